"""What a training checks before it begins, and the lock that it holds while it runs."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from metateleport.checkpoint import check_place
from metateleport.files import FileError, Lock, read_regular, unwritten
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.recipe import Recipe, TrainingError
from metateleport.training.state import (
    begun,
    different,
    nothing_to_resume,
    read_state,
    resume_folder,
    seeds_folder,
)

__all__ = ["check_start", "held"]

_COPIES = 12
"""Times the bytes of the largest networks: two networks with their best and Adam's two moments, in a state that is
written while the last one is still there, and a checkpoint."""

_holding: set[Path] = set()


def check_start(recipe: Recipe, out: str | Path, resume: bool = False, seeds: int = 1, restarted: bool = False) -> None:
    """Checks before any work that a training can be begun or gone on with, and that all that it will write has room.

    Args:
        recipe: the recipe, with all settings of its family.
        out: folder of the checkpoint.
        resume: whether it is to go on with an interrupted training.
        seeds: number of meta-seeds.
        restarted: whether the launcher has started the processes anew, which go on if there is something to go on with.

    Raises:
        TrainingError: if there is nothing to resume, it was started with other settings, or something unfinished is
            there and is not to be resumed.
        FileError: if there is no right or no space to write, or `out` is a folder with something else in it.
    """
    folder = seeds_folder(out) if seeds > 1 else resume_folder(out)
    there = folder.exists() if seeds > 1 else begun(folder)
    if resume and not there:
        raise nothing_to_resume(folder)
    if there and not resume and not restarted:
        raise TrainingError(f"{folder} holds an unfinished training: add --resume to go on with it, or remove it")
    if seeds == 1 and there:
        state = read_state(folder)
        changed = None if state is None else different(folder, state.recipe, recipe)
        if changed is not None:
            raise changed
    check_place(out, _size(recipe))


@contextlib.contextmanager
def held(out: str | Path) -> Iterator[None]:
    """Holds the lock of a training's output inside the block; the system lets go of it however the process ends.

    Args:
        out: folder of the checkpoint.

    Raises:
        FileError: if another process holds it, which the message names, or the lock cannot be made.
    """
    path = resume_folder(out).absolute() / "lock"
    if path in _holding:
        # A training of several seeds holds it while the first of them takes it again.
        yield
        return
    lock = Lock(path)
    made = not path.parent.is_dir()
    try:
        taken = lock.take()
    except OSError as error:
        raise FileError(unwritten(path.parent, error)) from error
    if not taken:
        raise FileError(
            f"another training writes to {out} ({_holder(path)}): wait until it ends, or choose another --out"
        )
    _holding.add(path)
    try:
        with contextlib.suppress(OSError):
            path.write_text(
                f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            )
        yield
    finally:
        _holding.discard(path)
        with contextlib.suppress(OSError):
            path.unlink()
        lock.let_go()
        if made:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        return read_regular(path, 1000).decode().strip() or "which has just begun"
    except (OSError, FileError, ValueError):
        return "which has just begun"


def _size(recipe: Recipe) -> int:
    """About how many bytes a training needs on the disk."""
    shape = recipe.networks(("GL", "diagonal", "O"))
    try:
        with torch.device("meta"):
            weights = MetaOptimizer(shape).state_dict().values()
    except NotImplementedError:
        return 1 << 20
    return _COPIES * sum(each.numel() * each.element_size() for each in weights) + (1 << 20)
