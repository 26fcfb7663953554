"""The index of a folder of results, and the extract that another page shows."""

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

_READING = """\
Every figure is written by `metateleport report` from the checkpoints' cards and from the results of
`metateleport evaluate --json`; each section names the command that made its own.

- Losses are medians over held-out tasks, at a number of **gradient evaluations**: one is a forward and backward pass of
  the task's loss on one batch, a forward pass alone counts a third, and whatever a teleporter or a line search
  evaluates is counted.
- **Learned** is the meta-seed that validation chose; *the worst meta-seed* is the largest median of all, at each mark.
- A **ratio** is another method's loss over the learned one's on the same task: above 1 the learned one is better. Over
  several meta-seeds it is the interquartile mean over seeds and tasks, else the median over tasks; in brackets the
  bootstrap interval of 95 %. Bold leaves out 1.
- What a result is **attributed** by stands beside it: the same networks with the teleport or the gauge off (g = 1),
  random elements of the same size, and a step that was learned without a teleport. It is said to help where it is ahead
  of all that were run of these, by intervals that leave out 1, and to do harm where one of them is ahead of it.
- Baselines are tuned on training tasks for their loss at the end of the budget. Seconds are of all tasks together."""


def index(named: Mapping[str, Checkpoint], entries: Mapping[str, Sequence[Entry]]) -> str:
    """The text of the index.

    Args:
        named: the checkpoints, by name.
        entries: their evaluations, by name; some may be of no checkpoint that was given.
    """
    lines = [WRITTEN, "", "# Results", "", *_READING.splitlines(), ""]
    lines += table(_HEADER, _rows(named, entries, ""))
    lines += _sentences(entries)
    others = [name for name in sorted(entries) if headline(entries[name], trained_on(named.get(name))) is None]
    lines += [f"- [{name}]({name}.md): nothing that a result is attributed by was run." for name in others]
    return "\n".join(lines).rstrip() + "\n"


def extract(named: Mapping[str, Checkpoint], entries: Mapping[str, Sequence[Entry]], folder: str) -> list[str]:
    """The lines that another page shows: a row for each checkpoint, and where to read on.

    Args:
        named: the checkpoints, by name.
        entries: their evaluations, by name.
        folder: of the pages, as links name it, ending in a slash; empty for the page's own.
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
    """In how many of its settings each checkpoint's teleport helps, brings nothing or does harm at the end."""
    said = []
    for name in sorted(entries):
        attributed = [entry for entry in entries[name] if entry.attributed]
        verdicts = [verdict_of(entry.moves_by, entry.against) for entry in attributed]
        counts = {word: verdicts.count(word) for word in ("helps", "nothing", "harms")}
        if attributed:
            words = {"helps": "helps in {}", "nothing": "brings nothing in {}", "harms": "does harm in {}"}
            told = ", ".join(words[word].format(count) for word, count in counts.items() if count)
            settings = f"{len(attributed)} setting{'s' if len(attributed) > 1 else ''}"
            said.append(f"- `{name}`, in {settings}: the teleport {told or 'was not measured in any'}.")
    return [*said, ""]
