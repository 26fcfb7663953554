"""Processes that share a meta-training or an evaluation, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metateleport.training.recipe import TrainingError

__all__ = ["ALONE", "RankLostError", "Ranks", "ToldByFirstError", "joined"]

_TIMEOUT = 600.0
_PATIENCE = 3.0
"""Seconds that the others have to report after an exchange has failed; who does not is named as lost."""


class RankLostError(TrainingError):
    """An exchange failed because a process ended, hangs or cannot be reached; the message says which."""


class ToldByFirstError(TrainingError):
    """The first process met an error, which it reports itself; the others stop with it."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that work together, and which of them this one is.

    Results do not depend on their number: work is numbered, each process does a part, and sums and gathered values are
    the same on all of them.

    Args:
        rank: number of this process; the first, 0, alone writes files and reports.
        size: number of processes.
        device: of the tensors that are exchanged.
        restarts: how many times `torchrun` has started all of them anew.
        neighbours: number of processes on this machine.
        store: where they find each other; None alone.
        places: machine and process number of each of the others, by rank.

    Example:
        >>> [list(Ranks(rank, 3).share(8)) for rank in range(3)]
        [[0, 1], [2, 3, 4], [5, 6, 7]]
        >>> ALONE.total(torch.ones(2))
        tensor([1., 1.])
    """

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    restarts: int = 0
    neighbours: int = 1
    store: Any = None
    places: Mapping[int, tuple[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def share(self, count: int) -> range:
        """The part of `count` numbered pieces of work that this process does; parts differ by at most one piece."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, equal on all of them bit for bit.

        Args:
            values: this process's part of the sum; overwritten.

        Raises:
            RankLostError: if another process is lost.
        """
        if not self.alone:
            with self._exchange():
                dist.all_reduce(values)
        return values

    def gathered(self, own: Tensor, count: int) -> Tensor:
        """The results of numbered pieces of work, each from the process that did it.

        Args:
            own: results of this process's `share(count)`, in order, `(share, ...)`.
            count: number of pieces.

        Returns:
            All results, `(count, ...)`, in order.

        Raises:
            RankLostError: if another process is lost.
        """
        if self.alone:
            return own
        every = own.new_zeros(count, *own.shape[1:])
        part = self.share(count)
        every[part.start : part.stop] = own
        return self.total(every)

    def from_first(self, function: Callable[[], Any]) -> Any:
        """Calls a function in the first process; all processes get what it returns.

        Args:
            function: returns plain values, as JSON has them.

        Raises:
            ToldByFirstError: in the other processes, if the function raised an error.
            RankLostError: if another process is lost.
        """
        if self.alone:
            return function()
        said: dict[str, Any] = {}
        if self.first:
            try:
                said["value"] = function()
            except Exception as error:
                said["error"] = str(error)
                self.bytes_from_first(json.dumps(said).encode())
                raise
        said = json.loads(self.bytes_from_first(json.dumps(said).encode()))
        if "error" in said:
            raise ToldByFirstError(said["error"])
        return said["value"]

    def bytes_from_first(self, own: bytes) -> bytes:
        """The first process's bytes; those of the others are ignored."""
        if self.alone:
            return own
        with self._exchange():
            length = torch.tensor(len(own) if self.first else 0)
            dist.broadcast(length, 0)
            sent = torch.empty(int(length), dtype=torch.uint8)
            if self.first:
                sent = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            dist.broadcast(sent, 0)
        return sent.numpy().tobytes()

    def meet(self) -> None:
        """Waits until all processes are here."""
        self.total(torch.zeros(1, device=self.device))

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLostError(f"{self._lost()} ({_brief(error)})") from error

    def _lost(self) -> str:
        """Which processes are gone, in words."""
        try:
            return self._missing()
        except (RuntimeError, ValueError, OSError):
            return "another rank was lost, and so is the store that would tell which: see the launcher's report"

    def ended(self) -> str:
        """Which processes of this machine have ended, in words; empty if none has."""
        here = socket.gethostname()
        gone = {rank: at for rank, at in self.places.items() if at[0] == here and _ended(int(at[1]))}
        return _named(gone, "ended or was killed") if gone else ""

    def _missing(self) -> str:
        self.store.set(f"survives/{self.restarts}/{self.rank}", "yes")
        stop, gone = time.monotonic() + _PATIENCE, dict(self.places)
        while gone and time.monotonic() < stop:
            # A connection is closed a moment before its process has ended.
            if self.ended():
                return self.ended()
            gone = {rank: at for rank, at in gone.items() if not self.store.check([f"survives/{self.restarts}/{rank}"])}
            time.sleep(0.05)
        if not gone:
            return "the ranks could not exchange values, though all are there: the network failed between them"
        return _named(gone, "ended, hangs or cannot be reached")


ALONE = Ranks()
"""This process by itself."""


@contextlib.contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[Ranks]:
    """Joins the processes that `torchrun` started; one that was started by itself is alone.

    Processes exchange values through gloo on CPUs and through nccl on GPUs, of which each takes its own. They wait 600
    seconds for each other; the environment variable `METATELEPORT_TIMEOUT` gives another number.

    Args:
        device: where they compute: the CPU or `cuda`.

    Yields:
        The processes.

    Raises:
        TrainingError: if the environment does not say which of them this one is, or there is no GPU for it.
        RankLostError: if they do not all come.

    Example:
        >>> with joined() as ranks:
        ...     ranks.alone
        True
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield dataclasses.replace(ALONE, restarts=_number("TORCHELASTIC_RESTART_COUNT", 0))
        return
    local, neighbours = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    kind = torch.device(device).type
    if kind == "cuda":
        there = torch.cuda.device_count()
        if local >= there:
            raise TrainingError(
                f"rank {_number('RANK')} has no GPU: this machine has {there} and was given {neighbours} processes; "
                f"start as many as it has GPUs, or use --device cpu"
            )
        torch.cuda.set_device(local)
    wait = datetime.timedelta(seconds=_number("METATELEPORT_TIMEOUT", int(_TIMEOUT)))
    rank, restarts = _number("RANK"), _number("TORCHELASTIC_RESTART_COUNT", 0)
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=wait))
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        own = dist.PrefixStore(f"metateleport/{restarts}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise RankLostError(f"rank {rank} of {size} did not meet the others ({_brief(error)})") from error
    store.set(f"place/{restarts}/{rank}", f"{socket.gethostname()} {os.getpid()}")
    others = {other: store.get(f"place/{restarts}/{other}").decode().split() for other in range(size) if other != rank}
    places = {other: (host, process) for other, (host, process) in others.items()}
    yield Ranks(rank, size, torch.device(kind), restarts, neighbours, store, places)
    # After an error the others may be gone, and taking leave of them would wait for them.
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is None:
        raise TrainingError(
            f"WORLD_SIZE says that there are several processes, but {name} is not set: start them with torchrun"
        )
    try:
        return default if text is None else int(text)  # type: ignore[return-value]
    except ValueError:
        raise TrainingError(f"the environment variable {name} has to be a whole number, not {text!r}") from None


def _ended(process: int) -> bool:
    """Whether a process of this machine has ended, even if its parent has not yet taken note."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return state in "ZX"


def _named(gone: Mapping[int, tuple[str, str]], why: str) -> str:
    said = ", ".join(f"rank {rank} (process {process} on {host})" for rank, (host, process) in gone.items())
    return f"{said} was lost: it {why}" if len(gone) == 1 else f"{said} were lost: each {why}"


def _brief(error: Exception) -> str:
    """The first sentence of an error, without the file and line of torch's sources."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
    return line.partition("] ")[2] if line.startswith("[") and "] " in line else line
