"""The benchmark of a learned optimizer on any model: what it keeps, goes on from and says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_runs_are_kept_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import any_model

    short = {name: dataclasses.replace(task, steps=4, times=2) for name, task in any_model.TASKS.items()}
    monkeypatch.setattr(any_model, "TASKS", short)
    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    asked = ["--tasks", "tabular", "--seeds", "1", "--json", str(kept), "--page", str(page)]
    assert any_model.main(asked) == 0
    runs = json.loads(kept.read_text())["runs"]
    trials = {kind: [key for key in runs if f"| {kind} " in key] for kind in ("adamw", "muon")}
    # As many trials for each rival.
    assert len(trials["adamw"]) == len(trials["muon"]) == 12
    methods = {key.split(" | ")[1] for key in runs} - {key.split(" | ")[1] for each in trials.values() for key in each}
    # The constants by hand are the checkpoint itself, and are not run twice.
    own = {
        f"default, {part}" for part in ("adam alone", "polar alone", "without safeguard", "as long as AdamW", "lr=2")
    }
    assert "default, by hand" not in methods
    assert {"default", "default, long", "adamw, defaults", "adamw, tuned", "muon, tuned", *own} <= methods
    assert len(runs["tabular | default, long | seed 0 | 8 steps"]["losses"]) == 9
    (in_time,) = (key for key in runs if "as long as AdamW" in key)
    spent = [runs[f"tabular | {name} | seed 0 | 4 steps"]["seconds"][-1] for name in ("adamw, tuned", "default")]
    assert in_time.endswith(f"| {max(int(4 * spent[0] / spent[1]), 1)} steps")
    text = page.read_text()
    assert "at the seconds of tuned AdamW's run, ahead on " in text
    assert "are the checkpoint itself" in text
    assert "on minilm, all weights 4, all with the schedule cosine; there muon is not run" in text
    assert "ahead of tuned AdamW: " in text
    assert "the best factor lr: tabular" in text
    assert "Adam's direction alone: loss over the learned one's, training" in text
    assert f"{runs['tabular | default | seed 0 | 4 steps']['losses'][-1]:.3g}" in text
    capsys.readouterr()
    monkeypatch.setattr(any_model, "_run", lambda *_: pytest.fail("a kept run was run again"))
    assert any_model.main(asked) == 0
    monkeypatch.setattr(any_model, "RATES", {"adamw": (1e-3,), "muon": (1e-2,)})
    with pytest.raises(SystemExit, match="other settings"):
        any_model.main(asked)


def test_constants_are_the_networks_biases() -> None:
    import torch

    import metateleport as mt
    from benchmarks.any_model import _parts_of

    before = mt.load_checkpoint("digits").learned.state_dict()
    after = _parts_of("digits")["constants"].state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.endswith("head.weight") for name in changed)
    assert not any(bool(after[name].any()) for name in changed)


def test_the_parts_of_the_attribution_are_what_they_say() -> None:
    import torch

    import metateleport as mt
    from benchmarks.any_model import _parts_of

    learned, parts = mt.load_checkpoint("default").learned, _parts_of("default")
    weights = torch.ones(learned.rule.head.in_features) / 16
    for name, place in (("adam alone", 3), ("polar alone", 4)):
        shares = parts[name].rule.head(weights)[3:6].softmax(-1)
        assert float(shares[place - 3].detach()) > 0.999
    assert not parts["without safeguard"].config.rule.guarded
    assert learned.config.rule.guarded
    assert "by hand" not in parts
    made = mt.load_checkpoint("digits").learned
    assert not bool(_parts_of("digits")["by hand"].rule.head.weight.any())
    assert bool(made.rule.head.weight.any())
