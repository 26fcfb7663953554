"""Runs in several processes that share the work, as torchrun starts them; here forked, which takes less time."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from training_cases import small, trainer

from metateleport.evaluation import Bench, Evaluation, Plan, share_plan
from metateleport.training import MetaTrainer, Progression, RankLostError, Ranks, joined

__all__ = ["evaluated", "evolved", "in_ranks", "left", "meta_gradient", "networks", "refused", "told", "validation"]


def in_ranks(count: int, run: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each of some processes returns.

    The processes are forked from a server that imports the library once for all tests of this process: starting Python
    and importing torch takes longer than the runs.

    Args:
        count: number of processes.
        run: a function of a module of the tests; it is given the ranks and the arguments.
        arguments: for the function.

    Returns:
        What they returned, by rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metateleport.evaluation", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        every = [pool.submit(_in_rank, run, rank, count, port, arguments) for rank in range(count)]
        return [each.result(timeout=180) for each in every]


def _in_rank(run: Callable[..., Any], rank: int, count: int, port: int, arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    with joined() as ranks:
        return run(ranks, *arguments)


def _trainer(ranks: Ranks, changes: dict[str, Any]) -> MetaTrainer:
    """A training whose networks and tasks are in float64."""
    recipe = small(**{"dtype": "float64", "tasks": 5, "meta_steps": 5, "validation_every": 5, **changes})
    torch.manual_seed(0)
    made = trainer(recipe)
    return MetaTrainer(recipe, made.family, made.meta.double(), ranks=ranks)


def meta_gradient(ranks: Ranks, changes: dict[str, Any]) -> tuple[list[float], float]:
    """The first meta-gradient, which a meta-step of no length leaves behind, and its meta-loss."""
    learning = _trainer(ranks, {**changes, "lr": 1e-300, "clip": 1e300, "meta_steps": 1})
    learning.run()
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in learning.meta.parameters()]
    return nn.utils.parameters_to_vector(gradients).tolist(), learning.progression.meta_losses[0]


def networks(ranks: Ranks, changes: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """The networks after all meta-steps, and the course of the training."""
    learning = _trainer(ranks, changes)
    learning.run()
    weights = nn.utils.parameters_to_vector(learning.meta.parameters()).detach()
    done = learning.progression
    said = {"losses": done.meta_losses, "validations": done.validations, "searched": done.searched}
    return weights.tolist(), {**said, "openness": done.openness, "seconds": done.seconds}


def validation(ranks: Ranks, changes: dict[str, Any]) -> float:
    """The validation score of the networks at their start."""
    return _trainer(ranks, changes).validation_score()


def told(ranks: Ranks) -> list[str]:
    """What a process says of an error that the first met."""

    def fails() -> None:
        raise ValueError("there is no such file")

    try:
        ranks.from_first(fails)
    except ValueError as error:
        return [type(error).__name__, str(error)]
    return []


def refused(ranks: Ranks) -> str:
    """What a process says of fewer tasks than processes."""
    try:
        _trainer(ranks, {"tasks": 1})
    except ValueError as error:
        return str(error)
    return ""


def evolved(ranks: Ranks, changes: dict[str, Any]) -> list[int]:
    """How many numbers each exchange of the meta-steps has had."""
    learning = _trainer(ranks, changes)
    learning._validate = lambda: None  # type: ignore[method-assign]
    learning.progression.validations.append([learning.outer.meta_steps, 0.0])
    sizes, own = [], dist.all_reduce
    dist.all_reduce = lambda values: (sizes.append(values.numel()), own(values))
    try:
        learning.run()
    finally:
        dist.all_reduce = own
    return sizes


def left(ranks: Ranks) -> str:
    """What the first process says of another that is gone in the midst of a training."""
    learning = _trainer(ranks, {"mode": "lr"})

    def leaves(progression: Progression) -> None:
        if progression.meta_step == 2 and ranks.rank == 1:
            raise InterruptedError

    try:
        learning.run(leaves)
    except InterruptedError:
        dist.destroy_process_group()
    except RankLostError as lost:
        return f"{learning.progression.meta_step}: {lost}"
    return ""


def evaluated(ranks: Ranks, plan: Plan, cache: str) -> tuple[Evaluation | None, int]:
    """The evaluation of a plan, and how many threads a process has."""
    os.environ["METATELEPORT_CACHE"] = cache
    return share_plan(Bench(plan), ranks), torch.get_num_threads()
