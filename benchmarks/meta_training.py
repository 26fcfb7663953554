"""Microseconds of meta-training per task-step: each mode, single and stacked tasks, beside the source's own loop.

A task-step is one inner step on one task. The task is the source paper's regression, with two layers of equal width and
LeakyReLU between them, in float64. Two times are measured: that of the meta-gradient alone (forward passes, inner steps
and the meta-backward pass), and that of the whole meta-step with clipping and Adam. Ratios are of meta-gradients. On
one CPU thread they use CPU time, which other load hardly changes; elsewhere wall-clock time.

Example:
    python -m benchmarks.meta_training --json meta_training.json
    python -m benchmarks.meta_training --modes lr lr+tele --tasks 1 16 64 --rounds 10
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks._source_loop import SOURCE_HIDDEN, SourceNetworks, SourceTask, window
from benchmarks._timing import Case, Measurement, Summary, conditions, measure
from metateleport import TaskFamily
from metateleport.families import load_family
from metateleport.files import write_json
from metateleport.learned import (
    MODES,
    BaseOptimizerSettings,
    CoordinateSettings,
    MetaOptimizer,
    MetaOptimizerConfig,
    RuleSettings,
    StepSettings,
    TeleportSettings,
)
from metateleport.papers.flat import FlatSettings
from metateleport.training import TrainingError, Unroll, device_for

__all__ = ["main"]

SCHEMA = 1
RULES: dict[str, RuleSettings] = {"lr": StepSettings(), "update": CoordinateSettings(), "tele": BaseOptimizerSettings()}
FLAT_MODES = ("lr+tele", "update+tele")
_CALM = 0.9

Networks = TypeVar("Networks", bound=nn.Module)


class _Trained:
    """Networks and the optimizer that trains them; its steps are so small that every round does the same work."""

    def __init__(self, networks: nn.Module) -> None:
        self.networks = networks
        self.optimizer = torch.optim.Adam(networks.parameters(), lr=1e-9)

    def backward(self, meta_loss: Tensor) -> None:
        self.optimizer.zero_grad()
        meta_loss.backward()

    def meta_step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        return float(norm)


class StackedCase(_Trained):
    """This library's meta-training on a stack of tasks."""

    def __init__(
        self, config: MetaOptimizerConfig, family: TaskFamily, tasks: int, unroll: int, device: torch.device
    ) -> None:
        self.meta = _seeded(lambda: MetaOptimizer(config)).to(device)
        super().__init__(self.meta)
        self.network = "flat" if isinstance(config.rule, FlatSettings) else "equivariant"
        self.hidden = next(shape["hidden"] for shape in config.table().values() if "hidden" in shape)
        self.mode, self.tasks = config.mode, tasks
        self.name = f"{self.network}/{self.mode}/{tasks}"
        self.length, self.task_steps = unroll, tasks * unroll
        self.stack = family.stack(range(tasks), device=device)
        self.start = {name: value.detach().clone() for name, value in self.stack.tensors().items()}

    def rewind(self) -> None:
        self.stack.load(self.start)
        self.unroll = Unroll(self.stack, self.meta)

    def meta_gradient(self) -> None:
        self.backward(self.unroll.window(self.length).mean())


class SourceCase(_Trained):
    """The source's loop: a meta-step is one window of one task, and the next meta-step has another task."""

    network, tasks = "source", 1

    def __init__(
        self, mode: str, hidden: int, family: TaskFamily, width: int, unroll: int, device: torch.device
    ) -> None:
        self.source = _seeded(lambda: SourceNetworks(mode, width, hidden)).to(device)
        super().__init__(self.source)
        self.mode, self.hidden = mode, hidden
        own = hidden == SOURCE_HIDDEN[mode]
        self.name = f"source/{mode}" if own else f"source/{mode}/hidden={hidden}"
        self.length = self.task_steps = unroll
        self.waiting = [SourceTask.of(family.task(index), device) for index in range(4)]

    def rewind(self) -> None:
        self.waiting.append(self.waiting.pop(0))

    def meta_gradient(self) -> None:
        self.backward(window(self.source, self.waiting[0], self.length))


