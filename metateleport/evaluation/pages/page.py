"""The page of one checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from metateleport.checkpoint import Checkpoint
from metateleport.evaluation.pages.entry import Entry, moves_by_of, text
from metateleport.evaluation.pages.markdown import WRITTEN, called, changed, listed, table
from metateleport.evaluation.pages.section import section
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.words import KINDS, number, opening_of, verdict_of

__all__ = ["INDEX", "cells", "headline", "in_order", "label", "page", "title_of", "trained_on"]

INDEX = "README.md"
"""Name of the page that lists the others."""

_TRAINED = "as trained"

_ATTRIBUTED = tuple(f"{REFERENCE}/{name}" for name in ("teleport-off", "random-teleport", "step-only"))


def page(name: str, checkpoint: Checkpoint | None, entries: Sequence[Entry], pictures: Mapping[int, str]) -> str:
    """The text of the page of a checkpoint.

    Args:
        name: of the checkpoint.
        checkpoint: the checkpoint; None if only evaluations of it are known.
        entries: its evaluations.
        pictures: names of pictures by the index of the evaluation; -1 for the picture of all of them.
    """
    heading = "Rivals without a learned optimizer" if name == "none" else name
    lines = [WRITTEN, "", f"# {heading}", "", f"[All checkpoints]({INDEX})", ""]
    lines += ["This page has evaluations only, without a card.", ""] if checkpoint is None else _card(checkpoint)
    trained = trained_on(checkpoint)
    attributed = [entry for entry in entries if entry.attributed]
    if attributed:
        lines += ["## At a glance", "", *_glance(attributed, trained)]
        if -1 in pictures:
            lines += [f"![medians by gradient evaluations, by setting]({pictures[-1]})", ""]
            lines += ["Bands cover the medians of all meta-seeds.", ""]
    if not entries:
        lines += ["On this card no evaluation is recorded: `metateleport evaluate --card` records one.", ""]
    for number_of, entry in enumerate(entries):
        lines += section(entry, title_of(entry, trained), pictures.get(number_of))
    return "\n".join(lines).rstrip() + "\n"


def headline(entries: Sequence[Entry], trained: Mapping[str, Any]) -> Entry | None:
    """The evaluation that represents a checkpoint: the first one with an attribution, if there is one."""
    return next((entry for entry in in_order(entries, trained) if entry.attributed), None)


def in_order(entries: Sequence[Entry], trained: Mapping[str, Any]) -> list[Entry]:
    """Evaluations in order: those with an attribution, then longer runs, then parts of the basis; training's first."""
    return sorted(entries, key=lambda entry: (not entry.attributed, entry.parts, label(entry, trained) != _TRAINED))


def trained_on(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Name and settings, as text, of the family that a checkpoint was trained on; empty if no card says it."""
    family = {} if checkpoint is None else checkpoint.card.get("family", {})
    settings = {name: text(value) for name, value in family.get("settings", {}).items()}
    return {"name": family["name"], "settings": settings} if family else {}


def title_of(entry: Entry, trained: Mapping[str, Any]) -> str:
    """The title of a section: the task, how it differs from training, and the budget."""
    known = label(entry, trained)
    title = f"{entry.task}: {known}" if entry.task == trained.get("name") else known
    return f"{title}, {entry.steps} gradient evaluations" + (", parts of the basis left out" if entry.parts else "")


def label(entry: Entry, trained: Mapping[str, Any]) -> str:
    """A label that says how an evaluation's tasks differ from those of training."""
    if not trained:
        return f"{entry.task} ({listed(entry.settings)})"
    other = listed(changed(entry.settings, trained["settings"]))
    if entry.task == trained["name"]:
        return other or _TRAINED
    return f"{entry.task}, never trained on" + (f": {other}" if other else "")


def _card(checkpoint: Checkpoint) -> list[str]:
    card, moves_by = checkpoint.card, moves_by_of(checkpoint)
    learns = "a step" if checkpoint.learned.config.steps else ""
    moves = KINDS.get(moves_by, "no teleport")
    lines = [f"- Learned: {' and '.join(filter(None, [learns, moves]))}."]
    trained, training = trained_on(checkpoint), card.get("training", {})
    if trained:
        lines.append(f"- Trained on `{trained['name']}` ({listed(trained['settings'])}).")
    made_for = card.get("made_for", {})
    if made_for:
        lines.append(f"- Made for {_made_for(made_for)}.")
    lines += [f"- Limit: {limit}" for limit in card.get("limits", ())]
    versions = card.get("versions", {})
    lines.append(f"- Versions: {', '.join(f'{library} {version}' for library, version in versions.items())}.")
    lines.append("")
    seeds = card.get("meta_seeds", ())
    if "recipe" in training:
        several = f" --meta-seeds {len(seeds)}" if seeds else ""
        lines += ["```", f"metateleport train --recipe {checkpoint.name}{several} --out FOLDER", "```", ""]
    if seeds:
        rows = [[str(each["seed"]), number(each["validation"]), "shipped" if each["chosen"] else ""] for each in seeds]
        lines += table(["meta-seed", "score on validation tasks (lower is better)", ""], rows)
    return lines


def _made_for(made_for: Mapping[str, Any]) -> str:
    said = ["minibatches and full batches" if made_for.get("minibatches", True) else "full batches alone"]
    if made_for.get("groups"):
        said.append(f"models with symmetries of {', '.join(made_for['groups'])}")
    if made_for.get("losses"):
        said.append(f"{made_for['losses']} alone")
    return "; ".join(said)


def _glance(entries: Sequence[Entry], trained: Mapping[str, Any]) -> list[str]:
    moves_by = entries[0].moves_by
    header = [
        "median at the end of the budget",
        "learned",
        "the worst meta-seed",
        *(called(name, moves_by) for name in _ATTRIBUTED),
    ]
    rows = []
    for entry in entries:
        link = f"[{label(entry, trained)}](#{_anchor(title_of(entry, trained))})"
        rows.append([f"{link}, at {entry.steps}", *cells(entry)])
    return table([*header, "the best other", "the teleport"], rows)


def cells(entry: Entry) -> list[str]:
    """The cells of a row: medians at the end of the budget of the learned method and of others, and the verdict."""
    end = entry.steps
    worst = max(entry.of_seeds(REFERENCE, end), default=None)
    row = [number(entry.median(REFERENCE, end)), "" if worst is None else number(worst)]
    row += [number(entry.median(name, end)) if name in entry.methods else "" for name in _ATTRIBUTED]
    others = {name: entry.median(name, end) for name in entry.methods if name.partition("/")[0] != REFERENCE}
    best = min(others, key=lambda name: others[name], default=None)
    row.append("" if best is None else f"{number(others[best])} ({best})")
    if verdict_of(entry.moves_by, entry.against) == "unknown":
        return [*row, "was not measured"]
    return [*row, opening_of(entry.moves_by, entry.against).removeprefix("the teleport ").removesuffix(" here")]


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
