"""The symmetries of models that people use: how many of each kind, how far they drift, how long finding takes.

Passes are forward and backward passes on the same input, timed in the same run. Small models are found in about half a
second, most of which torch.export takes, whatever a pass of theirs takes.

Example:
    python -m benchmarks.symmetries --markdown docs/symmetries.md
    python -m benchmarks.symmetries --models resnet18 Llama --json symmetries.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._symmetry_models import MODELS, build
from metateleport import find_symmetries
from metateleport.detection.trace import observables, split
from metateleport.files import write_json, write_text

__all__ = ["main", "row_of"]

SCHEMA = 1

_TITLE = """\
# Symmetries of models that people use

Made by `python -m benchmarks.symmetries --markdown docs/symmetries.md`. Each entry is the number of symmetries of a
kind and, in brackets, their dimensions together; the drift is the largest relative change of the outputs in float64
under random elements of norms up to three, on inputs that were not used for finding, at the model's weights and at
random ones. Models are in evaluation mode. The last column is the time of finding in forward and backward passes on
the same input, for each kind that was found; for small models it is torch.export's alone.

"""


def row_of(name: str) -> dict[str, Any]:
    """Finds the symmetries of one model.

    Args:
        name: a key of `MODELS`.

    Returns:
        What the table and the JSON say of it.
    """
    model, example = build(name)
    one_pass = min(_pass_seconds(model, example) for _ in range(3))
    started = time.perf_counter()
    found = find_symmetries(model, example)
    seconds = time.perf_counter() - started
    kinds = {kind: {"count": count, "dimension": total} for kind, (count, total) in found.by_kind().items()}
    return {
        "model": name,
        "parameters": sum(value.numel() for value in model.parameters()),
        "kinds": kinds,
        "dimension": found.dimension,
        "drift": max((each.drift for each in found.exact), default=0.0),
        "refused": len(found.refused),
        "seconds": seconds,
        "pass_seconds": one_pass,
    }


def _pass_seconds(model: nn.Module, example: Any) -> float:
    inputs, keywords = split(example)
    started = time.perf_counter()
    sum(output.float().sum() for output in observables(model(*inputs, **keywords))).backward()  # type: ignore[union-attr]
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


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
            f"| {row['seconds']:.1f} | {row['seconds'] / row['pass_seconds'] / max(len(row['kinds']), 1):.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: what stands behind the program's name; the process's own if not given.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.symmetries", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as a page")
    parsed = parser.parse_args(arguments)
    # The first trace of a process loads what all later ones use.
    find_symmetries(nn.Linear(2, 2), torch.ones(1, 2))
    rows = []
    for name in parsed.models:
        try:
            rows.append(row_of(name))
        except ModuleNotFoundError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
    table = table_of(rows)
    print(table, end="")
    if parsed.json is not None:
        write_json(parsed.json, {"schema": SCHEMA, "models": rows})
    if parsed.markdown is not None:
        write_text(parsed.markdown, _TITLE + table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
