"""What a run is known by later: the commit, the versions, the machine."""

from __future__ import annotations

import functools
import getpass
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from metateleport.version import VERSION

__all__ = ["conditions"]

_LIBRARIES = ("torch", "numpy", "higher", "mlflow", "safetensors")


@functools.cache
def conditions() -> dict[str, str]:
    """Tags for the commit of the package, the versions, the machine and the command.

    Example:
        >>> conditions()["metateleport"] == VERSION
        True
    """
    found = {
        "metateleport": VERSION,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count() or 1} CPUs",
        "host": platform.node(),
        "command": "metateleport " + shlex.join(sys.argv[1:]),
        "mlflow.source.name": "metateleport",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).resolve().parents[2])
    if commit:
        found["commit"] = commit
        found["mlflow.source.git.commit"] = commit.partition(" ")[0]
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def _commit(folder: Path) -> str:
    """The commit of a checkout, and whether files differ from it; empty for an installed package."""
    if not (folder / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
        return found.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + (" (changed)" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
