"""The symmetries of models that people use: how many of each kind, how far they drift, how long finding takes.

In every round, finding and a forward and backward pass on the same input take turns, after a warm-up of each. Seconds
are CPU seconds, which other load changes little. The symmetries of small models are found in about half a second; most
of that is torch.export's.

Example:
    python -m benchmarks.symmetries --markdown docs/symmetries.md
    python -m benchmarks.symmetries --models resnet18 Llama --rounds 1 --json symmetries.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._symmetry_models import MODELS, build
from benchmarks._timing import Summary, conditions
from metateleport import find_symmetries
from metateleport.detection.trace import observables, split
from metateleport.files import write_json, write_text

__all__ = ["main", "row_of"]

SCHEMA = 2

COST_SHAPES = ((2, 3, 224, 224), (1, 3, 224, 224), (2, 3, 64, 64))
"""Input shapes of resnet18 for which the cost of finding is measured."""

_SECONDS = {"GPT, 6 x 384": 1.5, "MiniLM": 1.5}
"""How many seconds of CPU finding the symmetries of a model may take."""

_PASSES = 3

_TITLE = """\
# Symmetries found in common models

`mt.find_symmetries` on models in evaluation mode, by `python -m benchmarks.symmetries --markdown docs/symmetries.md`.

- **symmetries by kind**: how many were found and, in brackets, the sum of their dimensions.
- **dimension, worst drift**: of the exact symmetries. The drift is the largest relative change of the outputs in
  float64 under random group elements with generators of norm up to three, at the model's weights and at random ones, on
  inputs that were not used for finding. Batch pairs hold on the example input only.
- **seconds**: CPU time of finding. **passes per kind**: that time in forward and backward passes on the same input, for
  each kind that was found. Both are medians; the search and the pass are timed in turn. For small models nearly all of
  the time is torch.export's.

"""

_COST = """
## The cost of finding

resnet18 with inputs of several shapes: seconds of finding, seconds of a forward and backward pass in float32, and
their ratio for each of its {kinds} kinds, as median (smallest to largest) of {rounds} rounds. Certifying all
symmetries takes six forward passes in float64, each about as long as a forward and backward pass in float32. The
trace takes a third of a second whatever the input, so it counts most where a pass is short.

| input | seconds | pass | passes per kind |
|---|---|---|---|
"""


def row_of(name: str, rounds: int = 1) -> dict[str, Any]:
    """Finds the symmetries of one model.

    Args:
        name: a key of `MODELS`.
        rounds: how often finding is timed.

    Returns:
        The model's row of the table and the JSON.
    """
    model, example = build(name)
    found = find_symmetries(model, example)
    kinds = {kind: {"count": count, "dimension": total} for kind, (count, total) in found.by_kind().items()}
    return {
        "model": name,
        "parameters": sum(value.numel() for value in model.parameters()),
        "kinds": kinds,
        "dimension": found.exact.dimension,
        "drift": max((each.drift for each in found.exact), default=0.0),
        "refused": len(found.refused),
        **_timed(model, example, rounds, len(kinds)),
    }


def cost_of(shape: Sequence[int], rounds: int) -> dict[str, Any]:
    """The cost of finding on resnet18, for one input shape; keys as in a row of the table."""
    model, _ = build("resnet18")
    example = torch.randn(*shape)
    kinds = len(find_symmetries(model, example).by_kind())
    return {"input": list(shape), "kinds": kinds, **_timed(model, example, rounds, kinds)}


def _timed(model: nn.Module, example: Any, rounds: int, kinds: int) -> dict[str, Any]:
    """Seconds of finding and of a pass, and passes per kind, over rounds in which both take turns."""
    finding, passing, ratios = [], [], []
    # Finding was run before on this model, so only the pass needs a warm-up.
    _pass_seconds(model, example)
    for _ in range(rounds):
        passes = [_pass_seconds(model, example) for _ in range(_PASSES)]
        started = time.process_time()
        find_symmetries(model, example)
        finding.append(time.process_time() - started)
        passes += [_pass_seconds(model, example) for _ in range(_PASSES)]
        passing.append(statistics.median(passes))
        ratios.append(finding[-1] / passing[-1] / max(kinds, 1))
    return {
        "seconds": statistics.median(finding),
        "pass_seconds": statistics.median(passing),
        "passes_per_kind": Summary.of(ratios)._asdict(),
    }


def _pass_seconds(model: nn.Module, example: Any) -> float:
    inputs, keywords = split(example)
    started = time.process_time()
    sum(output.float().sum() for output in observables(model(*inputs, **keywords))).backward()  # type: ignore[union-attr]
    seconds = time.process_time() - started
    model.zero_grad()
    return seconds


def reached(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each model that has a target."""
    lines = [
        f"- {row['model']}: finding takes {row['seconds']:.1f} s of CPU (target {_SECONDS[row['model']]:g} s, "
        f"{'met' if row['seconds'] <= _SECONDS[row['model']] else 'not met'})."
        for row in rows
        if row["model"] in _SECONDS
    ]
    return "\n".join(["", *lines, ""]) if lines else ""


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| model | parameters | symmetries by kind | dimension | worst drift | seconds | passes per kind |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kinds = ", ".join(f"{kind} {each['count']} ({each['dimension']})" for kind, each in row["kinds"].items())
        lines.append(
            f"| {row['model']} | {row['parameters']} | {kinds} | {row['dimension']} | {row['drift']:.0e} "
            f"| {row['seconds']:.1f} | {row['passes_per_kind']['median']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def cost_table(costs: Sequence[dict[str, Any]], rounds: int) -> str:
    """The section on the cost of finding, in Markdown."""
    lines = [_COST.format(kinds=costs[0]["kinds"], rounds=rounds).rstrip("\n")]
    for cost in costs:
        ratio = cost["passes_per_kind"]
        lines.append(
            f"| {'x'.join(map(str, cost['input']))} | {cost['seconds']:.2f} | {cost['pass_seconds']:.3f} "
            f"| {ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f}) |"
        )
    machine = conditions(torch.device("cpu"))
    lines += ["", f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command-line arguments; those of the process if not given.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.symmetries", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often finding is timed; 5 if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as a page")
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 1:
        parser.error(f"--rounds is a number of rounds, at least one, not {parsed.rounds}")
    # The first trace of a process loads code that all later ones use.
    find_symmetries(nn.Linear(2, 2), torch.ones(1, 2))
    rows = []
    for name in parsed.models:
        try:
            rows.append(row_of(name, parsed.rounds))
        except ModuleNotFoundError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
    costs = [cost_of(shape, parsed.rounds) for shape in COST_SHAPES] if "resnet18" in parsed.models else []
    table = table_of(rows) + reached(rows) + (cost_table(costs, parsed.rounds) if costs else "")
    print(table, end="")
    if parsed.json is not None:
        write_json(parsed.json, {"schema": SCHEMA, "models": rows, "costs": costs})
    if parsed.markdown is not None:
        write_text(parsed.markdown, _TITLE + table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
