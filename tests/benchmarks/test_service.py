"""The benchmarks of the service and of tracking: the shape of their reports, never how long anything took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow(seconds=40)
def test_latency_and_requests_of_every_size(tmp_path: Path) -> None:
    from benchmarks import service

    asked = ["--sizes", "2", "4", "--seconds", "0.2", "--clients", "2", "--page", str(tmp_path / "a.md")]
    assert service.main([*asked, "--json", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [row["size"] for row in report["rows"]] == [2, 4]
    for row in report["rows"]:
        assert row["here_ms"] > 0
        assert 0 < row["latency_ms"] <= row["latency_95_ms"]
        assert row["requests_per_second"] > 0
        assert row["batched_requests_per_second"] > 0
    assert "| 2 |" in (tmp_path / "a.md").read_text()


@pytest.mark.slow(seconds=40)
def test_the_share_of_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tracking

    # The benchmark keeps its runs in a store of its own.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path))
    assert tracking.main(["--seconds", "2", "--rate", "20", "--json", str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    for part in ("new", "existing"):
        assert report[part]["meta_steps"] > 0
        assert 0 < report[part]["share"] < 1
