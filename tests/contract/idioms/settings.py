"""Learning rates, groups, decay, and what is trained when."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..loops import MIDDLE, STEPS, Bench, Course, Loop, plain
from ..models import Batch
from ..registry import Outcome, idiom, same


def _halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The first and the second half of what is trained."""
    trained = [value for value in model.parameters() if value.requires_grad]
    return trained[: len(trained) // 2], trained[len(trained) // 2 :]


def _parameters_only(bench: Bench, steps: int = STEPS) -> Course:
    return Loop(bench, optimizer=lambda model: bench.optimizer(model.parameters())).run(plain, steps=steps)


@idiom("parameters and no model")
def parameters_only(bench: Bench) -> Outcome:
    """A list of parameters, or a group of them."""
    loop = Loop(bench, optimizer=lambda model: bench.optimizer([{"params": list(model.parameters())}]))
    return Outcome(_parameters_only(bench), (loop.run(plain),))


@idiom("named parameters and no model")
def named_parameters(bench: Bench) -> Outcome:
    """Steps as a model does that has no symmetries."""
    loop = Loop(bench, optimizer=lambda model: bench.optimizer(model.named_parameters()))
    return Outcome(loop.run(plain), (bench.plain(symmetries=()),))


@idiom("scheduler at one")
def constant_schedule(bench: Bench) -> Outcome:
    loop = Loop(bench)
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda _: 1.0)

    def scheduled(loop: Loop, batch: Batch) -> None:
        plain(loop, batch)
        scheduler.step()

    return Outcome(loop.run(scheduled), (bench.plain(),))


@idiom("scheduler that ends at zero")
def schedule_to_zero(bench: Bench) -> Outcome:
    """At a factor of zero nothing is stepped; the weights are those of a run that ended there."""
    loop = Loop(bench, symmetries=())
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: float(step < STEPS))

    def scheduled(loop: Loop, batch: Batch) -> None:
        plain(loop, batch)
        scheduler.step()

    return Outcome(loop.run(scheduled, steps=STEPS + 5), (bench.plain(symmetries=()),))


@idiom("cosine schedule with warm-up")
def warm_up(bench: Bench) -> Outcome:
    """Schedulers in a row, against the same factors written into the group."""
    loop = Loop(bench, lr=0.5, symmetries=())
    rising = torch.optim.lr_scheduler.LinearLR(loop.optimizer, 0.25, total_iters=4)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, STEPS)
    scheduler = torch.optim.lr_scheduler.SequentialLR(loop.optimizer, [rising, falling], milestones=[4])
    factors = []

    def scheduled(loop: Loop, batch: Batch) -> None:
        factors.append(loop.optimizer.param_groups[0]["lr"])
        plain(loop, batch)
        scheduler.step()

    tried, left = loop.run(scheduled), iter(factors)

    def by_hand(loop: Loop, batch: Batch) -> None:
        loop.optimizer.param_groups[0]["lr"] = next(left)
        plain(loop, batch)

    assert min(factors) < 0.2 < max(factors), f"the schedule went through {factors}"
    return Outcome(tried, (Loop(bench, symmetries=()).run(by_hand),))


