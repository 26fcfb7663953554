"""Microseconds of meta-training per task-step: each mode, single and stacked tasks, beside the source's own loop.

A task-step is one inner step on one task. The task is the source paper's regression, with two layers of equal width and
LeakyReLU between them. Two times are measured: that of the meta-gradient alone (forward passes, inner steps and the
meta-backward pass), and that of the whole meta-step with clipping and Adam. Ratios are of meta-gradients. On one CPU
thread they use CPU time, which other load hardly changes; elsewhere wall-clock time. Beside the times stand counts that
depend on no machine. With `--peak` the largest stack is also run by itself, for the memory of a whole process.

Example:
    python -m benchmarks.meta_training --json meta_training.json --page docs/meta-training-costs.md
    python -m benchmarks.meta_training --modes lr lr+tele --tasks 1 16 64 --rounds 10
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._meta_cases import DTYPES, Case, StackedCase, cases_of
from benchmarks._meta_memory import peaks_of
from benchmarks._meta_report import page_of, table_of
from benchmarks._timing import Measurement, Summary, conditions, measure
from metateleport.files import write_json, write_text
from metateleport.learned import MODES
from metateleport.training import TrainingError, device_for

__all__ = ["cases_of", "main"]

SCHEMA = 2


def ratios_of(
    cases: Sequence[Case], found: dict[str, Measurement], basis: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios of meta-gradient times, formed round by round, as other load affects all cases of a round alike.

    Args:
        cases: the cases that were timed.
        found: the measurements by name.
        basis: which of a measurement's times, `meta_gradient` or `cpu`.

    Returns:
        `stacked_over_single`, the largest stack against the smallest of the same networks, and `ours_over_source`,
        each stack, and the roof, against the source's loop of the same mode and dtype; median, min and max over rounds,
        by case.
    """

    def ratio(case: str, other: str) -> dict[str, float]:
        pairs = zip(getattr(found[case], basis), getattr(found[other], basis), strict=True)
        return Summary.of([ours / theirs for ours, theirs in pairs])._asdict()

    stacked = [case for case in cases if isinstance(case, StackedCase)]
    smallest, largest = min(case.tasks for case in stacked), max(case.tasks for case in stacked)
    single = {(case.kind, case.mode, case.dtype): case.name for case in stacked if case.tasks == smallest}
    return {
        "stacked_over_single": {
            case.name: ratio(case.name, single[case.kind, case.mode, case.dtype])
            for case in stacked
            if case.tasks == largest > smallest
        },
        "ours_over_source": {case.name: ratio(case.name, case.over) for case in cases if case.over},
    }


def report_of(
    cases: Sequence[Case],
    found: dict[str, Measurement],
    counts: dict[str, dict[str, float]],
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
            "network": case.kind,
            "mode": case.mode,
            "tasks": case.tasks,
            "hidden": case.hidden,
            "dtype": case.dtype,
            "counts": counts[case.name],
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
    parser.add_argument("--page", type=_file, metavar="FILE", help="write the page of the docs")
    parser.add_argument("--rounds", type=_positive, help="rounds to time; as many as --seconds allow if not given")
    parser.add_argument("--seconds", type=_positive, default=150, help="time to spend without --rounds (default 150)")
    parser.add_argument("--tasks", type=_positive, nargs="+", default=[1, 64], help="sizes of stacks (default 1 64)")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float64"], help="of tasks (default float64)")
    parser.add_argument("--at-once", type=_positive, metavar="N", help="tasks in one graph (default: all of a stack)")
    parser.add_argument("--peak", type=_positive, metavar="N", help="also tell the memory that N tasks take")
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
    dtypes = list(dict.fromkeys(arguments.dtypes))
    cases = cases_of(modes, tasks, arguments.width, arguments.unroll, device, dtypes, arguments.at_once)
    found = measure(cases, arguments.rounds, arguments.seconds, device, _progress)
    counts = {case.name: case.counts() for case in cases}
    peaks = []
    if arguments.peak is not None:
        peaks = peaks_of(arguments.peak, arguments.width, arguments.unroll, (None, max(1, arguments.peak // 8)))
    _progress("")
    if hasattr(os, "getloadavg"):
        machine["load_after"] = os.getloadavg()[0]
    settings = {
        "family": "leaky_mlp",
        "width": arguments.width,
        "unroll": arguments.unroll,
        "tasks": tasks,
        "modes": modes,
        "dtypes": dtypes,
        "at_once": arguments.at_once,
        "rounds": len(found[cases[0].name].meta_gradient),
    }
    report = {**report_of(cases, found, counts, settings, machine), "peaks": peaks}
    print(table_of(report))
    if arguments.json is not None:
        write_json(arguments.json, report)
    if arguments.page is not None:
        write_text(arguments.page, page_of(report))
    return report


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line:<60}\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
