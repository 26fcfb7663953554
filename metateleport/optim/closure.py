"""The loss that a closure or a caller tells a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["evaluated", "known_at_first", "scalar", "scalar_or_none", "told_loss"]


def scalar(loss: Any) -> Tensor:
    """A closure's loss, detached and without dimensions.

    Raises:
        ValueError: if it is not a scalar.
    """
    loss = torch.as_tensor(loss).detach()
    if loss.numel() != 1:
        raise ValueError(f"the loss of a step has to be a scalar; this one has shape {tuple(loss.shape)}")
    return loss.reshape(())


def told_loss(loss: Any) -> Tensor | None:
    """The loss that a step is told, detached and without dimensions; None if it is not a number.

    A closure may return anything that its caller needs: `torch.optim`'s own optimizers pass it on too.

    Raises:
        ValueError: if it is a tensor of several entries, or an empty one.

    Example:
        >>> told_loss(0.5), told_loss({"logits": torch.ones(3)})
        (tensor(0.5000, dtype=torch.float64), None)
    """
    if isinstance(loss, bool) or not isinstance(loss, Tensor | int | float | np.number | np.ndarray):
        return None
    found = torch.as_tensor(loss, dtype=torch.float64 if isinstance(loss, float) else None)
    found = scalar(found.real if found.is_complex() else found)
    return found if found.is_floating_point() else found.double()


def evaluated(closure: Callable[[], Any] | None, loss: Any) -> tuple[Any, Tensor | None]:
    """What the closure returns, or the loss that was given; and either as `told_loss`.

    Raises:
        ValueError: if the given loss is no number, or either is a tensor of several entries.
    """
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
        return loss, told_loss(loss)
    told = told_loss(loss)
    if loss is not None and told is None:
        raise ValueError(f"step(loss=...) takes the loss, a number or a tensor of one entry; not {loss!r}")
    return loss, told


def scalar_or_none(result: Any) -> Tensor | None:
    """The value that a step returned if it is a scalar, else None."""
    if isinstance(result, bool) or not isinstance(result, Tensor | int | float):
        return None
    found = torch.as_tensor(result).detach()
    return found.reshape(()) if found.numel() == 1 else None


def known_at_first(closure: Callable[[], Any], loss: Any, groups: Sequence[dict[str, Any]]) -> Callable[[], Any]:
    """The closure, which returns the known loss without evaluating until the weights or the gradients change.

    Values are compared, not versions: an optimizer that writes through `.data` does not raise the version.
    """
    held = [each for group in groups for each in group["params"]]
    known = [(each.detach().clone(), None if each.grad is None else each.grad.detach().clone()) for each in held]

    def unchanged() -> bool:
        return all(
            torch.equal(value, each) and _same_gradient(gradient, each.grad)
            for each, (value, gradient) in zip(held, known, strict=True)
        )

    def evaluate() -> Any:
        nonlocal known
        if known and unchanged():
            return loss
        # After the first change the copies are of no more use.
        known = []
        return closure()

    return evaluate


def _same_gradient(before: Tensor | None, now: Tensor | None) -> bool:
    if before is None or now is None:
        return before is now
    return before.layout == now.layout and before.layout == torch.strided and torch.equal(before, now)
