"""What a meta-step exchanges and takes in one, two and four processes, and what follows for many machines.

Processes are started by torchrun on this machine, with one thread each, and share the tasks of a stack of the source
paper's regression. Bytes and exchanges do not depend on the machine. Seconds are CPU time, which other load hardly
changes: on a machine with a free core for each process a meta-step takes as long as the CPU time of the process that
has the most.

Example:
    python -m benchmarks.scale --json scale.json --page docs/scale.md
    python -m benchmarks.scale --tasks 512 --processes 1 2 --json more.json
    python -m benchmarks.scale --reports scale.json more.json --page docs/scale.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks._timing import conditions
from metateleport.files import write_json, write_text

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
ESTIMATORS = ("tbptt", "pes")
OUTER = {"unroll": 10, "horizon": 1000}
HORIZONS = (100, 2000)


class Network(NamedTuple):
    """A network between machines: its name, seconds of one message and bytes a second of one machine."""

    name: str
    latency: float
    bandwidth: float


NETWORKS = (Network("cluster", 20e-6, 10e9 / 8), Network("wide-area", 50e-3, 100e6 / 8))
WORKERS = (100, 1000, 10_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a summary and writes the report and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--meta-steps", type=int, default=10, help="meta-steps that are measured (default 10)")
    parser.add_argument("--width", type=int, default=20, help="width of the task's layers (default 20)")
    parser.add_argument("--tasks", type=int, default=128, help="tasks of all processes together (default 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--reports", type=Path, nargs="+", metavar="FILE", help="measure nothing; the page is of these figures"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the docs")
    given = parser.parse_args(arguments)
    reports = [_report(given)] if given.reports is None else [json.loads(each.read_text()) for each in given.reports]
    for each in reports:
        print("\n".join(_measured_table(each)))
    if given.json is not None:
        write_json(given.json, reports[0])
    if given.page is not None:
        head, _, tail = _PAGE.partition("{measured}")
        write_text(given.page, head + "\n".join(_section(reports)) + tail)
    return 0


def _report(given: argparse.Namespace) -> dict[str, Any]:
    outer = {**OUTER, "tasks": given.tasks}
    report: dict[str, Any] = {"settings": {"outer": outer, "width": given.width, "meta_steps": given.meta_steps}}
    report["conditions"] = conditions(torch.device("cpu"))
    report["runs"] = {
        estimator: {str(count): _run(estimator, outer, count, given) for count in given.processes}
        for estimator in ESTIMATORS
    }
    report["memory"] = {str(horizon): _peak(horizon, given) for horizon in HORIZONS}
    report["draw_seconds"] = _draw_seconds()
    report["throughput"] = {
        estimator: {count: runs["1"]["slowest"]["median"] / each["slowest"]["median"] for count, each in runs.items()}
        for estimator, runs in report["runs"].items()
        if "1" in runs
    }
    report["paper"] = list(_on_paper(report))
    return report


def _run(estimator: str, outer: dict[str, Any], processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """Figures of one estimator in some processes."""
    settings = {"estimator": estimator, "outer": outer, "width": given.width, "meta_steps": given.meta_steps}
    every = _torchrun(settings, processes)
    steps = [each["steps"] for each in every]
    slowest = [max(own["cpu"] for own in ranks) for ranks in zip(*steps, strict=True)]
    return {
        "bytes": steps[0][0]["bytes"],
        "exchanges": steps[0][0]["exchanges"],
        "slowest": {"median": statistics.median(slowest), "min": min(slowest), "max": max(slowest)},
        "wall": statistics.median(own["seconds"] for own in steps[0]),
        "peak_bytes": max(each["peak_bytes"] for each in every),
        "weights": every[0]["weights"],
    }


def _peak(horizon: int, given: argparse.Namespace) -> int:
    """The largest memory of a process that takes as many inner steps by PES, along horizons of this length."""
    outer = {**OUTER, "horizon": horizon, "unroll": 50, "tasks": 8}
    settings = {"estimator": "pes", "outer": outer, "width": given.width, "meta_steps": max(HORIZONS) // 50}
    return int(_torchrun(settings, 1)[0]["peak_bytes"])


def _torchrun(settings: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "benchmarks._scale_worker", json.dumps(settings), folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def _draw_seconds() -> float:
    """Seconds to draw one perturbation of one weight and to add it up."""
    size, times = 200_000, []
    for _ in range(5):
        began = time.process_time()
        total = np.zeros(size, np.float32)
        total += np.random.default_rng(0).standard_normal(size)
        times.append((time.process_time() - began) / size)
    return statistics.median(times)


def _on_paper(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A meta-step of as many machines as `WORKERS`, each with the tasks that one of the most processes had."""
    runs = report["runs"]
    pairs = _tasks_of_one(report)
    for network in NETWORKS:
        for workers in WORKERS:
            for estimator in ESTIMATORS:
                several = runs[estimator][max(runs[estimator], key=int)]
                weights, numbers = several["weights"], 8 * (pairs * workers + 5)
                size = numbers if estimator == "pes" else several["bytes"]
                drawn = workers * pairs * weights if estimator == "pes" else 0
                rounds = 2 * math.ceil(math.log2(workers)) * several["exchanges"]
                parts = {
                    "compute": several["slowest"]["median"],
                    "draws": drawn * report["draw_seconds"],
                    "messages": rounds * network.latency,
                    "bytes": 2 * size / network.bandwidth,
                }
                total = sum(parts.values())
                yield {
                    "network": network.name,
                    "workers": workers,
                    "estimator": estimator,
                    "exchanged": size,
                    "memory": 4 * drawn,
                    "seconds": total,
                    "bound": max(parts, key=lambda name: parts[name]),
                    "efficiency": parts["compute"] / total,
                }


