"""The price on teleports: what it measures, that it reaches the gate, closes it, and that none changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from training_cases import family_of
from training_cases import small as config

import metateleport as mt
from metateleport import cli
from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal
from metateleport.learned import MetaOptimizer
from metateleport.learned.gauge import LearnedGauge
from metateleport.learned.teleporter import LearnedTeleporter
from metateleport.settings import SettingsError
from metateleport.training import Interrupted, MetaTrainer, Recipe, TrainingError, Unroll, train
from metateleport.training.cost import openness

GROUPS = [GeneralLinear(5), PositiveDiagonal(5), Orthogonal(5)]
KINDS: dict[str, dict[str, Any]] = {
    "stays": {},
    "gauge": {"stays": False, "gauge": "exact"},
    "both": {"gauge": "exact"},
}


def trainer(settings: Recipe) -> MetaTrainer:
    torch.manual_seed(0)
    return MetaTrainer(settings, family_of(settings), MetaOptimizer(settings.networks(("GL",))))


def weights(path: Path) -> bytes:
    return (path / "weights.safetensors").read_bytes()


def drawn(group: Group, size: float, count: int = 8) -> torch.Tensor:
    return group.random_generator(count, size=size, seed=0, dtype=torch.float64)


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_openness_is_between_zero_and_one_and_grows_along_a_way_from_the_identity(group: Group) -> None:
    generator = drawn(group, 1.0)
    along = torch.stack([openness(group, group.exp(scale * generator)) for scale in (0.0, 1e-3, 0.1, 0.5, 1.0)])
    assert torch.equal(along[0], torch.zeros(8, dtype=torch.float64))
    assert bool((along.diff(dim=0) > 0).all())
    assert bool((along < 1).all())


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_openness_is_that_of_the_inverse_and_by_unit_the_generator_s_norm(group: Group) -> None:
    far = group.exp(drawn(group, 2.0))
    assert torch.allclose(openness(group, far), openness(group, group.inverse(far)), rtol=1e-10)
    near = openness(group, group.exp(drawn(group, 1e-5)))
    assert torch.allclose(near, torch.full_like(near, 1e-5 / math.sqrt(5)), rtol=1e-4)


def test_openness_does_not_depend_on_the_width_of_a_repeated_element() -> None:
    small = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    large = torch.block_diag(*[small] * 7)
    assert torch.allclose(openness(GeneralLinear(2), small), openness(GeneralLinear(14), large))


def test_the_gradient_at_the_identity_is_zero_and_elsewhere_that_of_the_formula() -> None:
    group = GeneralLinear(3)
    one = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).clone().requires_grad_()
    (found,) = torch.autograd.grad(openness(group, one).sum(), one)
    assert torch.equal(found, torch.zeros_like(found))
    element = group.exp(group.random_generator(2, size=0.7, seed=1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: openness(group, each), element)


@pytest.mark.parametrize("kind", KINDS)
def test_the_price_s_gradient_reaches_the_gate(kind: str) -> None:
    learning = trainer(config(**KINDS[kind]))
    stack = family_of(config()).stack(range(3))

    def opened(priced: bool) -> torch.Tensor:
        unroll = Unroll(stack, learning.meta, priced=priced)
        unroll.window(3)
        assert unroll.openness is not None
        assert unroll.openness.shape == (3, 3)
        assert bool(((unroll.openness >= 0) & (unroll.openness < 1)).all())
        return unroll.openness.mean()

    assert not opened(priced=False).requires_grad
    opened(priced=True).backward()
    heads = []
    for part in (learning.meta.teleporter, learning.meta.gauge):
        if isinstance(part, LearnedTeleporter | LearnedGauge):
            heads.append(part.networks["GL"].head)
    assert heads
    for head in heads:
        # The gate is the last output; opening it moves the element further from the identity.
        assert float(head.bias.grad[-1]) > 0


def test_without_group_elements_there_is_no_openness() -> None:
    learning = trainer(config(mode="lr"))
    learning.run()
    assert learning.progression.openness == []
    unroll = Unroll(family_of(config()).stack(range(2)), learning.meta)
    unroll.window(2, track=False)
    assert unroll.openness is None


@pytest.mark.parametrize("kind", KINDS)
def test_no_price_takes_the_same_meta_steps_as_a_meta_loss_without_openness(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = trainer(config(**KINDS[kind]))
    learned.run()
    assert len(learned.progression.openness) == 6
    none = lambda _, like: (torch.zeros_like(like), torch.zeros_like(like))  # noqa: E731
    monkeypatch.setattr("metateleport.training.estimators.openness_sum", none)
    before = trainer(config(**KINDS[kind]))
    before.run()
    assert before.progression.openness == []
    for (name, value), old in zip(learned.meta.state_dict().items(), before.meta.state_dict().values(), strict=True):
        assert torch.equal(value, old), name
    assert learned.progression.validations == before.progression.validations


@pytest.mark.parametrize("kind", ["stays", "gauge"])
@pytest.mark.slow(seconds=2)
def test_a_large_price_closes_what_is_free_to_stay_open(kind: str) -> None:
    long = {"meta_steps": 30, "unroll": 2, "horizon": 2, "lr": 1e-1, "validation_every": 30, **KINDS[kind]}
    free, priced = trainer(config(**long)), trainer(config(**long, teleport_cost=100.0))
    for each in (free, priced):
        each.run()
    begin, end = priced.progression.openness[0], priced.progression.openness[-1]
    assert begin == free.progression.openness[0]
    assert end < begin / 3
    assert end < free.progression.openness[-1] / 3


def test_the_score_that_networks_are_chosen_by_has_the_price_in_it() -> None:
    free, priced = trainer(config()), trainer(config(teleport_cost=7.0))
    score = free.validation_score()
    assert free.validation_openness > 0
    assert priced.validation_score() == pytest.approx(score + 7.0 * free.validation_openness, rel=1e-6)


def test_it_is_in_the_card_and_in_what_a_resumption_needs(tmp_path: Path) -> None:
    settings = config(teleport_cost=2.0)
    expected = weights(train(settings, tmp_path / "whole"))
    assert expected != weights(train(config(), tmp_path / "free"))

    def interrupt(_: str, done: Any, __: float) -> None:
        if done.meta_step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(settings, tmp_path / "part", report=interrupt)
    with pytest.raises(TrainingError, match=r"outer\.teleport_cost = 2\.0, not 0\.0"):
        train(config(), tmp_path / "part", resume=True)
    path = train(settings, tmp_path / "part", resume=True)
    assert weights(path) == expected
    training = mt.load_checkpoint(path).card["training"]
    assert training["recipe"]["outer"]["teleport_cost"] == 2.0
    assert 0 < training["runs"]["learned"]["openness"] < 1
    assert "openness" not in training["runs"]["step-only"]


def test_a_training_begun_before_there_was_a_price_goes_on_without_one(tmp_path: Path) -> None:
    def interrupt(_: str, done: Any, __: float) -> None:
        if done.meta_step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(config(), tmp_path / "a", report=interrupt)
    path = tmp_path / "a.unfinished" / "state.safetensors"
    with safe_open(path, "pt") as file:
        tensors, state = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118
    del state["recipe"]["outer"]["teleport_cost"]
    save_file(tensors, path, {"state": json.dumps(state)})
    with pytest.raises(TrainingError, match=r"teleport_cost = 0\.0, not 1\.0"):
        train(config(teleport_cost=1.0), tmp_path / "a", resume=True)
    assert train(config(), tmp_path / "a", resume=True).is_dir()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teleport_cost": -1.0}, "teleport_cost has to be a number that is not negative, not -1.0"),
        ({"teleport_cost": math.nan}, "not negative, not nan"),
        ({"teleport_cost": math.inf}, "not negative, not inf"),
        ({"teleport_cost": 1.0, "mode": "lr"}, "teleport_cost = 1 .* add teleport or gauge"),
    ],
)
def test_bad_prices(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        config(**changes)
    assert config().outer.teleport_cost == 0.0


def test_the_command_takes_it_and_tracks_openness_and_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []

    class Run:
        id, experiment, key = "1", "leaky_mlp", "a"

        def __init__(self, _: str, __: str, parameters: dict[str, Any], *rest: Any, **more: Any) -> None:
            assert parameters["outer.teleport_cost"] == 0.5

        def __enter__(self) -> Run:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def log(self, metrics: dict[str, float], step: int) -> None:
            logged.append(metrics)

        def artifact(self, _: Path, under: str | None = None) -> None: ...

        def tag(self, _: dict[str, str]) -> None: ...

        def note(self, _: str) -> None: ...

        def model(self, _: Path, step: int) -> None: ...

    monkeypatch.setattr("metateleport.tracking.Run", Run)
    monkeypatch.chdir(tmp_path)
    sizes = "family.width=3 outer.meta_steps=2 outer.tasks=2 outer.unroll=2 outer.horizon=2 validation.every=2"
    sets = ["--set", *f"{sizes} outer.teleport_cost=0.5".split()]
    assert cli.main(["train", "leaky_mlp", *sets, "--out", "a"]) == 0
    learned = [each for each in logged if "learned/meta_loss" in each]
    assert len(learned) == 2
    for each in learned:
        assert 0 < each["learned/openness"] < 1
        assert each["learned/teleport_price"] == pytest.approx(0.5 * each["learned/openness"])
    assert not any("step-only/openness" in each for each in logged)
    assert cli.main(["train", "leaky_mlp", "--set", *sizes.split(), "outer.teleport_cost=-1", "--out", "b"]) == 2
    assert not Path("b").exists()
