"""The benchmark of several processes: what it counts and the page, never how long it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def _measured(settings: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """Figures as two processes would give them, in which the second has half again as much to do."""
    pes = settings["estimator"] == "pes"
    sent = (8 * (128 + 5) if pes else 40_000) if processes > 1 else 0
    step = {"seconds": 1.0, "bytes": sent, "exchanges": int(processes > 1) * (1 if pes else 2), "waited": 0.0}
    size = 100 * 2**20 + settings["outer"]["horizon"]
    cpu = [1.0 / processes, *[1.5 / processes] * (processes - 1)]
    return [{"steps": [{**step, "cpu": each}] * 3, "peak_bytes": size, "weights": 10_000} for each in cpu]


def test_the_page_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import scale

    monkeypatch.setattr(scale, "_torchrun", _measured)
    files = {name: tmp_path / f"scale.{name}" for name in ("json", "md")}
    assert scale.main(["--json", str(files["json"]), "--page", str(files["md"])]) == 0
    report = json.loads(files["json"].read_text())
    assert report["throughput"]["tbptt"] == pytest.approx({"1": 1.0, "2": 4 / 3, "4": 8 / 3})
    page = files["md"].read_text()
    assert "| tbptt | 2 | 2 | 40000 | 750 (750 to 750) | 1.33 |" in page
    assert "| pes | 4 | 1 | 1064 |" in page
    assert "100 MiB with a horizon of 100 and 100 MiB with one of 2000, 1.000 times as much" in page
    assert "{measured}" not in page
    assert page.count("| wide-area | ") == 6
    # Messages bind an exchange over a wide-area network; thousands of pairs are bound by what is drawn for them.
    bound = {(row["network"], row["workers"], row["estimator"]): row["bound"] for row in report["paper"]}
    assert bound["wide-area", 100, "tbptt"] == "messages"
    assert bound["cluster", 10_000, "pes"] == "draws"


def test_a_worker_counts_what_it_exchanges(tmp_path: Path) -> None:
    from benchmarks import _scale_worker

    outer = {"tasks": 2, "unroll": 2, "horizon": 4}
    for estimator in ("tbptt", "pes"):
        _scale_worker.main({"estimator": estimator, "outer": outer, "width": 3, "meta_steps": 2}, tmp_path)
        found = json.loads((tmp_path / "0.json").read_text())
        assert [(step["bytes"], step["exchanges"]) for step in found["steps"]] == [(0, 0)] * 2
        assert all(step["cpu"] > 0 for step in found["steps"])
        assert found["peak_bytes"] > 50 * 2**20
