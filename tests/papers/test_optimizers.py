"""The experiment `optimizers`: equal starts, honest claims, and what its runs are made of."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import metateleport as mt
from metateleport.optim import AtSteps, Every
from metateleport.papers.experiments import ExperimentError, ExperimentResult, load_experiment
from metateleport.papers.experiments._optimizers_claims import REGIMES, along, claims
from metateleport.papers.experiments.contenders import OPTIMIZERS, best_step_size, require
from metateleport.papers.experiments.courses import follow
from metateleport.papers.experiments.intervals import bootstrap, median_interval
from metateleport.papers.experiments.optimizers import FAMILIES, Optimizers
from metateleport.papers.experiments.ways import ONCE, PLAIN, THRICE, WHEN, Method, batch_pairs, rescalings
from metateleport.teleporters import LevelSetTeleporter, TrustRegion

pytestmark = pytest.mark.slow(seconds=3)

STEPS = 10


@pytest.fixture(scope="module")
def result() -> ExperimentResult:
    pytest.importorskip("sklearn")
    pytest.importorskip("mlxtend")
    return Optimizers(runs=2, steps=STEPS, tuning=1, ascent=3, only="sgd").run(seed=1)


def courses_of(result: ExperimentResult) -> list[Mapping[str, Any]]:
    """Of every data set and step size, what each method did."""
    data = result.results["data"]
    return [data[family]["sgd"]["courses"][regime] for family in FAMILIES for regime in REGIMES]


@pytest.mark.slow(seconds=8)
def test_all_start_alike_and_a_late_teleport_changes_nothing_before_it(result: ExperimentResult) -> None:
    for courses in courses_of(result):
        plain = courses[PLAIN]
        for name, course in courses.items():
            for what in ("training", "held_out"):
                assert [run[0] for run in course[what]] == [run[0] for run in plain[what]], name
        if "ascent, rescaling, late" not in courses:
            continue
        for name in (each for each in courses if each.endswith("late")):
            half = STEPS // 2 + 1
            assert [run[:half] for run in courses[name]["training"]] == [run[:half] for run in plain["training"]]
            assert [run[half:] for run in courses[name]["training"]] != [run[half:] for run in plain["training"]]


def test_every_way_is_tried_at_its_times_and_step_sizes(result: ExperimentResult) -> None:
    early = {PLAIN, *(f"{way}, early" for way in (*THRICE, *ONCE))}
    for family in FAMILIES:
        courses = result.results["data"][family]["sgd"]["courses"]
        assert set(courses["source"]) == set(courses["own"]) == early
        assert set(courses["plain"]) == early | {f"{way}, {when}" for way in THRICE for when in WHEN}
        # At equal step sizes a run is the same in both regimes.
        steps = result.results["data"][family]["sgd"]["step_sizes"]
        assert set(steps) == early | {"source"}
        assert courses["own"][PLAIN] == courses["plain"][PLAIN]


def test_teleports_move_at_their_times_and_are_paid_for(result: ExperimentResult) -> None:
    for courses in courses_of(result):
        for name, course in courses.items():
            moved = course["moved"]
            if name == "level set, early":
                # It may find no way on.
                assert [count + refused <= 1 for count, refused in zip(moved, course["refused"], strict=True)]
            else:
                assert moved == [0, 0] if name == PLAIN else min(moved) >= 1, name
            assert name.endswith("often") or max(moved) <= 1
            for size, count in zip(course["size"], moved, strict=True):
                assert (size > 0) is (count > 0)
            if "rescaling" in name:
                assert course["jump"] == pytest.approx([1, 1], rel=1e-5)
            for spent, training in zip(course["evaluations"], course["training"], strict=True):
                assert spent == sorted(spent)
                if training[-1] < 1e300:
                    assert (spent[-1] == STEPS) is (name == PLAIN)
            assert course["seconds"] == sorted(course["seconds"])
            if name.startswith("ascent") and name.endswith("early"):
                assert min(course["growth"]) > 1


def test_the_result_is_plain_and_names_every_claim(result: ExperimentResult, tmp_path: Path) -> None:
    result.write(tmp_path / "optimizers.json")
    found = json.loads((tmp_path / "optimizers.json").read_text())
    assert found["experiment"] == "optimizers"
    words = [claim["claim"] for claim in found["claims"]]
    assert len(words) == len(set(words)) == len(REGIMES) * (1 + 4 + 2 + 1) + 4 + 2 * len(ONCE) + 1
    for claim in found["claims"]:
        low, high = claim["interval"]
        below = True if high < 1 else False if low > 1 else None
        assert claim["holds"] is (below if "raises" not in claim["claim"] or below is None else not below)
    Optimizers().plot(result, tmp_path / "optimizers.png")
    assert (tmp_path / "optimizers.png").stat().st_size > 10_000


def test_equal_seeds_give_equal_losses(result: ExperimentResult) -> None:
    again = Optimizers(runs=2, steps=STEPS, tuning=1, ascent=3, only="sgd")
    ready = again._ready(again._family("digits").task(1, "held-out", 1))
    found = again._follow(ready, "sgd", OPTIMIZERS["sgd"].source, again.methods["ascent, batch form, early"])
    course = result.results["data"]["digits"]["sgd"]["courses"]["source"]["ascent, batch form, early"]
    assert found.training == pytest.approx(course["training"][1], rel=1e-5)
    assert found.evaluations == pytest.approx(course["evaluations"][1], rel=1e-5)


# --- the claims, on runs that are made up -------------------------------------------------------------------------


def made_up(factors: Mapping[str, float], spread: float = 0.0) -> dict[str, Any]:
    """Runs whose losses are those of the plain one times a factor, for each method."""
    draws = np.random.default_rng(0)

    def course(name: str) -> dict[str, Any]:
        factor = next((value for key, value in factors.items() if key in name), 1.0)
        runs = [
            [1.0, *(factor * float(np.exp(spread * draws.standard_normal())) * 0.9**step for step in range(1, 11))]
            for _ in range(5)
        ]
        clock = list(np.arange(11.0))
        return {"training": runs, "held_out": runs, "seconds": clock, "evaluations": [clock] * 5, "jump": [1.0] * 5}

    def courses(optimizer: str) -> dict[str, Any]:
        known = [regime for regime in REGIMES if regime != "source" or OPTIMIZERS[optimizer].source is not None]
        return {regime: {name: course(name) for name in Optimizers().methods} for regime in known}

    return {family: {optimizer: {"courses": courses(optimizer)} for optimizer in OPTIMIZERS} for family in FAMILIES}


def verdicts(data: dict[str, Any]) -> dict[str, bool | None]:
    return {claim.claim: claim.holds for claim in claims(data)}


def test_claims_follow_the_losses() -> None:
    better, worse = verdicts(made_up({"ascent": 0.5})), verdicts(made_up({"ascent": 2.0}))
    ways = tuple(ONCE)
    early = [name for name in better if "early teleport lowers" in name and not any(way in name for way in ways)]
    assert len(early) == 3 * 5 + 2 * 4 + 4 * 3 + 2 * 3
    assert all(better[name] is True and worse[name] is False for name in early)
    assert all(holds is True for name, holds in better.items() if "than a random element" in name)
    # Where nothing differs nothing is decided.
    assert set(verdicts(made_up({})).values()) == {None}
    assert set(verdicts(made_up({}, spread=0.3)).values()) <= {None, True, False}
    late = verdicts(made_up({"late": 0.5, "often": 2.0}))
    assert {holds for name, holds in late.items() if "teleporting late" in name} == {True}
    assert {holds for name, holds in late.items() if "teleporting often" in name} == {False}


def test_only_the_optimizer_that_gains_is_said_to() -> None:
    data = made_up({})
    data["digits"]["adam"] = copy.deepcopy(made_up({"ascent": 0.5})["digits"]["adam"])
    data["mnist_digits"]["adam"] = copy.deepcopy(made_up({"ascent": 0.5})["mnist_digits"]["adam"])
    gained = {name for name, holds in verdicts(data).items() if holds is True}
    assert len(gained) == 3
    assert all("adam's training loss" in name for name in gained)


def test_what_a_teleport_costs_counts_at_equal_evaluations_and_seconds() -> None:
    """Half the loss at each step, and twice as late: at equal cost nothing is gained, and at more there is a loss."""
    for clock in ("evaluations", "seconds"):
        data = made_up({"ascent": 0.5})
        for family, optimizer in itertools.product(data.values(), OPTIMIZERS):
            for courses in family[optimizer]["courses"].values():
                course = courses["ascent, batch form, early"]
                times = [0.0, *(100 + 10 * step for step in range(10))]
                course[clock] = times if clock == "seconds" else [times] * 5
        found = verdicts(data)
        word = "equal evaluations" if clock == "evaluations" else "equal seconds"
        at_equal = {holds for name, holds in found.items() if word in name}
        assert at_equal == {False}
        assert {holds for name, holds in found.items() if "adam's training loss" in name} == {True}


def test_a_jump_of_the_held_out_loss_is_told() -> None:
    data = made_up({})
    assert [claim.holds for claim in claims(data) if "raises" in claim.claim] == [None]
    for family, optimizer in itertools.product(data.values(), OPTIMIZERS):
        family[optimizer]["courses"]["plain"]["ascent, batch form, late"]["jump"] = [1.2, 1.1, 1.3, 1.2, 1.1]
    assert [claim.holds for claim in claims(data) if "raises" in claim.claim] == [True]


@pytest.mark.parametrize(("best", "start", "tried"), [(1.0, 1.0, 3), (27.0, 1.0, 6), (1 / 81, 1.0, 7)])
def test_the_search_for_a_step_size_goes_on_at_its_end(best: float, start: float, tried: int) -> None:
    seen = []

    def score(step: float) -> float:
        seen.append(step)
        return abs(float(np.log(step / best)))

    assert best_step_size(score, start) == pytest.approx(best)
    assert len(seen) == len(set(seen)) == tried


def test_the_search_ends_where_a_larger_step_is_always_better() -> None:
    assert best_step_size(lambda step: -step, 1.0) == pytest.approx(3.0**6)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pytorch_optimizer" else object())
    require(["sgd", "adam"])
    with pytest.raises(ExperimentError, match=r"lion, soap: needs pytorch_optimizer, pip install"):
        require(["sgd", "lion", "soap"])


def test_the_interval_of_a_median_is_that_of_the_bootstrap() -> None:
    rows = np.random.default_rng(0).standard_normal((10, 3))
    assert median_interval(rows, seed=3, draws=200) == bootstrap(rows, np.median, seed=3, draws=200)


def test_what_diverges_counts_as_ten_times_the_start() -> None:
    assert along([2.0, 1e300, 1e300]) == pytest.approx(20.0)
    assert along([[1.0, 0.5, 0.5], [1.0, 0.25, 1.0]]) == pytest.approx([0.5, 0.5])


# --- runs --------------------------------------------------------------------------------------------------------


def small_task() -> mt.Task:
    source = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3))
    inputs, targets = torch.randn(30, 6, generator=source), torch.randint(3, (30,), generator=source)
    return mt.Task(
        model.double(),
        nn.functional.cross_entropy,
        (inputs.double(),),
        (targets,),
        batch_size=6,
        held_out=((inputs.double()[:10],), (targets[:10],)),
    )


def run(step_size: float, method: Method, steps: int = 6) -> Any:
    task = small_task()
    batches = [task.batch(step) for step in range(steps)]
    return follow(task, task.training, batches, OPTIMIZERS["sgd"], step_size, method, [0, steps // 2, steps])


def test_a_run_is_that_of_a_plain_loop() -> None:
    course, task = run(0.1, Method()), small_task()
    optimizer = torch.optim.SGD(task.model.parameters(), 0.1)
    for step in range(6):
        optimizer.zero_grad()
        inputs, targets = task.batch(step)
        task.loss(task.model(*inputs), *targets).backward()
        optimizer.step()
    inputs, targets = task.training
    with torch.no_grad():
        assert course.training[-1] == float(task.loss(task.model(*inputs), *targets))
    assert course.evaluations == [0, 3, 6]
    assert (course.moved, course.refused, course.failures, course.growth) == (0, 0, {}, 1.0)
    assert (course.size, course.jump) == (0.0, 1.0)


def test_a_teleport_between_steps_keeps_its_loss_and_starts_the_optimizer_anew() -> None:
    """Teleporters that evaluate the loss at other weights: the step after them is that of a new optimizer."""
    task, step = small_task(), 3
    batches = [task.batch(number) for number in range(step + 1)]
    method = Method(lambda _: LevelSetTeleporter(steps=3), schedule=AtSteps([step]))
    contender = OPTIMIZERS["adam"]
    course = follow(task, task.training, batches, contender, 1e-2, method, [0, step, step + 1])
    assert course.moved == 1
    assert course.growth > 1
    other = small_task()
    optimizer = contender.make(other.model, 1e-2)
    for number in range(step + 1):
        inputs, targets = batches[number]
        if number == step:
            report = mt.teleport(
                other.model, LevelSetTeleporter(steps=3), inputs, lambda out: other.loss(out, *batches[step][1])
            )
            assert report.loss_after == pytest.approx(report.loss_before)
            optimizer = contender.make(other.model, 1e-2)
        optimizer.zero_grad()
        other.loss(other.model(*inputs), *targets).backward()
        optimizer.step()
    with torch.no_grad():
        inputs, targets = other.training
        assert course.training[-1] == pytest.approx(float(other.loss(other.model(*inputs), *targets)), rel=1e-9)
    assert course.evaluations[-1] > step + 1 + 3 * 2


def test_a_run_that_diverges_stops_and_stands_at_the_largest_number() -> None:
    course = run(1e200, Method())
    assert course.training[1:] == [1e300, 1e300]
    assert course.evaluations == [0, 3, 3]


def test_refused_teleports_and_failures_are_counted() -> None:
    refusing = TrustRegion(max_size=0.1)
    for symmetries in (rescalings, batch_pairs):
        method = Method(lambda seed: mt.RandomTeleporter(1.0, seed, trust_region=refusing), symmetries, Every(2))
        course = run(0.1, method)
        assert (course.moved, course.refused) == (0, 3)
        assert course.failures == {"unstable element": 3}
        method = dataclasses.replace(method, teleporter=lambda seed: mt.RandomTeleporter(0.1, seed))
        course = run(0.1, method)
        assert (course.moved, course.refused) == (3, 0)
        assert course.evaluations[-1] > 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": "1"}, "at least two runs"),
        ({"steps": "9"}, "steps=9 has to be at least 10"),
        ({"reach": "0"}, "reach is a norm"),
        ({"depth": "2"}, "two hidden layers"),
        ({"batch": "33"}, "batch=33 and hidden=32"),
        ({"only": "sgdm"}, "only"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_experiment("optimizers", settings)
