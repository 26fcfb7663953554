"""The only module that imports learn2learn, at its first use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import warnings
from typing import Any

from metateleport.torchvision import define_operators

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
    # learn2learn imports torchvision.
    define_operators()
    try:
        # gym tells at every import, on stderr, that it is unmaintained.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module("learn2learn")
    except Exception as error:
        raise MissingLearn2Learn(
            f"learn2learn is installed but does not import ({type(error).__name__}: {error}): {_HOW}"
        ) from error
