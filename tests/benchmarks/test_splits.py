"""The benchmark of splits: what steps in gauges keeps its product, and what does not tells the splits apart."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow(seconds=20)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("peft", "pytorch_optimizer")), reason="not installed"
)
def test_steps_in_gauges_alone_do_not_see_the_split(tmp_path: Path) -> None:
    from benchmarks.splits import SPLITS, main

    threads = torch.get_num_threads()
    page = tmp_path / "splits.md"
    sizes = [argument for name in ("width=12", "samples=60", "batch=20", "rank=2") for argument in ("--set", name)]
    try:
        assert (
            main(["--tasks", "1", "--steps", "6", *sizes, "--json", str(tmp_path / "s.json"), "--page", str(page)]) == 0
        )
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "s.json").read_text())
    apart = {case["name"]: case["apart"] for case in report["cases"]}
    assert all(len(own[dtype]) == len(SPLITS) for own in apart.values() for dtype in ("float64", "float32"))
    assert max(apart["gauged"]["float64"].values()) < 1e-8
    assert max(apart["gauged"]["float64"].values()) < 1e-3 * max(apart["gauged"]["float32"].values())
    rounding = {case["name"]: case["rounding"] for case in report["cases"]}
    assert 0 < rounding["gauged"] < 1e-3
    assert min(apart[name]["float64"]["size 10, condition 30"] for name in ("adamw", "muon", "lora+")) > 0.1
    assert page.with_suffix(".png").is_file()
    assert "splits.png" in page.read_text()
    assert all(f"| {name} |" in page.read_text() for name in apart)


@pytest.mark.parametrize("arguments", [["--tasks", "0"], ["--steps", "0"]])
def test_sizes_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.splits import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert "positive" in capsys.readouterr().err
