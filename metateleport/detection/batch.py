"""Pairs of linear layers with a bijective activation between them, for the batch forms."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import nn

from metateleport.detection.trace import Graph
from metateleport.detection.walk import module_of, name_of
from metateleport.symmetries import BatchPair2022, Unsuitable, inverse_of

__all__ = ["BatchCandidate", "batch_candidates"]


@dataclasses.dataclass(frozen=True)
class BatchCandidate:
    """A batch form that the graph speaks for, and its place in the data flow."""

    symmetry: BatchPair2022
    place: tuple[int, int]


def batch_candidates(graph: Graph, model: nn.Module) -> list[BatchCandidate]:
    """Linear layers, called once each as modules, with one bijective activation and nothing else between them.

    Args:
        graph: of the model.
        model: the model.
    """
    modules = dict(model.named_modules())
    linear = [node for node in graph.nodes if node.op == "call_function" and name_of(node) == "linear"]
    called = [graph.prefix + module_of(node) for node in linear]
    position = {node: number for number, node in enumerate(graph.nodes)}
    found = []
    for node, first in zip(linear, called, strict=True):
        between = _only_user(node)
        after = _only_user(between)
        if after is None or between is None or name_of(after) != "linear" or after.args[0] is not between:
            continue
        second, activation = graph.prefix + module_of(after), modules.get(graph.prefix + module_of(between))
        if activation is None or isinstance(activation, nn.Identity) or inverse_of(activation) is None:
            continue
        if called.count(first) > 1 or called.count(second) > 1:
            continue
        with contextlib.suppress(Unsuitable):
            found.append(
                BatchCandidate(BatchPair2022(model, first, second, activation), (position[node], position[after]))
            )
    return found


def _only_user(node: torch.fx.Node | None) -> torch.fx.Node | None:
    if node is None or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if user.op == "call_function" else None
