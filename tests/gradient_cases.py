"""Meta-gradients of small unrolls, and central differences to hold them against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from symmetry_cases import side_by_side
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import Batch, TaskStack
from metateleport.learned import LearnedTeleporter, MetaOptimizer
from metateleport.learned.progress import Progress
from metateleport.learned.rules.adaptive import AdaptiveRule
from metateleport.learned.rules.coordinate import CoordinateRule
from metateleport.learned.rules.step import StepRule
from metateleport.learned.rules.tensor import TensorRule
from metateleport.symmetries import BatchPair2022
from metateleport.training import StackOptimizer
from metateleport.training.differentiable import unroll_context

MODES = ["lr", "lr+tele", "update", "update+tele", "tele"]
TASKS, WIDTH = 2, 3
TOLERANCE = 1e-6

KINDS = ["linear pair", "rescaling", "2022 form"]
PROBLEMS = [(mode, kind) for mode in MODES for kind in (KINDS if "tele" in mode else KINDS[:1])]

every_problem = pytest.mark.parametrize(("mode", "kind"), PROBLEMS)


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


def stack(kind: str) -> tuple[TaskStack, Batch]:
    """Tasks whose covariances have eigenvalues far apart, so that `eigh` has a derivative."""
    source = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    between: list[nn.Module] = [] if kind == "linear pair" else [nn.LeakyReLU(0.1)]
    models = []
    for _ in range(TASKS):
        first, second = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        model = nn.Sequential(first, *between, second).double()
        with torch.no_grad():
            for layer in (first, second):
                layer.weight.copy_(draw(*layer.weight.shape))
                layer.bias.copy_(draw(*layer.bias.shape))
        models.append(model)
    if kind == "linear pair":
        symmetries: list[mt.Symmetry] = [mt.LinearPair(models[0], "0", "1")]
    elif kind == "rescaling":
        symmetries = [mt.Rescaling(models[0], "0", "2")]
    else:
        symmetries = [BatchPair2022(models[0], "0", "2", nn.LeakyReLU(0.1))]
    samples = 3 if kind == "2022 form" else 6
    batch = ((draw(TASKS, samples, 4),), (draw(TASKS, samples, 4),))
    return side_by_side(models, half_squared_error, batch, symmetries), batch


def meta_optimizer(mode: str, base: str = "momentum") -> MetaOptimizer:
    torch.manual_seed(0)
    config = shape_of(mode=mode, hidden=4, coordinate_hidden=3, base=base, base_lr=1e-4)
    meta = MetaOptimizer(config).double()
    if isinstance(meta.teleporter, LearnedTeleporter):
        with torch.no_grad():
            for network in meta.teleporter.networks.values():
                # Open enough that the teleport matters, and small enough that no step makes a task worse.
                network.head.bias[-1] = -0.5
                network.head.weight.copy_((torch.rand(network.head.weight.shape) - 0.5) / 2)
    if isinstance(meta.rule, StepRule):
        with torch.no_grad():
            meta.rule.head.bias[0] = -0.4
    return meta


def unrolled(meta: MetaOptimizer, problem: tuple[TaskStack, Batch], steps: int, track: bool) -> tuple[Tensor, bool]:
    """Mean log loss along an unroll, and whether every step was accepted and none of its teleports refused."""
    model, batch = problem
    optimizer = StackOptimizer(model, meta)
    smooth, losses = True, []
    with unroll_context(model, optimizer, track) as (patched, differentiable):
        current = patched(batch, probe=True)
        for _ in range(steps):
            differentiable.step(current)
            taken = differentiable.loop.last_step
            smooth = smooth and bool(taken.accepted.all()) and not bool(taken.refused.any())
            current = patched(batch, probe=True)
            losses.append(current.losses)
        # The last point has to be one that the next step would accept, too.
        smooth = smooth and bool((current.losses <= differentiable.loop.state.progress.last).all())
    return torch.stack(losses).log().mean(), smooth


def analytic(meta: MetaOptimizer, problem: tuple[TaskStack, Batch], steps: int) -> list[Tensor]:
    loss, smooth = unrolled(meta, problem, steps, track=True)
    assert smooth
    found = torch.autograd.grad(loss, list(meta.parameters()), allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(meta.parameters(), found, strict=True)
    ]


def difference(evaluate: Callable[[], Tensor], meta: MetaOptimizer, direction: list[Tensor]) -> float:
    """Central difference along a direction of the networks' parameters."""
    start = [value.detach().clone() for value in meta.parameters()]
    values = []
    for step in (2e-6, -2e-6):
        with torch.no_grad():
            for parameter, value, along in zip(meta.parameters(), start, direction, strict=True):
                parameter.copy_(value + step * along)
        values.append(float(evaluate()))
    with torch.no_grad():
        for parameter, value in zip(meta.parameters(), start, strict=True):
            parameter.copy_(value)
    return (values[0] - values[1]) / 4e-6


