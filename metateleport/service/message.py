"""Requests and answers as bytes: JSON, or safetensors with the fields in its metadata. Nothing is pickled."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metateleport.service.limits import Limits

__all__ = ["BINARY", "JSON", "SCHEMA", "Message", "Refused", "decode", "encode"]

SCHEMA = 1
JSON, BINARY = "application/json", "application/x-safetensors"

_FIELDS = "metateleport"
_HEADER = 1 << 20
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Refused(ValueError):
    """A request is refused; the message says why.

    Args:
        field: the name of the field at fault; empty if it is the whole body.
        message: what is wrong with it.
        status: HTTP's status: 400 for a body that cannot be read, 422 for one that cannot be meant.
    """

    def __init__(self, field: str, message: str, status: int = 422) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.message, self.status = field, message, status

    def table(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"schema": SCHEMA, "error": {"field": self.field, "message": self.message}}


@dataclasses.dataclass(frozen=True)
class Message:
    """A request or an answer.

    Args:
        fields: numbers, texts, lists and tables.
        tensors: in float32 or float64, by name.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def encode(message: Message, kind: str = BINARY) -> bytes:
    """A message as bytes.

    Args:
        message: the message; its tensors have to be finite.
        kind: `JSON` or `BINARY`.

    Example:
        >>> sent = Message({"schema": 1, "ask": "teleport"}, {"progress": torch.tensor([0.1, 1e-300]).double()})
        >>> both = [decode(encode(sent, kind), kind) for kind in (JSON, BINARY)]
        >>> [bool((each.tensors["progress"] == sent.tensors["progress"]).all()) for each in both]
        [True, True]
    """
    # Tensors that share memory cannot be written as safetensors.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in message.tensors.items()
    }
    if kind == BINARY:
        return save(tensors, {_FIELDS: json.dumps(message.fields, allow_nan=False)})
    tables = {
        name: {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data": value.flatten().tolist()}
        for name, value in tensors.items()
    }
    return json.dumps({**message.fields, **({"tensors": tables} if tables else {})}, allow_nan=False).encode()


def decode(body: bytes, kind: str, limits: Limits | None = None) -> Message:
    """A message from bytes that anybody may have sent.

    Raises:
        Refused: if it is not one, or is beyond a limit; nothing is built before.
    """
    limits = limits or Limits()
    most = limits.bytes if kind == BINARY else limits.json_bytes
    if len(body) > most:
        raise Refused("", f"the body has {len(body)} bytes, and at most {most} are taken", 413)
    return _from_binary(body, limits) if kind == BINARY else _from_json(body, limits)


def _from_json(body: bytes, limits: Limits) -> Message:
    table = _parsed(body)
    _check_depth(table, limits.depth)
    tables = table.pop("tensors", {})
    if not isinstance(tables, dict):
        raise Refused("tensors", "this is a table of tensors by their names")
    _check_count(tables, limits)
    return Message(table, {name: _tensor(f"tensors.{name}", value) for name, value in tables.items()})


def _from_binary(body: bytes, limits: Limits) -> Message:
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > min(_HEADER, len(body) - 8):
        raise Refused("", "the body is truncated, or is not a safetensors file", 400)
    header = _parsed(body[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_FIELDS), str):
        raise Refused("__metadata__", f"the request's fields are missing: they are a JSON text named {_FIELDS!r}", 400)
    fields = _parsed(metadata[_FIELDS].encode())
    _check_depth(fields, limits.depth)
    _check_count(header, limits)
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in ("F32", "F64"):
            raise Refused(f"tensors.{name}", "a tensor is of float32 or float64")
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise Refused("", f"the body is not a safetensors file ({error})", 400) from error
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise Refused(f"tensors.{name}", "it has values that are not finite")
    # Some libraries round products otherwise where memory is not aligned: torch's own is.
    return Message(fields, {name: value.clone() for name, value in tensors.items()})


def _parsed(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            raise Refused(next(name for name in names if names.count(name) > 1), "it is given twice", 400)
        return table

    def never(constant: str) -> NoReturn:
        raise Refused("", f"{constant} is not finite", 422)

    try:
        found = json.loads(text, object_pairs_hook=once, parse_constant=never)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused("", f"the body is truncated or not JSON ({str(error)[:200]})", 400) from error
    if not isinstance(found, dict):
        raise Refused("", "the body is a table, in braces", 400)
    return found


def _check_depth(value: Any, most: int) -> None:
    level = [value]
    for _ in range(most):
        level = [each for part in level for each in _inside(part)]
        if not level:
            return
    raise Refused("", f"it is nested more than {most} levels deep")


def _inside(value: Any) -> list[Any]:
    # Numbers of a tensor are looked at where it is made.
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in parts if isinstance(each, dict | list)]


def _check_count(tables: Mapping[str, Any], limits: Limits) -> None:
    if len(tables) > limits.tensors:
        raise Refused("tensors", f"there are {len(tables)}, and at most {limits.tensors} are taken")


def _tensor(field: str, table: Any) -> Tensor:
    if not isinstance(table, dict) or table.keys() != {"dtype", "shape", "data"}:
        raise Refused(field, "a tensor is a table of dtype, shape and data")
    shape, data, dtype = table["shape"], table["data"], table["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise Refused(f"{field}.dtype", "it is float32 or float64")
    if not isinstance(shape, list) or not all(type(each) is int and 0 < each < 1 << 32 for each in shape):
        raise Refused(f"{field}.shape", "it is a list of whole numbers above zero")
    if not isinstance(data, list) or len(data) != math.prod(shape):
        raise Refused(f"{field}.data", f"it is a list of {math.prod(shape)} numbers, in the order of rows")
    if not all(type(each) in (int, float) for each in data):
        raise Refused(f"{field}.data", "it holds something else than numbers")
    try:
        value = torch.tensor(data, dtype=_DTYPES[dtype]).reshape(shape)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise Refused(f"{field}.data", f"a number is out of range ({error})") from error
    if not bool(value.isfinite().all()):
        raise Refused(f"{field}.data", "it has values that are not finite")
    return value
