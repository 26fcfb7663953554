"""The learned teleporter: an equivariant generator, within bounds, for every width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from symmetry_cases import LEARNED, Case, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import point_of
from metateleport.groups import GeneralLinear, Orthogonal
from metateleport.learned import LearnedTeleporter
from metateleport.learned.teleporter import BASIS
from metateleport.point import Point
from metateleport.teleporters import TrustRegion, travel


def teleporter(size: float = 10.0) -> LearnedTeleporter:
    torch.manual_seed(2)
    made = LearnedTeleporter(hidden=6).double()
    with torch.no_grad():
        for network in made.networks.values():
            drawn = 2 * torch.rand(network.head.weight.shape, dtype=torch.float64) - 1
            network.head.weight[:-1] = size * 0.1 * drawn[:-1] / 6**0.5
            network.head.bias[-1] = 1.0
    return made


def pair(activation: nn.Module | None) -> tuple[nn.Sequential, mt.Symmetry]:
    """As many samples, inputs and outputs as units: no covariance is singular."""
    torch.manual_seed(0)
    between = [] if activation is None else [activation]
    model = nn.Sequential(nn.Linear(5, 5), *between, nn.Linear(5, 5)).double()
    if activation is None:
        return model, mt.LinearPair(model, "0", "1")
    return model, mt.Rescaling(model, "0", "2")


def generator_at(model: nn.Module, symmetry: mt.Symmetry, chosen: LearnedTeleporter) -> Tensor:
    source = torch.Generator().manual_seed(4)
    inputs = torch.randn(7, 5, generator=source, dtype=torch.float64)
    targets = torch.randn(7, 5, generator=source, dtype=torch.float64)
    point, _ = point_of(model, [symmetry], (inputs,), None, lambda y: (y - targets).square().sum() / 2)
    with torch.no_grad():
        return chosen.generator(symmetry, point, chosen.initial_state(point, [symmetry]))[0]


def changed(model: nn.Sequential, matrix: Tensor) -> None:
    """Hidden units in another basis."""
    with torch.no_grad():
        model[0].weight.copy_(matrix @ model[0].weight)
        model[0].bias.copy_(matrix @ model[0].bias)
        model[-1].weight.copy_(model[-1].weight @ torch.linalg.inv(matrix))


ORDER = torch.tensor([3, 0, 4, 1, 2])


def test_a_permutation_permutes_the_generator_of_gl() -> None:
    model, symmetry = pair(None)
    chosen = teleporter()
    before = generator_at(model, symmetry, chosen)
    changed(model, torch.eye(5, dtype=torch.float64)[ORDER])
    assert float(before.norm()) > 0.5
    assert torch.allclose(generator_at(model, symmetry, chosen), before[ORDER][:, ORDER], atol=1e-9)


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ReLU()])
def test_a_permutation_permutes_the_generator_of_rescaling(activation: nn.Module) -> None:
    model, symmetry = pair(activation)
    chosen = teleporter()
    before = generator_at(model, symmetry, chosen)
    changed(model, torch.eye(5, dtype=torch.float64)[ORDER])
    assert float(before.norm()) > 0.1
    assert torch.allclose(generator_at(model, symmetry, chosen), before[ORDER], atol=1e-9)


def test_a_rotation_conjugates_the_generator_of_gl() -> None:
    model, symmetry = pair(None)
    chosen = teleporter()
    before = generator_at(model, symmetry, chosen)
    rotation = Orthogonal(5).random(size=2.0, seed=3, dtype=torch.float64)
    changed(model, rotation)
    assert torch.allclose(generator_at(model, symmetry, chosen), rotation @ before @ rotation.mT, atol=1e-9)


def test_another_basis_than_an_orthogonal_one_does_not() -> None:
    """The covariances know the orthogonal part only, which is what the documentation says; and this test can fail."""
    model, symmetry = pair(None)
    chosen = teleporter()
    before = generator_at(model, symmetry, chosen)
    g = GeneralLinear(5).random(size=1.0, seed=3, dtype=torch.float64)
    changed(model, g)
    assert not torch.allclose(generator_at(model, symmetry, chosen), g @ before @ torch.linalg.inv(g), atol=1e-2)


@pytest.mark.parametrize("each", LEARNED, ids=str)
def test_one_teleporter_serves_every_symmetry_and_shape(each: Case) -> None:
    problem = each.problem()
    point = problem.point()
    chosen = teleporter()
    with torch.no_grad():
        moved, moves, state = travel(chosen, point, problem.symmetries)
        assert bool(torch.stack([move.size > 0 for move in moves]).any())
        again, _, _ = travel(chosen, point, problem.symmetries, state)
    fresh = problem.point(moved.parameters)
    assert float(fresh.loss) == pytest.approx(float(point.loss), rel=1e-6)  # type: ignore[arg-type]
    # It remembers: the second answer at one place is another.
    assert any(not torch.equal(value, moved.parameters[name]) for name, value in again.parameters.items())


def test_generators_stay_within_the_trust_region() -> None:
    problem = case("linear pair").problem()
    chosen = teleporter(size=1e6)
    chosen.trust_region = TrustRegion(max_size=0.5)
    with torch.no_grad():
        _, (move,), _ = travel(chosen, problem.point(), problem.symmetries)
    assert not bool(move.refused)
    assert float(move.size) == pytest.approx(0.99 * 0.5)


def test_groups_without_a_network_are_left_alone() -> None:
    problem = case("rescaling").problem()
    chosen = LearnedTeleporter(groups=("GL",), hidden=4).double()
    point = problem.point()
    with torch.no_grad():
        moved, (move,), _ = travel(chosen, point, problem.symmetries)
    assert float(move.size) == 0
    assert all(torch.equal(value, point.parameters[name]) for name, value in moved.parameters.items())


def test_it_starts_small() -> None:
    chosen = LearnedTeleporter(hidden=8).double()
    problem = case("linear pair").problem()
    with torch.no_grad():
        _, (move,), _ = travel(chosen, problem.point(), problem.symmetries)
    assert 0 < float(move.size) < 2


def test_weights_keep_their_dtype() -> None:
    """Networks in float32 serve models in float64, and the other way round."""
    for own, theirs in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        chosen = LearnedTeleporter(hidden=4).to(own)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(theirs)
        report = mt.teleport(model, chosen, torch.ones(5, 4, dtype=theirs), loss=lambda y: y.square().sum())
        assert report.size > 0
        assert model[0].weight.dtype == theirs


@pytest.mark.parametrize("name", ["chain of rescalings", "rescaling, convolutions", "gated", "rescaling"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_teleport_moves_in_its_own_memory_what_nobody_else_holds(
    name: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, chosen = case(name).problem(), teleporter()
    symmetries = [*problem.symmetries, *problem.symmetries]
    start = problem.point()
    before = start.map(torch.clone)
    expected, moves, _ = travel(chosen, start, symmetries)
    seen: list[Point] = []
    choose = LearnedTeleporter.choose

    def noted(self: LearnedTeleporter, symmetry: mt.Symmetry, point: Point, state: Any) -> Any:
        seen.append(point)
        return choose(self, symmetry, point, state)

    monkeypatch.setattr(LearnedTeleporter, "choose", noted)
    monkeypatch.setattr(LearnedTeleporter, "keeps_points", kept)
    with torch.no_grad():
        arrived, again, _ = travel(chosen, start, symmetries)
    assert all(bool(move.size > 0) for move in moves)
    for ours, theirs in zip(again, moves, strict=True):
        assert torch.equal(ours.element, theirs.element)
    for field in ("parameters", "gradients", "activations", "cotangents"):
        given, was = getattr(start, field), getattr(before, field)
        assert all(torch.equal(given[each], value) for each, value in was.items())
        found, wanted = getattr(arrived, field), getattr(expected, field)
        assert list(found) == list(wanted)
        assert all(torch.equal(found[each], value) for each, value in wanted.items())
    weight = symmetries[0].parameters[0]
    there, last = (point.parameters[weight] for point in (seen[len(symmetries) // 2], arrived))
    reused = there.data_ptr() == last.data_ptr()
    assert reused == (not kept and isinstance(symmetries[0], mt.Rescaling))


def test_a_task_that_is_not_moved_stays_where_it_was_seen() -> None:
    problem, chosen = case("chain of rescalings").problem(), teleporter()
    start = problem.point().map(lambda value: torch.stack([value, 2 * value]))
    allowed = torch.tensor([True, False])
    with torch.no_grad():
        arrived, _, _ = travel(chosen, start, [*problem.symmetries, *problem.symmetries], allowed=allowed)
    for name in {name for symmetry in problem.symmetries for name in symmetry.parameters}:
        value = start.parameters[name]
        assert torch.equal(arrived.parameters[name][1], value[1])
        assert not torch.equal(arrived.parameters[name][0], value[0])


def test_a_subclass_that_chooses_otherwise_may_keep_points() -> None:
    class Own(LearnedTeleporter):
        def gain(self, start: Point, arrived: Point) -> Tensor | None:
            return None

    class Named(LearnedTeleporter):
        name = "named"

    class Gains:
        def gain(self, start: Point, arrived: Point) -> Tensor | None:
            return None

    class Mixed(Gains, LearnedTeleporter):
        name = "mixed"

    kept = [each.keeps_points for each in (LearnedTeleporter, Own, Named, Mixed)]
    assert kept == [False, True, False, True]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=f"no basis for the group 'SL'; there is one for {', '.join(BASIS)}"):
        LearnedTeleporter(groups=("GL", "SL"))
    problem = case("linear pair").problem()
    with pytest.raises(ValueError, match="gradients"):
        travel(teleporter(), problem.point().replace(gradients={}), problem.symmetries)