def _at_a_module(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained in the first modules, and in the others."""
    owners = [[value for value in each.parameters(recurse=False) if value.requires_grad] for each in model.modules()]
    owners = [each for each in owners if each]
    first, second = owners[: len(owners) // 2], owners[len(owners) // 2 :]
    return [value for each in first for value in each], [value for each in second for value in each]


def _change(course: Course) -> list[Tensor]:
    return [now - then for now, then in zip(course.weights, course.start, strict=True)]


@idiom("groups with factors")
def groups(bench: Bench) -> Outcome:
    """A first step at a half is half as long; a group at zero stays."""

    def grouped(first: float, second: float, steps: int) -> Course:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            pairs = zip(_at_a_module(model), (first, second), strict=True)
            return bench.optimizer([{"params": held, "lr": lr} for held, lr in pairs])

        return Loop(bench, optimizer=make).run(plain, steps=steps)

    model = bench.model()
    first = [any(value is each for each in _at_a_module(model)[0]) for value in model.parameters()]
    whole, factored = _change(grouped(1.0, 1.0, 1)), _change(grouped(0.5, 0.0, 1))
    expected = [change * (0.5 if held else 0.0) for change, held in zip(whole, first, strict=True)]
    same(factored, expected, "the first step at factors of a half and zero")
    return Outcome(grouped(1.0, 1.0, STEPS))


@idiom("groups with and without decay")
def decay_groups(bench: Bench) -> Outcome:
    """Matrices in one group and vectors in another, by their names, step as one model; here without any decay."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        groups = [[pair for pair in trained if (pair[1].ndim > 1) == matrices] for matrices in (True, False)]
        return bench.optimizer([{"params": group} for group in groups if group])

    return Outcome(Loop(bench, optimizer=make).run(plain), (bench.plain(symmetries=()),))


@idiom("weight decay")
def weight_decay(bench: Bench) -> Outcome:
    """The learned step, and lr times the decay of the weights it started from."""
    lr, decay = 0.5, 0.02

    def by_hand(loop: Loop, batch: Batch) -> None:
        loop.gradients(batch)
        held = [value for value in loop.model.parameters() if value.grad is not None]
        before = [value.detach().clone() for value in held]
        loop.optimizer.step()
        with torch.no_grad():
            for value, old in zip(held, before, strict=True):
                value.sub_(lr * decay * old)

    tried = Loop(bench, symmetries=(), lr=lr, weight_decay=decay).run(plain)
    return Outcome(tried, (Loop(bench, symmetries=(), lr=lr).run(by_hand),))


@idiom("total_steps")
def total_steps(bench: Bench) -> Outcome:
    """Told how many steps there will be, it trains."""
    return Outcome(Loop(bench, total_steps=STEPS).run(plain))


@idiom("group added later")
def added_group(bench: Bench) -> Outcome:
    """What is added midway steps as what was held from the start and had no gradients until then."""

    def only(loop: Loop, batch: Batch, trained: bool) -> None:
        loop.gradients(batch)
        if not trained:
            for value in _halves(loop.model)[1]:
                value.grad = None
        loop.optimizer.step()

    def held(model: nn.Module) -> torch.optim.Optimizer:
        return bench.optimizer([{"params": half} for half in _halves(model)])

    later = Loop(bench, optimizer=lambda model: bench.optimizer(_halves(model)[0]))
    always = Loop(bench, optimizer=held)
    for number, batch in enumerate(bench.batches()):
        if number == MIDDLE:
            later.optimizer.add_param_group({"params": _halves(later.model)[1]})
        later.model.zero_grad()
        for loop in (later, always):
            loop.take(lambda loop, batch, trained=number >= MIDDLE: only(loop, batch, trained), batch)
    return Outcome(later.course(), (always.course(),))


def _changed_midway(bench: Bench, frozen_at_first: bool) -> Outcome:
    """Freezes, or unfreezes, half of what is trained; without symmetries it steps as without those gradients."""

    def frozen(number: int) -> bool:
        return (number < MIDDLE) == frozen_at_first

    def run(by_hand: bool, **settings: object) -> Course:
        model = bench.model()
        half = _halves(model)[0]
        if not by_hand:
            for value in half:
                value.requires_grad_(not frozen(0))
        loop = Loop(bench, model=model, **settings)  # type: ignore[arg-type]

        def one(loop: Loop, batch: Batch) -> None:
            loop.gradients(batch)
            for value in half:
                if by_hand and frozen(number):
                    value.grad = None
            loop.optimizer.step()

        for number, batch in enumerate(bench.batches()):
            if not by_hand:
                for value in half:
                    value.requires_grad_(not frozen(number))
            before = [value.detach().clone() for value in half]
            loop.take(one, batch)
            if frozen(number):
                assert all(torch.equal(*pair) for pair in zip(half, before, strict=True)), "frozen weights moved"
        return loop.course()

    without = run(by_hand=False, symmetries=())
    same(without.weights, run(by_hand=True, symmetries=()).weights, "without symmetries, against no gradients")
    return Outcome(run(by_hand=False, **bench.found()))


@idiom("frozen midway")
def frozen_midway(bench: Bench) -> Outcome:
    return _changed_midway(bench, frozen_at_first=False)


@idiom("unfrozen midway")
def unfrozen_midway(bench: Bench) -> Outcome:
    return _changed_midway(bench, frozen_at_first=True)
