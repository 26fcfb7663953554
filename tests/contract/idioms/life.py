"""Saving, copying, wrapping, and company."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim.swa_utils import AveragedModel

import metateleport as mt

from ..loops import MIDDLE, Bench, Course, Loop, by_closure, by_loss, plain
from ..models import Batch
from ..registry import Outcome, apart, idiom, same
from ..stand_in import ADAMW, GAUGED


def _halfway(bench: Bench) -> Loop:
    loop = Loop(bench)
    for batch in bench.batches(steps=MIDDLE):
        loop.take(plain, batch)
    return loop


def _rest(loop: Loop) -> Course:
    return loop.run(plain, loop.bench.batches()[MIDDLE:])


@idiom("state dict midway")
def state_dict(bench: Bench) -> Outcome:
    """Written to a file that holds tensors and plain values alone, and read by a new optimizer."""
    first, file = _halfway(bench), io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    saved, second = torch.load(file, weights_only=True), Loop(bench)
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    return Outcome(_rest(second), (bench.plain(),))


def _passed_on(first: Loop) -> Loop:
    """A new model and optimizer with the states of others, by the interface of `torch.distributed.checkpoint`."""
    second, before = Loop(first.bench), [value.detach().clone() for value in first.model.parameters()]
    # A copy, as a file would be: what is loaded is not copied again.
    saved = copy.deepcopy(distributed.get_state_dict(first.model, first.optimizer))
    assert apart(list(first.model.parameters()), before) == 0, "saving moved the model"
    distributed.set_state_dict(second.model, second.optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert apart(list(second.model.parameters()), before) == 0, "loading moved the model"
    return second


@idiom("distributed state dict before the first step")
def distributed_before(bench: Bench) -> Outcome:
    """It takes a step at a learning rate of zero to have a state, which may count; both go on alike from there."""
    first = Loop(bench)
    second = _passed_on(first)
    return Outcome(second.run(plain), (first.run(plain),))


@idiom("distributed state dict midway")
def distributed_midway(bench: Bench) -> Outcome:
    first = _halfway(bench)
    # An optimizer that has gradients refuses to be saved by it.
    first.optimizer.zero_grad()
    second = _passed_on(first)
    same(_rest(first).weights, bench.plain().weights, "the one that was saved")
    return Outcome(_rest(second), (bench.plain(),))


def _copied(bench: Bench, how: Any) -> Outcome:
    """The copy goes on as the one that was copied, and neither takes notice of the other."""
    first = _halfway(bench)
    other_model, other_optimizer = how((first.model, first.optimizer))
    second = copy.copy(first)
    second.model = second.watched = other_model
    second.optimizer = other_optimizer
    for batch in bench.batches()[MIDDLE:]:
        for loop in (first, second):
            loop.take(plain, batch)
    same(first.course().weights, bench.plain().weights, "the one that was copied")
    return Outcome(second.course(), (bench.plain(),))


@idiom("deepcopy midway")
def deep_copy(bench: Bench) -> Outcome:
    return _copied(bench, copy.deepcopy)


@idiom("pickle midway")
def pickled(bench: Bench) -> Outcome:
    return _copied(bench, lambda both: pickle.loads(pickle.dumps(both)))


class _Outer(nn.Module):
    """A model in another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)


class _Dict(_Outer):
    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": self.inner(*inputs)}


def either(bench: Bench, tried: Course) -> Outcome:
    """Equal to the bare model with its symmetries, or to the one without them if it was said that it goes without."""
    without = bench.plain(symmetries=())
    if tried.said or apart(bench.plain().weights, without.weights) <= 1e-6:
        return Outcome(tried, (bench.plain(), without))
    return Outcome(tried, (bench.plain(),))


@idiom("model in a wrapper")
def wrapped(bench: Bench) -> Outcome:
    return either(bench, Loop(bench, model=_Outer(bench.model())).run(plain))


@idiom("outputs in a dict")
def outputs_in_a_dict(bench: Bench) -> Outcome:
    return either(bench, Loop(bench, model=_Dict(bench.model())).run(plain))


