"""Timing of several cases side by side: warm-up, interleaved rounds, and the conditions of the machine."""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from metateleport.files import write_json, write_text

__all__ = ["Case", "Measurement", "Summary", "conditions", "measure", "publish"]

_ROUND_SECONDS = 0.2
_MOST_REPEATS = 16


class Case(Protocol):
    """A case whose meta-steps are timed."""

    name: str
    task_steps: int
    """Tasks times inner steps of one meta-step."""

    def rewind(self) -> None:
        """Goes back to the start, untimed."""

    def meta_gradient(self) -> None:
        """Forward passes, inner steps and the meta-backward pass."""

    def meta_step(self) -> float:
        """Clips and takes the optimizer's step; returns the norm of the meta-gradient."""


class Summary(NamedTuple):
    """Median and range over rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """The summary of some numbers.

        Example:
            >>> Summary.of([3.0, 1.0, 8.0])
            Summary(median=3.0, min=1.0, max=8.0)
        """
        return cls(statistics.median(values), min(values), max(values))


class Measurement(NamedTuple):
    """Microseconds per task-step of one case, a value per round.

    Args:
        meta_gradient: forward passes, inner steps and the meta-backward pass.
        meta_step: the same with clipping and the optimizer's step.
        cpu: CPU time of the meta-gradient, which other programs on the machine change little.
    """

    meta_gradient: list[float]
    meta_step: list[float]
    cpu: list[float]


def measure(
    cases: Sequence[Case],
    rounds: int | None,
    seconds: float,
    device: torch.device,
    report: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measurement]:
    """Times all cases in every round, in changing order, so that other load on the machine affects all of them alike.

    One meta-step of each case before the first round is warm-up; it also sets how often a round repeats the case.

    Args:
        cases: the cases.
        rounds: number of rounds; as many as `seconds` allow, and at least three, if not given.
        seconds: time to spend if `rounds` is not given, warm-up included.
        device: device to synchronise before the clock is read.
        report: called with a line of progress.
        clock: returns seconds; replaced in tests.

    Returns:
        The measurements by name.

    Raises:
        FloatingPointError: if a meta-gradient is not finite.
    """
    began = clock()
    repeats = {}
    for case in cases:
        report(f"warm-up: {case.name}")
        spent = _timed(case, device, clock)[1]
        repeats[case.name] = min(_MOST_REPEATS, max(1, round(_ROUND_SECONDS / max(spent, 1e-9))))
    found = {case.name: Measurement([], [], []) for case in cases}
    # Without the objects that exist now a garbage collection takes a moment instead of most of a second.
    gc.collect()
    gc.freeze()
    try:
        _rounds(cases, repeats, rounds, began + seconds, device, report, clock, found)
    finally:
        gc.unfreeze()
    return found


def _rounds(
    cases: Sequence[Case],
    repeats: Mapping[str, int],
    rounds: int | None,
    until: float,
    device: torch.device,
    report: Callable[[str], None],
    clock: Callable[[], float],
    found: Mapping[str, Measurement],
) -> None:
    """Times the rounds and appends to `found`."""
    order, done, slowest = random.Random(0), 0, 0.0
    while done < (rounds or 3) or (rounds is None and clock() + slowest < until):
        started = clock()
        for case in order.sample(list(cases), len(cases)):
            report(f"round {done + 1}{f' of {rounds}' if rounds else ''}: {case.name}")
            # So that this case does not pay for garbage of the last one.
            gc.collect()
            times = [_timed(case, device, clock) for _ in range(repeats[case.name])]
            for kept, parts in zip(found[case.name], zip(*times, strict=True), strict=True):
                kept.append(1e6 * sum(parts) / len(parts) / case.task_steps)
        done, slowest = done + 1, max(slowest, clock() - started)


def _timed(case: Case, device: torch.device, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds of one meta-step: of its meta-gradient, of the whole, and CPU seconds of its meta-gradient."""

    def now() -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock(), time.process_time()

    case.rewind()
    start = now()
    case.meta_gradient()
    middle = now()
    norm = case.meta_step()
    end = now()
    if not math.isfinite(norm):
        raise FloatingPointError(f"{case.name}: the meta-gradient is not finite, so its timing would mean nothing")
    return middle[0] - start[0], end[0] - start[0], middle[1] - start[1]


def conditions(device: torch.device) -> dict[str, Any]:
    """The conditions of a timing: processor, cores, threads, versions, and the load of the machine."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }
    if hasattr(os, "getloadavg"):
        found["load_before"] = os.getloadavg()[0]
    return found


def _cpu() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def publish(
    report: dict[str, Any],
    table: Callable[[dict[str, Any]], str],
    page: Callable[[dict[str, Any]], str],
    given: argparse.Namespace,
) -> None:
    """Prints the report's table, and writes the report and its page where the command was given files for them."""
    print(table(report))
    if given.json is not None:
        write_json(given.json, report)
    if given.page is not None:
        write_text(given.page, page(report))
