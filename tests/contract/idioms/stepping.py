"""Ways to make the gradients and to step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..loops import Bench, Loop, by_closure, by_loss, plain
from ..models import Batch, Problem
from ..registry import Outcome, idiom

SCALE = 1024.0


@idiom("step()")
def without_loss(bench: Bench) -> Outcome:
    """Run twice it takes the same steps."""
    return Outcome(Loop(bench, **bench.found()).run(plain), (bench.plain(),))


@idiom("step(closure)")
def closure(bench: Bench) -> Outcome:
    return Outcome(Loop(bench).run(by_closure), (bench.plain(one=by_loss),))


@idiom("step(loss=number)")
def loss_as_a_number(bench: Bench) -> Outcome:
    def by_number(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(loss=loop.gradients(batch).item())  # type: ignore[call-arg]

    return Outcome(Loop(bench).run(by_number), (bench.plain(one=by_loss),))


@idiom("closure that does nothing")
def empty_closure(bench: Bench) -> Outcome:
    """Gradients are there before the step, and the closure returns nothing: Lightning's step by hand."""

    def by_hand(loop: Loop, batch: Batch) -> None:
        loop.gradients(batch)
        loop.optimizer.step(lambda: None)  # type: ignore[arg-type]

    return Outcome(Loop(bench).run(by_hand), (bench.plain(),))


def _parts(problem: Problem, batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches whose losses' mean has the gradient of the whole; the whole again where samples are coupled."""
    if problem.coupled:
        return [batch] * parts
    return list(zip(*(each.chunk(parts) for each in batch), strict=True))


def _accumulated(loop: Loop, batch: Batch, parts: int) -> Tensor:
    loop.optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float64, device=loop.bench.device)
    for part in _parts(loop.bench.problem, batch, parts):
        loss = loop.loss(part) / parts
        loss.backward()
        total += loss.detach()
    return total


def in_four(loop: Loop, batch: Batch) -> None:
    _accumulated(loop, batch, 4)
    loop.optimizer.step()


def in_two(loop: Loop, batch: Batch) -> None:
    _accumulated(loop, batch, 2)
    loop.optimizer.step()


def _first_step(bench: Bench, one: Callable[[Loop, Batch], None]) -> float:
    """The length of the first step; teleports are no part of it."""
    loop = Loop(bench)
    course = loop.run(one, steps=1)
    pairs = list(zip(course.weights, course.start, strict=True))
    taken = getattr(loop.optimizer, "last_step", None)
    if taken is not None:
        pairs = [(value, taken.teleported[name]) for name, value in taken.parameters.items()]
    return sum(float((now - then).abs().square().sum()) for now, then in pairs) ** 0.5


@idiom("accumulation")
def accumulation(bench: Bench) -> Outcome:
    """Four passes step as two do, and the first step is no longer than the whole batch's in one pass."""
    whole = _first_step(bench, plain)
    for one in (in_two, in_four):
        summed = _first_step(bench, one)
        assert summed <= 1.01 * whole, f"the first step is {summed / whole:.3g} times that of one pass"
    return Outcome(Loop(bench).run(in_four), (bench.plain(one=in_two),))


@idiom("accumulation in a closure")
def accumulation_in_a_closure(bench: Bench) -> Outcome:
    def by_closure(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(lambda: _accumulated(loop, batch, 4))  # type: ignore[arg-type]

    def by_loss(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(loss=_accumulated(loop, batch, 4))  # type: ignore[call-arg]

    return Outcome(Loop(bench).run(by_closure), (Loop(bench).run(by_loss),))


@idiom("loss scaled by hand")
def scaled_by_hand(bench: Bench) -> Outcome:
    def scaled(loop: Loop, batch: Batch) -> None:
        loop.optimizer.zero_grad()
        (loop.loss(batch) * SCALE).backward()
        for value in loop.model.parameters():
            if value.grad is not None:
                value.grad = value.grad / SCALE
        loop.optimizer.step()

    return Outcome(Loop(bench).run(scaled), (bench.plain(),))


@idiom("GradScaler")
def grad_scaler(bench: Bench) -> Outcome:
    scaler = torch.amp.GradScaler(bench.device, init_scale=SCALE, growth_interval=5)

    def scaled(loop: Loop, batch: Batch) -> None:
        loop.optimizer.zero_grad()
        scaler.scale(loop.loss(batch)).backward()
        scaler.step(loop.optimizer)
        scaler.update()

    return Outcome(Loop(bench).run(scaled), (bench.plain(),))


def _no_clipping(problem: Problem) -> str | None:
    return "torch takes no norm of sparse gradients" if problem.sparse else None


@idiom("clipping that clips nothing", leaves_out=_no_clipping)
def loose_clipping(bench: Bench) -> Outcome:
    def clipped(loop: Loop, batch: Batch) -> None:
        loop.gradients(batch)
        nn.utils.clip_grad_norm_(loop.model.parameters(), 1e9)
        loop.optimizer.step()

    return Outcome(Loop(bench).run(clipped), (bench.plain(),))


@idiom("clipping", leaves_out=_no_clipping)
def tight_clipping(bench: Bench) -> Outcome:
    """Clipped gradients step as those of a loss that is smaller by the same factor."""

    def norm(loop: Loop, batch: Batch) -> Tensor:
        loop.gradients(batch)
        return nn.utils.get_total_norm([value.grad for value in loop.model.parameters() if value.grad is not None])

    def clipped(loop: Loop, batch: Batch) -> None:
        half = float(norm(loop, batch)) / 2
        loop.gradients(batch)
        nn.utils.clip_grad_norm_(loop.model.parameters(), half)
        loop.optimizer.step()

    def smaller(loop: Loop, batch: Batch) -> None:
        whole = norm(loop, batch)
        loop.optimizer.zero_grad()
        (loop.loss(batch) * (whole / 2 / (whole + 1e-6))).backward()
        loop.optimizer.step()

    return Outcome(Loop(bench).run(clipped), (Loop(bench).run(smaller),))


@idiom("autocast")
def autocast(bench: Bench) -> Outcome:
    """Under bfloat16, with a closure and without."""

    def within(loop: Loop, batch: Batch) -> Tensor:
        loop.optimizer.zero_grad()
        with torch.autocast(bench.device, torch.bfloat16):
            loss = loop.loss(batch)
        loss.backward()
        return loss

    def by_closure(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(lambda: within(loop, batch))  # type: ignore[arg-type]

    def by_loss(loop: Loop, batch: Batch) -> None:
        loop.optimizer.step(loss=within(loop, batch))  # type: ignore[call-arg]

    single = torch.float32
    return Outcome(Loop(bench, dtype=single).run(by_closure), (Loop(bench, dtype=single).run(by_loss),))
