"""Counts that depend on no machine: operations, waits for the device, factorisations, bytes that graphs keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counting", "kept_for_backward", "most_bytes"]

_FACTORISATIONS = ("eigh", "svd", "qr", "inv", "cholesky", "matrix_exp", "lu_factor", "solve")


class Counting(TorchDispatchMode):
    """Counts what is computed while it is on: operations, waits for the device, and factorised matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = self.factorisations = self.factorised = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = str(function).removeprefix("aten.").removeprefix("_linalg_").removeprefix("linalg_").split(".")[0]
        self.operations += 1
        self.waits += name in ("_local_scalar_dense", "is_nonzero")
        if any(name.startswith(each) for each in _FACTORISATIONS):
            self.factorisations += 1
            self.factorised += arguments[0].shape[:-2].numel()
        return function(*arguments, **(keywords or {}))


def most_bytes(run: Callable[[], None]) -> int:
    """The largest number of bytes of tensors that stand beside those from before at any time during a call.

    Example:
        >>> most_bytes(lambda: None if torch.ones(1000).double().sum() else None) >= 8000
        True
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    changes = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    total = most = 0
    for each in sorted(changes, key=lambda change: change.start_ns()):
        total += each.nbytes()
        most = max(most, total)
    return most


@contextlib.contextmanager
def kept_for_backward() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the bytes of all tensors that graphs made inside have kept so far, each once."""
    found: dict[int, int] = {}
    # What is released may leave its place to another tensor, so it is held on to.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in found:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(found.values())
