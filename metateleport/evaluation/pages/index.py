"""The index of a folder of results, and its extract for another page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metateleport.checkpoint import Checkpoint
from metateleport.evaluation.pages.entry import Entry
from metateleport.evaluation.pages.markdown import WRITTEN, table
from metateleport.evaluation.pages.page import INDEX, cells, headline, label, trained_on
from metateleport.evaluation.words import verdict_of

__all__ = ["extract", "index"]

_HEADER = (
    "median over held-out tasks",
    "learned",
    "worst meta-seed",
    "teleport off",
    "random elements",
    "step alone",
    "best other",
    "the teleport",
)

_COUNTED = {
    "helps": "helps in {}",
    "size": "helps as random elements do in {}",
    "nothing": "brings nothing in {}",
    "harms": "does harm in {}",
}

_READING = """\
Every figure is written by `metateleport report` from the checkpoints' cards and from the results of
`metateleport evaluate --json`; each section names the command that made its own.

- Losses are medians over held-out tasks, at a number of **gradient evaluations**: one is a forward and backward pass of
  the task's loss on one batch; a forward pass alone counts a third. Everything that a teleporter or a line search
  evaluates is counted.
- **Learned** is the meta-seed that was chosen on validation tasks; *the worst meta-seed* is the largest median of all
  meta-seeds, at each mark.
- A **ratio** is another method's loss over the learned one's on the same task: above 1 the learned one is better. With
  several meta-seeds it is the interquartile mean over seeds and tasks, else the median over tasks; in brackets is the
  bootstrap interval of 95 %. Ratios whose interval leaves out 1 are bold.
- The **attribution** of a result is three runs beside it: the same networks with the teleport or the gauge off (g = 1),
  random elements of the same size, and a step that was learned without a teleport. The teleport *helps* if the learned
  method is ahead of all of these that were run, by intervals that leave out 1. It *does harm* if one of them is ahead.
  Where it is ahead of all but random elements, both divide the loss by what is named: its size and spectrum help, and
  its directions bring nothing.
- Rivals are tuned on training tasks, by the rules that each section names. Seconds are of all tasks together."""


def index(named: Mapping[str, Checkpoint], entries: Mapping[str, Sequence[Entry]]) -> str:
    """The text of the index.

    Args:
        named: the checkpoints, by name.
        entries: evaluations by the checkpoint's name, also of checkpoints that are not in `named`.
    """
    lines = [WRITTEN, "", "# Results", "", *_READING.splitlines(), ""]
    lines += table(_HEADER, _rows(named, entries, ""))
    lines += _sentences(entries)
    others = [name for name in sorted(entries) if headline(entries[name], trained_on(named.get(name))) is None]
    lines += [f"- [{name}]({name}.md): no attribution was run." for name in others]
    return "\n".join(lines).rstrip() + "\n"


def extract(named: Mapping[str, Checkpoint], entries: Mapping[str, Sequence[Entry]], folder: str) -> list[str]:
    """The lines of the extract: a table with a row for each checkpoint, the verdicts, and a link to the pages.

    Args:
        named: the checkpoints, by name.
        entries: their evaluations, by name.
        folder: folder of the pages as in links, with a slash at the end; empty for the folder of the page itself.
    """
    return [
        "",
        *table(_HEADER, _rows(named, entries, folder)),
        *_sentences(entries),
        f"[All settings, intervals, seconds, conditions and commands]({folder}{INDEX}). `metateleport report` writes "
        "these lines and those pages from the checkpoints' cards.",
        "",
    ]


def _rows(named: Mapping[str, Checkpoint], entries: Mapping[str, Sequence[Entry]], folder: str) -> list[list[str]]:
    rows = []
    for name in sorted(entries):
        trained = trained_on(named.get(name))
        entry = headline(entries[name], trained)
        if entry is not None:
            shown = f"[{name}]({folder}{name}.md): {label(entry, trained)}, at {entry.steps}"
            rows.append([shown, *cells(entry)])
    return rows


def _sentences(entries: Mapping[str, Sequence[Entry]]) -> list[str]:
    """For each checkpoint, in how many settings its teleport has which verdict, at the last mark."""
    said = []
    for name in sorted(entries):
        attributed = [entry for entry in entries[name] if entry.attributed]
        verdicts = [verdict_of(entry.moves_by, entry.against) for entry in attributed]
        counts = {word: verdicts.count(word) for word in _COUNTED}
        if attributed:
            told = ", ".join(_COUNTED[word].format(count) for word, count in counts.items() if count)
            settings = f"{len(attributed)} setting{'s' if len(attributed) > 1 else ''}"
            said.append(f"- `{name}`, in {settings}: the teleport {told or 'was not measured in any'}.")
    return [*said, ""]
