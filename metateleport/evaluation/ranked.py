"""Makes the runs of a plan in the processes that `torchrun` started."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import torch

from metateleport.evaluation.jobs import Account
from metateleport.evaluation.plan import Bench, Done
from metateleport.evaluation.run import Evaluation
from metateleport.training.distributed import RankLostError, Ranks

__all__ = ["share_plan"]

_PAUSE = 0.05


def share_plan(bench: Bench, ranks: Ranks, progress: Callable[[str], None] | None = None) -> Evaluation | None:
    """Makes every run of a plan, each in the process that is free next; runs that are kept are read.

    Each process computes with one thread; the figures are, bit for bit, those of one process with one thread. A process
    reads the runs that are kept on its own machine.

    Args:
        bench: the bench of the plan, made in every process.
        ranks: several processes, each of which calls this function.
        progress: called in the first process with a line that says what it runs and how much is handed out.

    Returns:
        The evaluation in the first process; None in the others.

    Raises:
        RankLostError: if another process is lost.
        KeyboardInterrupt: after Ctrl-C; the message says what is kept.
    """
    torch.set_num_threads(1)
    account = Account(len(bench.units), (progress if ranks.first else None) or (lambda _: None))
    told = lambda what: account.started(ranks.rank, what)  # noqa: E731
    counter, place = (f"evaluation/{ranks.restarts}/{name}" for name in ("next", "done"))
    try:
        while (number := ranks.store.add(counter, 1) - 1) < len(bench.units):
            account.done = number
            account.started(ranks.rank, str(bench.units[number]))
            found = bench.run(bench.units[number], told, ranks.neighbours)
            ranks.store.set(f"{place}/{number}", pickle.dumps(found))
        if not ranks.first:
            # One that is gone before the first has read all runs would count as lost.
            _wait(f"{place}/all", ranks, account)
            ranks.meet()
            return None
        every = [_waited_for(f"{place}/{number}", ranks, account) for number in range(len(bench.units))]
        ranks.store.set(f"{place}/all", "yes")
        ranks.meet()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{ranks.ended() or 'interrupted'}; {account.left_off()}") from None
    except RuntimeError as error:
        if ranks.ended():
            raise RankLostError(f"{ranks.ended()}; {account.left_off()}") from error
        raise
    return bench.evaluation(every, threads=1)


def _waited_for(key: str, ranks: Ranks, account: Account) -> Done:
    """The result of a run that another process may still make."""
    _wait(key, ranks, account)
    found: Done = pickle.loads(ranks.store.get(key))
    account.finished(found)
    return found


def _wait(key: str, ranks: Ranks, account: Account) -> None:
    while not ranks.store.check([key]):
        if ranks.ended():
            raise RankLostError(f"{ranks.ended()}; {account.left_off()}")
        account.started(ranks.rank, "waiting for the other processes")
        time.sleep(_PAUSE)