@idiom("DataParallel")
def data_parallel(bench: Bench) -> Outcome:
    devices = [0] if bench.device == "cuda" else []
    return either(bench, Loop(bench, model=nn.DataParallel(bench.model(), devices)).run(plain))


@idiom("compiled model")
def compiled(bench: Bench) -> Outcome:
    torch.compiler.reset()
    return either(bench, Loop(bench, model=torch.compile(bench.model(), backend="eager")).run(plain))  # type: ignore[arg-type]


@idiom("compiled after the optimizer was made")
def compiled_later(bench: Bench) -> Outcome:
    torch.compiler.reset()
    loop = Loop(bench)
    loop.watched, loop.model = loop.model, torch.compile(loop.model, backend="eager")  # type: ignore[assignment]
    return either(bench, loop.run(plain))


def _pieces(model: nn.Module) -> tuple[Any, Any]:
    """A first part of the model and the rest: modules where there are two that are trained, else parameters."""
    children = [each for each in model.children() if any(value.requires_grad for value in each.parameters())]
    trained = [value for value in model.parameters() if value.requires_grad]
    held = {id(value) for each in children for value in each.parameters() if value.requires_grad}
    if len(children) > 1 and all(id(value) in held for value in trained):
        middle = len(children) // 2
        return nn.ModuleList(children[:middle]), nn.ModuleList(children[middle:])
    return trained[: len(trained) // 2], trained[len(trained) // 2 :]


@idiom("two optimizers on one model")
def two_optimizers(bench: Bench) -> Outcome:
    """One for each half; which of them steps first makes no difference."""
    # Each takes the step of a whole model.
    halves: dict[str, Any] = {} if bench.checkpoint in (ADAMW, GAUGED) else {"lr": 0.5}

    def run(turned: bool) -> Course:
        loop = Loop(bench, optimizer=lambda model: bench.optimizer(_pieces(model)[0], **halves))
        with loop.listening():
            both = [loop.optimizer, bench.optimizer(_pieces(loop.model)[1], **halves)]

        def one(loop: Loop, batch: Batch) -> None:
            loop.model.zero_grad()
            loop.loss(batch).backward()
            for optimizer in reversed(both) if turned else both:
                optimizer.step()

        return loop.run(one)

    return Outcome(run(turned=False), (run(turned=True),))


@idiom("two models, one loaded checkpoint")
def shared_checkpoint(bench: Bench) -> Outcome:
    """In turns, one in float64 and one in float32, as each would by itself."""
    loaded = {} if bench.checkpoint in (ADAMW, GAUGED) else {"checkpoint": mt.load_checkpoint(bench.checkpoint)}
    double, single = Loop(bench, **loaded), Loop(bench, dtype=torch.float32, **loaded)
    pairs = zip(bench.batches(), bench.batches(torch.float32), strict=True)
    for one, other in pairs:
        double.take(by_loss, one)
        single.take(by_loss, other)
    same(single.course().weights, bench.plain(one=by_loss, dtype=torch.float32).weights, "the one in float32")
    return Outcome(double.course(), (bench.plain(one=by_loss),))


@idiom("average of the weights")
def averaged(bench: Bench) -> Outcome:
    """The average trains too, and that it is evaluated between backward and step changes no step."""
    loop = Loop(bench)
    average = AveragedModel(loop.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))

    def one(loop: Loop, batch: Batch) -> None:
        loop.gradients(batch)
        bench.problem.loss(average, batch)
        loop.optimizer.step()
        average.update_parameters(loop.model)

    tried = loop.run(one)
    with torch.no_grad():
        after = float(bench.problem.loss(average, bench.data()))
    assert after < tried.before, f"the average's loss is {after:.4g}, and was {tried.before:.4g} at the start"
    return Outcome(tried, (bench.plain(),))


@idiom("closure under no_grad")
def closure_without_gradients(bench: Bench) -> Outcome:
    """torch's own enable gradients for the closure."""

    def one(loop: Loop, batch: Batch) -> None:
        with torch.no_grad():
            by_closure(loop, batch)

    return Outcome(Loop(bench).run(one), (bench.plain(one=by_loss),))
