"""What a step is told by its closure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["known_at_first", "scalar", "scalar_or_none"]


def scalar(loss: Any) -> Tensor:
    """A closure's loss, detached and without dimensions.

    Raises:
        ValueError: if it is not a scalar.
    """
    loss = torch.as_tensor(loss).detach()
    if loss.numel() != 1:
        raise ValueError(f"the closure has to return a scalar loss; it returned shape {tuple(loss.shape)}")
    return loss.reshape(())


def scalar_or_none(result: Any) -> Tensor | None:
    """What a step returned, if it is a scalar."""
    if isinstance(result, bool) or not isinstance(result, Tensor | int | float):
        return None
    found = torch.as_tensor(result).detach()
    return found.reshape(()) if found.numel() == 1 else None


def known_at_first(closure: Callable[[], Any], loss: Any, groups: Sequence[dict[str, Any]]) -> Callable[[], Any]:
    """The closure, whose value is known as long as nobody changes the weights or the gradients."""

    def versions() -> list[tuple[int, int | None, int | None]]:
        return [
            (each._version, *((None, None) if each.grad is None else (id(each.grad), each.grad._version)))
            for group in groups
            for each in group["params"]
        ]

    known = versions()

    def evaluate() -> Any:
        return loss if versions() == known else closure()

    return evaluate
