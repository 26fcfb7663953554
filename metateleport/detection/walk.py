"""The walk over a model's graph that fills the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.detection.given import tensors_in
from metateleport.detection.ledger import Classes, Ledger
from metateleport.detection.rules import FRESH, RULES
from metateleport.detection.trace import Graph
from metateleport.detection.values import Context, Value
from metateleport.symmetries._memory import overlaps

__all__ = ["Walk", "aliased", "module_of", "name_of", "walk"]

_MOST_PASSES = 50
_SHAPE_ONLY = frozenset(
    (
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "empty_like",
        "sym_size",
        "size",
        "_assert_tensor_metadata",
    )
)
"""Operations that look at no entry of their inputs."""


class Walk:
    """What the walk over a graph found.

    Args:
        ledger: with the edges, kills and touches of the last pass.
        classes: their solution.
    """

    def __init__(self, ledger: Ledger, classes: Classes) -> None:
        self.ledger, self.classes = ledger, classes


def walk(graph: Graph, movable: Collection[str], buffers: Collection[str]) -> Walk:
    """Passes over a graph until no further variable turns out to be fixed.

    A norm late in the graph fixes variables before it, and with them those that were matched with them. So passes are
    repeated with what is known, first without tentative results, then with them.

    Args:
        graph: the graph.
        movable: names of the parameters that may move.
        buffers: names of the buffers that may move (running statistics).
    """
    ledger = Ledger()
    tentative = False
    for _ in range(_MOST_PASSES):
        size = ledger.size
        ledger.begin()
        _pass(graph, ledger, movable, buffers)
        classes = ledger.solve(tentative)
        ledger.remember(tentative)
        changed = not np.array_equal(classes.dead, ledger.dead) or ledger.size != size
        ledger.dead = classes.dead
        if not changed and (tentative or not ledger.is_tentative):
            return Walk(ledger, classes)
        if not changed:
            tentative = True
    raise RuntimeError(f"the walk over the model did not come to an end in {_MOST_PASSES} passes")


def _pass(
    graph: Graph,
    ledger: Ledger,
    movable: Collection[str],
    buffers: Collection[str],
) -> None:
    values: dict[torch.fx.Node, Any] = {}
    for number, node in enumerate(graph.nodes):
        if node.op == "placeholder":
            values[node] = _placeholder(graph, node, ledger, movable, buffers)
        elif node.op == "output":
            Context(ledger, number, "output", graph.prefix).kill(_labelled(node.args, values), silent=True)
        elif node.op == "call_function":
            values[node] = _call(graph, node, number, ledger, values)


def _placeholder(
    graph: Graph, node: torch.fx.Node, ledger: Ledger, movable: Collection[str], buffers: Collection[str]
) -> Any:
    shape = _shape(node)
    name = graph.parameters.get(node.name)
    if name is not None and name in movable:
        for axis, size in enumerate(shape):
            if size > 1:
                ledger.slot((name, axis), name, tuple(size if i == axis else 1 for i in range(len(shape))))
        labels = [ledger.alive(slot.variables) for slot in ledger.by_parameter.get(name, ())]
        return Value(shape, tuple(label for label in labels if bool(label.any())), parameter=name)
    buffer = graph.tensors.get(node.name)
    if buffer is not None and buffer in buffers:
        return Value(shape, buffer=buffer)
    return Value(shape) if isinstance(shape, tuple) else None


def _call(graph: Graph, node: torch.fx.Node, number: int, ledger: Ledger, values: dict[torch.fx.Node, Any]) -> Any:
    shape = _shape(node)
    name = name_of(node)
    if name == "getitem":
        source: Any = node.args[0]
        place: Any = node.args[1]
        if isinstance(values[source], list):
            return values[source][place]
        return Value(shape) if isinstance(shape, tuple) else shape
    labelled = _labelled((node.args, node.kwargs), values)
    for value in labelled:
        if value.parameter or value.buffer:
            ledger.first_use.setdefault(value.parameter or str(value.buffer), number)
    base = name.removesuffix("_") if not name.startswith("_") else name
    context = Context(ledger, number, base, graph.prefix + module_of(node), node.target)  # type: ignore[arg-type]
    # A parameter gets what its axes of one entry ask for when it is first read.
    if not any(value.labels or (value.parameter and 1 in value.shape) for value in labelled) or base in _SHAPE_ONLY:
        return _fixed(shape)
    schema = getattr(node.target, "_schema", None)
    result = None
    if schema is not None and schema.is_mutable and not _overwrites_its_own(node):
        context.name = f"{name} in place, of a tensor that is used elsewhere,"
    elif base in RULES and isinstance(shape, tuple | list) and (schema is None or schema.name.startswith("aten::")):
        arguments = torch.fx.map_arg(node.args, values.get)
        # An overload that a rule does not know asks for more or other arguments: it is not followed.
        with contextlib.suppress(TypeError, ValueError, IndexError, RuntimeError):
            result = RULES[base](context, shape, *arguments, **torch.fx.map_arg(node.kwargs, values.get))
    # Rounding to whole numbers does not scale.
    if result is None or not _is_floating(node.meta.get("val")):
        context.kill(labelled)
        return _fixed(shape)
    return result


def _labelled(arguments: Any, values: Mapping[torch.fx.Node, Any]) -> list[Value]:
    found: list[Value] = []

    def visit(node: torch.fx.Node) -> torch.fx.Node:
        value = values.get(node)
        found.extend(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Value))
        return node

    torch.fx.map_arg(arguments, visit)
    return found


def _fixed(shape: Any) -> Any:
    if isinstance(shape, list):
        return [_fixed(each) for each in shape]
    return Value(shape) if isinstance(shape, tuple) else shape


def _is_floating(value: Any) -> bool:
    """Whether a tensor, or all of several, holds floating-point numbers, or truth values (signs)."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.dtype is torch.bool
    return isinstance(value, tuple | list) and all(_is_floating(each) for each in value)


