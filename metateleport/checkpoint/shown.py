"""A checkpoint's card for people, in markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metateleport.version import VERSION

__all__ = ["card_in_words"]


def card_in_words(card: Mapping[str, Any]) -> str:
    """What a checkpoint is, what it is for, how it was trained, what it has shown, and its limits.

    Entries that are missing are left out.

    Args:
        card: the card, as `metateleport.checkpoint.read_card` gives it.

    Returns:
        Markdown.

    Example:
        >>> family = {"name": "digits", "settings": {"hidden": 8}}
        >>> print(card_in_words({"name": "mine", "mode": "lr", "family": family}))
        # mine
        <BLANKLINE>
        A learned step for each tensor (mode `lr`), meta-trained on `digits` with hidden = 8.
    """
    parts = [f"# {card.get('name', 'a checkpoint')}", _opening(card), _made_for(card), _training(card), _results(card)]
    limits = card.get("limits") or ()
    if limits:
        parts.append("## Limits\n\n" + "\n".join(f"- {each}" for each in limits))
    return "\n\n".join(part for part in parts if part)


_LEARNS = {
    "update": "A learned update of every coordinate",
    "lr": "A learned step for each tensor",
    "update+tele": "A learned update of every coordinate, with learned group elements",
    "lr+tele": "A learned step for each tensor, with learned group elements",
    "tele": "A learned teleport, for any optimizer",
}


def _opening(card: Mapping[str, Any]) -> str:
    family, shape = card.get("family", {}), card.get("meta_optimizer", {})
    settings = ", ".join(f"{name} = {_text(value)}" for name, value in family.get("settings", {}).items())
    mode = card.get("mode", "")
    parts = [f"{_LEARNS.get(mode, 'A meta-optimizer')} (mode `{mode}`), meta-trained on `{family.get('name', '?')}`"]
    if settings:
        parts.append(f"with {settings}")
    opening = " ".join(parts) + "."
    if "teleport" in shape:
        opening += " It has a teleport that stays."
    if "gauge" in shape:
        opening += f" Its gauges are undone after the step (gauge.kind = {shape['gauge'].get('kind')})."
    if shape.get("groups"):
        opening += f" Its networks serve symmetries of {', '.join(shape['groups'])}."
    return opening


def _made_for(card: Mapping[str, Any]) -> str:
    made_for = card.get("made_for")
    if not isinstance(made_for, Mapping):
        return ""
    rows = [
        "It is made for minibatches." if made_for.get("minibatches", True) else "It needs the whole data at each step.",
        f"It has learned on {made_for['losses']} alone." if made_for.get("losses") else "",
        f"It has learned along symmetries of {', '.join(made_for['groups'])}." if made_for.get("groups") else "",
    ]
    return "## Made for\n\n" + "\n".join(f"- {row}" for row in rows if row)


def _training(card: Mapping[str, Any]) -> str:
    training, rows = card.get("training", {}), []
    for name, run in training.get("runs", {}).items():
        rows.append(
            f"- {name}: {run.get('meta_steps')} meta-steps in {run.get('seconds')} s, chosen at "
            f"{run.get('chosen_at')}, validation score {_text(run.get('validation'))}"
        )
    seeds = card.get("meta_seeds") or ()
    if len(seeds) > 1:
        scores = ", ".join(
            f"{_text(each.get('validation'))} (seed {each.get('seed')}{', chosen' if each.get('chosen') else ''})"
            for each in seeds
        )
        rows.append(f"- {len(seeds)} meta-seeds, with validation scores {scores}")
    if training.get("command"):
        own = card.get("versions", {}).get("metateleport") == VERSION
        again = "" if own else ", a command of that version; today `metateleport train --recipe` with its recipe.toml"
        rows.append(f"- by `{training['command']}`{again}")
    wrote = card.get("versions", {})
    if wrote:
        rows.append("- with " + ", ".join(f"{name} {version}" for name, version in wrote.items()))
    return "## Training\n\n" + "\n".join(rows) if rows else ""


def _results(card: Mapping[str, Any]) -> str:
    results = card.get("results")
    if not isinstance(results, Mapping) or not results:
        return ""
    parts = ["## Results\n\nMedian losses over held-out tasks, at the end of the budget of gradient evaluations."]
    for key, result in results.items():
        methods = result.get("methods", {}) if isinstance(result, Mapping) else {}
        rows = []
        for name, entry in methods.items():
            medians = entry.get("median_loss") or {}
            if medians:
                last = max(medians, key=int)
                rows.append((float(medians[last]), f"| {name} | {_text(medians[last])} | {entry.get('diverged', 0)} |"))
        if rows:
            lines = [row for _, row in sorted(rows, key=lambda row: row[0])]
            parts.append("\n".join((f"### {key}\n", "| method | loss | diverged |", "|---|--:|--:|", *lines)))
    return "\n\n".join(parts)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
