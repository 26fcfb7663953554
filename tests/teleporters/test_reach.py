"""The trust region over the orbit: all teleports together lead no further than the bound, and back is always open."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learned_cases import shape_of
from symmetry_cases import LEARNED, Case, case
from torch import Tensor, nn
from training_cases import tiny

import metateleport as mt
from metateleport.checkpoint import load_checkpoint
from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal
from metateleport.learned import LearnedTeleporter, MetaOptimizer
from metateleport.learned.parts import TeleportSettings
from metateleport.settings import SettingsError
from metateleport.teleporters import TrustRegion, travel
from metateleport.teleporters.reach import stretch, within_reach
from metateleport.training import train

GROUPS = [GeneralLinear(4), PositiveDiagonal(4), Orthogonal(4)]
BOUND = 0.7


def generators(group: Group, seed: int, size: float) -> Tensor:
    return group.random_generator(3, size=size, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_a_stretch_is_a_norm_on_the_group(group: Group) -> None:
    one, other = (group.exp(generators(group, seed, 2.0)) for seed in (0, 1))
    here, there = stretch(group, one), stretch(group, other)
    assert torch.allclose(stretch(group, group.inverse(one)), here)
    assert bool((stretch(group, group.compose(one, other)) <= here + there + 1e-12).all())
    assert torch.allclose(stretch(group, group.identity(3, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))
    assert bool((here > 0.1).all()) == (group.name != "O")


def test_a_scaling_as_a_whole_is_a_stretch_though_its_condition_is_one() -> None:
    for group in GROUPS[:2]:
        element = 5 * group.identity(dtype=torch.float64)
        assert float(group.condition(element)) == pytest.approx(1.0)
        assert float(stretch(group, element)) == pytest.approx(math.log(5))


@pytest.mark.parametrize("group", GROUPS[:2], ids=repr)
def test_what_is_not_finite_or_singular_is_infinitely_far(group: Group) -> None:
    element = group.identity(2, dtype=torch.float64).clone()
    element[0] = math.nan
    element[1] = 0.0
    assert stretch(group, element).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("group", GROUPS, ids=repr)
@given(seed=st.integers(0, 10**6), size=st.floats(0.0, 5.0), before=st.floats(0.0, 3.0))
def test_no_generator_leads_beyond_the_bound(group: Group, seed: int, size: float, before: float) -> None:
    """Nor further out, from where a model is beyond it already."""
    reached = group.exp(generators(group, seed, before))
    kept = within_reach(group, generators(group, seed + 1, size), reached, BOUND)
    arrived = stretch(group, group.compose(group.exp(kept), reached))
    assert bool((arrived <= stretch(group, reached).clamp_min(BOUND) + 1e-9).all())


@pytest.mark.parametrize("group", GROUPS[:2], ids=repr)
def test_within_the_bound_and_on_the_way_back_nothing_is_changed(group: Group) -> None:
    out = generators(group, 0, 1.0)
    far = BOUND / torch.linalg.matrix_norm(torch.diag_embed(out) if group.name == "diagonal" else out, 2)
    out = out * group.expand(far)
    short = 0.5 * out
    identity = group.identity(3, dtype=torch.float64)
    assert torch.equal(within_reach(group, short, identity, BOUND), short)
    edge = group.exp(2 * out)
    assert torch.allclose(within_reach(group, -short, edge, BOUND), -short)
    assert float(within_reach(group, short, edge, BOUND).abs().max()) < float(short.abs().max())


def test_of_a_diagonal_each_unit_has_its_own_bound_and_its_own_derivative() -> None:
    group = PositiveDiagonal(3)
    generator = torch.tensor([0.5, 0.5, -0.2], dtype=torch.float64, requires_grad=True)
    kept = within_reach(group, generator, torch.tensor([0.6, 0.0, -0.6], dtype=torch.float64).exp(), BOUND)
    assert torch.allclose(kept, torch.tensor([0.1, 0.5, -0.1], dtype=torch.float64))
    (slope,) = torch.autograd.grad(kept.sum(), generator)
    assert slope.tolist() == [0.0, 1.0, 0.0]


def restless(max_stretch: float | None, hidden: int = 6) -> LearnedTeleporter:
    """A teleporter that goes on and on in one direction."""
    torch.manual_seed(2)
    made = LearnedTeleporter(hidden=hidden, max_stretch=max_stretch).double()
    with torch.no_grad():
        for network in made.networks.values():
            network.head.weight.mul_(0.1)
            network.head.bias.copy_(torch.linspace(0.02, 0.1, len(network.head.bias)))
    return made


@pytest.mark.parametrize("each", [each for each in LEARNED if each.name != "quadratic"], ids=str)
def test_the_way_of_many_teleports_ends_within_the_bound(each: Case) -> None:
    """The element remembered is the one that leads from where the model began to where it is."""
    problem = each.problem()
    ends = {}
    for bound in (None, 1.5):
        chosen, point, state = restless(bound), problem.point(), None
        places = {each.key: each.group.identity(dtype=torch.float64) for each in problem.symmetries}
        with torch.no_grad():
            for _ in range(8):
                point, moves, state = travel(chosen, point, problem.symmetries, state)
                for move in moves:
                    key, group = move.symmetry.key, move.symmetry.group
                    places[key] = group.compose(move.element, places[key])
        groups = {each.key: each.group for each in problem.symmetries}
        ends[bound] = max(float(stretch(groups[key], place)) for key, place in places.items())
        assert ("reached" in state) == (bound is not None)
        for key, place in places.items() if bound else ():
            assert torch.allclose(state["reached"][key], place)
    assert ends[None] > math.log(1.5)
    assert 0.5 * math.log(1.5) < ends[1.5] <= math.log(1.5) + 1e-9


def test_a_step_taken_back_takes_its_teleport_back() -> None:
    problem = case("rescaling").problem()
    stacked = problem.point().map(lambda value: torch.stack((value, value)))
    chosen = restless(3.0)
    (symmetry,) = problem.symmetries
    with torch.no_grad():
        state = chosen.initial_state(stacked, problem.symmetries)
        progress = state["progress"]
        first, _, state = travel(chosen, stacked, problem.symmetries, state)
        after_one = state["reached"][symmetry.key]
        accepted = torch.tensor([True, True])
        _, _, state = travel(chosen, first, problem.symmetries, chosen.judged(state, progress, accepted))
        after_two = state["reached"][symmetry.key]
        after = chosen.judged(state, progress, torch.tensor([True, False]))
    assert not torch.allclose(after_one, after_two)
    assert torch.equal(after["reached"][symmetry.key][0], after_two[0])
    assert torch.equal(after["reached"][symmetry.key][1], after_one[1])


def model_and_data() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.1), nn.Linear(5, 3)).double()
    return model, torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)


def steps(model: nn.Module, optimizer: mt.LearnedOptimizer, x: Tensor, y: Tensor, count: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)


def test_an_optimizer_keeps_the_bound_and_knows_it_again_when_it_goes_on() -> None:
    """With a step of no length the weights move along the orbit alone, and tell where on it they are."""
    model, x, y = model_and_data()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    meta = MetaOptimizer(shape_of(mode="tele", hidden=6, base_lr=1e-300, max_stretch=1.5))
    meta.teleporter = restless(1.5)
    optimizer = mt.LearnedOptimizer(model, meta, deterministic=True)
    steps(model, optimizer, x, y, 4)
    again = copy.deepcopy(model)
    resumed = mt.LearnedOptimizer(again, meta, deterministic=True)
    resumed.load_state_dict(optimizer.state_dict())
    steps(model, optimizer, x, y, 6)
    steps(again, resumed, x, y, 6)
    for name, value in model.named_parameters():
        assert torch.allclose(value, dict(again.named_parameters())[name])
    factors = (dict(model.named_parameters())["0.weight"] / start["0.weight"]).detach()
    assert float(factors.log().abs().max()) <= math.log(1.5) + 1e-9
    assert float(factors.log().abs().max()) > 0.9 * math.log(1.5)


def test_an_optimizer_that_takes_a_step_back_is_where_it_was_on_the_orbit() -> None:
    model, x, y = model_and_data()
    meta = MetaOptimizer(shape_of(mode="tele", hidden=6, base_lr=10.0, max_stretch=3.0))
    meta.teleporter = restless(3.0)
    optimizer = mt.LearnedOptimizer(model, meta, deterministic=True)
    (symmetry,) = optimizer.symmetries
    departed = reached = symmetry.group.identity(1, dtype=torch.float64)
    verdicts = []
    for _ in range(8):
        steps(model, optimizer, x, y, 1)
        assert optimizer.last_step is not None
        assert optimizer.loop.state is not None
        verdicts.append(bool(optimizer.last_step.accepted))
        departed = reached if verdicts[-1] else departed
        (move,) = optimizer.last_step.moves
        reached = symmetry.group.compose(move.element, departed)
        assert torch.allclose(optimizer.loop.state.teleporter["reached"][symmetry.key], reached)
    assert set(verdicts) == {True, False}


@pytest.mark.parametrize("region", [TrustRegion(), TrustRegion(max_drift=0.0)])
def test_a_teleport_that_is_refused_leaves_the_model_where_it_was_on_its_orbit(region: TrustRegion) -> None:
    model, x, y = model_and_data()
    teleporter = restless(3.0)
    teleporter.trust_region = region
    optimizer = mt.TeleportingOptimizer(torch.optim.SGD(model.parameters(), lr=1e-300), model, teleporter, every=1)
    start = model[0].weight.detach().clone()  # type: ignore[operator,union-attr]
    steps(model, optimizer, x, y, 4)  # type: ignore[arg-type]
    assert optimizer.last_report is not None
    assert optimizer.last_report.accepted == (region.max_drift > 0)
    (place,) = optimizer.state_dict()["teleporting"]["state"]["reached"].values()
    assert torch.allclose(place[:, None] * start, model[0].weight.detach())  # type: ignore[operator,union-attr]
    assert bool((place != 1).any()) == (region.max_drift > 0)


def test_a_step_without_a_teleport_between_two_with_one_is_taken_back_rightly() -> None:
    """As where the gradients are not the last pass's: the optimizer then goes a step without the teleport."""
    problem = case("rescaling").problem()
    stacked = problem.point().map(lambda value: torch.stack((value, value)))
    (symmetry,) = problem.symmetries
    meta = MetaOptimizer(shape_of(mode="tele", hidden=6, base_lr=1e-300, max_stretch=3.0))
    meta.teleporter = restless(3.0)
    assert stacked.loss is not None
    worse = stacked.replace(loss=stacked.loss * torch.tensor([1.0, 9.0], dtype=torch.float64))
    places = []
    state = meta.initial_state(stacked, problem.symmetries)
    with torch.no_grad():
        for point, along in ((stacked, None), (worse, ()), (worse, ())):
            state = meta.step(point, problem.symmetries, state, along=along).state
            places.append(state.teleporter["reached"][symmetry.key])
    first, second, third = places
    assert not torch.allclose(first[0], torch.ones_like(first[0]))
    assert torch.equal(second[0], first[0])
    assert torch.equal(second[1], torch.ones_like(second[1]))
    assert torch.equal(third, second)


@pytest.mark.parametrize("value", [1.0, 0.5, math.inf, math.nan])
def test_a_bound_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="a factor above one"):
        LearnedTeleporter(max_stretch=value)
    with pytest.raises(SettingsError, match=r"teleport\.max_stretch has to be a number above 1"):
        tiny(max_stretch=value)


def test_the_flat_networks_have_no_bound() -> None:
    with pytest.raises(ValueError, match="do not know where on the orbit"):
        shape_of(shapes=(("0.weight", (2, 2)),), max_stretch=2.0)


def test_a_checkpoint_keeps_its_bound(tmp_path: Any) -> None:
    made = load_checkpoint(train(tiny(max_stretch=2.0), tmp_path / "a"))
    assert made.learned.config.teleport == TeleportSettings(3, 2.0)
    assert made.learned.teleporter.max_stretch == 2.0  # type: ignore[union-attr]
    assert mt.load(tmp_path / "a").max_stretch == 2.0  # type: ignore[attr-defined]
    # Another bound is no other network.
    further = load_checkpoint(train(tiny(max_stretch=3.0, start_from=str(tmp_path / "a")), tmp_path / "b"))
    assert further.learned.config.teleport == TeleportSettings(3, 3.0)
