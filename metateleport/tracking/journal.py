"""What is still to be sent of one run, kept on disk until MLflow has it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metateleport.files import Lock, cache_folder, replacing, write_json

__all__ = ["Journal", "journals", "new_key"]

_HEADER, _OPERATIONS, _SENT, _LOCK, _FILES = "run.json", "operations.jsonl", "sent.json", "lock", "files"
_CHUNK = 1 << 18
_LONG = 1 << 22
_HELD = 200_000
"""Operations that are held in memory at most, where the disk is full."""


def new_key() -> str:
    """The name of a new run: MLflow gives a run its own id only once its store is reached."""
    return uuid.uuid4().hex


class Journal:
    """The operations of one run in the order in which they are to be sent, in a folder of its own.

    Every operation is on disk when `append` returns, so that nothing is lost however the process ends. What MLflow has
    taken is noted, and sent again at most once: its operations can be repeated. The folder is locked as long as the
    process that writes it lives; so what a process that was killed has left is told from what is still written.

    On a full disk operations are held in memory instead.

    Args:
        folder: the folder; made where there is none.
        header: of a new journal: `uri`, `experiment`, `name`, `key`, `tags` and whatever else is sent first.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.trouble = ""
        self.lost = 0
        self._closed = False
        self._file: int | None = None
        self._held: list[str] = []
        self._offset = 0
        self.run_id: str | None = None
        self._lock, self._mutex = Lock(folder / _LOCK), threading.Lock()
        if header is None:
            self.header: dict[str, Any] = json.loads((folder / _HEADER).read_text())
            self._recall()
        else:
            self.header = {"made": int(time.time() * 1000), **header}
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock.take()
                write_json(folder / _HEADER, self.header)
            except OSError as error:
                self.trouble = str(error)

    @classmethod
    def begin(cls, header: Mapping[str, Any]) -> Journal:
        """A new journal among the others of this person; that of an earlier part of the same run is continued."""
        for folder in _folders():
            if folder.name.endswith(header["key"]):
                with contextlib.suppress(OSError, ValueError):
                    found = cls(folder)
                    if found.take():
                        found.header = {**found.header, **header, "made": found.header["made"]}
                        write_json(folder / _HEADER, found.header)
                        found._mend()
                        return found
        # The time first: they are sent in the order in which they were begun, parents before their children.
        return cls(cache_folder("unsent") / f"{time.time_ns()}-{header['key']}", header)

    @property
    def key(self) -> str:
        """The run's own name."""
        return str(self.header["key"])

    def take(self) -> bool:
        """Makes this process the one that the journal belongs to; false if another one lives that it belongs to."""
        try:
            return self._lock.take()
        except OSError:
            return False

    def append(self, operation: Mapping[str, Any]) -> None:
        """Adds an operation."""
        line = json.dumps(operation) + "\n"
        with self._mutex:
            if not self.trouble and not self._held and self._written(line):
                return
            self._held.append(line)
            if len(self._held) > _HELD:
                del self._held[0]
                self.lost += 1

    def keep(self, path: Path, name: str) -> Path:
        """Copies a file or a folder into the journal, to be sent from there; gives the original where that fails."""
        place = self.folder / _FILES / uuid.uuid4().hex[:12] / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, place)
            else:
                shutil.copyfile(path, place)
        except OSError:
            return path.absolute()
        return place

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """The next operations, at most a few thousand, and what `done` is told once they are sent."""
        chunk = b""
        with contextlib.suppress(OSError), (self.folder / _OPERATIONS).open("rb") as file:
            file.seek(self._offset)
            chunk = file.read(_CHUNK)
            while chunk and b"\n" not in chunk:
                # One operation may be longer than a chunk.
                more = file.read(_CHUNK)
                if not more:
                    break
                chunk += more
        whole = chunk[: chunk.rfind(b"\n") + 1]
        if whole:
            return list(_parsed(whole.decode().splitlines())), self._offset + len(whole)
        lines = self._held[:5000]
        return list(_parsed(lines)), -len(lines)

    def done(self, mark: int) -> None:
        """Notes that the operations up to a mark that `read` gave are sent."""
        if self._closed:
            # The store has taken it after all, and whoever has the journal now sends it once more.
            return
        if mark < 0:
            with self._mutex:
                del self._held[:-mark]
            return
        self._offset = mark
        self._note()
        if self._offset > _LONG and not self._held:
            self._shorten()

    def note_run(self, run_id: str) -> None:
        """Notes the id that MLflow has given the run."""
        if run_id != self.run_id:
            self.run_id = run_id
            if not self._closed:
                self._note()

    @property
    def empty(self) -> bool:
        """Whether all is sent."""
        if self._held:
            return False
        try:
            return (self.folder / _OPERATIONS).stat().st_size <= self._offset
        except OSError:
            return True

    def close(self, remove: bool = False) -> None:
        """Lets go of the journal; with `remove` it is taken off the disk too."""
        if self._held and not remove:
            text = "".join(self._held)
            self.trouble = ""
            if self._written(text):
                self._held.clear()
        self.lost += len(self._held)
        self._closed = True
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.let_go()

    def _written(self, text: str) -> bool:
        """Appends text to the file, whole or not at all; says whether it is there."""
        data, wrote = text.encode(), 0
        try:
            if self._file is None:
                self._file = os.open(self.folder / _OPERATIONS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            wrote = os.write(self._file, data)
            if wrote == len(data):
                return True
            self.trouble = "the disk is full"
        except OSError as error:
            self.trouble = str(error)
        if wrote and self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, os.fstat(self._file).st_size - wrote)
        return False

    def _note(self) -> None:
        # What is not noted is sent again, which does no harm.
        with contextlib.suppress(OSError), replacing(self.folder / _SENT) as temporary:
            temporary.write_text(json.dumps({"offset": self._offset, "run_id": self.run_id}))

    def _recall(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads((self.folder / _SENT).read_text())
            self._offset, self.run_id = int(known["offset"]), known["run_id"]

    def _mend(self) -> None:
        """Takes half a line off that a process left when it was killed."""
        path = self.folder / _OPERATIONS
        with contextlib.suppress(OSError):
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)

    def _shorten(self) -> None:
        """Empties a long file that is sent."""
        path = self.folder / _OPERATIONS
        with contextlib.suppress(OSError), self._mutex:
            if path.stat().st_size == self._offset:
                self._offset = 0
                self._note()
                os.truncate(path, 0)


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        # A process that was killed may have left half a line.
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _folders() -> list[Path]:
    root = cache_folder("unsent")
    return sorted(each for each in root.iterdir() if (each / _HEADER).is_file()) if root.is_dir() else []


def journals() -> list[Journal]:
    """The journals that belong to no living process, the oldest first; they belong to this one now."""
    found = []
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError, KeyError):
            journal = Journal(folder)
            if journal.take():
                found.append(journal)
    return found
