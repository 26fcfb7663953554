"""Writes a folder of results: an index, a page for each checkpoint, and pictures."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metateleport.checkpoint import Checkpoint
from metateleport.evaluation.pages.entry import Entry, entries_of, read_report, told
from metateleport.evaluation.pages.index import extract, index
from metateleport.evaluation.pages.markdown import WRITTEN
from metateleport.evaluation.pages.page import INDEX, cells, in_order, label, page, title_of, trained_on
from metateleport.evaluation.pages.picture import draw
from metateleport.evaluation.pages.section import section
from metateleport.evaluation.plot import plot
from metateleport.evaluation.run import EvaluationError
from metateleport.evaluation.style import is_drawn, trace_of
from metateleport.files import write_text

__all__ = ["BEGIN", "END", "Written", "write_pages"]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
"""The lines of a file between which the extract is written."""


class Written(NamedTuple):
    """The files of a report.

    Args:
        files: all files of the report, in order.
        changed: those that were written now, as they had changed.
        strangers: pages of earlier reports in the folder that belong to no checkpoint of this one.
    """

    files: list[Path]
    changed: list[Path]
    strangers: list[Path]


def write_pages(
    out: Path,
    checkpoints: Sequence[Checkpoint],
    evaluations: Sequence[Path] = (),
    extract_in: Path | None = None,
) -> Written:
    """Writes pages of results from cards and evaluations; the same input gives the same files.

    Args:
        out: the folder.
        checkpoints: the checkpoints whose cards are read.
        evaluations: files that `metateleport evaluate --json` wrote; each goes to its checkpoint's page.
        extract_in: a file; the extract is written between its marks.

    Returns:
        The files.

    Raises:
        EvaluationError: before anything is written, if an input cannot be read, two checkpoints have the same name, or
            the file for the extract has no marks.
    """
    named = {checkpoint.name: checkpoint for checkpoint in checkpoints}
    if len(named) < len(checkpoints):
        raise EvaluationError("two of the checkpoints have the same name, which their pages would share: give one")
    entries: dict[str, list[Entry]] = {name: entries_of(checkpoint) for name, checkpoint in named.items()}
    for path in evaluations:
        name, entry = read_report(path)
        entries.setdefault(name, []).append(entry)
    if not entries:
        raise EvaluationError("there is nothing to report: give a checkpoint, or --evaluation with a result")
    for name, given in entries.items():
        _try(name, named.get(name), given)
    before = None if extract_in is None else _marked(extract_in)
    files, changed = [], []

    def note(path: Path, new: bool) -> None:
        files.append(path)
        if new:
            changed.append(path)

    for name, given in sorted(entries.items()):
        checkpoint, pictures = named.get(name), {}
        trained = trained_on(checkpoint)
        own = in_order(given, trained)
        attributed = [entry for entry in own if entry.attributed and entry.report is None]
        if attributed:
            pictures[-1] = f"{name}.png"
            titles = [label(each, trained) for each in attributed]
            note(out / pictures[-1], draw(attributed, titles, out / pictures[-1]))
        for number, entry in enumerate(own):
            if entry.report is not None:
                pictures[number] = f"{name}-{_slug(entry.source)}.png"
                note(out / pictures[number], _curves(entry, out / pictures[number]))
        path = out / f"{name}.md"
        note(path, _put(path, page(name, checkpoint, own, pictures)))
    path = out / INDEX
    note(path, _put(path, index(named, entries)))
    if extract_in is not None and before is not None:
        text = before[0] + "\n".join([BEGIN, *extract(named, entries, _link(out, extract_in)), END]) + before[1]
        note(extract_in, _put(extract_in, text))
    return Written(files, changed, _strangers(out, files))


def _try(name: str, checkpoint: Checkpoint | None, entries: Sequence[Entry]) -> None:
    """Makes all that will be shown once, so that nothing is written where something cannot be."""
    source = f"the card of {name}"
    try:
        page(name, checkpoint, (), {})
        for entry in entries:
            source = f"{entry.source}: {title_of(entry, trained_on(checkpoint))}"
            section(entry, "", None)
            if entry.attributed:
                cells(entry)
            if entry.report is not None:
                with tempfile.TemporaryDirectory() as folder:
                    plot(entry.report, Path(folder) / "trial.png")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EvaluationError(f"{source} cannot be shown ({told(error)}): it was edited or damaged") from error


def _curves(entry: Entry, path: Path) -> bool:
    assert entry.report is not None
    trace = trace_of(dict(entry.report), plot)
    if is_drawn(path, trace):
        return False
    plot(entry.report, path, trace)
    return True


def _put(path: Path, text: str) -> bool:
    """Writes a file if its content has changed; returns whether it was written."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def _marked(path: Path) -> tuple[str, str]:
    """The text before and after the marks of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise EvaluationError(f"{path} has no place for an extract: put the lines {BEGIN} and {END} in it, once each")
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]


def _link(out: Path, file: Path) -> str:
    """The path of the folder of pages in links of a file."""
    try:
        found = out.resolve().relative_to(file.resolve().parent).as_posix()
    except ValueError:
        found = out.resolve().as_posix()
    return "" if found == "." else f"{found}/"


def _strangers(out: Path, files: Sequence[Path]) -> list[Path]:
    pages = [path for path in sorted(out.glob("*.md")) if path not in files]
    return [path for path in pages if path.read_text(encoding="utf-8").startswith(WRITTEN)]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower()).strip("-") or "evaluation"
