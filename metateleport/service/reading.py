"""Reads a request field by field; what is missing, of another kind, beyond a limit or unknown is named."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.groups import GeneralLinear, Group, Orthogonal, PositiveDiagonal
from metateleport.service.limits import Limits
from metateleport.service.message import SCHEMA, Message, Refused
from metateleport.settings import shown
from metateleport.symmetries.rotary import PlaneScaling
from metateleport.symmetries.translation import Translation

__all__ = ["GROUPS", "Reader", "check_covariance", "kind_of"]

_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far below zero the eigenvalues of a covariance may be by rounding, over its trace."""

GROUPS: dict[str, type[Group]] = {
    "GL": GeneralLinear,
    "O": Orthogonal,
    "diagonal": PositiveDiagonal,
    "planes": PlaneScaling,
    "translation": Translation,
}
"""The groups by the names that requests have for them."""


def kind_of(group: Group) -> str | None:
    """The name that requests have for a group; None for one that they have none for."""
    return next((name for name, kind in GROUPS.items() if type(group) is kind), None)


def check_covariance(name: str, value: Tensor, dimensions: int) -> None:
    """Refuses what is no matrix of second moments: such a one is symmetric and no quadratic form of it is negative.

    Args:
        name: the tensor's.
        value: one or a stack of matrices, or of their diagonals.
        dimensions: 2 for matrices, 1 for diagonals.

    Raises:
        Refused: if it is none, beyond what rounding explains.

    Example:
        >>> check_covariance("c", torch.ones(2, 2), 2)
        >>> check_covariance("c", torch.tensor([1.0, -1.0]), 1)
        Traceback (most recent call last):
        metateleport.service.message.Refused: tensors.c: it is a covariance, and has entries below zero
    """
    if dimensions == 1:
        if bool((value < 0).any()):
            raise Refused(f"tensors.{name}", "it is a covariance, and has entries below zero")
        return
    # In units of the largest entry the trace of a large one does not overflow.
    scaled = value.double() / value.abs().amax((-2, -1), keepdim=True).double().clamp_min(1e-300)
    slack = _ROUNDING[value.dtype] * scaled.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    if bool(((scaled - scaled.mT).abs().amax((-2, -1)) > slack).any()):
        raise Refused(f"tensors.{name}", "it is a covariance, and is not symmetric")
    lifted = scaled + torch.diag_embed(slack.unsqueeze(-1).expand(scaled.shape[:-1]).clamp_min(1e-12))
    if bool((torch.linalg.cholesky_ex(lifted).info > 0).any()):
        raise Refused(f"tensors.{name}", "it is a covariance, and is not positive semidefinite")


class Reader:
    """What a request says, read once each; in the end `done` refuses what nobody has asked for.

    Args:
        message: the request.
        limits: its bounds.
    """

    def __init__(self, message: Message, limits: Limits) -> None:
        self.limits = limits
        self._fields, self._tensors = dict(message.fields), dict(message.tensors)
        self.dtype: torch.dtype | None = None
        self.apart: Sequence[int] | None = None
        schema = self._fields.pop("schema", None)
        if type(schema) is not int or schema != SCHEMA:
            raise Refused("schema", f"this service speaks schema {SCHEMA}, not {shown(schema)}")

    def has(self, field: str) -> bool:
        """Whether there is a field, or a tensor, of that name."""
        return field in self._fields or field in self._tensors

    def choice(self, field: str, of: Collection[str], default: str | None = None) -> str:
        """One of some texts."""
        value = self._fields.pop(field, default)
        if not isinstance(value, str) or value not in of:
            raise Refused(field, f"it is one of {', '.join(of)}; not {shown(value)}")
        return value

    def whole(self, field: str, least: int, most: int, default: int | None = None) -> int:
        """A whole number."""
        return whole(field, self._fields.pop(field, default), least, most)

    def number(self, field: str, above: float, most: float, default: float | None = None) -> float:
        """A number above one bound and at most another."""
        value = self._fields.pop(field, default)
        if type(value) not in (int, float) or not above < float(value) <= most:
            raise Refused(field, f"it is a number above {above:g} and at most {most:g}; not {shown(value)}")
        return float(value)

    def group(self, field: str = "group") -> Group:
        """A group: a table of its name and the size of the space that it acts on."""
        return group_of(field, self._fields.pop(field, None), self.limits)

    def tables(self, field: str) -> list[Mapping[str, Any]]:
        """A list of tables."""
        value = self._fields.pop(field, None)
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise Refused(field, "it is a list of tables, with at least one")
        if len(value) > self.limits.tensors:
            raise Refused(field, f"there are {len(value)}, and at most {self.limits.tensors} are taken")
        return value

    def tensor(self, name: str, *shape: int | None, free: bool = False) -> Tensor:
        """A tensor of that shape; None for a dimension of any size.

        Args:
            name: the tensor's.
            shape: sizes of its last dimensions, or of all if it is not `free`.
            free: whether there may be dimensions in front.
        """
        value = self._tensors.pop(name, None)
        if value is None:
            raise Refused(f"tensors.{name}", "it is missing")
        own = tuple(value.shape)
        tail = own[len(own) - len(shape) :] if shape else ()
        fits = len(own) >= len(shape) if free else len(own) == len(shape)
        if not fits or any(want is not None and has != want for has, want in zip(tail, shape, strict=True)):
            wanted = ["..."] * free + ["any" if each is None else str(each) for each in shape]
            raise Refused(f"tensors.{name}", f"its shape is {list(own)}, and ({', '.join(wanted)}) is needed")
        if any(each < 1 for each in own):
            raise Refused(f"tensors.{name}", "it is empty")
        return value

    def in_one_dtype(self, name: str, value: Tensor) -> Tensor:
        """The tensor, if all of these are of one dtype."""
        self.dtype = self.dtype or value.dtype
        if value.dtype != self.dtype:
            raise Refused(f"tensors.{name}", f"it is of {value.dtype}, and others are of {self.dtype}")
        return value

    def under(self, prefix: str) -> list[str]:
        """Names of the tensors with a prefix, without it."""
        return [name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)]

    def done(self) -> None:
        """Refuses what was not read."""
        for name in self._fields:
            raise Refused(str(name)[:100], "there is no such field")
        for name in self._tensors:
            raise Refused(f"tensors.{str(name)[:100]}", "no such tensor is read here")


def whole(field: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds."""
    if type(value) is not int or not least <= value <= most:
        raise Refused(field, f"it is a whole number from {least} to {most}; not {shown(value)}")
    return value


def group_of(field: str, table: Any, limits: Limits) -> Group:
    """A group from its table."""
    if not isinstance(table, dict) or table.keys() != {"name", "size"}:
        raise Refused(field, "it is a table of name and size")
    if not isinstance(table["name"], str) or table["name"] not in GROUPS:
        raise Refused(f"{field}.name", f"it is one of {', '.join(GROUPS)}; not {shown(table['name'])}")
    size = whole(f"{field}.size", table["size"], 1, limits.size)
    try:
        return GROUPS[table["name"]](size)
    except ValueError as error:
        raise Refused(f"{field}.size", str(error)) from error


def batch_of(field: str, value: Tensor, limits: Limits) -> tuple[int, ...]:
    """The batch dimensions in front of a tensor's last one."""
    batch = tuple(value.shape[:-1])
    if len(batch) > 1 or math.prod(batch) > limits.tasks:
        raise Refused(f"tensors.{field}", f"in front is one dimension at most, of {limits.tasks} tasks at most")
    return batch
