"""`bottleneck_digits`: bottlenecks and heads, along which every teleporter moves."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from gallery_cases import close, fills, load
from torch import nn

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.gauges import TensorGroup, gauge_symmetries, step_in_gauges
from metateleport.groups import GeneralLinear
from metateleport.learned import GaugeTeleporter, LearnedTeleporter
from metateleport.learned.gauge import LearnedGauge
from metateleport.point import Point
from metateleport.symmetries import AttentionQK, AttentionVO, Unsuitable
from metateleport.teleporters import travel


@pytest.mark.parametrize("heads", [1, 3])
def test_bottlenecks_name_symmetries_that_are_found_too(heads: int) -> None:
    settings = {"width": 6, "heads": heads, "rank": 2, "hidden": 5}
    task = load("bottleneck_digits", settings).task(0, dtype=torch.float64)
    found = {(each.kind, each.where): each.group for each in mt.find_symmetries(task.model, task.batch(0)[0][0][:6])}
    named = {(each.kind, each.where): each.group for each in task.symmetries}
    assert len(named) == len(task.symmetries) == 2 * heads + 3
    assert named.items() <= found.items()
    assert {group for (kind, _), group in found.items() if kind.startswith("attention")} == {GeneralLinear(6 // heads)}


def small_bottlenecks() -> tuple[TaskStack, Point]:
    settings = {"width": 6, "heads": 2, "rank": 3, "hidden": 5, "samples": 100, "batch": 20}
    stack = load("bottleneck_digits", settings).stack([0, 1, 2], dtype=torch.float64)
    return stack, stack.point_at(stack.tensors(), stack.batch(0))


TELEPORTERS = {
    "random": lambda: mt.RandomTeleporter(1.0, seed=0),
    "gradient ascent": lambda: mt.GradientAscentTeleporter(steps=2),
    "features": lambda: mt.WhiteningTeleporter("features", damping=1e-3),
    "outgoing": lambda: mt.WhiteningTeleporter("outgoing", damping=1e-3),
    "balanced": lambda: mt.WhiteningTeleporter("balanced", damping=1e-3),
    "learned": lambda: LearnedTeleporter(hidden=4),
    "learned gauge": lambda: GaugeTeleporter(LearnedGauge(("GL", "diagonal"), hidden=4)),
}


@pytest.mark.parametrize("name", TELEPORTERS)
def test_every_teleporter_moves_a_stack_of_bottlenecks_and_keeps_its_loss(name: str) -> None:
    stack, start = small_bottlenecks()
    teleporter = TELEPORTERS[name]()
    with torch.no_grad() if name.startswith("learned") else contextlib.nullcontext():
        state = teleporter.initial_state(start, stack.symmetries)
        arrived, moves, _ = travel(teleporter, start, stack.symmetries, state)
    there = stack.point_at(arrived.parameters, stack.batch(0))
    assert len(moves) == len(stack.symmetries)
    for move in moves:
        assert not bool(move.refused.any()), move.reason
        assert bool((move.size > 1e-6).all()), move.symmetry
    assert start.loss is not None
    assert there.loss is not None
    close(there.loss, start.loss, 1e-9)
    for kind in ("gradients", "activations", "cotangents"):
        for key, value in getattr(there, kind).items():
            close(getattr(arrived, kind)[key], value, 1e-7)
    other = stack.batch(1)
    close(stack.losses_at(arrived.parameters, other), stack.losses_at(start.parameters, other), 1e-9)


@pytest.mark.parametrize("kind", ["whitening", "random"])
def test_bottlenecks_can_be_stepped_in_gauges(kind: str) -> None:
    stack, start = small_bottlenecks()

    def gauge(group: TensorGroup) -> mt.Teleporter:
        if kind == "random":
            return mt.RandomTeleporter(0.5, seed=len(group.names[0]))
        return mt.WhiteningTeleporter.for_group(group, damping=1e-6)

    def descend(rate: float) -> Any:
        return lambda at, names: {name: at.parameters[name] - rate * at.gradients[name] for name in names}

    still = step_in_gauges(start, stack.symmetries, gauge, descend(0.0))
    for key, value in still.parameters.items():
        close(value, start.parameters[key], 1e-9)
    stepped = step_in_gauges(start, stack.symmetries, gauge, descend(1e-4))
    moves = [move for each in stepped.moves.values() for move in each]
    assert moves
    assert not any(bool(move.refused.any()) for move in moves)
    assert start.loss is not None
    assert bool((stack.losses_at(stepped.parameters, stack.batch(0)) < start.loss).all())
    if kind == "whitening":
        features = start.activations["classify"]
        gram = features.mT @ features
        shift = 1e-6 * torch.linalg.eigvalsh(gram)[:, -1, None, None] * torch.eye(3, dtype=gram.dtype)
        expected = start.gradients["classify.weight"] @ torch.linalg.inv(gram + shift)
        taken = (start.parameters["classify.weight"] - stepped.parameters["classify.weight"]) / 1e-4
        close(taken, expected, 1e-3)


def test_every_head_has_a_gauge() -> None:
    stack, _ = small_bottlenecks()
    chosen = gauge_symmetries(stack.symmetries, linearised=False)
    assert [each.where for each in chosen] == [each.where for each in stack.symmetries]


def test_bottlenecks_vary_in_training() -> None:
    family = load("bottleneck_digits")
    drawn = [family.augmented(index, 0) for index in range(120)]
    assert {each.heads for each in drawn} == {1, 2, 3, 4}
    fills([each.width / each.heads for each in drawn], 4, 12)
    fills([each.rank for each in drawn], 3, 9)
    fills([each.hidden for each in drawn], 16, 48)
    fills([each.batch for each in drawn], 32, 128)
    assert family.augmented(3, 1) == family.augmented(3, 1)


@pytest.mark.parametrize(
    ("message", "names"),
    [("'nothing' is no linear layer", ("nothing", "key")), ("not 3 heads", ("query", "key"))],
)
def test_heads_that_cannot_be(message: str, names: tuple[str, str]) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 8) for name in ("query", "key", "value")} | {"out": nn.Linear(6, 4)})
    with pytest.raises(Unsuitable, match=message):
        AttentionQK.of_heads(model, *names, heads=3)
    with pytest.raises(Unsuitable, match="'value' has 8, 'out' has 6"):
        AttentionVO.of_heads(model, "value", "out", heads=2)