def error(gradient: list[Tensor], evaluate: Callable[[], Tensor], meta: MetaOptimizer) -> float:
    """Largest difference between a meta-gradient and central differences along random directions, relative."""
    norm = torch.cat([each.flatten() for each in gradient]).norm()
    assert float(norm) > 1e-4
    worst = 0.0
    for seed in range(2):
        source = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(each.shape, generator=source, dtype=torch.float64) for each in gradient]
        # Half of it along the gradient: what is compared is never small.
        length = torch.cat([each.flatten() for each in drawn]).norm()
        direction = [each / length + own / norm for each, own in zip(drawn, gradient, strict=True)]
        expected = float(sum((each * own).sum() for each, own in zip(direction, gradient, strict=True)))
        found = difference(evaluate, meta, direction)
        worst = max(worst, abs(found - expected) / abs(expected))
    return worst


def compare(meta: MetaOptimizer, problem: tuple[TaskStack, Batch], steps: int, evaluate: Callable[[], Tensor]) -> float:
    return error(analytic(meta, problem, steps), evaluate, meta)


class Tape:
    """Records what functions answer, or answers with what was recorded; not what they call of one another."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.replayed: Iterator[Any] | None = None
        self.within = False

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def taped(*arguments: Any) -> Any:
            if self.within:
                return function(*arguments)
            if self.replayed is not None:
                return next(self.replayed)
            self.within = True
            answer = function(*arguments)
            self.within = False
            self.answers.append(answer)
            return answer

        return taped


def gauged(secants: int) -> MetaOptimizer:
    """Steps in learned gauges and no teleport that stays."""
    torch.manual_seed(0)
    config = shape_of(hidden=4, stays=False, gauge="linearised", secants=secants)
    meta = MetaOptimizer(config).double()
    with torch.no_grad():
        assert isinstance(meta.rule, StepRule)
        # Short steps, so that none is taken back, and enough trust in the secants that they matter.
        meta.rule.head.bias[0] = -2.5
        meta.rule.head.bias[-1] = -1.0
    return meta


def taped(meta: MetaOptimizer, monkeypatch: pytest.MonkeyPatch) -> Tape:
    """Puts all that the networks see on one tape."""
    tape = Tape()
    if isinstance(meta.teleporter, LearnedTeleporter):
        meta.teleporter.observe = tape(meta.teleporter.observe)
    if isinstance(meta.rule, StepRule | AdaptiveRule):
        meta.rule.observe = tape(meta.rule.observe)
    if isinstance(meta.rule, AdaptiveRule):
        meta.rule.polar = tape(meta.rule.polar)
    if isinstance(meta.rule, StepRule):
        meta.rule.secant = tape(meta.rule.secant)
    if meta.gauge is not None:
        meta.gauge.observe = tape(meta.gauge.observe)
    if isinstance(meta.rule, CoordinateRule | TensorRule):
        meta.rule.observe_coordinates = tape(meta.rule.observe_coordinates)
    monkeypatch.setattr(Progress, "features", tape(Progress.features))
    return tape


def attached(meta: MetaOptimizer) -> MetaOptimizer:
    """Leaves all that the networks see in the graph."""
    meta.detach = False
    if isinstance(meta.teleporter, LearnedTeleporter):
        meta.teleporter.detach = False
    if isinstance(meta.rule, StepRule | AdaptiveRule):
        meta.rule.detach = False
    return meta


def plain(meta: MetaOptimizer, problem: tuple[TaskStack, Batch], steps: int) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        loss, smooth = unrolled(meta, problem, steps, track=False)
        assert smooth
        return loss.detach()

    return evaluate


def recorded(
    meta: MetaOptimizer, problem: tuple[TaskStack, Batch], steps: int, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Tensor]:
    """Evaluates with the basis and the features that were seen at the parameters which `meta` has now."""
    tape = taped(meta, monkeypatch)
    loss, smooth = unrolled(meta, problem, steps, track=False)
    assert smooth

    def evaluate() -> Tensor:
        tape.replayed = iter(tape.answers)
        value = plain(meta, problem, steps)()
        assert next(tape.replayed, None) is None
        return value

    assert torch.equal(evaluate(), loss)
    return evaluate
