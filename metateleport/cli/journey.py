"""What `metateleport` alone prints: a person's way through the commands."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["journey"]

_STAGES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "see it",
        (("demo --first", "a shipped checkpoint beside AdamW on real data, under a minute"),),
    ),
    (
        "is it for my model?",
        (
            ("which nets.py:small", "the checkpoint for a model of yours, its price, or AdamW"),
            ("symmetries nets.py:small", "the symmetries of a model of yours, each certified"),
            ("checkpoints", "the checkpoints, and what each is for"),
        ),
    ),
    (
        "train one of your own",
        (
            ("tasks", "the task families; a file of yours serves as well"),
            ("train digits --seconds 120", "meta-train; writes runs/digits"),
            ("evaluate runs/digits digits", "against tuned rivals, on tasks never trained on"),
        ),
    ),
    (
        "compare and share",
        (
            ("compare digits", "the runs of a task, in a table"),
            ("ui", "the same in MLflow's pages"),
            ("promote runs/digits", "give it a name that others load it by"),
            ("serve digits", "group elements and steps over HTTP"),
        ),
    ),
    (
        "look closer",
        (
            ("experiment", "tests of what the papers claim"),
            ("reproduce figure-6", "the source paper's figure"),
        ),
    ),
)

_HEAD = """\
metateleport learns to teleport: to move a network's weights along the symmetries of its loss before optimizer steps.

use it, in the place of AdamW
  optimizer = metateleport.LearnedOptimizer(model)
"""

_FOOT = "'metateleport COMMAND --help' explains a command with examples; 'metateleport --help' lists all of them."


def journey(commands: Collection[str]) -> str:
    """The way, by those commands that there are.

    Example:
        >>> print(journey(["ui"]).splitlines()[-3].strip())
        metateleport ui  the same in MLflow's pages
    """
    stages = [(title, [row for row in rows if row[0].split()[0] in commands]) for title, rows in _STAGES]
    width = max(len(command) for _, rows in stages for command, _ in rows)
    lines = [_HEAD]
    for title, rows in stages:
        if rows:
            lines += [title, *(f"  metateleport {command:{width}}  {words}" for command, words in rows), ""]
    return "\n".join([*lines, _FOOT])
