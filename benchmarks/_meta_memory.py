"""Memory of whole processes that take one meta-gradient each."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._meta_cases import StackedCase, cases_of

__all__ = ["peaks_of"]

_PEAK_MODE = "update+tele"


def peaks_of(tasks: int, width: int, unroll: int, at_once: Sequence[int | None]) -> list[dict[str, Any]]:
    """Memory of processes that take one meta-gradient each, of `update+tele` with both rules.

    Args:
        tasks: their number.
        width: of their layers.
        unroll: inner steps.
        at_once: numbers of tasks in one graph; None for all.
    """
    wanted = [(kind, some) for kind in ("equivariant", "tensor") for some in at_once]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(_peak, [(kind, tasks, width, unroll, some) for kind, some in wanted], chunksize=1)


def _peak(kind: str, tasks: int, width: int, unroll: int, at_once: int | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    cases = cases_of([_PEAK_MODE], [1], width, unroll, torch.device("cpu"))
    config = next(case.meta.config for case in cases if isinstance(case, StackedCase) and case.kind == kind)
    before = _megabytes()
    case = StackedCase.of(kind, config, width, tasks, unroll, at_once)
    case.rewind()
    case.meta_gradient()
    return {"name": case.name, "at_once": at_once, "before": before, "megabytes": _megabytes()}


def _megabytes() -> float:
    """Most memory that this process has had so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # `getrusage` also remembers the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    # In bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
