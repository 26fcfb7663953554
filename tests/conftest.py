"""What every test stands on: equal draws, one thread, and nothing written outside temporary folders."""

from __future__ import annotations

import gc
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

SLOW_SECONDS = 60.0
T = TypeVar("T")

_scratch = tempfile.TemporaryDirectory(prefix="metateleport-tests-", ignore_cleanup_errors=True)
# Set at import, so that the commands which tests start inherit them and MLflow finds them whenever it is imported.
os.environ.update(
    MLFLOW_TRACKING_URI=f"sqlite:///{_scratch.name}/mlflow.db",
    MLFLOW_DISABLE_TELEMETRY="true",
    METATELEPORT_CACHE=f"{_scratch.name}/cache",
    MPLBACKEND="agg",
    OMP_NUM_THREADS="1",
)
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-seconds",
        type=float,
        metavar="N",
        help="run slow tests as long as the seconds they state add up to N, other ones every day; skip the rest",
    )
    parser.addoption(
        "--slow-turn",
        type=int,
        # The number of the day; made once, and handed to every process of pytest-xdist.
        default=int(time.time() // 86400),
        metavar="N",
        help="which of the slow tests --slow-seconds begins with (default: the number of the day, %(default)s)",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    if config.getoption("--slow-seconds"):
        return f"slow tests: those of --slow-turn {config.getoption('--slow-turn')}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="there is no CUDA device")
    slow = []
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        elif item.get_closest_marker("slow"):
            slow.append(item)
    left = config.getoption("--slow-seconds")
    if left is None:
        return
    too_slow = pytest.mark.skip(reason=f"slow, and --slow-seconds {left:g} leaves no time for it on this turn")
    for item in _in_turn(slow, config.getoption("--slow-turn")):
        seconds = item.get_closest_marker("slow").kwargs.get("seconds", SLOW_SECONDS)
        if seconds > left:
            item.add_marker(too_slow)
        else:
            left -= seconds


def _in_turn(items: list[pytest.Item], turn: int) -> Iterator[pytest.Item]:
    """One item of every test function, then another of each, and so on; turn by turn others are the first."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    queues = [_from(turn // max(len(functions), 1), each) for each in functions.values()]
    for several in itertools.zip_longest(*_from(turn, queues)):
        yield from (item for item in several if item is not None)


def _from(place: int, values: list[T]) -> list[T]:
    """The values from a place on, and then those before it."""
    place %= max(len(values), 1)
    return values[place:] + values[:place]


def pytest_unconfigure() -> None:
    _scratch.cleanup()


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """Tests and what they have imported, millions of objects, are out of the garbage collector's sight.

    An optimizer looks through all others for an average of its model when it teleports for the first time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _equal_draws() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a folder of its own, so that what writes beside itself never writes in the project."""
    monkeypatch.chdir(tmp_path)