def _seeded(make: Callable[[], Networks]) -> Networks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def cases_of(
    modes: Sequence[str], tasks: Sequence[int], width: int, unroll: int, device: torch.device
) -> list[StackedCase | SourceCase]:
    """All cases that are timed side by side.

    Args:
        modes: modes of the meta-optimizer; `flat` networks and the source's loop are added if they have the mode.
        tasks: sizes of stacks.
        width: of the task's layers.
        unroll: inner steps of a meta-step.
        device: device to run on.
    """
    family = load_family("leaky_mlp", {"width": width})
    example = family.stack([0])
    groups = tuple(dict.fromkeys(symmetry.group.name for symmetry in example.symmetries))
    shapes = tuple((name, tuple(value.shape[1:])) for name, value in example.tensors().items())
    cases: list[StackedCase | SourceCase] = []
    for mode in modes:
        step = mode.removesuffix("+tele")
        teleport = TeleportSettings() if "tele" in mode else None
        configs = [MetaOptimizerConfig(RULES[step], teleport, groups=groups)]
        if mode in FLAT_MODES:
            hidden = SOURCE_HIDDEN[mode]
            flat = FlatSettings(shapes, hidden, per_coordinate=step == "update")
            configs.append(MetaOptimizerConfig(flat, TeleportSettings(hidden), groups=groups))
        cases += [StackedCase(config, family, count, unroll, device) for config in configs for count in tasks]
        if mode in SOURCE_HIDDEN:
            cases.append(SourceCase(mode, SOURCE_HIDDEN[mode], family, width, unroll, device))
        if mode == "lr+tele":
            # The paper's networks are of this size throughout; its code takes 20 units where it learns the rate.
            cases.append(SourceCase(mode, 300, family, width, unroll, device))
    return cases


