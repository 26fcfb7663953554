"""Tensors that share memory: moving one moves the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["overlaps"]


def overlaps(tensors: Mapping[str, Tensor], others: Iterable[Tensor] = ()) -> set[str]:
    """Names of the tensors that share memory with another of them, or with one of some others.

    Adjacent views into one buffer do not overlap (recurrent layers, flattened parameters). Interleaved views count as
    overlapping.

    Args:
        tensors: by name.
        others: tensors of which none is moved; one that is among `tensors` counts once.

    Example:
        >>> import torch
        >>> flat = torch.zeros(4)
        >>> overlaps({"a": flat[:2], "b": flat[2:]}), sorted(overlaps({"a": flat[:3], "b": flat[2:]}))
        (set(), ['a', 'b'])
    """
    known = {id(value) for value in tensors.values()}
    spans = [(*span, name) for name, value in tensors.items() if (span := _span(value)) is not None]
    spans += [(*span, "") for each in others if id(each) not in known and (span := _span(each)) is not None]
    found: set[str] = set()
    furthest: tuple[tuple[object, ...], int, str] | None = None
    for storage, start, end, name in sorted(spans, key=lambda span: (repr(span[0]), span[1])):
        if furthest is not None and furthest[0] == storage and start < furthest[1]:
            found |= {name, furthest[2]}
        if furthest is None or furthest[0] != storage or end > furthest[1]:
            furthest = (storage, end, name)
    return found - {""}


def _span(tensor: Tensor) -> tuple[tuple[object, ...], int, int] | None:
    """The storage of a tensor and the bytes in it that it lies between; None where there is no such memory."""
    if tensor.device.type == "meta" or not tensor.numel():
        return None
    try:
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):
        return None
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    reach = sum(int(length - 1) * int(stride) for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return storage, start, start + (reach + 1) * size
