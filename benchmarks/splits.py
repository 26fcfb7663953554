"""How far a run depends on how the factors of adapters are split at the start: W = B A after a hundred steps.

Each optimizer trains the same tasks of `lora_digits` from several starts that are one model: B is zero and A is g A. At
the end W = B A is compared with that of the run from the usual start, g = 1, in the Frobenius norm over all adapters.

Example:
    python -m benchmarks.splits --page docs/split-invariance.md
    python -m benchmarks.splits --tasks 1 --steps 20 --set width=16
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt
from benchmarks._timing import conditions, publish
from metateleport.cli.common import settings_of
from metateleport.evaluation.methods.lora import lora_plus
from metateleport.evaluation.methods.schedule import factor
from metateleport.evaluation.style import BLUE, GREY, VERMILLION, bare, new_figure, save
from metateleport.families import FamilyError, Task, load_family

__all__ = ["SPLITS", "main"]

SCHEMA = 1

SPLITS = ((0.01, 1.0), (100.0, 1.0), (1.0, 30.0), (10.0, 30.0), (1.0, 1e3))
"""Sizes and condition numbers of the elements that A is split by."""

_USUAL = (1.0, 1.0)
_SETTINGS = {"rank": "4", "width": "48", "depth": "3", "samples": "600", "batch": "32"}
_DTYPES = {"float64": torch.float64, "float32": torch.float32}
_COLOURS = {"learned": VERMILLION, "by hand": BLUE, "": GREY}

Make = Callable[[nn.Module, int], torch.optim.Optimizer]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def _lora_rite(model: nn.Module, _: int) -> torch.optim.Optimizer:
    from pytorch_optimizer import LoRARite

    made: torch.optim.Optimizer = LoRARite(_trained(model), lr=0.03)
    return made


def _learned(model: nn.Module, steps: int, checkpoint: str) -> torch.optim.Optimizer:
    return mt.LearnedOptimizer(model, checkpoint, symmetries=mt.detection.adapter_pairs(model), total_steps=steps)


def _makers(checkpoint: str) -> dict[str, tuple[str, Make]]:
    """By name of the row: who steps in gauges, and the optimizer on a model for so many steps."""
    return {
        "lora (learned)": ("learned", lambda model, steps: _learned(model, steps, checkpoint)),
        "gauged-shampoo": ("by hand", lambda model, _: mt.GaugedOptimizer(model, rule="shampoo", lr=0.1)),
        "gauged": ("by hand", lambda model, _: mt.GaugedOptimizer(model, lr=0.03)),
        "lora-rite": ("", _lora_rite),
        "muon": ("", lambda model, _: torch.optim.Muon(_trained(model), lr=0.03, weight_decay=0.0)),
        "adamw": ("", lambda model, _: torch.optim.AdamW(_trained(model), lr=0.01, weight_decay=0.0)),
        "lora+": ("", lambda model, _: lora_plus(model, lr=0.01, ratio=8)),
    }


def _products(task: Task, make: Make, steps: int, nudged: bool = False) -> dict[str, Tensor]:
    """B A of every adapter after so many steps; step sizes of all but the learned one decay to zero.

    Args:
        task: the task.
        make: makes the optimizer.
        steps: how many.
        nudged: whether each entry of A starts one rounding error away, up or down.
    """
    model = task.model
    if nudged:
        source = torch.Generator().manual_seed(0)
        for value in _trained(model):
            signs = torch.randint(2, value.shape, generator=source).mul(2).sub(1)
            value.data.mul_(1 + signs * torch.finfo(value.dtype).eps)
    optimizer = make(model, steps)
    learned = isinstance(optimizer, mt.LearnedOptimizer)
    largest = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        inputs, targets = task.batch(step)
        optimizer.zero_grad()
        loss = task.loss(model(*inputs), *targets)
        loss.backward()
        if isinstance(optimizer, mt.LearnedOptimizer | mt.GaugedOptimizer):
            if not learned:
                _set(optimizer, largest, step, steps)
            optimizer.step(loss=loss.detach())
        else:
            _set(optimizer, largest, step, steps)
            optimizer.step()
    named = {name: value.detach().double() for name, value in model.named_parameters()}
    return {name: named[name.replace("lora_A", "lora_B")] @ value for name, value in named.items() if "lora_A" in name}


def _set(optimizer: torch.optim.Optimizer, largest: Sequence[float], step: int, steps: int) -> None:
    for group, rate in zip(optimizer.param_groups, largest, strict=True):
        group["lr"] = rate * factor("linear", step, steps)


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Relative difference of all products together, in the Frobenius norm."""
    difference = sum(float((other[name] - value).square().sum()) for name, value in one.items())
    return (difference / sum(float(value.square().sum()) for value in one.values())) ** 0.5


def _ends(
    settings: Mapping[str, str], make: Make, number: int, steps: int, dtype: torch.dtype
) -> dict[tuple[float, float], dict[str, Tensor]]:
    """The products of one task at the end, by how they were split at the start."""
    found = {}
    for scale, split in (_USUAL, *SPLITS):
        family = load_family("lora_digits", {**settings, "scale": str(scale), "split": str(split)})
        found[scale, split] = _products(family.task(number, "held-out", dtype=dtype), make, steps)
    return found


