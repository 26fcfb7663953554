"""What a step on adapters costs: `lora` and steps in a gauge by hand, beside AdamW, on MiniLM with PEFT's adapters.

A step is whole: forward and backward pass of a sentence classifier (rank 8 on queries and values, 16 docstrings of 32
tokens, all from `lora_sentences`) and the optimizer's own. The optimizers step in turn, and CPU time is measured, which
other load hardly changes.

Example:
    python -m benchmarks.adapters --page docs/adapter-costs.md
    python -m benchmarks.adapters --checkpoint runs/lora --rank 16 --rounds 9
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt
from benchmarks._timing import Summary, conditions, publish
from metateleport.families import FamilyError, Task, load_family

__all__ = ["main"]

SCHEMA = 1
_WARM_UP = 3

Make = Callable[[nn.Module], torch.optim.Optimizer]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def _makers(checkpoint: str) -> dict[str, Make]:
    return {
        "adamw": lambda model: torch.optim.AdamW(_trained(model), lr=1e-4),
        "gauged": lambda model: mt.GaugedOptimizer(model, lr=1e-4),
        "gauged-shampoo": lambda model: mt.GaugedOptimizer(model, rule="shampoo", lr=1e-4),
        "lora": lambda model: mt.LearnedOptimizer(
            model, checkpoint, symmetries=mt.detection.adapter_pairs(model), total_steps=1000
        ),
    }


class _Case:
    """One optimizer on a model of its own."""

    def __init__(self, name: str, task: Task, make: Make) -> None:
        self.name, self.task, self.optimizer = name, task, make(task.model)

    def step(self, rows: Tensor) -> tuple[float, float]:
        """CPU seconds of a whole step on some rows of the data, and of the optimizer's part of it."""
        inputs, targets = ([each[rows] for each in part] for part in (self.task.inputs, self.task.targets))
        began = time.process_time()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.task.model(*inputs), *targets)
        loss.backward()
        before = time.process_time()
        if isinstance(self.optimizer, mt.GaugedOptimizer | mt.LearnedOptimizer):
            self.optimizer.step(loss=loss.detach())
        else:
            self.optimizer.step()
        after = time.process_time()
        return after - began, after - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="lora", help="name or folder of the learned one (default %(default)s)")
    parser.add_argument("--rank", type=int, default=8, metavar="N", help="of the adapters (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps of each (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the docs")
    given = parser.parse_args(arguments)
    if given.rank < 1 or given.rounds < 1:
        parser.error("rank and rounds have to be positive")
    torch.set_num_threads(1)
    try:
        family = load_family("lora_sentences", {"rank": given.rank})
        cases = [_Case(name, family.task(0, "held-out"), make) for name, make in _makers(given.checkpoint).items()]
    except (FamilyError, mt.checkpoint.CheckpointError) as error:
        parser.error(str(error))
    seconds: dict[str, list[tuple[float, float]]] = {case.name: [] for case in cases}
    order, samples = random.Random(0), torch.Generator().manual_seed(0)
    for number in range(_WARM_UP + given.rounds):
        rows = torch.randperm(len(cases[0].task.inputs[0]), generator=samples)[: cases[0].task.batch_size]
        for case in order.sample(cases, len(cases)):
            taken = case.step(rows)
            if number >= _WARM_UP:
                seconds[case.name].append(taken)
    whole = {name: [each for each, _ in taken] for name, taken in seconds.items()}
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "settings": {
            "checkpoint": given.checkpoint,
            **family.settings(),
            "rounds": given.rounds,
            "warm_up": _WARM_UP,
            "trained": sum(value.numel() for value in _trained(cases[0].task.model)),
        },
        "conditions": conditions(torch.device("cpu")),
        "cases": [
            {
                "name": name,
                "seconds": Summary.of(own)._asdict(),
                "optimizer": Summary.of([each for _, each in seconds[name]])._asdict(),
                "over_adamw": Summary.of([a / b for a, b in zip(own, whole["adamw"], strict=True)])._asdict(),
            }
            for name, own in whole.items()
        ],
    }
    publish(report, _table, _page, given)
    return 0


def _page(report: dict[str, Any]) -> str:
    known, settings = report["conditions"], report["settings"]
    lines = [
        "# What a step on adapters costs",
        "",
        "`python -m benchmarks.adapters --page docs/adapter-costs.md` writes this page. A row is a whole step, forward "
        f"and backward pass included, of MiniLM with PEFT's adapters of rank {settings['rank']} on queries and values "
        f"({settings['trained']:,} trained parameters), on {settings['batch']} x {settings['tokens']} tokens. `gauged` "
        'is `mt.GaugedOptimizer`, `gauged-shampoo` the same with `rule="shampoo"`, `lora` the learned one.',
        "",
        f"Medians and ranges of {settings['rounds']} rounds after {settings['warm_up']}, all optimizers in turn, in "
        f"CPU time on {known['threads']} thread; {known['cpu']}, torch {known['torch']}, Python {known['python']}.",
        "",
        _table(report),
    ]
    return "\n".join(lines) + "\n"


def _table(report: dict[str, Any]) -> str:
    rows = [
        "| optimizer | CPU ms a step | of these its own | over AdamW's whole step (range) |",
        "|---|--:|--:|--:|",
    ]
    for case in report["cases"]:
        over = case["over_adamw"]
        rows.append(
            f"| {case['name']} | {1e3 * case['seconds']['median']:.0f} | {1e3 * case['optimizer']['median']:.1f} | "
            f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f}) |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
