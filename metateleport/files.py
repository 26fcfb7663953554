"""Files: written so that nobody finds half of one, searched for by bare name, run where a person points at them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "FileError",
    "Lock",
    "cache_folder",
    "check_destination",
    "read_regular",
    "replacing",
    "replacing_folder",
    "run_file",
    "search_folders",
    "write_json",
    "write_text",
]


class FileError(ValueError):
    """A file cannot be read or written; the message says which, why, and what to do."""


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    A pipe or a device is refused and never waited for.

    Args:
        path: the file.
        most: the largest number of bytes that it may have; a larger one is not read.

    Raises:
        FileNotFoundError: if there is none.
        FileError: if it is not a regular file, is too large, or cannot be read.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> _ = path.write_bytes(b"1234")
        >>> read_regular(path, most=4)
        b'1234'
        >>> read_regular(path, most=3)
        Traceback (most recent call last):
        metateleport.files.FileError: it has 4 bytes, and at most 3 are read
    """
    try:
        # Opening a pipe without a writer waits for one, except with this flag.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(f"it cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileError("it is not a regular file")
        if status.st_size > most:
            raise FileError(f"it has {status.st_size} bytes, and at most {most} are read")
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise FileError(f"it cannot be read: {error.strerror or error}") from error
    finally:
        os.close(handle)
    if len(content) > most:
        raise FileError(f"it grows while it is read, beyond {most} bytes")
    return content


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def check_destination(path: str | Path, size: int = 1 << 20) -> None:
    """Tries whether a file or folder can be written, before the work that it is for.

    As many bytes as it is going to need are written beside it, and removed. What is there already is not touched.

    Args:
        path: the file or folder.
        size: number of bytes.

    Raises:
        FileError: if there is no right or no space to write it.

    Example:
        >>> check_destination(Path(tempfile.mkdtemp()) / "new" / "result.json")
        >>> check_destination("/proc/result.json")
        Traceback (most recent call last):
        metateleport.files.FileError: /proc/result.json cannot be written (No such file or directory): choose another \
place, or make room there
    """
    path = Path(path)
    made: list[Path] = []
    try:
        for folder in reversed(path.parent.parents):
            _made(folder, made)
        _made(path.parent, made)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:64]}-")
        try:
            with os.fdopen(handle, "wb") as file:
                for start in range(0, size, _BLOCK):
                    file.write(b"\0" * min(_BLOCK, size - start))
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(unwritten(path, error)) from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def unwritten(path: str | Path, error: OSError) -> str:
    """A sentence that a file or folder cannot be written, why, and what to do."""
    return f"{path} cannot be written ({error.strerror or error}): choose another place, or make room there"


_BLOCK = 1 << 20


def _made(folder: Path, made: list[Path]) -> None:
    if not folder.is_dir():
        folder.mkdir()
        made.append(folder)


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary file's path beside `path`; on success it takes the place of `path`, on failure it goes.

    Args:
        path: the file to write; its folder is made where there is none. The temporary file has the same suffix.
        durable: wait until it is on the disk, so that a loss of power leaves the old file or the new one.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [each.name for each in folder.iterdir()]
        ['a.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files for their owner's eyes alone.
        temporary.chmod(0o666 & ~_umask())
        if durable:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one piece, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, in one piece; a number that is not finite is an error."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`; on success it takes the place of `path`, on failure it goes.

    Args:
        path: the folder to write; one that exists is replaced, whole.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing_folder(folder / "a") as temporary:
        ...     _ = (temporary / "b.txt").write_text("whole")
        >>> (folder / "a" / "b.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if not path.exists():
            temporary.rename(path)
        elif not _exchanged(temporary, path):
            # A folder that is not empty cannot be renamed over: the old one steps aside, and back if that fails.
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-")) / path.name
            path.rename(aside)
            try:
                temporary.rename(path)
            except BaseException:
                aside.rename(path)
                raise
            finally:
                shutil.rmtree(aside.parent, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two folders at one moment, so that there is none at which one of them is missing.

    Returns:
        Whether it did: Linux can, on most of its file systems.
    """
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here = -100  # AT_FDCWD
    return bool(exchange(here, os.fsencode(one), here, os.fsencode(other), 2) == 0)  # RENAME_EXCHANGE


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder(name: str) -> Path:
    """The cache folder of that name: under `METATELEPORT_CACHE` if it is set, else under `~/.cache/metateleport`."""
    root = os.environ.get("METATELEPORT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "metateleport") / name


class Lock:
    """A lock on a file, held by one process at a time; the system lets go of it however that process ends.

    Args:
        path: the file, made where there is none; it stays.

    Example:
        >>> lock, other = (Lock(Path(tempfile.gettempdir()) / f"lock-{os.getpid()}") for _ in range(2))
        >>> lock.take(), other.take()
        (True, False)
        >>> lock.let_go()
        >>> other.take()
        True
        >>> other.let_go()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle: int | None = None

    def take(self, seconds: float = 0.0) -> bool:
        """Takes the lock if nobody else has it within so many seconds; says whether it did.

        Raises:
            OSError: if the file cannot be made.
        """
        import fcntl

        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(handle)
                    return False
                time.sleep(0.05)
            else:
                if _same(handle, self.path):
                    self._handle = handle
                    return True
                # Whoever held it has removed the file: the one that is there now is another.
                os.close(handle)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def let_go(self) -> None:
        """Lets go of the lock, if it was taken."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def search_folders(name: str, packaged: str, variable: str) -> list[Path]:
    """Folders that bare names resolve to, the first to look in first; some may not be there.

    Args:
        name: of the folder, in the working folder and in the project.
        packaged: its name inside an installed package.
        variable: the environment variable that names a further one.
    """
    here = Path(__file__).resolve().parent
    further = [Path(os.environ[variable])] if os.environ.get(variable) else []
    return [*further, Path.cwd() / name, here / packaged, here.parent / name]


def run_file(path: Path, prefix: str) -> ModuleType:
    """Runs a Python file that a person pointed at, as a module; it may import its neighbours.

    Args:
        path: the file.
        prefix: of the module's name, which its stem completes; a module of that name is replaced.

    Returns:
        The module.

    Raises:
        ImportError: if the file cannot be run, whatever it raised; the message says what.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "answer.py"
        >>> _ = path.write_text("value = 42")
        >>> run_file(path, "example_").value
        42
    """
    name = f"{prefix}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look the module of a class up while they are made.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ImportError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module
