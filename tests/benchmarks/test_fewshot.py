"""The few-shot comparison: the shape of what it reports, and how it decides; never how long it took."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks lie beside the package and are run from the project's folder."""
    monkeypatch.syspath_prepend(str(ROOT))


def found(losses: list[float], seconds: float = 1.0, accuracy: float = 0.5) -> dict[str, Any]:
    accuracies = [accuracy] * len(losses)
    return {"losses": losses, "accuracies": accuracies, "meta_seconds": seconds, "adapt_seconds": seconds / 2}


def test_a_method_is_better_only_with_its_interval_and_every_meta_seed() -> None:
    from benchmarks._fewshot_report import compare

    source = np.random.default_rng(0)
    base = [found(list(source.uniform(0.5, 1.5, 40))) for _ in range(3)]

    def scaled(*factors: float) -> list[dict[str, Any]]:
        return [
            found([factor * loss for loss in each["losses"]], 3.0, 0.6)
            for each, factor in zip(base, factors, strict=True)
        ]

    better = compare(scaled(0.5, 0.5, 0.8), base)
    assert better["verdict"] == "better"
    assert better["loss"]["ratio"] == pytest.approx((2 * 2 * 1.25) ** (1 / 3))
    assert better["by_seed"] == pytest.approx([2, 2, 1.25])
    assert better["accuracy"]["mean"] == pytest.approx(0.1)
    assert better["meta_seconds"] == better["adapt_seconds"] == pytest.approx(3.0)
    assert compare(scaled(2.0, 2.0, 1.2), base)["verdict"] == "worse"
    assert compare(scaled(0.5, 0.5, 1.1), base)["verdict"] == "no difference", "one meta-seed says otherwise"
    noisy = [found(list(np.array(each["losses"]) * source.lognormal(0.01, 1.0, 40))) for each in base]
    assert compare(noisy, base)["verdict"] == "no difference"


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    from benchmarks._fewshot_report import compare
    from benchmarks.fewshot import _finite

    lost = found([_finite(torch.tensor(math.nan)), _finite(torch.tensor(math.inf)), 1e300])
    assert compare([lost], [found([1.0, 2.0, 3.0])])["verdict"] == "worse"


def test_methods_are_read_at_equal_gradient_evaluations() -> None:
    from benchmarks.fewshot import at_budget
    from metateleport.fewshot import Adaptation

    values = torch.arange(8.0).reshape(2, 4)
    spent = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 4 / 3, 8 / 3, 4.0]])
    adaptation = Adaptation(values, values, None, spent, values, 0)
    assert at_budget(values, adaptation, 3).tolist() == [3.0, 6.0]
    assert at_budget(values, adaptation, 4).tolist() == [3.0, 7.0]


@pytest.mark.slow(seconds=20)
def test_the_command_writes_the_figures_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import fewshot

    monkeypatch.setattr(fewshot, "RATES", (0.1, 0.25))
    monkeypatch.setattr(fewshot, "FURTHER", 0)
    names = ["maml", "maml+ascent", "maml+random", "meta-sgd+ascent"]
    small = ["--meta-steps", "1", "--tasks", "4", "--inner-steps", "2", "--ways", "2", "--bottleneck", "3"]
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    assert fewshot.main(["--methods", *names, "--seeds", "1", *small, *files]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["settings"]["seeds"] == 1
    assert list(report["methods"]) == names
    for name, each in report["methods"].items():
        assert [tried["lr"] for tried in each["tuning"]] == [0.1, 0.25]
        best = min(each["tuning"], key=lambda tried: tried["validation"])
        assert each["lr"] == best["lr"]
        (seed,) = each["seeds"]
        # Exact symmetries carry the gradient along: every method has spent the same.
        assert seed["evaluations"] == 8 * 2
        assert len(seed["losses"]) == len(seed["accuracies"]) == 4
        assert (seed["drift"] is None) == ("+" not in name)
        assert seed["drift"] is None or seed["drift"] < 1e-4
        assert (seed["losses_teleport_off"] is None) == ("+" not in name)
    assert report["random_size"] == report["methods"]["maml+ascent"]["size"] > 0
    (seed,) = report["methods"]["maml+random"]["seeds"]
    assert seed["size"] == pytest.approx(report["random_size"], rel=1e-5)
    # Meta-SGD is not among them: what is held against it is told against MAML alone.
    assert list(report["methods"]["meta-sgd+ascent"]["against"]) == ["maml"]
    page = (tmp_path / "out.md").read_text()
    assert capsys.readouterr().out == page
    assert all(sentence in page for sentence in report["in_words"])
    assert page.count("MAML, ascent on the gradient norm") >= 3


@pytest.mark.slow(seconds=3)
def test_every_hand_designed_method_can_be_made() -> None:
    from benchmarks._fewshot_methods import METHODS, Meta, build
    from metateleport import load_family

    task = load_family(ROOT / "tasks" / "fewshot_digits.py", {"ways": 2, "bottleneck": 3}).task(0)
    for name in set(METHODS) - {"maml+learned"}:
        assert build(Meta(name, 0.1, 0, 0.5), task.model, task.symmetries) is not None


def test_the_page_names_the_weights_of_the_shipped_teleporter() -> None:
    from benchmarks._fewshot_report import _trained_by
    from benchmarks.fewshot import checkpoint_of

    assert checkpoint_of(["maml", "meta-sgd"]) == {}
    assert _trained_by({}) == []
    found = checkpoint_of(["maml", "maml+learned"])
    (line, _) = _trained_by(found)
    assert found["weights_sha256"][:12] in line
    assert "metateleport train digits" in line
