"""What every test stands on: equal draws, one thread, and nothing written outside temporary folders."""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

SLOW_SECONDS = 60.0

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


def _define_torchvision_operators() -> torch.library.Library | None:
    """Defines the two operators that torchvision registers fakes for, where its own extension does not load.

    A torchvision made for CUDA cannot load its extension beside a torch for CPUs, and then importing it fails with
    `operator torchvision::nms does not exist`; so does transformers, which imports it where it is installed.

    Returns:
        The library that holds the definitions, which last as long as it does; None where none were needed.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    for extension in Path(found.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_torchvision_operators = _define_torchvision_operators()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-seconds",
        type=float,
        metavar="N",
        help="run slow tests, in their order, as long as the seconds they state add up to N; skip the others",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="there is no CUDA device")
    left = config.getoption("--slow-seconds")
    too_slow = pytest.mark.skip(reason=f"slow, and more than --slow-seconds {left} leaves time for")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
            continue
        slow = item.get_closest_marker("slow")
        if slow is None or left is None:
            continue
        seconds = slow.kwargs.get("seconds", SLOW_SECONDS)
        if seconds > left:
            item.add_marker(too_slow)
        else:
            left -= seconds


def pytest_unconfigure() -> None:
    _scratch.cleanup()


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
