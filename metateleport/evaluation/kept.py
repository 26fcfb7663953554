"""Finished runs of methods, kept on disk, so that an interrupted evaluation goes on from them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from metateleport.evaluation.conditions import conditions_of
from metateleport.evaluation.trajectory import Method, Trajectory
from metateleport.families import TaskFamily, TaskStack
from metateleport.files import cache_folder, replacing

__all__ = ["KeptRun", "KeptRuns", "cache_folder", "digest", "foundations", "kept_if_possible"]

_FORMAT = 1
_DAYS = 30
_JOBS = "jobs"


@dataclasses.dataclass(frozen=True)
class KeptRun:
    """A finished run.

    Args:
        trajectory: its trajectory; the seconds are those measured when it ran.
        jobs: number of processes that shared the machine then.
    """

    trajectory: Trajectory
    jobs: int = 1


class KeptRuns:
    """The finished runs on one stack of tasks at one budget.

    A run's file is named by a hash of all that its figures depend on: the package's sources, the versions and the
    machine (`conditions_of`), the family's settings, its file and those beside it, the tasks' weights and data, the
    budget, and the method's `identity`. Files that were not read for 30 days are removed.

    Args:
        family: the tasks' family.
        stack: the tasks.
        steps: the budget.
        folder: folder of the files; `cache_folder("runs")` if not given.
        every: gradient evaluations between two measurements.

    Example:
        >>> import tempfile
        >>> from metateleport import load_family
        >>> from metateleport.evaluation import FirstOrder
        >>> family, method = load_family("leaky_mlp", {"width": 3}), FirstOrder("gd", lr=1e-3)
        >>> stack = family.stack(range(2), "held-out")
        >>> runs = KeptRuns(family, stack, 5, Path(tempfile.mkdtemp()))
        >>> runs.put(method, KeptRun(method.run(stack, 5)))
        >>> runs.get(method).trajectory.loss.shape, runs.get(FirstOrder("gd", lr=1e-2))
        ((2, 6), None)
    """

    def __init__(
        self, family: TaskFamily, stack: TaskStack, steps: int, folder: Path | None = None, every: int = 1
    ) -> None:
        self.folder = folder or cache_folder("runs")
        self._shape = (len(stack), steps + 1)
        self._family = family.name
        self._foundations = foundations(family, stack, steps) + (f" every {every}" if every > 1 else "")
        _sweep(self.folder)

    def get(self, method: Method) -> KeptRun | None:
        """The finished run of a method; None if there is none, or its file was truncated or edited."""
        path = self._path(method)
        try:
            arrays: dict[str, Any] = load(path.read_bytes())
            jobs = int(arrays.pop(_JOBS))
            fields: dict[str, Any] = {name: value if value.ndim else float(value) for name, value in arrays.items()}
            trajectory = Trajectory(**fields)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        if trajectory.loss.shape != self._shape:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return KeptRun(trajectory, jobs)

    def put(self, method: Method, run: KeptRun) -> None:
        """Writes a finished run, whole or not at all; where it cannot be written a warning says so."""
        fields = {field.name: getattr(run.trajectory, field.name) for field in dataclasses.fields(run.trajectory)}
        arrays = {
            name: np.ascontiguousarray(value, dtype=np.float64) for name, value in fields.items() if value is not None
        }
        # ascontiguousarray gives a scalar a dimension, which is taken off again.
        arrays = {name: value if np.ndim(fields[name]) else value.reshape(()) for name, value in arrays.items()}
        with kept_if_possible(self.folder), replacing(self._path(method)) as temporary:
            temporary.write_bytes(save({**arrays, _JOBS: np.asarray(run.jobs, dtype=np.int64)}))

    def _path(self, method: Method) -> Path:
        name = re.sub(r"[^a-z0-9]+", "-", f"{self._family} {method.name}".lower())
        return self.folder / f"{name}-{digest([self._foundations, method.identity()])[:24]}.safetensors"


@contextlib.contextmanager
def kept_if_possible(folder: Path) -> Iterator[None]:
    """What cannot be written in the block, because of a full disk or a missing right, is told by a warning, once.

    What is kept serves a later call alone, and is no reason to end the one that has the results in its memory.
    """
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"finished runs cannot be kept in {folder} ({error.strerror or error}): this evaluation goes on, but after "
            "an interruption it begins anew. Make room there, or set METATELEPORT_CACHE to another folder",
            stacklevel=4,
        )


def foundations(family: TaskFamily, stack: TaskStack, steps: int) -> str:
    """A hash of all that a run's figures depend on, except its method.

    Args:
        family: the tasks' family.
        stack: the tasks.
        steps: the budget.
    """
    return digest(
        [
            _FORMAT,
            _package(),
            conditions_of(str(stack.device)),
            family.name,
            family.settings(),
            _sources(_beside(family)),
            _tasks(stack),
            steps,
        ]
    )


def digest(value: Any) -> str:
    """A hash of plain values; a value that JSON does not know counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _package() -> str:
    return _sources(sorted(Path(__file__).resolve().parents[1].rglob("*.py")))


def _sources(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _beside(family: TaskFamily) -> list[Path]:
    """The family's file and those beside it, which it may import; empty if the family has no file."""
    try:
        return sorted(Path(inspect.getfile(type(family))).parent.glob("*.py"))
    except (OSError, TypeError):
        return []


def _tasks(stack: TaskStack) -> str:
    found = hashlib.sha256()
    seen: set[int] = set()
    for task in stack.tasks:
        own = [str(task.model), task.batch_size, task.seed, [symmetry.key for symmetry in task.symmetries]]
        found.update(json.dumps(own).encode())
        measured = (task.measure.name, task.measure.data) if task.measure is not None else None
        data = (task.inputs, task.targets, task.rows, task.held_out, measured)
        for value in _tensors((dict(task.model.state_dict()), data)):
            # Tasks may share their data.
            found.update(str((value.dtype, tuple(value.shape), id(value) in seen)).encode())
            if id(value) not in seen:
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        seen.update(id(value) for value in _tensors(data))
    return found.hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _sweep(folder: Path) -> None:
    """Removes files that were not read for long."""
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        if time.time() - path.stat().st_mtime > _DAYS * 86400:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
