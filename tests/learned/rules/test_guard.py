"""The safeguard: it leaves good steps alone, and gives way to AdamW's where the learned ones lead uphill."""

from __future__ import annotations

import math

import pytest
import torch
from gallery_cases import load
from torch import Tensor

from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.meta_optimizer import InnerLoop
from metateleport.learned.rules.adaptive import AdaptiveRule, AdaptiveSettings
from metateleport.learned.rules.guard import _SAMPLE, PLAIN_RATE, Sample, guard_state, judged, noted, sampled
from metateleport.linalg import Blocks


def networks(size: float = 0.0, guarded: bool = True, told: bool = False) -> MetaOptimizer:
    """Networks that always say the same; `size` is the logarithm of the length of their steps."""
    torch.manual_seed(0)
    meta = MetaOptimizer(MetaOptimizerConfig(AdaptiveSettings(hidden=4, guarded=guarded, told=told), None))
    assert isinstance(meta.rule, AdaptiveRule)
    with torch.no_grad():
        meta.rule.head.weight.zero_()
        meta.rule.head.bias[0] = size
    return meta


def sample_of(gradients: dict[str, Tensor]) -> Sample:
    values = list(gradients.values())
    return Sample.of_gradients(list(gradients), Blocks.of(values, free=False), values)


def tasks() -> TaskStack:
    return load("digits", {"batch": 32, "depth": 3}).stack(range(2))


def run(meta: MetaOptimizer, steps: int, stack: TaskStack) -> tuple[Tensor, list[Tensor]]:
    """The loss on all training data at the end, and the trust before each step; no step is told its loss."""
    parameters = {name: value.detach() for name, value in stack.tensors().items()}
    loop, trust = InnerLoop(meta, (), False), []
    with torch.no_grad():
        for step in range(steps):
            taken = loop.advance(stack.point_at(parameters, stack.batch(step)), False, False)
            parameters = taken.parameters
            assert loop.state is not None
            trust.append(loop.state.rule.get("trust", torch.ones(len(stack))))
    return stack.losses_at(parameters, stack.full).detach(), trust


def test_good_steps_are_soon_trusted_and_stay_so() -> None:
    _, trust = run(networks(-0.5), 60, tasks())
    assert bool((trust[0] < 0.2).all())
    assert bool((torch.stack(trust[12:40]).mean(0) > 0.8).all())


def test_steps_that_are_far_too_long_give_way() -> None:
    start = tasks()
    first = start.losses_at(dict(start.tensors()), start.full).detach()
    guarded, trust = run(networks(1.6), 80, tasks())
    alone, _ = run(networks(1.6, guarded=False), 80, tasks())
    assert bool((torch.stack(trust).amin(0) < 0.5).all()), "it never gave way"
    assert bool((guarded < first).all())
    assert float(guarded.log().mean()) < float(alone.log().mean()) - 0.3