def ratios_of(
    cases: Sequence[StackedCase | SourceCase], found: dict[str, Measurement], basis: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios of meta-gradient times, formed round by round, as other load affects all cases of a round alike.

    Args:
        cases: the cases that were timed.
        found: the measurements by name.
        basis: which of a measurement's times, `meta_gradient` or `cpu`.

    Returns:
        `stacked_over_single`, the largest stack against the smallest of the same networks, and `ours_over_source`,
        each stack against the source's loop of the same mode; median, min and max over rounds, by case.
    """

    def ratio(case: str, other: str) -> dict[str, float]:
        pairs = zip(getattr(found[case], basis), getattr(found[other], basis), strict=True)
        return Summary.of([ours / theirs for ours, theirs in pairs])._asdict()

    stacked = [case for case in cases if isinstance(case, StackedCase)]
    smallest, largest = min(case.tasks for case in stacked), max(case.tasks for case in stacked)
    return {
        "stacked_over_single": {
            case.name: ratio(case.name, f"{case.network}/{case.mode}/{smallest}")
            for case in stacked
            if case.tasks == largest > smallest
        },
        "ours_over_source": {
            case.name: ratio(case.name, f"source/{case.mode}") for case in stacked if case.mode in SOURCE_HIDDEN
        },
    }


def report_of(
    cases: Sequence[StackedCase | SourceCase],
    found: dict[str, Measurement],
    settings: dict[str, Any],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The whole run as plain values."""
    used = [sum(sum(getattr(values, part)) for values in found.values()) for part in ("cpu", "meta_gradient")]
    machine = {**machine, "cpu_share": used[0] / used[1]}
    basis = "cpu" if machine["device"] == "cpu" and machine["threads"] == 1 else "meta_gradient"
    listed = [
        {
            "name": case.name,
            "network": case.network,
            "mode": case.mode,
            "tasks": case.tasks,
            "hidden": case.hidden,
            **{
                part: {**Summary.of(values)._asdict(), "rounds": values}
                for part, values in found[case.name]._asdict().items()
            },
        }
        for case in cases
    ]
    return {
        "schema": SCHEMA,
        "benchmark": "meta_training",
        "unit": "microseconds per task-step",
        "settings": settings,
        "conditions": machine,
        "cases": listed,
        "ratios": {"basis": basis, **ratios_of(cases, found, basis)},
    }


def table_of(report: dict[str, Any]) -> str:
    """The report as text."""
    machine, settings, ratios = report["conditions"], report["settings"], report["ratios"]
    head = (
        "microseconds per task-step",
        "meta-gradient",
        "min-max",
        "CPU time",
        "meta-step",
        "stacked/single",
        "ours/source",
    )
    rows = [head]
    for case in report["cases"]:
        both = [ratios[kind].get(case["name"]) for kind in ("stacked_over_single", "ours_over_source")]
        gradient = case["meta_gradient"]
        rows.append(
            (
                case["name"],
                f"{gradient['median']:.0f}",
                f"{gradient['min']:.0f}-{gradient['max']:.0f}",
                f"{case['cpu']['median']:.0f}",
                f"{case['meta_step']['median']:.0f}",
                *("" if ratio is None else f"{ratio['median']:.3f}" for ratio in both),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(both))
        for both in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines += [
        "",
        f"{settings['rounds']} rounds; width {settings['width']}, unroll {settings['unroll']}, float64 tasks; "
        f"ratios are of the meta-gradient's {'CPU' if ratios['basis'] == 'cpu' else 'wall-clock'} time; "
        "all are medians over rounds",
        f"{machine['device']} on {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python']}, CPU share {machine['cpu_share']:.2f}",
    ]
    if machine["device"] == "cpu" and machine["cpu_share"] < _CALM:
        lines.append("the machine was busy with other programs: CPU time is nearer than the others to a calm machine's")
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _file(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: give the name of a file")
    return Path(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_training", description=description)
    parser.add_argument("--json", type=_file, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--rounds", type=_positive, help="rounds to time; as many as --seconds allow if not given")
    parser.add_argument("--seconds", type=_positive, default=150, help="time to spend without --rounds (default 150)")
    parser.add_argument("--tasks", type=_positive, nargs="+", default=[1, 64], help="sizes of stacks (default 1 64)")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES), help="modes to time (default all)")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of torch (default 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where to run (default cpu)")
    parser.add_argument("--width", type=_positive, default=20, help="width of the task's layers (default 20)")
    parser.add_argument("--unroll", type=_positive, default=10, help="inner steps of a meta-step (default 10)")
    arguments = parser.parse_args(argv)
    try:
        arguments.device = device_for(arguments.device)
    except TrainingError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its table.

    Args:
        argv: the command-line arguments; those of the process if not given.

    Returns:
        The report, as `--json` writes it.
    """
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    device, tasks = arguments.device, sorted(set(arguments.tasks))
    modes = list(dict.fromkeys(arguments.modes))
    machine = conditions(device)
    cases = cases_of(modes, tasks, arguments.width, arguments.unroll, device)
    timed: Sequence[Case] = cases
    found = measure(timed, arguments.rounds, arguments.seconds, device, _progress)
    _progress("")
    if hasattr(os, "getloadavg"):
        machine["load_after"] = os.getloadavg()[0]
    settings = {
        "family": "leaky_mlp",
        "width": arguments.width,
        "unroll": arguments.unroll,
        "tasks": tasks,
        "modes": modes,
        "dtype": "float64",
        "rounds": len(found[cases[0].name].meta_gradient),
    }
    report = report_of(cases, found, settings, machine)
    print(table_of(report))
    if arguments.json is not None:
        write_json(arguments.json, report)
    return report


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line:<60}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