def _measured(settings: Mapping[str, str], make: Make, tasks: int, steps: int) -> dict[str, Any]:
    """Medians over tasks of relative differences from the usual start in each precision, and of what rounding does."""
    apart: dict[str, dict[str, list[float]]] = {of: {_name(each): [] for each in SPLITS} for of in _DTYPES}
    rounding = []
    for number in range(tasks):
        ends = {of: _ends(settings, make, number, steps, dtype) for of, dtype in _DTYPES.items()}
        for of, own in ends.items():
            for each in SPLITS:
                apart[of][_name(each)].append(_apart(own[_USUAL], own[each]))
        task = load_family("lora_digits", settings).task(number, "held-out", dtype=torch.float32)
        rounding.append(_apart(ends["float32"][_USUAL], _products(task, make, steps, nudged=True)))
    medians = {of: {name: statistics.median(values) for name, values in own.items()} for of, own in apart.items()}
    return {"apart": medians, "rounding": statistics.median(rounding)}


def _name(split: tuple[float, float]) -> str:
    return f"size {split[0]:g}, condition {split[1]:g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="lora", help="name or folder of the learned one (default %(default)s)")
    parser.add_argument("--tasks", type=int, default=2, metavar="N", help="held-out tasks (default %(default)s)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of a run (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of lora_digits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the docs, with its picture")
    given = parser.parse_args(arguments)
    if given.tasks < 1 or given.steps < 1:
        parser.error("tasks and steps have to be positive")
    torch.set_num_threads(1)
    settings = {**_SETTINGS, **settings_of(given.set)}
    try:
        shown = load_family("lora_digits", settings).settings()
        cases = [
            {"name": name, "gauge": kind, **_measured(settings, make, given.tasks, given.steps)}
            for name, (kind, make) in _makers(given.checkpoint).items()
        ]
    except (FamilyError, mt.checkpoint.CheckpointError) as error:
        parser.error(str(error))
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": {"checkpoint": given.checkpoint, "steps": given.steps, "tasks": given.tasks},
        "family": {name: str(value) for name, value in shown.items() if name not in ("scale", "split")},
        "conditions": conditions(torch.device("cpu")),
        "cases": cases,
        "picture": None if given.page is None else given.page.with_suffix(".png").name,
    }
    if given.page is not None:
        _draw(report, given.page.with_suffix(".png"))
    publish(report, _table, _page, given)
    return 0


def _draw(report: Mapping[str, Any], path: Path) -> None:
    """The largest difference of each optimizer over all splits, in both precisions."""
    figure = new_figure(7.0, 3.2)
    axes = figure.add_subplot()
    names = [case["name"] for case in report["cases"]]
    for place, case in enumerate(report["cases"]):
        for shift, (of, shade) in zip((-0.2, 0.2), (("float64", 1.0), ("float32", 0.45)), strict=True):
            axes.barh(place + shift, max(case["apart"][of].values()), 0.38, color=_COLOURS[case["gauge"]], alpha=shade)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("largest relative difference of B A over splits: float64 dark, float32 light")
    bare(axes)
    save(figure, path)


def _page(report: dict[str, Any]) -> str:
    known, settings = report["conditions"], report["settings"]
    family = ", ".join(f"{name}={value}" for name, value in report["family"].items())
    lines = [
        "# Does the split of an adapter matter?",
        "",
        "`python -m benchmarks.splits --page docs/split-invariance.md` writes this page. An adapter's product is the "
        "same for $B$ and $A$ as for $B g^{-1}$ and $g A$. Each optimizer trains from the usual start of an adapter, "
        "and from starts at which $A$ is $g A$, which are the same model, for "
        f"{settings['steps']} steps. A cell is the relative difference of $B A$ at the end from that of the usual "
        "start: Frobenius norm over all adapters, median over "
        f"{settings['tasks']} held-out tasks. $g$ is a random element of the size and the condition number that are "
        "named. In the last column is what single precision does by itself: the difference that it makes to move each "
        "entry of $A$ by one rounding error, at the usual start. What begins as a rounding error grows from step to "
        "step.",
        "",
        f"![largest differences by optimizer]({report['picture']})",
        "",
        _table(report),
        "",
        f"Tasks of `lora_digits` ({family}); step sizes about as they were tuned there, with a linear decay, and "
        "`lora` as it is. `gauged` is `mt.GaugedOptimizer`, `gauged-shampoo` the same with "
        f'`rule="shampoo"`. {known["cpu"]}, {known["threads"]} thread, torch {known["torch"]}, Python '
        f"{known['python']}.",
        "",
        "[Steps taken in a gauge](gauged.md) says what makes the difference, and where it is not exact.",
    ]
    return "\n".join(lines) + "\n"


def _table(report: dict[str, Any]) -> str:
    splits = [_name(each) for each in SPLITS]
    rows = [
        f"| optimizer | precision | {' | '.join(splits)} | rounding alone |",
        "|---|---|" + "--:|" * (len(splits) + 1),
    ]
    for case in report["cases"]:
        for of, apart in case["apart"].items():
            rounding = f"{case['rounding']:.1e} " if of == "float32" else ""
            cells = " | ".join(f"{apart[each]:.1e}" for each in splits)
            rows.append(f"| {case['name']} | {of} | {cells} | {rounding}|")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
