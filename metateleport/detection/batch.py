"""Candidates for batch pairs: linear layers with an elementwise activation between them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from typing import TypeGuard

import torch
from torch import nn

from metateleport.detection.assemble import Candidate
from metateleport.detection.trace import Graph
from metateleport.detection.walk import module_of, name_of
from metateleport.symmetries import BatchPair2022, BatchPair2024, Unsuitable
from metateleport.symmetries.activations import activation_of, inverse_of

__all__ = ["batch_candidates"]


def batch_candidates(graph: Graph, model: nn.Module, movable: Collection[str], frozen: bool = False) -> list[Candidate]:
    """Pairs of linear layers, each called once as a module, with one elementwise activation between them.

    With a bijective activation the 2022 form is tried first, as it has the group law, and the 2024 form if the rank
    condition of the first is not met. With any other activation only the 2024 form is tried.

    Args:
        graph: of the model.
        model: the model.
        movable: names of the parameters that may move.
        frozen: whether frozen ones may.
    """
    position = {node: number for number, node in enumerate(graph.nodes)}
    found = []
    for node, number in position.items():
        if node.op != "call_function" or name_of(node) != "linear":
            continue
        between = _next(node)
        after = None if between is None else _next(between)
        if between is None or after is None or name_of(after) != "linear" or not _takes_in(after, between):
            continue
        name = name_of(between)
        activation = activation_of(name.removesuffix("_"), between.args[1:], between.kwargs)  # type: ignore[arg-type]
        first, second = (graph.prefix + module_of(layer) for layer in (node, after))
        read = {graph.parameters.get(each.name) for each in (*node.args[1:], after.args[1]) if _is_read_once(each)}
        if activation is None:
            continue
        place = (number, position[after])
        bijective = inverse_of(activation) is not None
        several: list[Candidate] = []
        for kind in (BatchPair2024, BatchPair2022) if bijective else (BatchPair2024,):
            with contextlib.suppress(Unsuitable):
                symmetry = kind(model, first, second, activation, frozen)
                if not read.intersection(movable).issuperset(symmetry.parameters):
                    continue
                several.append(Candidate(symmetry, place, functools.partial(tuple, tuple(several))))
        found += several[-1:]
    return found


def _takes_in(layer: torch.fx.Node, before: torch.fx.Node) -> bool:
    """Whether a node's output is the input of a layer, and not its weight."""
    source = layer.args[0]
    while isinstance(source, torch.fx.Node) and _is_idle(source):
        source = source.args[0]
    return source is before


def _next(node: torch.fx.Node) -> torch.fx.Node | None:
    """The only operation that reads a node, behind dropout that drops nothing."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not _is_idle(node):
            return node if node.op == "call_function" else None
    return None


def _is_read_once(value: object) -> TypeGuard[torch.fx.Node]:
    """Whether an argument is a tensor that no other operation reads."""
    return isinstance(value, torch.fx.Node) and len(value.users) == 1


def _is_idle(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and name_of(node) == "dropout" and not (node.args[2] and node.args[1])
