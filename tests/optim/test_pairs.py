"""Every optimizer with every teleporter on every kind of symmetry; those without symmetries on the same models.

By default a covering design (`tests/covering.py`): any two of optimizer, teleporter and kind of symmetry meet. The
whole product over all cases, with longer runs, is marked slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from covering import pairwise
from optimizer_cases import OPTIMIZERS
from symmetry_cases import CASES, Problem, by_kind, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.objectives import Curvature, Sharpness
from metateleport.optim import Every
from metateleport.teleporters import LevelSetTeleporter, NullSpaceTeleporter

TELEPORTERS: dict[str, Callable[[Sequence[mt.Symmetry]], mt.Teleporter]] = {
    "none": lambda _: mt.NoTeleport(),
    "random": lambda _: mt.RandomTeleporter(size=0.3, seed=0),
    "gradient-ascent": lambda _: mt.GradientAscentTeleporter(steps=3, step_size=0.02, cap=0.3),
    "sharpness": lambda _: mt.GradientAscentTeleporter(
        Sharpness(radii=(0.1,), directions=2), steps=2, step_size=0.02, cap=0.3, direction="descent"
    ),
    "curvature": lambda symmetries: mt.GradientAscentTeleporter(
        Curvature(symmetries, curves=1), steps=1, step_size=0.02, cap=0.3, direction="descent"
    ),
    "whitening": lambda _: mt.WhiteningTeleporter(),
    "level-set": lambda _: LevelSetTeleporter(steps=2, step_size=0.01, projections=20, tolerance=1e-13),
    "null-space": lambda _: NullSpaceTeleporter(steps=2, step_size=0.01),
}
FIRST = 5
"""The step of the first teleport: by then there is a state to be brought along."""
# An optimizer moves no buffers, and the symmetry before a batch norm does.
EVERY_CASE = [each for each in CASES if not each.moves_buffers]


def design() -> list[tuple[str, str, str]]:
    """Rows of an optimizer, a teleporter and a case: any two of optimizer, teleporter and kind of symmetry meet."""
    kinds = by_kind(EVERY_CASE)
    places = range(max(len(kind) for kind in kinds))
    return [
        pytest.param(
            inner, teleporter, str(kind[place % len(kind)]), id=f"{inner}-{teleporter}-{kind[place % len(kind)]}"
        )
        for inner, teleporter, kind, place in pairwise(list(OPTIMIZERS), list(TELEPORTERS), kinds, places)
    ]


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str, int], Tensor]:
    """All tensors of the state, by parameter, entry and place in the entry."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            for place, each in enumerate(value if isinstance(value, list | tuple) else [value]):
                if isinstance(each, Tensor):
                    found[name, key, place] = each
    return found


def loss_at(problem: Problem) -> float:
    return float(problem.loss_of(problem.outputs()))


@pytest.mark.parametrize(("inner", "teleporter", "name"), design())
@pytest.mark.filterwarnings("ignore:the state")
def test_the_loss_stays_the_state_is_consistent_and_training_goes_on(inner: str, teleporter: str, name: str) -> None:
    run(inner, teleporter, name, steps=20)


@pytest.mark.slow(seconds=11)
@pytest.mark.parametrize("teleporter", TELEPORTERS)
@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:the state")
def test_longer_runs_in_every_case(inner: str, teleporter: str) -> None:
    for each in EVERY_CASE:
        run(inner, teleporter, str(each), steps=200)


def run(inner: str, teleporter: str, name: str, steps: int) -> None:
    problem = case(name).problem()
    chosen = TELEPORTERS[teleporter](problem.symmetries)
    optimizer = mt.TeleportingOptimizer(
        OPTIMIZERS[inner](problem.model, 1.0),
        problem.model,
        chosen,
        problem.symmetries,
        schedule=Every(steps // 5, start=FIRST),
        max_stretch=None,
    )
    certified = [each.certificate.drift for each in problem.symmetries if each.certificate is not None]
    tolerance = max([1e-9, *(10 * drift for drift in certified)])
    loss, before = loss_at(problem), dict[tuple[str, str, int], Tensor]()
    start = loss

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = problem.loss_of(problem.model(*problem.inputs))
        value.backward()
        return value

    def look(*_: Any) -> None:
        """What the inner optimizer meets after a teleport."""
        if not optimizer.schedule.due(optimizer.steps):
            return
        assert loss_at(problem) == pytest.approx(loss, rel=tolerance)
        for key, value in tensors_of(problem.model, optimizer).items():
            assert value.shape == before[key].shape
            assert value.isfinite().all()
            assert "sq" not in key[1] or bool((value >= 0).all())

    optimizer.optimizer.register_step_pre_hook(look)
    for step in range(FIRST + steps):
        if optimizer.schedule.due(step):
            loss, before = loss_at(problem), tensors_of(problem.model, optimizer)
        optimizer.step(closure, loss=problem.loss_of)
    assert len(optimizer.reports) == 5
    for report in optimizer.reports:
        assert report.accepted, report.reason
        assert report.drift <= tolerance
        assert report.loss_after == pytest.approx(report.loss_before, rel=tolerance)
        assert "unstable element" not in report.failures
        # A null space may have no room, and a sharpness of what is linear in each factor no slope.
        assert (report.size > 0) or teleporter in {"none", "whitening", "null-space", "curvature"}
        assert chosen.needs_symmetries or report.state == ("reset" if inner == "lbfgs" else "keep")
        assert bool(report.state_entries) is (report.size > 0 and inner != "sgd")
    assert all(bool(value.isfinite().all()) for value in problem.model.parameters())
    assert loss_at(problem) < start
