"""State size and seconds of the learned updates `coordinate` and `tensor`, and of Adam, on a million parameters.

A perceptron of 784, 1000, 300 and 10 units on minibatches of noise. The updates step in turn, and the CPU time of a
step is measured, which other load hardly changes. The networks are untrained: their cost does not depend on their
weights.

Example:
    python -m benchmarks.updates --json updates.json --page docs/update-rules.md
    python -m benchmarks.updates --widths 784 3000 1000 10 --rounds 9
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt
from benchmarks._timing import Summary, conditions, publish
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.rules import read_rule

__all__ = ["main"]

SCHEMA = 1
UPDATES = ("coordinate", "tensor", "adaptive")
_BATCH = 100


class _Case:
    """One optimizer on a model of its own, always on the same few minibatches."""

    def __init__(self, name: str, widths: Sequence[int]) -> None:
        self.name = name
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])
        self.parameters = sum(each.numel() for each in self.model.parameters())
        self.inputs, self.labels = torch.randn(_BATCH, widths[0]), torch.randint(widths[-1], (_BATCH,))
        self.optimizer: torch.optim.Optimizer
        if name == "adam":
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        else:
            # Without symmetries, so that only the update is measured.
            meta = MetaOptimizer(MetaOptimizerConfig(read_rule({"kind": name}), teleport=None))
            self.optimizer = mt.LearnedOptimizer(self.model, meta, symmetries=())

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.labels)
        loss.backward()
        return loss

    def step(self) -> float:
        """CPU seconds of one step, the forward and the backward pass included."""
        began = time.process_time()
        self.optimizer.step(self.closure)  # type: ignore[arg-type]
        return time.process_time() - began

    def state(self) -> int:
        """Numbers in the update's state; the last accepted point of a learned optimizer is not counted."""
        return _numbers(dict(self.optimizer.state))


def _numbers(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(_numbers(each) for each in value.values())
    return sum(_numbers(each) for each in value) if isinstance(value, tuple | list) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 1000, 300, 10], metavar="N")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps of each update (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the docs")
    given = parser.parse_args(arguments)
    if len(given.widths) < 2 or min(given.widths) < 1 or given.rounds < 1:
        parser.error("give at least two widths and one round, all of them positive")
    torch.set_num_threads(1)
    cases = [_Case(name, given.widths) for name in ("adam", *UPDATES)]
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        case.step()
    order = random.Random(0)
    for _ in range(given.rounds):
        for case in order.sample(cases, len(cases)):
            seconds[case.name].append(case.step())
    report = {
        "schema": SCHEMA,
        "settings": {
            "widths": given.widths,
            "batch": _BATCH,
            "rounds": given.rounds,
            "parameters": cases[0].parameters,
        },
        "conditions": conditions(torch.device("cpu")),
        "cases": [
            {
                "name": case.name,
                "state_per_parameter": case.state() / case.parameters,
                "seconds": Summary.of(seconds[case.name])._asdict(),
                "over_adam": Summary.of(
                    [own / adam for own, adam in zip(seconds[case.name], seconds["adam"], strict=True)]
                )._asdict(),
            }
            for case in cases
        ],
    }
    publish(report, _table, _page, given)
    return 0


def _page(report: dict[str, Any]) -> str:
    known, settings = report["conditions"], report["settings"]
    widths = ", ".join(map(str, settings["widths"]))
    lines = [
        "# What an update rule costs",
        "",
        "`python -m benchmarks.updates --page docs/update-rules.md` writes this page. A row is a whole step, "
        f"forward and backward pass included, of a perceptron of {widths} units ({settings['parameters']:,} "
        f"parameters) on minibatches of {settings['batch']}, without symmetries. State is what the rule keeps, in "
        "numbers a parameter.",
        "",
        f"Medians and ranges of {settings['rounds']} rounds, all rules in turn, in CPU time on {known['threads']} "
        f"thread; {known['cpu']}, torch {known['torch']}, Python {known['python']}.",
        "",
        _table(report),
    ]
    return "\n".join(lines) + "\n"


def _table(report: dict[str, Any]) -> str:
    rows = [
        "| update | state, numbers a parameter | CPU seconds a step | over Adam's (range) |",
        "|---|---|---|---|",
    ]
    for case in report["cases"]:
        over = case["over_adam"]
        rows.append(
            f"| {case['name']} | {case['state_per_parameter']:.1f} | {case['seconds']['median']:.3f} | "
            f"{over['median']:.1f} ({over['min']:.1f} to {over['max']:.1f}) |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
