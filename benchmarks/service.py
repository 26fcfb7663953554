"""What a service takes for an answer: latency and requests a second, by the size of the group.

A service is started on loopback for a checkpoint with teleports along linear pairs; its requests hold five matrices of
size k x k in float64. Beside each latency stands what the same answer takes in this process, without a service.

Example:
    python -m benchmarks.service --json service.json --page docs/service-costs.md
    python -m benchmarks.service --sizes 8 --seconds 2
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._timing import conditions
from metateleport.checkpoint import load_checkpoint
from metateleport.files import write_json, write_text
from metateleport.service import Answerer, Client, Message

__all__ = ["main"]

SCHEMA = 1
CHECKPOINT = "leaky_mlp_stays"
MATRICES = (
    "feature_covariance",
    "outgoing_covariance",
    "incoming_covariance",
    "outgoing_gradient_covariance",
    "incoming_gradient_covariance",
)


def request_of(size: int) -> Message:
    """A request for a teleport along a linear pair of that width."""
    source = torch.Generator().manual_seed(size)
    tensors = {"progress": torch.tensor([0.1, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)}
    for name in MATRICES:
        root = torch.randn(size, 2 * size, generator=source, dtype=torch.float64)
        tensors[f"matrices.{name}"] = root @ root.mT
    return Message({"group": {"name": "GL", "size": size}}, tensors)


@contextlib.contextmanager
def served(batching: bool) -> Iterator[str]:
    """The address of a service in a process of its own."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "metateleport.cli", "serve", CHECKPOINT, "--port", str(port)]
    process = subprocess.Popen(
        [*command, *(["--batching"] if batching else [])],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        until = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit("the service did not start") from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def latencies(ask: Any, seconds: float) -> list[float]:
    """Seconds of each of some calls, one after the other."""
    for _ in range(3):
        ask()
    found: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(found) < 5:
        began = time.perf_counter()
        ask()
        found.append(time.perf_counter() - began)
    return found


def rate(url: str, request: Message, clients: int, seconds: float) -> float:
    """Answers a second that some clients get together."""
    counts = [0] * clients
    until = time.monotonic() + seconds

    def work(number: int) -> None:
        client = Client(url)
        while time.monotonic() < until:
            client.ask("teleport", request)
            counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def measured(sizes: Sequence[int], seconds: float, clients: int) -> dict[str, Any]:
    """The report."""
    torch.set_num_threads(1)
    answerer = Answerer(load_checkpoint(CHECKPOINT))
    rows = []
    with served(batching=False) as alone, served(batching=True) as together:
        for size in sizes:
            request = request_of(size)
            whole = Message({"schema": 1, "ask": "teleport", **request.fields}, request.tensors)
            client = Client(alone)
            own = latencies(lambda: answerer.answer(whole), seconds)  # noqa: B023
            over = latencies(lambda: client.ask("teleport", request), seconds)  # noqa: B023
            rows.append(
                {
                    "size": size,
                    "here_ms": 1e3 * statistics.median(own),
                    "latency_ms": 1e3 * statistics.median(over),
                    "latency_95_ms": 1e3 * sorted(over)[int(0.95 * len(over))],
                    "requests_per_second": rate(alone, request, clients, seconds),
                    "batched_requests_per_second": rate(together, request, clients, seconds),
                }
            )
    return {"schema": SCHEMA, "clients": clients, "rows": rows, "conditions": conditions(torch.device("cpu"))}


def page(report: dict[str, Any]) -> str:
    """The report as a page of the docs."""
    lines = [
        "<!-- Written by python -m benchmarks.service --page; do not edit. -->",
        "",
        "# What a service costs",
        "",
        f"Teleports of `{CHECKPOINT}` along a linear pair of width k, five matrices a request, over loopback; "
        f"{report['clients']} clients ask at once for the requests a second. The first column is the same answer "
        "without a service.",
        "",
        "| k | here, ms | latency, ms | 95 %, ms | latency over here | requests/s | requests/s, batching |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['size']} | {row['here_ms']:.3g} | {row['latency_ms']:.3g} | {row['latency_95_ms']:.3g} | "
            f"{row['latency_ms'] / row['here_ms']:.2g} | {row['requests_per_second']:.3g} | "
            f"{row['batched_requests_per_second']:.3g} |"
        )
    said = ", ".join(f"{name} {value}" for name, value in report["conditions"].items())
    return "\n".join([*lines, "", f"Conditions: {said}.", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args(arguments)
    report = measured(given.sizes, given.seconds, given.clients)
    text = page(report)
    print(text)
    if given.json is not None:
        write_json(given.json, report)
    if given.page is not None:
        write_text(given.page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
