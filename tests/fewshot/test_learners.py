"""Teleports inside the inner loop: what they keep, what they cost, and meta-gradients through them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.fewshot import (
    TeleportingLearner,
    TeleportingMAML,
    TeleportingMetaSGD,
    UnrolledAscentTeleporter,
    adapt,
    maml,
    meta_curvature,
    meta_sgd,
    on_stack,
)
from metateleport.learned import LearnedTeleporter
from metateleport.point import Point
from metateleport.symmetries import BatchPair2022, Symmetry, Unsuitable
from metateleport.teleporters import Teleporter, TrustRegion

SLOPE = 0.1


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(3, 4), nn.LeakyReLU(SLOPE), nn.Linear(4, 2), nn.Linear(2, 3)
        return nn.Sequential(*layers).double()


def data(seed: int = 0, samples: int = 6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 3, generator=source, dtype=torch.float64)
    return inputs, torch.randint(3, (samples,), generator=source)


loss_of = nn.functional.cross_entropy
SUPPORT, QUERY = data(1), data(2, samples=8)


class Fixed(Teleporter):
    """Generators made once for all symmetries, whatever the point."""

    name = "fixed"

    def __init__(self, size: float = 0.7) -> None:
        super().__init__()
        self.size = size

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        drawn = symmetry.group.random_generator(size=self.size, seed=symmetry.dimension, dtype=torch.float64)
        batch = () if point.loss is None else point.loss.shape
        return drawn.expand(*batch, *drawn.shape), state


class Replayed(Teleporter):
    """Keeps what another teleporter chooses, or gives it out again."""

    name = "replayed"
    needs_gradient = True

    def __init__(self, teleporter: Teleporter) -> None:
        super().__init__()
        self.teleporter, self.kept, self.place = teleporter, [], None

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        if self.place is None:
            chosen, state = self.teleporter.generator(symmetry, point, state)
            self.kept.append(chosen)
            return chosen, state
        self.place += 1
        return self.kept[self.place - 1], state


def query_loss(meta: Any, steps: int = 3, first_order: bool | None = None) -> Tensor:
    learner = meta.clone()
    for _ in range(steps):
        learner.adapt(loss_of(learner(SUPPORT[0]), SUPPORT[1]), first_order=first_order)
    return loss_of(learner(QUERY[0]), QUERY[1])


def by_differences(function: Callable[[], Tensor], values: Sequence[Tensor], step: float = 1e-6) -> list[Tensor]:
    """Central differences of a scalar in every entry of some leaves."""
    found = []
    for value in values:
        slopes = torch.zeros_like(value)
        for place in range(value.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    value.view(-1)[place] += sign * step
                ends.append(float(function().detach()))
                with torch.no_grad():
                    value.view(-1)[place] -= sign * step
            slopes.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
        found.append(slopes)
    return found


def meta_gradient(function: Callable[[], Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(function(), values))


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return float(sum((a - b).detach().square().sum() for a, b in zip(found, expected, strict=True)).sqrt())


# Without a teleport


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(TeleportingMAML, maml), (TeleportingMetaSGD, meta_sgd)], ids=["maml", "meta-sgd"]
)
def test_without_a_teleport_it_is_learn2learns_own(ours: Any, theirs: Any, first_order: bool) -> None:
    mine = ours(network(), 0.3, mt.NoTeleport(), first_order=first_order)
    plain = theirs(network(), 0.3, first_order=first_order)
    losses = [query_loss(meta) for meta in (mine, plain)]
    assert torch.equal(*losses)
    parameters = [list(meta.parameters()) for meta in (mine, plain)]
    gradients = [torch.autograd.grad(loss, each) for loss, each in zip(losses, parameters, strict=True)]
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


# What a teleport keeps, and what it costs


@pytest.mark.parametrize(
    "teleporter",
    [
        Fixed(1.5),
        mt.RandomTeleporter(size=1.0, seed=0),
        mt.GradientAscentTeleporter(steps=4, step_size=0.2),
        mt.WhiteningTeleporter(damping=1e-3),
        UnrolledAscentTeleporter(steps=2, step_size=0.3),
    ],
    ids=lambda each: each.name,
)
def test_inner_teleports_keep_the_loss_everywhere_and_cost_nothing(teleporter: Teleporter) -> None:
    meta = TeleportingMAML(network(), 0.0, teleporter)
    learner = meta.clone()
    before = [value.clone() for value in learner.module.parameters()]
    for _ in range(3):
        learner.adapt(loss_of(learner(SUPPORT[0]), SUPPORT[1]))
    assert distance(list(learner.module.parameters()), before) > 0.1
    for inputs, targets in (SUPPORT, QUERY):
        torch.testing.assert_close(
            loss_of(learner(inputs), targets), loss_of(meta.module(inputs), targets), rtol=1e-10, atol=0
        )
    assert float(learner.evaluations) == pytest.approx(3.0)
    assert not any(bool(move.refused) for move in learner.moves)
    # The learner that it was cloned from stays.
    assert_close(list(meta.module.parameters()), before, 0.0)


def _afresh(learner: TeleportingLearner, symmetries: Sequence[Symmetry], teleporter: Teleporter, lr: float) -> None:
    """One step with the gradient evaluated anew where the teleport leads to."""
    model = copy.deepcopy(learner.module)
    report = mt.teleport(model, teleporter, SUPPORT[0], lambda outputs: loss_of(outputs, SUPPORT[1]), symmetries)
    assert report.accepted
    gradients = torch.autograd.grad(loss_of(model(SUPPORT[0]), SUPPORT[1]), list(model.parameters()))
    expected = [value - lr * gradient for value, gradient in zip(model.parameters(), gradients, strict=True)]
    clone = learner.clone()
    clone.adapt(loss_of(clone(SUPPORT[0]), SUPPORT[1]))
    assert_close([value.detach() for value in clone.module.parameters()], expected, 1e-9)
    assert float(clone.evaluations) == pytest.approx(1.0 + report.evaluations - 4 / 3)


def test_the_gradient_after_a_teleport_is_the_one_evaluated_there() -> None:
    model = network()
    _afresh(TeleportingMAML(model, 0.3, Fixed()), mt.symmetries_of(model), Fixed(), 0.3)


def test_batch_pairs_rebuild_the_gradient_and_are_counted() -> None:
    with torch.random.fork_rng():
        model = nn.Sequential(
            nn.Linear(3, 7), nn.LeakyReLU(SLOPE), nn.Linear(7, 6), nn.LeakyReLU(SLOPE), nn.Linear(6, 3)
        )
    model = model.double()
    pair = BatchPair2022(model, "2", "4", model[3])
    meta = TeleportingMAML(model, 0.3, Fixed(0.3), [pair])
    _afresh(meta, [pair], Fixed(0.3), 0.3)
    clone = meta.clone()
    clone.adapt(loss_of(clone(SUPPORT[0]), SUPPORT[1]))
    assert float(clone.evaluations) > 1.1


def test_teleports_take_place_every_so_many_steps() -> None:
    learner = TeleportingMAML(network(), 0.1, Fixed(), every=3).clone()
    moved = []
    for _ in range(7):
        learner.adapt(loss_of(learner(SUPPORT[0]), SUPPORT[1]))
        moved.append(bool(learner.moves))
    assert moved == [True, False, False, True, False, False, True]


def test_learned_teleporter_is_told_how_the_task_gets_on() -> None:
    torch.manual_seed(0)
    learner = TeleportingMAML(network(), 0.1, LearnedTeleporter(hidden=4)).clone()
    for _ in range(4):
        learner.adapt(loss_of(learner(SUPPORT[0]), SUPPORT[1]))
    assert learner._state["progress"].time == 4


# Meta-gradients


def test_meta_gradient_passes_through_the_action_and_the_exponential() -> None:
    meta = TeleportingMAML(network(), 0.3, Fixed())
    values = list(meta.parameters())
    function = lambda: query_loss(meta)  # noqa: E731
    assert_close(meta_gradient(function, values), by_differences(function, values), 1e-7)


@pytest.mark.parametrize("steps", [1, 2])
def test_meta_gradient_passes_through_the_choice_where_asked(steps: int) -> None:
    meta = TeleportingMAML(network(), 0.3, UnrolledAscentTeleporter(steps=steps, step_size=0.4), through_choice=True)
    values = list(meta.parameters())
    function = lambda: query_loss(meta, steps=2)  # noqa: E731
    assert_close(meta_gradient(function, values), by_differences(function, values), 1e-6)


@pytest.mark.parametrize("teleporter", [UnrolledAscentTeleporter(step_size=0.4), mt.WhiteningTeleporter(damping=1e-3)])
def test_a_detached_choice_is_a_constant_of_the_meta_gradient(teleporter: Teleporter) -> None:
    kept = Replayed(teleporter)
    meta = TeleportingMAML(network(), 0.1, kept)
    values = list(meta.parameters())
    found = meta_gradient(lambda: query_loss(meta, steps=2), values)
    assert not any(each.requires_grad for each in kept.kept)

    def replayed() -> Tensor:
        kept.place = 0
        return query_loss(meta, steps=2)

    assert_close(found, by_differences(replayed, values), 1e-7)
    whole = TeleportingMAML(meta.module, 0.1, teleporter)
    assert distance(found[:1], by_differences(lambda: query_loss(whole, steps=2), values[:1])) > 1e-3


def test_first_order_pulls_the_gradient_back_through_the_action_alone() -> None:
    meta = TeleportingMAML(network(), 0.3, Fixed(), first_order=True)
    found = meta_gradient(lambda: query_loss(meta, steps=1), list(meta.parameters()))
    learner = meta.clone()
    learner.adapt(loss_of(learner(SUPPORT[0]), SUPPORT[1]))
    arrived = {name: value.detach().requires_grad_() for name, value in learner.module.named_parameters()}
    loss = loss_of(torch.func.functional_call(learner.module, arrived, QUERY[0]), QUERY[1])
    there = dict(zip(arrived, torch.autograd.grad(loss, list(arrived.values())), strict=True))
    # The pull-back is the action's transpose: what covectors do under the inverse element.
    for move in reversed(learner.moves):
        inverse = move.symmetry.group.inverse(move.element.detach())
        there.update(move.symmetry.carry_covectors(inverse, there, Point({})).tensors)
    assert_close(found, list(there.values()), 1e-10)


@pytest.mark.parametrize("rates", ["keep", "transport"])
def test_meta_gradient_of_learning_rates(rates: Any) -> None:
    model = network()
    meta = TeleportingMetaSGD(model, 0.3, Fixed(), [mt.Rescaling(model, "0", "2")], rates=rates)
    with torch.no_grad():
        for value in meta.learner.lrs:
            value.mul_(1 + torch.rand_like(value))
    values = list(meta.parameters())
    assert len(values) == 12
    function = lambda: query_loss(meta, steps=2)  # noqa: E731
    assert_close(meta_gradient(function, values), by_differences(function, values), 1e-7)


def test_meta_gradient_of_a_learned_teleporters_networks() -> None:
    torch.manual_seed(0)
    teleporter = LearnedTeleporter(hidden=3).double()
    model = network()
    symmetries = [mt.Rescaling(model, "0", "2")]
    detached = TeleportingMAML(model, 0.3, teleporter, symmetries)
    meta = TeleportingMAML(model, 0.3, teleporter, symmetries, through_choice=True)
    networks = list(teleporter.networks["diagonal"].parameters())
    assert {id(each) for each in networks} <= {id(each) for each in meta.parameters()}
    assert not {id(each) for each in networks} & {id(each) for each in detached.parameters()}
    # The basis is cut from the graph: over one move nothing that the networks read depends on them.
    values = list(teleporter.networks["diagonal"].head.parameters())
    function = lambda: query_loss(meta, steps=1)  # noqa: E731
    found = meta_gradient(function, values)
    assert distance(found, [torch.zeros_like(each) for each in found]) > 1e-3
    assert_close(found, by_differences(function, values), 1e-7)


# Learning rates


def test_transported_rates_undo_a_teleport_and_kept_ones_do_not() -> None:
    model = network()
    symmetries = [mt.Rescaling(model, "0", "2")]
    plain = query_loss(meta_sgd(network(), 0.3))
    moved = {
        rates: query_loss(TeleportingMetaSGD(network(), 0.3, Fixed(), symmetries, rates=rates))
        for rates in ("transport", "keep")
    }
    torch.testing.assert_close(moved["transport"], plain, rtol=1e-12, atol=0)
    assert abs(float((moved["keep"] - plain).detach())) > 1e-3


# Stacks


class Tiny(mt.TaskFamily):
    """Three classes of Gaussian points, labelled at random."""

    dtype = torch.float64

    def sample(self, seed: int) -> mt.Task:
        support, query = data(seed), data(seed + 1)
        model = network(seed % 1000)
        held_out = ((query[0],), (query[1],))
        return mt.Task(
            model,
            loss_of,
            (support[0],),
            (support[1],),
            mt.symmetries_of(model),
            seed=seed,
            held_out=held_out,
            score=lambda outputs, targets: (outputs.argmax(-1) == targets).double().mean(-1),
        )


LEARNERS: dict[str, Callable[[nn.Module], Any]] = {
    "maml": lambda model: maml(model, 0.3),
    "meta-sgd": lambda model: meta_sgd(model, 0.3),
    "meta-curvature": lambda model: meta_curvature(model, 0.3),
    "maml+ascent": lambda model: TeleportingMAML(model, 0.1, mt.GradientAscentTeleporter(steps=2)),
    "maml+whitening": lambda model: TeleportingMAML(model, 0.1, mt.WhiteningTeleporter(damping=1e-3)),
    "maml+unrolled": lambda model: TeleportingMAML(model, 0.1, UnrolledAscentTeleporter(), through_choice=True),
    "meta-sgd+fixed": lambda model: TeleportingMetaSGD(model, 0.3, Fixed()),
    "meta-sgd+transported": lambda model: TeleportingMetaSGD(
        model, 0.3, Fixed(), [mt.Rescaling(model, "0", "2")], rates="transport"
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_stack_adapts_as_its_tasks_do_alone(name: str) -> None:
    stack = Tiny().stack(range(3))
    meta = LEARNERS[name](network())
    with torch.no_grad():
        for value in meta.parameters():
            value.add_(0.05 * torch.randn_like(value))
    clone = on_stack(meta, stack)
    for _ in range(2):
        clone.adapt(clone(stack.full).sum())
    losses = clone(stack.held_out)
    alone = []
    for task in stack.tasks:
        learner = meta.clone()
        for _ in range(2):
            learner.adapt(loss_of(learner(*task.inputs), *task.targets))
        alone.append(loss_of(learner(*task.held_out[0]), *task.held_out[1]))
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-10, atol=1e-12)
    values = list(meta.parameters())
    assert_close(*(torch.autograd.grad(each, values) for each in (losses.mean(), sum(alone) / 3)), 1e-9)


@pytest.mark.parametrize("name", ["maml", "maml+ascent", "meta-sgd+transported", "meta-curvature"])
def test_adapting_is_measured_before_and_after_every_step(name: str) -> None:
    stack = Tiny().stack(range(3))
    meta = LEARNERS[name](network())
    found = adapt(meta, stack, steps=4)
    clone = on_stack(meta, stack)
    for step in range(5):
        torch.testing.assert_close(found.support[:, step], clone(stack.full), rtol=1e-10, atol=0)
        torch.testing.assert_close(found.query[:, step], clone(stack.held_out), rtol=1e-10, atol=0)
        clone.adapt(clone(stack.full).sum())
    assert found.accuracy is not None
    assert found.accuracy.shape == found.evaluations.shape == (3, 5)
    assert found.evaluations[0].tolist() == pytest.approx([0, 1, 2, 3, 4])
    assert bool((found.size > 0).all()) == name.startswith(("maml+", "meta-sgd+"))
    assert found.refused == 0


def test_refused_teleports_are_counted_and_the_step_is_taken_all_the_same() -> None:
    teleporter = Fixed(2.0)
    teleporter.trust_region = TrustRegion(max_size=1.0)
    stack = Tiny().stack(range(3))
    found = adapt(TeleportingMAML(network(), 0.3, teleporter), stack, steps=2)
    assert found.refused == 3 * 2 * 2
    assert torch.equal(found.query, adapt(maml(network(), 0.3), stack, steps=2).query)


# What is refused


def test_misuse_is_named() -> None:
    model = network()
    learner = TeleportingMAML(model, 0.1, mt.NoTeleport()).clone()
    with pytest.raises(RuntimeError, match="before adapt"):
        learner.adapt(torch.ones(()))
    other = loss_of(learner(QUERY[0]), QUERY[1])
    learner(SUPPORT[0])
    with pytest.raises(RuntimeError, match="last forward pass"):
        learner.adapt(other)
    with pytest.raises(ValueError, match="at least 1"):
        TeleportingMAML(model, 0.1, mt.NoTeleport(), every=0)
    with pytest.raises(ValueError, match="not a GBML"):
        TeleportingLearner(meta_curvature(model, 0.1), mt.NoTeleport())
    with pytest.raises(ValueError, match="no diagonal group"):
        TeleportingMetaSGD(model, 0.1, mt.NoTeleport(), rates="transport")
    with pytest.raises(ValueError, match="'keep' or 'transport'"):
        TeleportingMetaSGD(model, 0.1, mt.NoTeleport(), rates="reset")
    with pytest.raises(Unsuitable, match=r"nn\.Sequential"):
        TeleportingMAML(nn.Linear(2, 2), 0.1, mt.NoTeleport())
    with pytest.raises(ValueError, match="differ in name or shape"):
        on_stack(maml(nn.Linear(2, 2), 0.1), Tiny().stack([0]))
    for steps, cap, said in ((0, 1.0, "one step"), (1, 0.0, "positive")):
        with pytest.raises(ValueError, match=said):
            UnrolledAscentTeleporter(steps=steps, cap=cap)


def test_a_stack_takes_the_sum_of_the_losses_only() -> None:
    stack = Tiny().stack(range(3))
    clone = on_stack(TeleportingMAML(network(), 0.1, Fixed()), stack)
    with pytest.raises(RuntimeError, match="sum of the losses"):
        clone.adapt(clone(stack.full).mean())


def test_symmetries_that_move_buffers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    found = [each for each in mt.find_symmetries(model, torch.randn(5, 3)).exact if each.buffers]
    assert found
    with pytest.raises(ValueError, match="buffers"):
        TeleportingMAML(model, 0.1, mt.NoTeleport(), found)


def test_passes_without_gradients_do_not_disturb() -> None:
    learner = TeleportingMAML(network(), 0.1, Fixed()).clone()
    loss = loss_of(learner(SUPPORT[0]), SUPPORT[1])
    with torch.no_grad():
        learner(QUERY[0])
    learner.adapt(loss)
    assert float(loss_of(learner(SUPPORT[0]), SUPPORT[1])) < float(loss)


def test_held_out_data_are_needed_to_measure() -> None:
    task = Tiny().task(0)
    stack = TaskStack([mt.Task(task.model, task.loss, task.inputs, task.targets)])
    with pytest.raises(ValueError, match="none"):
        adapt(maml(network(), 0.1), stack, steps=1)
