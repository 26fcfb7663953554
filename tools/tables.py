"""Tables that README.md and docs/choose.md carry between marks, made from the cards of the shipped checkpoints.

    python -m tools.tables

A test holds the pages against the cards.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from metateleport.checkpoint import Checkpoint, load_checkpoint, shipped_checkpoints
from metateleport.evaluation.pages.entry import Entry, entries_of
from metateleport.evaluation.pages.markdown import table
from metateleport.evaluation.pages.page import cells, headline, label, trained_on
from metateleport.evaluation.words import number
from metateleport.files import write_text
from metateleport.optim.choice import DEFAULT

__all__ = ["BEGIN", "END", "PAGES", "choice", "main", "written"]

BEGIN, END = "<!-- checkpoints: begin -->", "<!-- checkpoints: end -->"
PAGES = (Path("README.md"), Path("docs/choose.md"))

_HEADER = ("your model", "checkpoint", "loss, beside the best rival", "seconds, over Adam's", "its teleport", "not for")


def choice(checkpoints: Mapping[str, Checkpoint], results: str) -> list[str]:
    """A row for each checkpoint: what it is for, what it brings there, at what price, and what it is not for.

    Args:
        checkpoints: by name.
        results: folder of the pages of results, as in links.
    """

    # What serves the most models first.
    def rank(name: str) -> tuple[bool, int, str]:
        return name != DEFAULT, _narrow(checkpoints[name].card.get("made_for", {})), name

    order = sorted(checkpoints, key=rank)
    return table(list(_HEADER), [_row(name, checkpoints[name], results) for name in order])


def _narrow(made_for: Mapping[str, object]) -> int:
    return 2 * (not made_for.get("minibatches", True)) + bool(made_for.get("groups")) + 2 * bool(made_for.get("losses"))


def _row(name: str, checkpoint: Checkpoint, results: str) -> list[str]:
    made_for = checkpoint.card.get("made_for", {})
    trained = trained_on(checkpoint)
    entry = headline(entries_of(checkpoint), trained)
    adapters = checkpoint.learned.rule.reads_factors
    row = [_serves(made_for, adapters), f"[`{name}`]({results}{name}.md)"]
    if entry is None:
        page = f"{results.removesuffix('results/')}any-model.md"
        there = f"{_beside_adamw(checkpoint)}[real tasks]({page})" if name == DEFAULT else "not measured"
        return [*row, there, "", "has none" if checkpoint.learned.teleporter is None else "", _not_for(made_for)]
    found = cells(entry)
    row.append(f"{found[0]}, {found[-2]} on {entry.task} {label(entry, trained)}, at {entry.steps}")
    return [*row, _price(entry), found[-1], _not_for(made_for)]


def _beside_adamw(checkpoint: Checkpoint) -> str:
    """On how many real tasks it is ahead of tuned AdamW, as the notes of its card say."""
    notes = " ".join(checkpoint.card.get("notes", ()))
    by_step = re.search(r"ahead of tuned AdamW: (\d+ of \d+)", notes)
    by_second = re.search(r"at the seconds of tuned AdamW's run, ahead on (\d+ of \d+)", notes)
    if by_step is None or by_second is None:
        return "on "
    return f"ahead of tuned AdamW by the step on {by_step[1]}, by the second on {by_second[1]} "


def _serves(made_for: Mapping[str, object], adapters: bool) -> str:
    layers = "adapters (LoRA)" if adapters else "linear layers in a row: factorisations, bottlenecks"
    model = f"with {layers}" if made_for.get("groups") else "any"
    loss = ", squared error" if made_for.get("losses") else ""
    return model + loss + ("" if made_for.get("minibatches", True) else ", every step on all data")


def _not_for(made_for: Mapping[str, object]) -> str:
    said = []
    if not made_for.get("minibatches", True):
        said.append("minibatches")
    if made_for.get("losses"):
        said.append("other losses")
    if made_for.get("groups"):
        said.append("models without such layers")
    return ", ".join(said) or "small models by the second: AdamW's steps cost less"


def _price(entry: Entry) -> str:
    """Seconds of the learned method over tuned Adam's, or AdamW's, for as many evaluations."""
    usual = next((name for name in ("adam", "adamw") if name in entry.methods), None)
    if usual is None:
        return "not measured"
    return number(float(entry.methods["learned"]["seconds"]) / float(entry.methods[usual]["seconds"]))


def written(text: str, lines: Sequence[str]) -> str:
    """A page's text with other lines between its marks.

    Raises:
        ValueError: if it does not have each mark once.

    Example:
        >>> written(f"a\\n{BEGIN}\\nold\\n{END}\\n", ["new"]).split()[-5]
        'new'
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"put the lines {BEGIN} and {END} into the page, once each")
    before, after = text.split(BEGIN, maxsplit=1)[0], text.split(END)[1]
    return "\n".join([before + BEGIN, "", *lines, "", END]).replace("\n\n\n", "\n\n") + after


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.tables", description=(__doc__ or "").partition("\n")[0])
    parser.parse_args(arguments)
    checkpoints = {name: load_checkpoint(name) for name in shipped_checkpoints()}
    for page in PAGES:
        results = "results/" if page.parent.name == "docs" else "docs/results/"
        text = page.read_text(encoding="utf-8")
        if (new := written(text, choice(checkpoints, results))) != text:
            write_text(page, new)
            print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
