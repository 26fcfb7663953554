"""What a learned optimizer remembers, as tensors with names, and back."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
import torch
from learned_cases import backward, meta_of, mlp, teleporting
from torch import Tensor

import metateleport as mt
from metateleport.learned.meta_optimizer import MetaState
from metateleport.optim.memory import (
    flattened,
    restored_parts,
    saved_parts,
    unflattened,
)
from metateleport.optim.parameters import rule_state, update_entries
from metateleport.point import Point

STEP_RULE = {"mode": "lr+tele", "gauge": "linearised", "groups": ("GL", "diagonal")}


def learned_states(told: bool) -> tuple[MetaState, MetaState]:
    """The state after some steps of a rule that divides by the loss, in gauges and along an orbit, and a fresh one."""
    model = mlp()
    optimizer = mt.LearnedOptimizer(model, teleporting(**STEP_RULE).double(), lr=0.5)
    for number in range(3):
        # What is not told comes first, and a stand-in is there when the losses are.
        loss = backward(model, number)
        optimizer.step(loss=loss if told and number else None)
    other = mlp()
    again = mt.LearnedOptimizer(other, optimizer.meta, [mt.Rescaling(other, "0", "2")])
    backward(other)
    begun: list[MetaState] = []
    initial = again.meta.initial_state

    def noted(*given: Any) -> MetaState:
        begun.append(initial(*given))
        return begun[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(again.meta, "initial_state", noted)
        again.step()
    assert optimizer.loop.state is not None
    return optimizer.loop.state, begun[-1]


def assert_same(ours: Any, theirs: Any, where: str = "state") -> None:
    """Equal tensors, numbers and types throughout."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), where
        assert ours.dtype == theirs.dtype, where
    elif isinstance(ours, dict):
        assert set(ours) == set(theirs), where
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{where}/{key}")
    elif isinstance(ours, tuple | list):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif dataclasses.is_dataclass(ours):
        for field in dataclasses.fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name), f"{where}/{field.name}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("told", [True, False])
def test_a_whole_state_is_restored(told: bool) -> None:
    state, fresh = learned_states(told)
    assert state.stand_in is not None
    assert state.stand_in.change
    assert state.stand_in.factor == 0.5
    assert (state.accepted is not None) == told
    assert state.teleporter is not None
    assert state.gauge["covariances"]
    saved = saved_parts(state)
    assert all(isinstance(value, Tensor) for value in saved.values())
    restored = restored_parts(fresh, saved)
    assert_same(dataclasses.replace(restored, rule=None), dataclasses.replace(state, rule=None))
    # What a fresh state has is what none of it came from.
    assert restored.progress.time == 3
    assert fresh.progress.time == 0


def test_what_was_not_there_is_not_restored() -> None:
    _, fresh = learned_states(True)
    restored = restored_parts(fresh, saved_parts(fresh))
    assert restored.accepted is None
    assert restored.stand_in is None


@pytest.mark.parametrize("part", ["progress/last", "stand_in/length", "gauge/covariances"])
def test_a_tensor_of_another_shape_is_named(part: str) -> None:
    state, fresh = learned_states(True)
    saved = saved_parts(state)
    name = next(path for path in saved if path.startswith(part))
    with pytest.raises(ValueError, match=r"has shape \(7, 7\).*same model, symmetries and checkpoint"):
        restored_parts(fresh, {**saved, name: torch.ones(7, 7)})


def test_values_come_back_with_their_types() -> None:
    value = {"a": (1, True, 0.5), "b": [torch.ones(2), None], 3: torch.zeros(1)}
    like = {"a": (0, False, 0.0), "b": [torch.zeros(2), None], 3: torch.ones(1)}
    assert_same(unflattened(like, flattened(value, "x"), "x"), value)


def test_a_number_has_the_type_of_the_fresh_one() -> None:
    saved = {"x/0": torch.tensor(3.0), "x/1": torch.tensor(1), "x/2": torch.tensor(2)}
    assert_same(unflattened((0, False, 0.0), saved, "x"), (3, True, 2.0))


def test_a_loaded_tensor_has_the_dtype_of_the_fresh_one() -> None:
    found = unflattened(torch.zeros(2, dtype=torch.float64), {"x": torch.ones(2)}, "x")
    assert found.dtype == torch.float64


def test_what_was_not_saved_is_as_in_a_fresh_state() -> None:
    like = {"old": torch.zeros(1), "new": torch.full((2,), 5.0), "count": 3}
    found = unflattened(like, {"x/old": torch.ones(1)}, "x")
    assert_same(found, {**like, "old": torch.ones(1)})


@pytest.mark.parametrize("config", [{}, STEP_RULE, {"mode": "update", "update": "coordinate"}, {"update": "tensor"}])
def test_what_a_rule_keeps_by_tensor_goes_to_the_entries_and_comes_back(config: dict[str, Any]) -> None:
    meta = meta_of(**config)
    weights = {name: torch.randn(1, 3, 2) for name in ("a.weight", "b.weight")}
    point = Point(weights, dict(weights), loss=torch.ones(1))
    state = {key: _filled(value) for key, value in meta.rule.initial_state(point).items()}
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = update_entries(meta.rule, state, entries)
    assert not set(rest) & set(meta.rule.per_tensor)
    assert all(isinstance(value, Tensor) for own in entries.values() for value in own.values())
    assert_same(rule_state(meta.rule, rest, entries, meta.rule.initial_state(point)), state)


def test_a_tensor_that_is_new_starts_fresh_beside_one_that_is_known() -> None:
    meta = meta_of()
    weights = {name: torch.randn(1, 3, 2) for name in ("old.weight", "new.weight")}
    point = Point(weights, dict(weights), loss=torch.ones(1))
    fresh = meta.rule.initial_state(point)
    filled = {key: _filled(value) for key, value in fresh.items()}
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = update_entries(meta.rule, filled, entries)
    found = rule_state(meta.rule, rest, {"old.weight": entries["old.weight"], "new.weight": {}}, fresh)
    for entry in meta.rule.per_tensor:
        assert_same(found[entry]["old.weight"], filled[entry]["old.weight"])
        assert_same(found[entry]["new.weight"], fresh[entry]["new.weight"])


def _filled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.randn_like(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _filled(each) for key, each in value.items()}
    return tuple(_filled(each) for each in value) if isinstance(value, tuple) else value
