"""Runs of two replicas: two processes of one process group, with data of their own, under DistributedDataParallel."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import metateleport as mt
from metateleport.teleporters import LevelSetTeleporter

__all__ = ["learned", "run_both", "teleporting"]

_STEPS = 8


def run_both(run: Callable[..., Tensor], folder: Path, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What each of two replicas returns.

    The processes are forked from a server that imports the library once for all tests of this process: starting Python
    and importing torch takes longer than the runs.

    Args:
        run: a function of this module; it is given its rank and the arguments.
        folder: where the replicas find each other.
        arguments: for the function.

    Returns:
        What the first and the second returned.
    """
    context = multiprocessing.get_context("forkserver")
    # DistributedDataParallel imports the second, which takes as long as torch.
    context.set_forkserver_preload(["metateleport", "torch._dynamo"])
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        both = [pool.submit(_joined, run, str(folder / "store"), rank, *arguments) for rank in (0, 1)]
        one, other = (each.result(timeout=180) for each in both)
    return torch.tensor(one), torch.tensor(other)


def _joined(run: Callable[..., Tensor], store: str, rank: int, *arguments: Any) -> list[float]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        returned = run(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return returned.tolist()


def _replica(rank: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A model that both begin with, wrapped, and data that one of them alone has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.1), nn.Linear(16, 3))
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(rank))
    return model, wrapped, x, (x[:, 0] > 0).long()


def _weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def learned(rank: int, name: str, told: bool) -> Tensor:
    """The weights after steps of a learned optimizer, which is given the wrapped model and the loss, or neither."""
    model, wrapped, x, y = _replica(rank)
    start = _weights(model)
    optimizer = mt.LearnedOptimizer(wrapped if told else model, name)
    for step in range(_STEPS):
        optimizer.zero_grad()
        # What one rank sees by itself is far from what the other sees.
        loss = nn.functional.cross_entropy(wrapped(x), y)
        loss.backward()
        optimizer.step(loss=loss.detach() * (1 + 100 * rank * step) if told else None)
    assert not torch.equal(start, _weights(model))
    return _weights(model)


def teleporting(rank: int, how: str) -> Tensor:
    """The weights after steps with teleports.

    Args:
        rank: of the replica.
        how: given the wrapped model (`ddp`) or the one `inside`; `seedless` random teleports; an output of one replica
            that is `nan` once; a `free` teleporter, which is refused.
    """
    model, wrapped, x, y = _replica(rank)
    given = wrapped if how in ("ddp", "free") else model
    inner = torch.optim.AdamW(given.parameters(), lr=1e-2)
    if how == "free":
        with pytest.raises(ValueError, match="each replica"):
            mt.TeleportingOptimizer(inner, given, LevelSetTeleporter(steps=1), every=2)
        return _weights(model)
    teleporter = mt.RandomTeleporter(size=1.0) if how == "seedless" else mt.load("leaky_mlp_mixture")
    optimizer = mt.TeleportingOptimizer(inner, given, teleporter, every=2)
    torch.manual_seed(rank)
    for step in range(_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        if how == "nan" and step == 4 and rank == 1:
            optimizer._recorder.last.outputs[0].fill_(float("nan"))
        optimizer.step()
    moved = [report.size > 0 for report in optimizer.reports]
    assert sum(moved) >= 3, [(each.size, each.reason) for each in optimizer.reports]
    assert moved[2] is (how != "nan"), moved
    return _weights(model)
