"""Attribution: what a learned teleport brings is measured at equal cost, and said in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learned_cases import shape_of
from torch import nn

import metateleport as mt
from metateleport.evaluation import (
    Evaluation,
    Result,
    SeedResults,
    Trajectory,
    attribution_of,
    marks,
    plot,
    ratios_table_of,
    report_of,
    table_of,
    words_of,
)
from metateleport.evaluation.methods.learned import Learned
from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer
from metateleport.point import Point
from metateleport.symmetries import AttentionQK
from metateleport.teleporters import Teleporter

TASKS, STEPS = 24, 20


def result(factor: float, moves_by: str = "none", speed: float = 1.0, noise: float = 0.05, seed: int = 0) -> Result:
    """Loss `factor` times what every task has at its evaluation, half as much after each; one evaluation a second."""
    task = np.exp(np.random.default_rng(99).normal(size=(TASKS, 1)))
    spread = np.exp(noise * np.random.default_rng(seed).normal(size=(TASKS, 1)))
    along = 0.5 ** np.arange(STEPS + 1)
    loss = factor * task * spread * along
    seconds = np.arange(STEPS + 1) / speed
    trajectory = Trajectory(loss, float(seconds[-1]), seconds, drift_max=None if moves_by == "none" else 0.0)
    return Result(trajectory, moves_by != "none", {}, None, moves_by)


def named(results: dict[str, Result]) -> dict[str, Result]:
    return {name.replace("__", "/").replace("_", "-"): each for name, each in results.items()}


def evaluation(**results: Result) -> Evaluation:
    return Evaluation("line", {}, "some", TASKS, STEPS, 0, "float64", "cpu", named(results))


def of_seeds(*seeds: dict[str, Result], **others: Result) -> Evaluation:
    """The first seed is the chosen one; `others` have no meta-seeds."""
    results = [named(each) for each in seeds]
    listed = tuple(SeedResults(10 + place, -1.0 * place, place == 0, each) for place, each in enumerate(results))
    whole = evaluation(**others)
    return dataclasses.replace(whole, results={**results[0], **whole.results}, meta_seeds=listed)


def found(**results: Result) -> dict[str, Any]:
    return attribution_of(evaluation(**results))["learned"]


def test_ratios_are_paired_at_equal_evaluations() -> None:
    against = found(learned=result(1.0, "stays"), learned__teleport_off=result(8.0, seed=1))["against"]
    ratios = against["learned/teleport-off"]["gradient_evaluations"]
    assert [each["at"] for each in ratios] == marks(STEPS) == [12, 20]
    for each in ratios:
        assert each["low"] < 8 < each["high"] or each["ratio"] == pytest.approx(8, rel=0.05)
        # Losses differ by far more between tasks than within a pair.
        assert each["high"] / each["low"] < 1.2


def test_ratios_at_equal_seconds_know_who_is_slower() -> None:
    # The learned one takes twice as long: when the other is done, it has made half of its steps.
    slow = found(learned=result(1.0, "stays", speed=0.5), learned__teleport_off=result(1.0, noise=0.05, seed=1))
    seconds = slow["against"]["learned/teleport-off"]["seconds"]
    assert seconds["at"] == STEPS
    assert seconds["ratio"] == pytest.approx(0.5 ** (STEPS / 2), rel=0.1)
    fast = found(learned=result(1.0, "stays", speed=2.0), learned__teleport_off=result(1.0, seed=1))
    assert fast["against"]["learned/teleport-off"]["seconds"]["at"] == STEPS / 2
    assert fast["against"]["learned/teleport-off"]["seconds"]["ratio"] == pytest.approx(2 ** (STEPS / 2), rel=0.1)


@pytest.mark.parametrize(
    ("off", "alone", "verdict", "says"),
    [
        (100.0, 10.0, "helps", "divides the loss by "),
        (100.0, 1.0, "nothing", "brings nothing here"),
        (1.0, 1.0, "nothing", "brings nothing here"),
        (1.0, 100.0, "nothing", "brings nothing here"),
        (100.0, 0.1, "harms", "does harm here"),
    ],
)
def test_it_says_in_words_what_the_teleport_brings(off: float, alone: float, verdict: str, says: str) -> None:
    each = found(
        learned=result(1.0, "stays"),
        learned__teleport_off=result(off, noise=0.5, seed=1),
        learned__step_only=result(alone, seed=2),
        whitening=result(0.01, "undone", seed=3),
    )
    assert each["verdict"] == verdict
    assert says in each["in_words"]
    assert "20 gradient evaluations" in each["in_words"]
    assert "whitening by hand: 0.01" in each["in_words"] or "whitening by hand: 0.00" in each["in_words"]
    if verdict == "helps":
        # The smaller of the two merits is the teleport's.
        assert float(each["in_words"].split("loss by ")[1].split()[0]) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("off", "alone", "random", "verdict"),
    [
        (7.0, None, 1.0, "size"),
        (7.0, 5.0, 1.0, "size"),
        (7.0, 1.0, 1.0, "nothing"),
        (7.0, None, 3.0, "helps"),
        (7.0, None, 0.1, "harms"),
        (None, None, 1.0, "nothing"),
    ],
)
def test_random_elements_that_do_as_well_do_not_hide_what_none_at_all_does(
    off: float | None, alone: float | None, random: float, verdict: str
) -> None:
    losses = {"teleport_off": off, "step_only": alone, "random_teleport": random}
    runs = {f"learned__{name}": result(loss, seed=3) for name, loss in losses.items() if loss is not None}
    each = found(learned=result(1.0, "undone"), **runs)
    assert each["verdict"] == verdict
    if verdict == "size":
        assert "over none at all, as random elements of the same size do at 20" in each["in_words"]
        least = min(loss for loss in (off, alone) if loss is not None)
        assert float(each["in_words"].split("loss by ")[1].split()[0]) == pytest.approx(least, rel=0.1)


@pytest.mark.parametrize(
    ("moves_by", "stays", "undone"),
    [("stays", 5.0, "none"), ("undone", "none", 5.0), ("both", 3.0, 2.0), ("none", "none", "none")],
)
def test_what_stays_and_what_is_undone_are_kept_apart(moves_by: str, stays: Any, undone: Any) -> None:
    each = found(
        learned=result(1.0, moves_by, noise=0),
        learned__teleport_off=result(5.0, noise=0),
        learned__stays_off=result(3.0, noise=0),
        learned__gauge_off=result(2.0, noise=0),
    )
    assert each["gauge"] == moves_by
    for kind, expected in (("stays", stays), ("undone", undone)):
        brings = each["brings"][kind]
        ratio = brings if isinstance(brings, str) else brings["gradient_evaluations"][-1]["ratio"]
        assert ratio == (expected if isinstance(expected, str) else pytest.approx(expected))


def test_what_was_not_run_is_said() -> None:
    each = found(learned=result(1.0, "both"), whitening=result(0.1))
    assert each["verdict"] == "unknown"
    assert "was not measured; run learned/teleport-off and learned/step-only" in each["in_words"]
    assert each["brings"] == {"stays": "not run", "undone": "not run"}
    assert attribution_of(evaluation(whitening=result(1.0, "undone"))) == {}
    assert "no teleport is learned" in found(learned=result(1.0))["in_words"]


def test_it_stands_in_the_report_as_plain_json() -> None:
    off = result(3.0, seed=1)
    off.trajectory.loss[0, 5:] = np.nan
    report = report_of(evaluation(learned=result(1.0, "stays"), learned__teleport_off=off))
    back = json.loads(json.dumps(report, allow_nan=False))
    assert back == report
    assert "null" not in json.dumps(report)
    assert words_of(back) == [report["attribution"]["learned"]["in_words"]]
    assert report["methods"]["learned"]["gauge"] == "stays"


def seed_results(factor: float, off: float, seed: int = 0) -> dict[str, Result]:
    return {
        "learned": result(factor, "stays", seed=seed),
        "learned__teleport_off": result(factor * off, seed=seed + 50),
        "learned__step_only": result(factor * off, seed=seed + 60),
    }


def test_over_meta_seeds_each_has_its_own_twin_and_all_have_the_same_baselines() -> None:
    whole = of_seeds(
        *(seed_results(factor, 8.0, seed) for seed, factor in enumerate((1.0, 0.5, 2.0, 1.0))),
        adam=result(16.0, seed=9),
    )
    each = attribution_of(whole)["learned"]
    assert each["meta_seeds"] == 4
    for mark in each["against"]["learned/teleport-off"]["meta_seeds"]["gradient_evaluations"]:
        assert mark["ratio"] == pytest.approx(8, rel=0.05)
        assert mark["high"] / mark["low"] < 1.2
    adam = each["baselines"]["adam"]
    # The chosen seed alone: 16. Over all: seeds differ by factors of two, and the interval knows it.
    assert adam["gradient_evaluations"][-1]["ratio"] == pytest.approx(16, rel=0.05)
    over = adam["meta_seeds"]["gradient_evaluations"][-1]
    assert over["ratio"] == pytest.approx(16, rel=0.1)
    assert over["low"] < 13
    assert over["high"] > 20
    assert over["worst"]["seed"] == 12
    assert over["worst"]["ratio"] == pytest.approx(8, rel=0.1)
    assert over["worst"]["low"] < over["worst"]["ratio"] < over["worst"]["high"]
    assert "Intervals are over tasks and 4 meta-seeds" in each["in_words"]
    assert "the worst of 4 meta-seeds is, by intervals that leave out 1, ahead of adam (12, 20)" in each["in_words"]


def test_one_seed_that_fails_takes_the_verdict_away() -> None:
    good = [seed_results(1.0, 8.0, seed) for seed in range(2)]
    assert attribution_of(of_seeds(*good))["learned"]["verdict"] == "helps"
    bad = {"learned": result(1.0, "stays"), "learned__teleport_off": result(0.01), "learned__step_only": result(0.01)}
    each = attribution_of(of_seeds(*good, bad))["learned"]
    assert each["verdict"] == "nothing"
    worst = each["against"]["learned/teleport-off"]["meta_seeds"]["gradient_evaluations"][-1]["worst"]
    assert (worst["seed"], worst["ratio"]) == (12, pytest.approx(0.01))


def test_the_worst_seed_decides_which_baselines_it_is_ahead_of() -> None:
    whole = of_seeds(
        seed_results(1.0, 8.0), seed_results(100.0, 8.0), adam=result(10.0, seed=7), gd=result(1e4), soap=result(1e-3)
    )
    words = attribution_of(whole)["learned"]["in_words"]
    assert "ahead of gd (12, 20); behind adam (12, 20), soap (12, 20)." in words
    alone = attribution_of(evaluation(learned=result(1.0, "stays"), adam=result(10.0, seed=7)))["learned"]["in_words"]
    assert alone.endswith("the learned method is, by intervals that leave out 1, ahead of adam (12, 20).")


def test_the_report_has_every_seed_and_the_worst_of_them(tmp_path: Path) -> None:
    seeds = [seed_results(factor, 8.0, seed) for seed, factor in enumerate((1.0, 0.1, 100.0))]
    seeds[1]["learned"].trajectory.loss[:3, 5:] = np.nan
    report = json.loads(json.dumps(report_of(of_seeds(*seeds, adam=result(16.0, seed=9))), allow_nan=False))
    found = report["meta_seeds"]
    assert [(each["seed"], each["chosen"], each["validation"]) for each in found["seeds"]] == [
        (10, True, 0.0),
        (11, False, -1.0),
        (12, False, -2.0),
    ]
    medians = [each["methods"]["learned"]["median_loss"]["12"] for each in found["seeds"]]
    assert medians[0] == report["methods"]["learned"]["median"][12]
    assert found["worst"]["learned"]["median_loss"]["12"] == max(medians) == medians[2]
    assert [each["methods"]["learned"]["diverged"] for each in found["seeds"]] == [0, 3, 0]
    assert found["worst"]["learned"]["diverged"] == 3
    assert found["along"]["learned"]["highest"][12] == medians[2]
    assert found["along"]["learned"]["lowest"][12] == medians[1]
    assert set(found["ratios_to_learned"]) == {"learned/teleport-off", "learned/step-only", "adam"}
    # The ratios of single seeds are those of the shipped one, at every mark.
    adam = report["methods"]["adam"]
    assert [each["at"] for each in adam["paired_ratios_to_learned"]] == [12, 20]
    for each in adam["paired_ratios_to_learned"]:
        assert each["ratio"] == pytest.approx(16, rel=0.1)
    end = adam["paired_ratio_to_learned"]
    assert end["ratio"] == pytest.approx(adam["paired_ratios_to_learned"][-1]["ratio"])
    assert table_of(report).row_count == len(report["methods"]) + 1
    ratios = ratios_table_of(report)
    assert ratios is not None
    assert ratios.row_count == 3
    plot(report, tmp_path / "a.svg")
    assert "band of 3 meta-seeds" in (tmp_path / "a.svg").read_text()


def test_a_single_seed_has_no_meta_seeds_in_its_report() -> None:
    report = report_of(evaluation(learned=result(1.0, "stays"), adam=result(10.0, seed=7)))
    assert report["meta_seeds"] == {}
    assert "meta_seeds" not in report["attribution"]["learned"]["baselines"]["adam"]
    assert ratios_table_of(report) is not None
    assert ratios_table_of(report_of(evaluation(adam=result(1.0)))) is None


class _Heads(nn.Module):
    """Two heads of attention: their keys and queries share layers, their elements are apart."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            layer(x).reshape(*x.shape[:-1], 2, 2).transpose(-3, -2) for layer in (self.query, self.key, self.value)
        )
        mixed = (query @ key.mT).softmax(-1) @ value
        return mixed.transpose(-3, -2).flatten(-2)


