"""The pure step of a meta-optimizer is one graph for `torch.compile`: no break, and the steps of the eager one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from torch import Tensor

from metateleport.families import TaskStack, load_family
from metateleport.learned import MetaOptimizer, MetaState
from metateleport.point import Point

Pure = Callable[[Point, MetaState], tuple[dict[str, Tensor], MetaState]]

STEPS = 3


def stack(kind: str) -> TaskStack:
    """Tasks on which some steps are taken back, so that both sides of every choice are met."""
    if kind == "GL":
        return load_family("matrix_factorisation", {"width": "4", "rank": "2", "batch": "20"}).stack(
            range(2), dtype=torch.float64
        )
    family: Any = load_family("digits", {"hidden": "6", "samples": "40", "batch": "8"})
    return family.stack(range(2), dtype=torch.float64)


def walked(meta: MetaOptimizer, tasks: TaskStack, pure: Pure) -> list[Tensor]:
    weights, state, seen = dict(tasks.tensors()), None, []
    for number in range(STEPS):
        point = tasks.point_at(weights, tasks.batch(number)).replace(pullback=None, loss_at=None)
        if number == 1:
            # In the first task a loss far above the start, in the second a gradient that is not finite.
            assert point.loss is not None
            point = point.replace(loss=point.loss * torch.tensor([1e3, 1.0]))
            first = next(iter(point.gradients))
            bad = torch.tensor([1.0, float("nan")])[:, None, None]
            point = point.update(gradients={first: point.gradients[first] * bad})
        state = state or meta.initial_state(point, tasks.symmetries, tasks.deterministic)
        with torch.no_grad():
            weights, state = pure(point, state)
        seen += [*weights.values(), state.progress.accepted.double()]
    return seen


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("diagonal", {"mode": "lr+tele"}),
        pytest.param("GL", {"mode": "lr+tele"}, marks=pytest.mark.slow),
        pytest.param("diagonal", {"mode": "update", "update": "tensor"}, marks=pytest.mark.slow),
        pytest.param(
            "diagonal", {"mode": "update+tele", "update": "adaptive", "max_stretch": 2.0}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_step_is_one_graph(kind: str, changes: dict[str, Any]) -> None:
    tasks = stack(kind)
    torch.manual_seed(0)
    meta = MetaOptimizer(shape_of(hidden=4, groups=(kind,), **changes)).double()

    def pure(point: Point, state: MetaState) -> tuple[dict[str, Tensor], MetaState]:
        taken = meta.step(point, tasks.symmetries, state)
        return taken.parameters, taken.state

    torch._dynamo.reset()
    compiled = torch.compile(pure, backend="eager", fullgraph=True)
    ours, theirs = walked(meta, tasks, pure), walked(meta, tasks, compiled)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    assert not all(bool(each.all()) for each in ours if each.shape == (2,))
