"""What tracking costs a training: CPU time of the thread that trains and of the one that sends, over what they log.

Nothing is trained: what a meta-step logs is logged so many times a second, to a new sqlite store, as a training of that
speed would. CPU time is counted, which a busy machine hardly spoils; making the store and importing MLflow are told
apart.

Example:
    python -m benchmarks.tracking --seconds 300 --rate 20 --page docs/tracking-costs.md
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks._timing import conditions
from metateleport.files import write_json, write_text

__all__ = ["main"]


def measured(seconds: float, rate: float) -> dict[str, Any]:
    """The report."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db", METATELEPORT_CACHE=f"{folder}/cache")
        first = _session(2.0, rate)
        steady = _session(seconds, rate)
    return {"new": first, "existing": steady, "conditions": conditions(torch.device("cpu"))}


def _session(seconds: float, rate: float) -> dict[str, Any]:
    from metateleport.tracking import Run, TrackedTraining

    began = time.monotonic()
    run = Run("benchmark", "r", {f"setting {number}": number for number in range(60)}, {"kind": "train"}, system=True)
    tracked = TrackedTraining(run)
    steps, own = 0, 0.0
    progression = SimpleNamespace(
        meta_step=0, skipped=0, seconds=0.0, meta_losses=[0.0], validations=[], openness=[0.5], searched=[]
    )
    arrived = sending = None
    clock = time.pthread_getcpuclockid(run._sender._thread.ident or 0)
    while arrived is None or time.monotonic() < began + seconds + arrived:
        steps += 1
        progression.meta_step, progression.seconds, progression.meta_losses = steps, steps / rate, [-0.01 * steps]
        if steps % 25 == 0:
            progression.validations = [*progression.validations, [steps, -0.01 * steps]]
        start = time.thread_time()
        tracked("learned", progression)
        own += time.thread_time() - start
        if arrived is None and run.id is not None and run._sender._failing is None and run._sender._doing == "idle":
            # From here on the store is there, and what is logged arrives.
            arrived, sending, steps, own = time.monotonic() - began, time.clock_gettime(clock), 0, 0.0
        time.sleep(1 / rate)
    assert sending is not None
    thread = time.clock_gettime(clock) - sending
    wall = time.monotonic() - began - arrived
    run.end()
    return {
        "first_metrics_after": arrived,
        "set_up_cpu": sending,
        "seconds": wall,
        "meta_steps": steps,
        "logging_cpu": own,
        "sending_cpu": thread,
        "share": (own + thread) / wall,
    }


def page(report: dict[str, Any], rate: float) -> str:
    """The report as a page of the docs."""
    new, old = report["new"], report["existing"]
    said = ", ".join(f"{name} {value}" for name, value in report["conditions"].items())
    return "\n".join(
        [
            "<!-- Written by python -m benchmarks.tracking --page; do not edit. -->",
            "",
            "# What tracking costs",
            "",
            f"A training of {rate:g} meta-steps a second, {old['seconds']:.0f} s long, with a sqlite store.",
            "",
            f"- First metrics are in the store after {old['first_metrics_after']:.1f} s, on a new store after "
            f"{new['first_metrics_after']:.1f} s (wall); of these {old['set_up_cpu']:.1f} and "
            f"{new['set_up_cpu']:.1f} s are CPU time of setting up, which importing MLflow and making the tables take.",
            f"- After that tracking takes {100 * old['share']:.2g} % of one CPU: "
            f"{1e6 * old['logging_cpu'] / old['meta_steps']:.0f} us of each meta-step, and {old['sending_cpu']:.2f} s "
            "of the thread that sends.",
            "",
            f"Conditions: {said}.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rate", type=float, default=20.0, help="meta-steps a second")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args(arguments)
    report = measured(given.seconds, given.rate)
    text = page(report, given.rate)
    print(text)
    if given.json is not None:
        write_json(given.json, report)
    if given.page is not None:
        write_text(given.page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