def test_each_head_gets_a_random_element_of_its_own_size() -> None:
    torch.manual_seed(0)
    model = _Heads().double()
    heads = AttentionQK.of_heads(model, "query", "key", 2)
    assert len({head.parameters for head in heads}) == 1
    x, y = torch.randn(6, 5, 4).double(), torch.randn(6, 5, 4).double()
    stack = TaskStack([mt.Task(model, nn.functional.mse_loss, (x,), (y,), symmetries=heads)])
    seen: list[list[tuple[str, float]]] = []

    class Own(Teleporter, nn.Module):
        """Turns every head by a size of its own."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            Teleporter.__init__(self)

        def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[torch.Tensor, Any]:
            size = 0.1 * (1 + heads.index(symmetry))
            return size * torch.eye(2, dtype=torch.float64).expand(1, 2, 2) / 2**0.5, state

    meta = MetaOptimizer(shape_of(mode="tele", hidden=4, groups=("GL",)))
    meta.teleporter = Own()
    step = MetaOptimizer.step

    def noted(*arguments: Any, **keywords: Any) -> Any:
        taken = step(*arguments, **keywords)
        seen.append([(move.symmetry.key, float(move.size)) for move in taken.moves])
        return taken

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MetaOptimizer, "step", noted)
        Learned("learned/random-teleport", meta, "random").run(stack, 3)
    learned, drawn = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert sorted(size for _, size in learned[0]) == pytest.approx([0.1, 0.2])
    for before, after in zip(learned, drawn, strict=True):
        assert dict(after) == pytest.approx(dict(before))


def test_each_heads_random_gauge_has_its_own_size() -> None:
    from metateleport.evaluation.methods.learned import _place, _SameGauges, _Sizes
    from metateleport.gauges import Gauge

    heads = AttentionQK.of_heads(_Heads(), "query", "key", 2)
    unit = torch.eye(2).expand(1, 2, 2)
    gauges = [
        Gauge(head, side, head.parameters, unit, torch.tensor([size]))
        for head, side, size in zip(heads * 2, ("in", "in", "out", "out"), (0.1, 0.2, 0.3, 0.4), strict=True)
    ]
    sizes = [_Sizes({}, {_place(gauge): gauge.size for gauge in gauges})]
    drawn = _SameGauges(sizes, torch.Generator().manual_seed(0))(gauges)
    assert [float(gauge.size) for gauge in drawn] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert len({tuple(gauge.element.flatten().tolist()) for gauge in drawn}) == 4


def test_losses_that_were_measured_now_and_then_are_not_compared_at_equal_seconds() -> None:
    seeds = [{"learned": result(1, "stays", seed=seed), "learned__teleport_off": result(2)} for seed in (0, 1)]
    often = of_seeds(*seeds, adam=result(4))
    rarely = dataclasses.replace(often, every=2)
    for each, timed in ((often, True), (rarely, False)):
        report = report_of(each, against="adam")
        found = report["attribution"]["learned"]
        pairs = [*found["against"].values(), *found["baselines"].values(), *report["against"]["others"].values()]
        pairs += [pair["meta_seeds"] for pair in pairs if "meta_seeds" in pair]
        assert len(pairs) > 4
        assert all(("seconds" in pair) == timed for pair in pairs)
        assert ("measured every 2 evaluations" in found["in_words"]) == (not timed)
    assert found["in_words"].count("equal seconds") == 1
