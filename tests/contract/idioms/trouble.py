"""Batches and passes that are not as they should be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..loops import MIDDLE, STEPS, Bench, Course, Loop, by_closure, by_loss, plain
from ..models import Batch, Problem
from ..registry import Outcome, idiom

One = Callable[[Loop, Batch], None]


def _without(bench: Bench, number: int) -> list[Batch]:
    """The batches but for one."""
    batches = bench.batches(steps=STEPS + 1)
    return batches[:number] + batches[number + 1 :]


def _counted(bench: Bench, usual: One, bad: One) -> Course:
    """A bad step among the usual ones, told its loss: it may take the step back that led there. It is counted."""
    loop = Loop(bench)
    for step, batch in enumerate(bench.batches(steps=STEPS + 1)):
        loop.take(bad if step == MIDDLE else usual, batch)
    skipped = loop.optimizer.skipped  # type: ignore[attr-defined]
    assert skipped == 1, f"one step was to be skipped, and {skipped} are counted"
    return loop.course()


def _interrupted(bench: Bench, number: int, usual: One, bad: One) -> Outcome:
    """A bad step among the usual ones is skipped, counted, and leaves no trace."""
    loop = Loop(bench)
    for step, batch in enumerate(bench.batches(steps=STEPS + 1)):
        before = [value.detach().clone() for value in loop.model.parameters()]
        loop.take(bad if step == number else usual, batch)
        if step == number:
            pairs = zip(loop.model.parameters(), before, strict=True)
            assert all(torch.equal(*pair) for pair in pairs), "a step that is not finite moved the weights"
    skipped = loop.optimizer.skipped
    assert skipped == 1, f"one step was to be skipped, and {skipped} are counted"
    return Outcome(loop.course(), (Loop(bench).run(usual, _without(bench, number)),))


def _spoilt(bench: Bench, batch: Batch) -> Batch:
    """The batch with a NaN in a sample; tokens have none."""
    if not bench.problem.floats:
        return batch
    inputs, labels = batch
    inputs = inputs.clone()
    inputs[0] = float("nan")
    return inputs, labels


def _nan_gradients(loop: Loop, batch: Batch) -> torch.Tensor:
    loop.optimizer.zero_grad()
    loss = loop.loss(_spoilt(loop.bench, batch))
    loss = loss if loop.bench.problem.floats else loss * float("nan")
    loss.backward()
    return loss


def _nan(loop: Loop, batch: Batch) -> None:
    _nan_gradients(loop, batch)
    loop.optimizer.step()


@idiom("NaN in a batch")
def nan_batch(bench: Bench) -> Outcome:
    return _interrupted(bench, MIDDLE, plain, _nan)


@idiom("NaN in the first batch")
def nan_at_first(bench: Bench) -> Outcome:
    return _interrupted(bench, 0, plain, _nan)


@idiom("NaN in a closure")
def nan_in_a_closure(bench: Bench) -> Outcome:
    def closure(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(lambda: _nan_gradients(loop, batch))  # type: ignore[arg-type]

    def loss(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(loss=_nan_gradients(loop, batch))  # type: ignore[call-arg]

    return Outcome(_counted(bench, by_closure, closure), (_counted(bench, by_loss, loss),))


@idiom("infinite gradient")
def infinite_gradient(bench: Bench) -> Outcome:
    """In one tensor, after a finite loss."""

    def infinite(loop: Loop, batch: Batch) -> None:
        loop.gradients(batch)
        held = next(value for value in loop.model.parameters() if value.grad is not None)
        if held.grad.is_sparse:  # type: ignore[union-attr]
            held.grad = held.grad * float("inf")  # type: ignore[operator]
        else:
            held.grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        loop.optimizer.step()

    return _interrupted(bench, MIDDLE, plain, infinite)


def _empty(loop: Loop, batch: Batch) -> torch.Tensor:
    """Gradients of no samples: zeros, and a mean loss that is NaN. Where torch refuses such a batch it is made one."""
    try:
        return loop.gradients(tuple(each[:0] for each in batch))
    except (RuntimeError, ValueError):
        return loop.gradients(batch) * float("nan")


@idiom("empty batch")
def empty_batch(bench: Bench) -> Outcome:
    """Told its loss it is left out; without one it is a step along gradients of zero."""

    def told(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(loss=_empty(loop, batch))  # type: ignore[call-arg]

    def untold(loop: Loop, batch: Batch) -> None:
        _empty(loop, batch)
        loop.optimizer.step()

    loop = Loop(bench)
    for step, batch in enumerate(bench.batches(steps=STEPS + 1)):
        loop.take(untold if step == MIDDLE else plain, batch)
    without = loop.course()
    assert without.after < without.before, f"untold, the loss went from {without.before:.4g} to {without.after:.4g}"
    return Outcome(_counted(bench, by_loss, told))


@idiom("smaller last batch")
def smaller_last_batch(bench: Bench) -> Outcome:
    """Batches of sixteen and then one of five, twenty times over, with a closure and without."""
    batches = [tuple(each[:5] for each in batch) if k % 4 == 3 else batch for k, batch in enumerate(bench.batches())]
    return Outcome(Loop(bench).run(by_closure, batches), (Loop(bench).run(by_loss, batches),))


@idiom("dropout")
def dropout(bench: Bench) -> Outcome:
    return Outcome(Loop(bench, dropout=0.2).run(by_closure), (Loop(bench, dropout=0.2).run(by_loss),))


@idiom("dropout, repeated batch")
def dropout_on_one_batch(bench: Bench) -> Outcome:
    """Losses that differ on the same data do not end the steps: after many the weights still move."""
    loop, batch = Loop(bench, dropout=0.2), bench.data()
    tried = loop.run(by_closure, [batch] * (2 * STEPS))
    assert not tried.weights or _still_moves(loop, batch), "the weights have stopped moving"
    return Outcome(tried)


def _still_moves(loop: Loop, batch: Batch) -> bool:
    before = [value.detach().clone() for value in loop.model.parameters()]
    for _ in range(3):
        loop.take(by_closure, batch)
    return any(not torch.equal(*pair) for pair in zip(loop.model.parameters(), before, strict=True))


def _validated(bench: Bench, *, gradients: bool) -> Outcome:
    other = bench.data(7, seed=3)

    def validated(loop: Loop, batch: Batch) -> None:
        loop.gradients(batch)
        loop.model.eval()
        with torch.set_grad_enabled(gradients):
            loop.loss(other)
        loop.model.train()
        loop.optimizer.step()

    return Outcome(Loop(bench).run(validated), (bench.plain(),))


@idiom("validation before the step")
def validation(bench: Bench) -> Outcome:
    return _validated(bench, gradients=False)


@idiom("validation before the step, with gradients")
def validation_with_gradients(bench: Bench) -> Outcome:
    return _validated(bench, gradients=True)


@idiom("gradients cleared to zero")
def cleared_to_zero(bench: Bench) -> Outcome:
    """`zero_grad(set_to_none=False)`: what a batch leaves unused has a gradient of zero once it has had one."""
    used: set[int] = set()

    def to_zero(loop: Loop, batch: Batch) -> None:
        loop.optimizer.zero_grad(set_to_none=False)
        loop.loss(batch).backward()
        loop.optimizer.step()

    def by_hand(loop: Loop, batch: Batch) -> None:
        loop.gradients(batch)
        for value in loop.model.parameters():
            if value.grad is not None:
                used.add(id(value))
            elif id(value) in used:
                value.grad = torch.zeros_like(value)
        loop.optimizer.step()

    return Outcome(Loop(bench).run(to_zero), (Loop(bench).run(by_hand),))


@idiom("step without gradients")
def no_gradients(bench: Bench) -> Outcome:
    """Before the first pass and between two: nothing happens, as with torch's own."""

    def nothing_first(loop: Loop, batch: Batch) -> None:
        loop.optimizer.zero_grad()
        loop.optimizer.step()
        plain(loop, batch)

    return Outcome(Loop(bench).run(nothing_first), (bench.plain(),))


def _zeroed(model: nn.Module, name: str) -> nn.Module:
    last = model.get_submodule(name)
    for value in last.parameters():
        nn.init.zeros_(value)
    return model


def _no_zero(problem: Problem) -> str | None:
    return None if problem.last else "its last layer is frozen, or has no gradient at zero"


@idiom("last layer starts at zero", leaves_out=_no_zero)
def zero_last_layer(bench: Bench) -> Outcome:
    def run(one: One) -> Loop:
        loop = Loop(bench, model=_zeroed(bench.model(), str(bench.problem.last)), **bench.found())
        loop.run(one)
        return loop

    return Outcome(run(by_closure).course(), (run(by_loss).course(),))
