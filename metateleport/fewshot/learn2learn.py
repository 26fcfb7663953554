"""The only module that imports learn2learn, at its first use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import torch

__all__ = ["MissingLearn2Learn", "learn2learn"]

_HOW = (
    "pip install 'metateleport[learn2learn]'. On Python 3.11 and later its sources need a build option, which only a "
    "requirements file can carry: put the line\n"
    '    learn2learn==0.2.0 --config-settings="--build-option=build_ext"\n'
    "into requirements.txt and run pip install -r requirements.txt. It needs numpy below 2, so Python below 3.13."
)


class MissingLearn2Learn(ImportError):
    """learn2learn is not installed or cannot be imported; the message says how to get it."""


@functools.cache
def learn2learn() -> Any:
    """The module `learn2learn`, imported at the first call, which takes seconds.

    Returns:
        The module.

    Raises:
        MissingLearn2Learn: if it is not installed, or its import fails.

    Example:
        >>> learn2learn().__name__
        'learn2learn'
    """
    if importlib.util.find_spec("learn2learn") is None:
        raise MissingLearn2Learn(f"learn2learn is not installed: {_HOW}")
    define_torchvision_operators()
    try:
        # gym tells at every import, on stderr, that it is unmaintained.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module("learn2learn")
    except Exception as error:
        raise MissingLearn2Learn(
            f"learn2learn is installed but does not import ({type(error).__name__}: {error}): {_HOW}"
        ) from error


@functools.cache
def define_torchvision_operators() -> torch.library.Library | None:
    """Defines the operators that torchvision, which learn2learn imports, registers fakes for.

    A torchvision made for CUDA cannot load its own extension beside a torch for CPUs; importing it then fails with
    `operator torchvision::nms does not exist`.

    Returns:
        The library that holds the definitions, which last as long as it does; None where none were needed.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    for extension in Path(found.origin).parent.glob("_C.*"):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(extension))
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
