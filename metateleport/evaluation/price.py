"""What a learned step costs on a model, beside AdamW's."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metateleport.optim import LearnedOptimizer

__all__ = ["Price", "Unpriced", "price_of"]

_WARM_UP = 4
"""Steps of each before any is timed: the first ones make their states."""


class Unpriced(ValueError):
    """No step can be timed; the message says why."""


class Price(NamedTuple):
    """Seconds of whole steps, forward and backward pass included, as medians.

    Args:
        learned: of a learned step.
        adamw: of AdamW's.
    """

    learned: float
    adamw: float

    @property
    def ratio(self) -> float:
        """How many of AdamW's steps fit into one learned step."""
        return self.learned / self.adamw


def price_of(model: nn.Module, example_input: Any, checkpoint: str, rounds: int = 9) -> Price:
    """Times steps of copies of a model on an example input, those of both optimizers in turn.

    The loss is the mean square of what the model puts out: how long a step takes does not depend on it. On a CPU it is
    CPU time that is counted, which other processes hardly spoil.

    Args:
        model: the model; it is left as it is.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs; a step on a batch of another
            size has another price.
        checkpoint: a checkpoint's name or path.
        rounds: steps of each that are timed.

    Returns:
        The price.

    Raises:
        Unpriced: if the model cannot be copied, or puts out nothing with a gradient.

    Example:
        >>> price = price_of(nn.Linear(4, 2), torch.ones(8, 4), "digits", rounds=3)
        >>> price.adamw > 0 and price.ratio > 1
        True
    """
    device = next(model.parameters()).device
    steps: dict[str, Callable[[], None]] = {}
    optimizers: dict[str, Any] = {}
    for name in Price._fields:
        try:
            own = copy.deepcopy(model)
        except Exception as error:
            raise Unpriced(f"the model cannot be copied: {type(error).__name__}: {error}") from error
        trained = [value for value in own.parameters() if value.requires_grad]
        if not trained:
            raise Unpriced("no parameter of the model is trained")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = torch.optim.AdamW(trained) if name == "adamw" else LearnedOptimizer(own, checkpoint)
        optimizers[name] = optimizer
        steps[name] = _step(own, optimizer, example_input)
    times: dict[str, list[float]] = {name: [] for name in steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for round_ in range(-_WARM_UP, rounds):
            for name, step in steps.items():
                began = _now(device)
                step()
                if round_ >= 0:
                    times[name].append(_now(device) - began)
    if optimizers["learned"].skipped:
        raise Unpriced("steps are left out, as loss or gradients on this input are not finite")
    return Price(*(max(statistics.median(times[name]), 1e-9) for name in Price._fields))


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, example_input: Any) -> Callable[[], None]:
    def step() -> None:
        _called(model, example_input).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _called(model: nn.Module, example_input: Any) -> Tensor:
    """The mean square of what a model puts out."""
    if isinstance(example_input, Mapping):
        outputs = model(**example_input)
    else:
        outputs = model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    if hasattr(outputs, "to_tuple"):
        outputs = outputs.to_tuple()
    found = [each for each in pytree.tree_leaves(outputs) if isinstance(each, Tensor) and each.requires_grad]
    if not found:
        raise Unpriced("what the model puts out has no tensor with a gradient")
    return torch.stack([each.abs().square().mean() for each in found]).sum()