def _shape(node: torch.fx.Node) -> Any:
    return _shape_of(node.meta.get("val"))


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [_shape_of(each) for each in value]
    return None


def name_of(node: torch.fx.Node) -> str:
    """The name of a node's operation, without namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name.split("::")[-1])
    return str(getattr(node.target, "__name__", node.target))


def module_of(node: torch.fx.Node) -> str:
    """The path, in the traced module, of the module that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).removeprefix("observed").removeprefix(".")


def _overwrites_its_own(node: torch.fx.Node) -> bool:
    """Whether what an in-place operation overwrites is seen by it alone, under no other name."""
    source = node.args[0]
    if not isinstance(source, torch.fx.Node) or source.op != "call_function" or set(source.users) != {node}:
        return False
    return name_of(source) in FRESH and (not name_of(source).endswith("_") or _overwrites_its_own(source))


def aliased(model: nn.Module, graph: Graph) -> dict[str, str]:
    """Parameters whose memory another tensor that is read looks at too, each with the reason.

    A tensor that a module merely keeps, as the buffer that flattened parameters are views of, is read by nothing that
    was traced; where only a part was traced it may be read elsewhere.
    """
    named = dict(model.named_parameters())
    tensors = {**named, **dict(model.named_buffers())}
    others: list[Tensor] = list(graph.constants)
    if graph.prefix:
        others += tensors.values()
        kept = (value for module in model.modules() for value in vars(module).values())
        others += [each for value in kept for each in tensors_in(value) if not isinstance(each, nn.Parameter)]
    else:
        read = {node.name for node in graph.nodes if node.op == "placeholder" and node.users}
        names = {name for key, name in (*graph.parameters.items(), *graph.tensors.items()) if key in read}
        named = {name: value for name, value in named.items() if name in names}
        others += [value for name, value in tensors.items() if name in names]
    return dict.fromkeys(overlaps(named, others), "another tensor of the model shares its memory")
