"""Makes the runs of a plan, one after the other or distributed over processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from metateleport.evaluation.plan import Bench, Done, Plan, Unit
from metateleport.evaluation.run import Evaluation, EvaluationError
from metateleport.interruption import Stopped, code_of

__all__ = ["Account", "run_plan"]

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_plan(bench: Bench, jobs: int = 1, progress: Callable[[str], None] | None = None) -> Evaluation:
    """Makes every run of a plan; runs that are kept from an earlier call are read.

    With several processes each computes with one thread; the figures are, bit for bit, those of one process with one
    thread. Seconds are measured while the processes share the machine.

    Args:
        bench: the bench of the plan.
        jobs: number of processes; 1 for this process alone.
        progress: called with a line that says what is running and how much is finished.

    Returns:
        The evaluation.

    Raises:
        EvaluationError: if a process ends during a run.
        Stopped: after Ctrl-C or another signal; the message says what is kept.
    """
    account = Account(len(bench.units), progress or (lambda _: None))
    threads = 1 if jobs > 1 else torch.get_num_threads()
    runs = _shared(bench, jobs, account) if jobs > 1 else _alone(bench, account)
    done = []
    try:
        with contextlib.closing(runs):
            for each in runs:
                done.append(each)
                account.finished(each)
    except KeyboardInterrupt as stopped:
        raise Stopped(f"interrupted; {account.left_off()}", code_of(stopped) - 128) from None
    return bench.evaluation(done, threads)


class Account:
    """Counts the finished runs and names those that are running."""

    def __init__(self, total: int, tell: Callable[[str], None]) -> None:
        self.total, self.tell = total, tell
        self.done = self.kept = 0
        self.running: dict[int, str] = {}

    def started(self, worker: int, what: str) -> None:
        self.running[worker] = what
        kept = f" ({self.kept} from an earlier call)" if self.kept else ""
        self.tell(f"{self.done} of {self.total} runs finished{kept}; now {'; '.join(self.running.values())}")

    def finished(self, done: Done) -> None:
        self.done, self.kept = self.done + 1, self.kept + done.kept

    def left_off(self) -> str:
        return f"{self.done} of {self.total} runs are finished and kept: the same command goes on from there"


def _alone(bench: Bench, account: Account) -> Generator[Done, None, None]:
    for unit in bench.units:
        account.started(0, str(unit))
        yield bench.run(unit, lambda what: account.started(0, what))


def _shared(bench: Bench, jobs: int, account: Account) -> Generator[Done, None, None]:
    waiting = list(bench.units)
    with _workers(bench.plan, min(jobs, len(waiting))) as workers:
        busy: dict[Any, tuple[int, Unit]] = {}
        for number, worker in enumerate(workers):
            _hand_out(worker, number, waiting, busy)
        while busy:
            for channel in multiprocessing.connection.wait(list(busy)):
                number, unit = busy[channel]
                kind, what = _heard(channel, workers[number][0], unit, account)
                if kind == "progress":
                    account.started(number, what)
                    continue
                del busy[channel]
                account.running.pop(number, None)
                yield what
                _hand_out(workers[number], number, waiting, busy)


def _hand_out(worker: tuple[Any, Any], number: int, waiting: list[Unit], busy: dict[Any, tuple[int, Unit]]) -> None:
    if waiting:
        unit = waiting.pop(0)
        busy[worker[1]] = (number, unit)
        with contextlib.suppress(BrokenPipeError):
            # A process that is gone is noticed when its answer is read.
            worker[1].send(unit)


def _heard(channel: Any, process: Any, unit: Unit, account: Account) -> tuple[str, Any]:
    try:
        kind, what = channel.recv()
    except (EOFError, ConnectionResetError):
        process.join(5)
        raise EvaluationError(
            f"the process that ran {unit} ended by itself (exit code {process.exitcode}): it was killed, perhaps for "
            f"lack of memory. Give fewer --jobs; {account.left_off()}"
        ) from None
    if kind == "failed":
        error, where = what
        raise error from RuntimeError(f"in the process that ran {unit}:\n{where}")
    return kind, what


@contextlib.contextmanager
def _workers(plan: Plan, count: int) -> Iterator[Sequence[tuple[Any, Any]]]:
    """Starts processes that make runs, each with a channel to it; all of them are ended with the block."""
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(plan, count, theirs), daemon=True)
            with _environment(dict.fromkeys(_ONE_THREAD, "1")):
                process.start()
            theirs.close()
            workers.append((process, ours))
        yield workers
    finally:
        for process, channel in workers:
            process.terminate()
            channel.close()
        for process, _ in workers:
            process.join()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Inside the block, processes that are started get these environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(plan: Plan, jobs: int, channel: Any) -> None:
    """Makes the runs that it receives, one after the other."""
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        bench = Bench(plan)
        while True:
            done = bench.run(channel.recv(), lambda what: channel.send(("progress", what)), jobs)
            channel.send(("done", done))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        channel.send(("failed", (_portable(error), traceback.format_exc())))


def _portable(error: Exception) -> Exception:
    """The error itself if it can be sent to another process, else a `RuntimeError` with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