def test_where_nothing_is_trusted_the_step_is_adamw_s() -> None:
    meta, stack = networks(), tasks()
    parameters = {name: value.detach().clone() for name, value in stack.tensors().items()}
    model = {name: torch.nn.Parameter(value.clone()) for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(list(model.values()), lr=PLAIN_RATE, weight_decay=0.0, betas=(0.9, 0.999))
    loop = InnerLoop(meta, (), False)
    with torch.no_grad():
        for step in range(4):
            point = stack.point_at(parameters, stack.batch(step))
            for name, value in model.items():
                value.grad = point.gradients[name].clone()
            optimizer.step()
            state = meta.initial_state(point, (), False) if loop.state is None else loop.state
            state.rule["trust"] = torch.zeros(2)
            state.rule["begun"] = torch.zeros(2)
            loop.state = state
            parameters = loop.advance(point, False, False).parameters
    # Entries that never had a gradient to speak of have another floor.
    for name, value in model.items():
        torch.testing.assert_close(parameters[name], value.detach(), rtol=2e-4, atol=3e-4)


@pytest.mark.parametrize(
    ("ended", "falls"), [(-1.0, False), (-0.1, False), (0.2, False), (0.9, True), (math.nan, True)]
)
def test_the_trust_falls_where_steps_end_uphill(ended: float, falls: bool) -> None:
    gradients = {"w": torch.tensor([[1.0, 0.0]])}
    state = guard_state(gradients, torch.zeros(1)) | {"trust": torch.tensor([0.5])}
    state["taken"], state["begun"] = {"w": torch.tensor([[ended, 0.0]])}, torch.tensor([-1.0])
    # The same step again and again.
    for _ in range(12):
        state |= judged(state, sample_of(gradients), torch.tensor([True]))
    assert bool(state["trust"] < 0.5) == falls


def test_what_adamw_does_as_badly_is_not_held_against_a_step() -> None:
    gradients = {"w": torch.tensor([[1.0]])}
    state = guard_state(gradients, torch.zeros(1)) | {"begun": torch.tensor([-1.0])}
    state["taken"] = state["plain"] = {"w": torch.tensor([[5.0]])}
    assert float(judged(state, sample_of(gradients), torch.tensor([True]))["trust"]) > float(state["trust"])


def test_a_step_that_was_taken_back_is_not_judged() -> None:
    gradients = {"w": torch.tensor([[1.0]])}
    state = guard_state(gradients, torch.zeros(1)) | {"begun": torch.tensor([-1.0])}
    state["taken"] = {"w": torch.tensor([[5.0]])}
    found = judged(state, sample_of(gradients), torch.tensor([False]))
    assert torch.equal(found["trust"], state["trust"])


def test_slopes_of_large_tensors_are_those_of_all_entries() -> None:
    source = torch.Generator().manual_seed(0)
    gradient, step = (torch.randn(2, 300, 400, generator=source) for _ in range(2))
    step = step - 0.3 * gradient
    sample = sample_of({"w": gradient})
    found = noted(sample, [torch.zeros_like(step)], [step], sample.stepped([gradient], torch.ones(1, 2)))
    whole = (gradient * step).flatten(1).sum(1)
    torch.testing.assert_close(found["begun"], whole, rtol=0.2, atol=0.0)
    assert found["taken"]["w"].shape[1] <= 2048
    torch.testing.assert_close(found["plain"]["w"], -gradient.flatten(1)[:, :: 300 * 400 // 1024])


def test_a_sample_of_tensors_side_by_side_is_that_of_each() -> None:
    source = torch.Generator().manual_seed(0)
    values = [torch.randn(2, *shape, generator=source) for shape in ((50, 60), (7,), (8, 4, 3, 3))]
    names, together = ["a", "b", "c"], Blocks.of(values, free=True)
    assert together.joined
    alone = Sample.of_gradients(names, Blocks.of(values, free=False), values)
    beside = Sample.of_gradients(names, together, together.gather(values))
    assert torch.equal(beside.of(together.gather(values)), alone.of(values))
    assert beside.counts == tuple(sampled(each).shape[1] for each in values)
    step = torch.randn(2, sum(beside.counts), generator=source)
    torch.testing.assert_close(beside.slope(step), alone.slope(step))
    assert torch.equal(beside.joined(beside.by_name(step)), step)


@pytest.mark.parametrize("shape", [(1024, 64), (512, 784), (64, 32, 3, 3), (5000,), (3, 4), (0, 4)], ids=str)
def test_a_sample_is_of_all_columns(shape: tuple[int, ...]) -> None:
    """A feature that is always zero is not all that the safeguard sees."""
    columns = torch.arange(math.prod(shape[1:])).expand(shape[0], -1).reshape(1, *shape)
    sample = sampled(columns)
    assert sample.numel() <= 2 * _SAMPLE
    assert sample.unique().numel() >= min(math.prod(shape[1:]), sample.numel()) // 2