def _tasks_of_one(report: dict[str, Any]) -> int:
    """Number of tasks of each process where there were most of them."""
    return int(report["settings"]["outer"]["tasks"]) // max(int(count) for count in report["runs"]["pes"])


def _measured_table(report: dict[str, Any]) -> list[str]:
    rows = ["| estimator | processes | exchanges | bytes | CPU ms of the slowest (range) | throughput |"]
    rows += ["|---|---|---|---|---|---|"]
    for estimator, runs in report["runs"].items():
        for count, each in runs.items():
            slow = {name: 1e3 * value for name, value in each["slowest"].items()}
            gain = report["throughput"].get(estimator, {}).get(count, math.nan)
            rows.append(
                f"| {estimator} | {count} | {each['exchanges']} | {each['bytes']} | "
                f"{slow['median']:.0f} ({slow['min']:.0f} to {slow['max']:.0f}) | {gain:.2f} |"
            )
    return rows


def _section(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    report = reports[0]
    machine = report["conditions"]
    yield (
        f"Windows of {OUTER['unroll']} steps on tasks of width {report['settings']['width']}, networks of "
        f"{report['runs']['tbptt'][min(report['runs']['tbptt'])]['weights']} weights. Throughput is task-steps a "
        "second over those of one process with one thread, where every process has a core of its own: the CPU time of "
        "one over that of the slowest of several. A small stack gains little, as its kernels cost about the same for "
        "half of the tasks. "
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}."
    )
    for each in reports:
        settings = each["settings"]
        yield ""
        yield f"{settings['outer']['tasks']} tasks, medians of {settings['meta_steps']} meta-steps:"
        yield ""
        yield from _measured_table(each)
    yield ""
    small, large = (report["memory"][str(horizon)] for horizon in HORIZONS)
    yield (
        f"The largest memory of a process that takes {max(HORIZONS)} inner steps by PES is {small / 2**20:.0f} MiB "
        f"with a horizon of {HORIZONS[0]} and {large / 2**20:.0f} MiB with one of {HORIZONS[1]}, "
        f"{large / small:.3f} times as much."
    )
    yield ""
    yield "## On paper: 100 to 10 000 machines"
    yield ""
    yield (
        f"Each machine has {_tasks_of_one(report)} tasks, as each of the most processes above, so that the stack grows "
        "with the number of machines. A meta-step takes the CPU time of such a process; two times the binary logarithm "
        "of the number of machines in messages, for each exchange; two times its bytes over the bandwidth; and, for "
        f"PES, all pairs' perturbations, at {1e9 * report['draw_seconds']:.1f} ns a weight. A cluster has 20 µs a "
        "message and 10 Gbit/s, a wide-area network 50 ms and 100 Mbit/s. Efficiency is the share of the time that is "
        "spent on a machine's own tasks. "
        "Nothing here was run."
    )
    yield ""
    yield "| network | machines | estimator | exchanged | PES's perturbations | seconds | bound by | efficiency |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in report["paper"]:
        kept = f"{row['memory'] / 2**20:.0f} MiB" if row["memory"] else ""
        cells = [row["network"], row["workers"], row["estimator"], f"{row['exchanged'] / 1024:.0f} KiB", kept]
        cells += [f"{row['seconds']:.2f}", row["bound"], f"{row['efficiency']:.0%}"]
        yield f"| {' | '.join(map(str, cells))} |"


_PAGE = (Path(__file__).parent / "_scale_page.md").read_text()


if __name__ == "__main__":
    sys.exit(main())
