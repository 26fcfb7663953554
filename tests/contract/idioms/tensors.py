"""Parameters of every kind, precisions, and activations that are computed twice."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..loops import Bench, Loop, by_closure, by_loss, plain
from ..models import Batch
from ..registry import Outcome, idiom
from .life import either


@idiom("weights in bfloat16", precision=True)
def bfloat16(bench: Bench) -> Outcome:
    return Outcome(Loop(bench, dtype=torch.bfloat16).run(by_closure), (Loop(bench, dtype=torch.bfloat16).run(by_loss),))


@idiom("weights in float16", precision=True)
def float16(bench: Bench) -> Outcome:
    return Outcome(Loop(bench, dtype=torch.float16).run(by_closure), (Loop(bench, dtype=torch.float16).run(by_loss),))


@idiom("weights in float32")
def float32(bench: Bench) -> Outcome:
    return Outcome(Loop(bench, dtype=torch.float32).run(by_closure), (Loop(bench, dtype=torch.float32).run(by_loss),))


@idiom("activation checkpointing")
def activation_checkpointing(bench: Bench) -> Outcome:
    """Every part of the model runs once more in the backward pass. Its forward is no longer its class's own, which may
    hide a symmetry."""
    model = bench.model()
    for part in model.children():
        if not isinstance(part, nn.ModuleList):
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)  # type: ignore[method-assign]
    return either(bench, Loop(bench, model=model, **bench.found()).run(plain))


@idiom("activation checkpointing, reentrant")
def reentrant(bench: Bench) -> Outcome:
    """The whole model runs once more; the older kind needs an input that has a gradient."""

    def one(loop: Loop, batch: Batch) -> None:
        loop.optimizer.zero_grad()
        asks = torch.zeros((), device=bench.device, requires_grad=True)

        def again(*inputs: Tensor) -> Tensor:
            return checkpoint(lambda _, *given: loop.model(*given), asks, *inputs, use_reentrant=True)

        bench.problem.loss(again, batch).backward()
        loop.optimizer.step()

    return Outcome(Loop(bench).run(one), (bench.plain(),))


class _Odd(nn.Module):
    """A model with parameters of zero dimensions, one entry and none."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))
        self.offset = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.none, self.hollow = nn.Parameter(torch.empty(0, dtype=dtype)), nn.Parameter(torch.empty(0, 4, dtype=dtype))

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = self.gain * self.inner(*inputs)
        first = outputs[..., :1] + self.offset + self.none.sum() + self.hollow.sum()
        return torch.cat([first, outputs[..., 1:]], -1)


@idiom("parameters of zero, one and no entries")
def odd_shapes(bench: Bench) -> Outcome:
    def loop() -> Loop:
        return Loop(bench, model=_Odd(bench.model(), torch.float64).to(bench.device))

    return Outcome(loop().run(by_closure), (loop().run(by_loss),))


class _Complex(nn.Module):
    """A model with a filter of complex numbers behind it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.filter = nn.Parameter(torch.ones(2, dtype=torch.complex128))

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.inner(*inputs)) * self.filter, n=3)


@idiom("complex parameters")
def complex_parameters(bench: Bench) -> Outcome:
    def loop() -> Loop:
        return Loop(bench, model=_Complex(bench.model()).to(bench.device))

    return Outcome(loop().run(by_closure), (loop().run(by_loss),))


class _Twice(nn.Module):
    """A matrix applied twice behind a model: tied under two names, or one parameter used twice."""

    def __init__(self, inner: nn.Module, tied: bool) -> None:
        super().__init__()
        self.inner = inner
        self.first = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(3) + 0.1)
        if tied:
            self.second = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.second.weight = self.first.weight

    def forward(self, *inputs: Tensor) -> Tensor:
        again = self.second.weight if hasattr(self, "second") else self.first.weight
        return nn.functional.linear(nn.functional.leaky_relu(self.first(self.inner(*inputs)), 0.3), again)


@idiom("tied weights")
def tied(bench: Bench) -> Outcome:
    """A matrix with two names steps as one parameter that is used twice."""

    def loop(tied: bool) -> Loop:
        return Loop(bench, model=_Twice(bench.model(), tied).to(bench.device))

    return Outcome(loop(tied=True).run(plain), (loop(tied=False).run(plain),))


def _flattened(model: nn.Module) -> Tensor:
    """Makes the parameters views into one buffer."""
    values = list(model.parameters())
    flat = torch.cat([value.detach().flatten() for value in values])
    for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
        value.data = part.view_as(value)
    return flat


@idiom("parameters in one flat buffer")
def flat_buffer(bench: Bench) -> Outcome:
    model = bench.model()
    flat = _flattened(model)
    tried = Loop(bench, model=model, **bench.found()).run(plain)
    held = torch.cat([value.detach().flatten() for value in model.parameters()])
    assert torch.equal(held, flat), "the parameters are no longer views into their buffer"
    return Outcome(tried, (bench.plain(),))
