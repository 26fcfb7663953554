"""A service answers what the checkpoint loaded here does: bit for bit alone, to rounding when stacked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from service_cases import beside, once_beside
from symmetry_cases import CASES, Case, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.checkpoint import load_checkpoint, save_checkpoint, shipped_checkpoints
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.rules import read_rule
from metateleport.service import ServiceError
from metateleport.service.message import BINARY, JSON
from metateleport.teleporters import WhiteningTeleporter, travel


def has_teleporter(name: str) -> bool:
    learned = load_checkpoint(name).learned
    return learned.teleporter is not None or learned.gauge is not None


def has_networks(name: str) -> bool:
    """Whether its rule asks a network; constants are nothing to be asked for."""
    return load_checkpoint(shipped_checkpoints()[name]).learned.config.rule.kind != "static"


SHIPPED = sorted(shipped_checkpoints())
MOVING = [name for name in SHIPPED if has_teleporter(name)]
"""Those that choose group elements: a learned step alone moves nothing."""


def trajectory(problem: Any, teleporter: Any, steps: int = 3) -> list[dict[str, Tensor]]:
    """Where teleports and steps of gradient descent between them lead."""
    point, state, found = problem.point(), None, []
    for _ in range(steps):
        with torch.no_grad():
            moved, _, state = travel(teleporter, point, problem.symmetries, state)
        found.append(moved.parameters)
        # Buffers have no gradient.
        stepped = {name: moved.parameters[name] - 1e-3 * value for name, value in moved.gradients.items()}
        point = problem.point({**moved.parameters, **stepped})
    return found


def equal_and_moved(name: str, each: Case, steps: int) -> bool:
    """Checks that a checkpoint leads to the same places, bit for bit, over a service; and whether anywhere at all."""
    problem = each.problem()
    here, there = trajectory(problem, mt.load(name), steps), trajectory(problem, beside(name), steps)
    for mine, theirs in zip(here, there, strict=True):
        for parameter, value in mine.items():
            assert torch.equal(value, theirs[parameter]), (name, each.name, parameter)
    return any(not torch.equal(here[0][key], value) for key, value in problem.point().parameters.items())


@pytest.mark.parametrize("place", range(0, len(CASES), 3))
def test_each_kind_of_symmetry_with_a_shipped_checkpoint(place: int) -> None:
    equal_and_moved(MOVING[place // 3 % len(MOVING)], CASES[place], 2)


@pytest.mark.slow(seconds=60)
def test_every_shipped_checkpoint_and_every_kind_of_symmetry() -> None:
    moved = {(name, each.name) for name in MOVING for each in CASES if equal_and_moved(name, each, 3)}
    # Each checkpoint moves something, and each kind of symmetry that networks are for is moved along by one.
    assert {name for name, _ in moved} == set(MOVING)
    assert {name for _, name in moved} >= {each.name for each in CASES} - {"quadratic", "translations"}


@pytest.mark.parametrize("kind", [JSON, BINARY])
@pytest.mark.parametrize("stacked", [False, True])
def test_other_groups_bodies_and_batches(kind: str, stacked: bool, tmp_path: Any) -> None:
    torch.manual_seed(1)
    meta = MetaOptimizer(shape_of("tele", hidden=6, stays=True, groups=("GL", "diagonal", "O")))
    with torch.no_grad():
        for value in meta.parameters():
            value.copy_(torch.randn_like(value) / 3)
    save_checkpoint(tmp_path / "own", meta, None, {"name": "own"})
    local, remote = mt.load(tmp_path / "own"), beside(tmp_path / "own", kind, stacked)
    for each in (case("quadratic"), case("linear pair"), case("mixed chain")):
        problem = each.problem()
        for mine, theirs in zip(trajectory(problem, local), trajectory(problem, remote), strict=True):
            for name, value in mine.items():
                if stacked:
                    assert torch.allclose(value, theirs[name], rtol=1e-12, atol=1e-12), name
                else:
                    assert torch.equal(value, theirs[name]), name


def model_for(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(0.1), nn.Linear(12, 5), nn.Linear(5, 3)).to(dtype)


def trained(checkpoint: Any, steps: int = 4, model: nn.Module | None = None) -> tuple[list[Tensor], Any]:
    model = model or model_for()
    dtype = next(model.parameters()).dtype
    source = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, size, generator=source, dtype=torch.float64).to(dtype) for size in (6, 3))
    optimizer = mt.LearnedOptimizer(model, checkpoint)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return [value.detach().clone() for value in model.parameters()], optimizer


@pytest.mark.filterwarnings("ignore:.*is not made for this")
@pytest.mark.parametrize("name", [name for name in SHIPPED if has_networks(name)])
def test_a_learned_step_over_the_service_is_the_learned_step(name: str) -> None:
    mine, _ = trained(name)
    theirs, _ = trained(beside(name))
    assert all(torch.equal(here, there) for here, there in zip(mine, theirs, strict=True))
    stacked, _ = trained(beside(name, stacked=True))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(mine, stacked, strict=True))


def test_constants_are_refused_by_name() -> None:
    with pytest.raises(ServiceError, match="'static' has no network to ask"):
        trained(beside("default"))


@pytest.mark.filterwarnings("ignore:.*is not made for this")
def test_a_rule_of_factors_asks_for_its_three_networks(tmp_path: Any) -> None:
    torch.manual_seed(3)
    meta = MetaOptimizer(MetaOptimizerConfig(read_rule({"kind": "gauged"}), teleport=None, groups=("GL",)))
    with torch.no_grad():
        for value in meta.parameters():
            value.add_(0.1 * torch.randn_like(value))
    save_checkpoint(tmp_path / "own", meta, None, {"name": "own"})
    connected = beside(tmp_path / "own")
    mine, _ = trained(tmp_path / "own")
    theirs, optimizer = trained(connected)
    assert all(torch.equal(here, there) for here, there in zip(mine, theirs, strict=True))
    asked = {request.fields["network"] for request in optimizer.meta.rule.plain.network.args[0].asked}
    assert asked == {"tensors", "in", "out"}


@pytest.mark.filterwarnings("ignore:.*is not made for this")
def test_weights_gradients_and_samples_do_not_leave() -> None:
    connected = beside("digits")
    model = model_for()
    _, optimizer = trained(connected, model=model)
    client = optimizer.meta.teleporter.client
    assert {request.fields["ask"] for request in client.asked} == {"teleport", "steps"}
    own = [value.detach() for value in model.parameters()] + [value.grad for value in model.parameters()]
    for request in client.asked:
        for name, value in request.tensors.items():
            # Nothing of the samples' number, and of no weight's values.
            assert 16 not in value.shape, name
            for weight in own:
                seen = torch.isin(value.flatten(), weight.flatten())
                assert not bool((seen & (value.flatten().abs() > 1e-6)).any()), name


@pytest.mark.filterwarnings("ignore:.*is not made for this")
def test_a_state_is_saved_and_goes_on() -> None:
    whole, _ = trained(beside("digits"), 6)
    model = model_for()
    _, optimizer = trained(beside("digits"), 3, model)
    saved = copy.deepcopy(optimizer.state_dict())
    again = mt.LearnedOptimizer(model, beside("digits"))
    again.load_state_dict(saved)
    source = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, size, generator=source, dtype=torch.float64) for size in (6, 3))
    for _ in range(3):
        again.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        again.step(loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(whole, model.parameters(), strict=True))
    other = mt.LearnedOptimizer(model_for(), beside("bottleneck_digits"))
    with pytest.raises(ValueError, match="another checkpoint"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["tensor", "coordinate"])
def test_rules_that_read_every_coordinate_are_refused_by_name(kind: str, tmp_path: Any) -> None:
    meta = MetaOptimizer(shape_of("update+tele", hidden=4, update=kind, groups=("diagonal",)))
    save_checkpoint(tmp_path / "own", meta, None, {"name": "own"})
    connected = beside(tmp_path / "own")
    with pytest.raises(ServiceError, match=f"rule.kind = '{kind}' reads every coordinate"):
        mt.LearnedOptimizer(model_for(), connected)
    # Its teleporter serves all the same.
    mine = trajectory(case("rescaling").problem(), mt.load(tmp_path / "own"))
    theirs = trajectory(case("rescaling").problem(), connected)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(mine, theirs, strict=True) for name in a)


@pytest.mark.filterwarnings("ignore:.*is not made for this")
def test_in_a_teleporting_optimizer() -> None:
    def run(teleporter: Any) -> tuple[list[Tensor], Any]:
        model = model_for()
        optimizer = mt.TeleportingOptimizer(torch.optim.Adam(model.parameters()), model, teleporter, every=2)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return [value.detach() for value in model.parameters()], optimizer

    for name in ("digits", "leaky_mlp"):
        (mine, local), (theirs, remote) = run(mt.load(name)), run(beside(name))
        assert local.last_report.size == remote.last_report.size > 0
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


ONCE: dict[str, tuple[dict[str, Any], Callable[[], mt.Teleporter]]] = {
    "whitening": ({}, WhiteningTeleporter),
    "whitening, outgoing": ({"side": "outgoing", "damping": 1e-4}, lambda: WhiteningTeleporter("outgoing", 1e-4)),
    "balance": ({}, lambda: WhiteningTeleporter("balanced")),
    "random": ({"size": 0.5, "seed": 3}, lambda: mt.RandomTeleporter(size=0.5, seed=3)),
}


@pytest.mark.parametrize("what", ONCE)
@pytest.mark.parametrize("each", [case("linear pair"), case("rescaling"), case("2022 form")], ids=str)
def test_teleports_that_nothing_is_learned_for(what: str, each: Case) -> None:
    settings, make = ONCE[what]
    mine = trajectory(each.problem(), make(), 1)
    theirs = trajectory(each.problem(), once_beside(what.partition(",")[0], **settings), 1)
    assert all(torch.equal(mine[0][name], theirs[0][name]) for name in mine[0])
    assert any(not torch.equal(mine[0][name], value) for name, value in each.problem().point().parameters.items())


@pytest.mark.parametrize("each", [case("linear pair"), case("rescaling"), case("rescaling, convolutions")], ids=str)
def test_the_effect_is_predicted(each: Case) -> None:
    problem = each.problem()
    symmetry, point = problem.symmetries[0], problem.point()
    teleporter = once_beside("random", size=1.0, seed=5)
    from metateleport.service.described import effect_of

    with torch.no_grad():
        generator, _ = teleporter.generator(symmetry, point, None)
        element = symmetry.group.exp(generator)
        matrices = symmetry.diagonals(point) if each.diagonal else symmetry.matrices(point)
        effect, moved = effect_of(symmetry.group, element, matrices), symmetry.act(element, point)
    weights = [symmetry.first_weight, symmetry.second_weight]  # type: ignore[attr-defined]
    for name, table in (("weight_norm", "parameters"), ("gradient_norm", "gradients")):
        before, after = (sum(getattr(each, table)[w].square().sum() for w in weights) for each in (point, moved))
        assert torch.allclose(effect[name], (after / before).sqrt(), rtol=1e-10), name


def test_the_card_of_a_connection() -> None:
    connected = beside("leaky_mlp")
    assert connected.service.name == "leaky_mlp"
    assert connected.service.made_for == load_checkpoint("leaky_mlp").card["made_for"]
