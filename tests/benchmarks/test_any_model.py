"""The benchmark of a learned optimizer on any model: what it keeps, goes on from and says."""

from __future__ import annotations

import dataclasses
import json
import math
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
    parts = ("constants", "by hand", "adam alone", "polar alone", "without safeguard", "as long as AdamW", "lr=2")
    own = {f"default, {part}" for part in parts}
    assert {"default", "default, long", "adamw, defaults", "adamw, tuned", "muon, tuned", *own} <= methods
    assert len(runs["tabular | default, long | seed 0 | 8 steps"]["losses"]) == 9
    (in_time,) = (key for key in runs if "as long as AdamW" in key)
    spent = [runs[f"tabular | {name} | seed 0 | 4 steps"]["seconds"][-1] for name in ("adamw, tuned", "default")]
    assert in_time.endswith(f"| {max(int(4 * spent[0] / spent[1]), 1)} steps")
    text = page.read_text()
    assert "at the seconds of tuned AdamW's run, ahead on " in text
    assert "a mixture made by hand: loss over the learned one's, training" in text
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
    start = parts["by hand"].state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in learned.state_dict().items())
    made = mt.load_checkpoint("digits").learned
    assert not bool(_parts_of("digits")["by hand"].rule.head.weight.any())
    assert bool(made.rule.head.weight.any())


def test_a_checkpoint_that_is_its_own_start_is_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    import metateleport as mt
    from benchmarks import any_model
    from benchmarks._any_report import findings
    from metateleport.learned import MetaOptimizer

    kept = mt.load_checkpoint("default")
    start = dataclasses.replace(kept, learned=MetaOptimizer(kept.learned.config))
    monkeypatch.setattr(any_model.mt, "load_checkpoint", lambda _: start)
    parts = any_model._parts_of("default")
    assert "by hand" not in parts
    assert "constants" not in parts
    run = {"losses": [2.0, 1.0], "seconds": [0.0, 1.0], "unseen": 1.0, "accuracy": None, "finite": True}
    runs = {f"tabular | {name} | seed 0 | 9 steps": run for name in ("default", "default, adam alone")}
    assert "are the checkpoint itself" in " ".join(findings({"checkpoint": "default", "runs": runs}))


def test_the_tasks_that_constants_are_chosen_by_are_others_and_make_no_page(tmp_path: Path) -> None:
    from benchmarks import any_model
    from benchmarks._development_tasks import DEVELOPMENT

    assert not set(DEVELOPMENT) & set(any_model.TASKS)
    for task in DEVELOPMENT.values():
        data = task.data()
        assert len(data.inputs) == len(data.targets) > 2 * len(data.unseen_inputs)
        run = any_model._run(task, data, any_model._rival("adamw", 1e-3, "constant"), seed=0, steps=2, marks=1)
        assert run["finite"]
        assert run["losses"][-1] < run["losses"][0]
    with pytest.raises(SystemExit):
        any_model.main(["--development", "--page", str(tmp_path / "page.md")])


def test_held_out_losses_are_compared_by_seed_and_with_an_interval() -> None:
    from benchmarks._any_report import findings

    runs = {}
    for seed, factor in enumerate((1.15, 1.2, 1.25)):
        for task, own in (("above", factor), ("as good", factor / 1.2)):
            for method, loss in (("default", own), ("adamw, tuned", 1.0)):
                runs[f"{task} | {method} | seed {seed} | 9 steps"] = {
                    "losses": [2.0, 1.0],
                    "seconds": [0.0, 1.0],
                    "unseen": loss * (1 + seed),
                    "accuracy": None,
                    "finite": True,
                }
    (said,) = (each for each in findings({"checkpoint": "default", "runs": runs}) if "interval over seeds" in each)
    assert "interval over seeds: 1 of 2; not on above. Its ratio, in geometric means: above 1.20 [" in said
    # Student's t with two degrees of freedom.
    logs = [math.log(each) for each in (1.15, 1.2, 1.25)]
    middle = sum(logs) / 3
    width = 4.303 * (sum((each - middle) ** 2 for each in logs) / 2 / 3) ** 0.5
    assert f"above {math.exp(middle):.2f} [{math.exp(middle - width):.2f}, {math.exp(middle + width):.2f}]" in said


def test_factors_are_compared_over_all_tasks_that_have_them() -> None:
    from benchmarks._any_report import findings

    ends = {"default": (1.0, 4.0, 1.0), "default, lr=0.5": (2.0, 2.0), "default, lr=2": (4.0, 16.0)}
    runs = {
        f"{task} | {method} | seed 0 | 9 steps": {
            "losses": [20.0, end],
            "seconds": [0.0, 1.0],
            "unseen": end,
            "accuracy": None,
            "finite": True,
        }
        for method, losses in ends.items()
        for task, end in zip(("first", "second", "third"), losses, strict=False)
    }
    (said,) = (each for each in findings({"checkpoint": "default", "runs": runs}) if "over that at 1" in each)
    assert "geometric means over 2 tasks: 0.5 1.00 [" in said
    assert ", 2 4.00 [4.00, 4.00]" in said
