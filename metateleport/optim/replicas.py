"""Teleports of a model that is replicated over processes: the first process chooses, and all carry it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metateleport.symmetries import Symmetry
from metateleport.teleporters import Move, Teleporter

__all__ = ["all_agree", "all_can", "check_replicas", "chosen_by_first", "group_of"]


def group_of(model: nn.Module) -> Any:
    """The process group of a `DistributedDataParallel` with several processes; None for any other model."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    return group if group is not None and torch.distributed.get_world_size(group) > 1 else None


def check_replicas(teleporter: Teleporter, symmetries: Sequence[Symmetry]) -> str:
    """Why replicas would not stay equal, in words; empty if they would.

    Along an exact symmetry the same element moves all replicas alike. A batch pair depends on a process's own batch,
    and so does the loss that a teleporter without symmetries evaluates.
    """
    cure = "train in one process, or take exact symmetries and a teleporter along them"
    if not teleporter.needs_symmetries:
        return f"{type(teleporter).__name__} moves each replica by the loss on its own batch: {cure}"
    loose = [each for each in symmetries if each.exactness != "exact"]
    if loose:
        return f"along {loose[0].kind} ({loose[0].exactness}) each replica moves by its own batch: {cure}"
    return ""


def all_agree(own: bool, group: Any, device: torch.device) -> bool:
    """Whether all processes say yes."""
    said = torch.tensor(int(own), device=device)
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=group)
    return bool(said)


def all_can(own: Sequence[bool], group: Any, device: torch.device) -> list[bool]:
    """For each of several things, whether all processes can do it."""
    said = torch.tensor(list(own), dtype=torch.int32, device=device)
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group=group)
    return [bool(each) for each in said]


def chosen_by_first(moves: Sequence[Move], group: Any) -> list[Move]:
    """The moves of the first process of a group."""
    first = torch.distributed.get_global_rank(group, 0)
    found = []
    for move in moves:
        element, size = move.element.contiguous().clone(), move.size.to(move.element.dtype).contiguous().clone()
        for value in (element, size):
            torch.distributed.broadcast(value, first, group=group)
        found.append(dataclasses.replace(move, element=element, size=size, refused=size == 0, reason=move.reason))
    return found
