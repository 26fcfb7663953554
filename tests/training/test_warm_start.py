"""Meta-training that starts from a checkpoint: it begins where that one ended, and says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import family_of
from training_cases import tiny as config

from metateleport.checkpoint import load_checkpoint
from metateleport.checkpoint.seeds import combine_meta_seeds, each_meta_seed
from metateleport.learned import MetaOptimizer
from metateleport.training import Interrupted, Progression, Recipe, TrainingError, train
from metateleport.training.distributed import ALONE
from metateleport.training.train import _trainers


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    paths = [train(config(seed=seed, lr=0.05), folder / f"s{seed}") for seed in (1, 2)]
    return combine_meta_seeds(paths, folder / "both")


def started(settings: Recipe) -> dict[str, MetaOptimizer]:
    return {name: trainer.meta for name, trainer in _trainers(settings, family_of(settings), ALONE).items()}


@pytest.mark.parametrize("seed", [1, 2])
def test_it_starts_from_the_networks_of_the_same_meta_seed(source: Path, seed: int) -> None:
    metas = started(config(start_from=str(source), seed=seed))
    (own,) = [
        each
        for each in each_meta_seed(load_checkpoint(source))
        if each.card["training"]["recipe"]["outer"]["seed"] == seed
    ]
    assert own.step_only is not None
    for meta, expected in ((metas["learned"], own.learned), (metas["step-only"], own.step_only)):
        for name, value in expected.state_dict().items():
            assert torch.equal(meta.state_dict()[name], value)


def test_another_seed_starts_from_the_best(source: Path) -> None:
    metas, best = started(config(start_from=str(source), seed=7)), load_checkpoint(source).learned
    assert all(torch.equal(metas["learned"].state_dict()[name], value) for name, value in best.state_dict().items())


def test_secants_are_trusted_as_at_the_start_and_the_rest_is_the_checkpoint_s(source: Path) -> None:
    settings = config(start_from=str(source), seed=1, secants=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fresh = MetaOptimizer(started(settings)["learned"].config).rule.head  # type: ignore[union-attr]
    head, known = (
        meta.rule.head  # type: ignore[union-attr]
        for meta in (started(settings)["learned"], started(config(start_from=str(source), seed=1))["learned"])
    )
    assert torch.equal(head.bias[:-1], known.bias)
    assert torch.equal(head.weight[:-1], known.weight)
    assert torch.equal(head.weight[-1], fresh.weight[-1])
    assert not torch.equal(head.weight[:-1], fresh.weight[:-1])


def test_the_rate_of_cooling_may_be_another(tmp_path: Path) -> None:
    source = train(config(cooling=0.1), tmp_path / "source")
    metas = started(config(start_from=str(source), cooling=0.7))
    known = load_checkpoint(source).learned
    assert metas["learned"].rule.cooling == 0.7  # type: ignore[union-attr]
    assert all(torch.equal(metas["learned"].state_dict()[name], value) for name, value in known.state_dict().items())
    with pytest.raises(TrainingError, match=r"have rule\.cooling = 0\.1, and these 0\.0"):
        train(config(start_from=str(source)), tmp_path / "none")


def test_the_adaptive_update_may_begin_to_cool_down(tmp_path: Path) -> None:
    shape = {"mode": "update", "update": "adaptive"}
    source = train(config(**shape), tmp_path / "source")
    rule = started(config(**shape, start_from=str(source), cooling=0.7))["learned"].rule
    assert rule.cooling == 0.7  # type: ignore[union-attr]
    known = load_checkpoint(source).learned.rule
    assert torch.equal(rule.head.bias, known.head.bias)  # type: ignore[union-attr]


def test_where_the_rate_is_learned_cooling_cannot_begin(tmp_path: Path) -> None:
    shape = {"mode": "lr"}
    source = train(config(**shape), tmp_path / "source")
    with pytest.raises(TrainingError, match=r"have rule\.cooling = 0\.0, and these 0\.7"):
        train(config(**shape, start_from=str(source), cooling=0.7), tmp_path / "none")


def test_the_metric_s_memory_may_be_another(tmp_path: Path) -> None:
    shape = {"stays": False, "gauge": "exact"}
    source = train(config(**shape), tmp_path / "source")
    gauge = started(config(**shape, start_from=str(source), metric_memory=0.3))["learned"].gauge
    known = load_checkpoint(source).learned.gauge
    assert gauge is not None
    assert known is not None
    assert (known.metric_memory, gauge.metric_memory) == (0.95, 0.3)
    assert all(torch.equal(gauge.state_dict()[name], value) for name, value in known.state_dict().items())


def test_it_is_trained_on_and_its_card_says_where_from(source: Path, tmp_path: Path) -> None:
    settings = config(start_from=str(source), seed=1, settings={"width": 4, "activation": "identity"})
    path = train(settings, tmp_path / "on")
    assert load_checkpoint(path).card["training"]["recipe"]["outer"]["start_from"] == str(source)

    def interrupt(name: str, progression: Progression, _: float) -> None:
        if name == "learned" and progression.meta_step == 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(settings, tmp_path / "part", report=interrupt)
    resumed = train(settings, tmp_path / "part", resume=True)
    assert (resumed / "weights.safetensors").read_bytes() == (path / "weights.safetensors").read_bytes()


def test_it_never_ends_worse_than_it_started(source: Path, tmp_path: Path) -> None:
    """Steps of this size lead nowhere: what is kept is what it started from."""
    path = train(config(start_from=str(source), seed=1, lr=1e3, validation_every=1), tmp_path / "on")
    run = load_checkpoint(path).card["training"]["runs"]["learned"]
    assert [step for step, _ in run["validations"]] == [0, 1, 2]
    assert run["chosen_at"] == 0
    found, expected = load_checkpoint(path).learned, started(config(start_from=str(source), seed=1))["learned"]
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 5}, r"have rule\.hidden = 3, and these 5"),
        ({"mode": "update+tele"}, "have rule.kind = 'lr', and these 'coordinate'"),
        ({"start_from": "nowhere"}, "cannot start from nowhere: there is no checkpoint"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(
    source: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        train(config(**{"start_from": str(source), **changes}), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_twin_starts_no_twin(tmp_path: Path) -> None:
    alone = train(config(mode="tele"), tmp_path / "alone")
    with pytest.raises(TrainingError, match=r"have rule\.kind = 'base', and these 'lr'"):
        train(config(start_from=str(alone)), tmp_path / "c")
