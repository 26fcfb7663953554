"""`metateleport which`: the checkpoint for a model, what it would use, its price, and whether AdamW is the answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from typing import Any

from metateleport.cli.common import Parser, say
from metateleport.cli.progress import status
from metateleport.cli.symmetries import load_factory

__all__ = ["add"]

_EXAMPLES = """\
examples:
  metateleport which nets.py:small              the factory is that of 'metateleport symmetries'
  metateleport which nets.py:small --json       the same for a program
"""

_DEAR = 3.0
"""From so many of AdamW's steps in one learned step on, AdamW is the answer where seconds count.

Where a learned optimizer is ahead at equal steps, AdamW needs about two to three times the steps to get as far."""


def add(commands: Any) -> None:
    """Adds the command to a parser's subcommands."""
    parser: Parser = commands.add_parser(
        "which",
        help="the checkpoint for a model of yours, its price per step, or that AdamW is the answer",
        description="Names the checkpoint for a model, the symmetries that it would use, its price and what to expect.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("factory", metavar="FILE.py:FACTORY", help="function that returns model and example input")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    # What a model prints is no part of the answer, which a program may read.
    with contextlib.redirect_stdout(sys.stderr):
        model, example = load_factory(arguments.factory)
        with status("finding symmetries and timing steps"):
            found = advice(model, example)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(in_words(found)))
        if found["checkpoint"] is not None:
            say(f"more on it: metateleport show {found['checkpoint']}")
    return 0


def advice(model: Any, example: Any) -> dict[str, Any]:
    """What is to be said of a model.

    Args:
        model: an `nn.Module`; it is left as it is.
        example: its example input.

    Returns:
        `parameters` that are trained, `checkpoint` (None if none serves) and `why`, `symmetries` that would be used,
        `warnings`, `price` (`learned` and `adamw` in seconds, `ratio`; None if it cannot be measured), `expect`, and
        `use`, a checkpoint or `adamw`, with `because`.
    """
    from metateleport.checkpoint import CheckpointError, read_card, shipped_checkpoints
    from metateleport.evaluation.price import Unpriced, price_of
    from metateleport.optim import LearnedOptimizer
    from metateleport.optim.choice import choose

    chosen = choose(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    found: dict[str, Any] = {
        "parameters": 0,
        "checkpoint": chosen.checkpoint,
        "why": chosen.why,
        "symmetries": [],
        "warnings": [],
        "price": None,
        "expect": [],
    }

    def refused(because: str) -> dict[str, Any]:
        return {**found, "checkpoint": None, "use": "adamw", "because": because}

    if not trained:
        return refused("no parameter of this model is trained")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = LearnedOptimizer(model, chosen.checkpoint, example_input=example)
    except (ValueError, CheckpointError) as error:
        return refused(str(error))
    found["parameters"] = sum(value.numel() for value in trained)
    found["symmetries"] = [repr(each) for each in optimizer.symmetries]
    found["warnings"] = [str(each.message) for each in caught]
    del optimizer
    card = read_card(shipped_checkpoints()[chosen.checkpoint])
    found["expect"] = [str(each) for each in card.get("limits", ())]
    try:
        price = price_of(model, example, chosen.checkpoint)
    except Unpriced as error:
        return {**found, "use": chosen.checkpoint, "because": f"its price was not measured: {error}"}
    except Exception as error:
        return refused(f"the model does not train on its example input: {type(error).__name__}: {error}")
    found["price"] = {**price._asdict(), "ratio": price.ratio}
    if price.ratio > _DEAR:
        because = (
            f"a learned step takes {price.ratio:.1f} of AdamW's on this input, more than it saves where seconds "
            f"count; where steps or data are what is short, use {chosen.checkpoint!r}, or larger batches, on which the "
            "step weighs less"
        )
        return {**found, "use": "adamw", "because": because}
    because = f"a learned step takes {price.ratio:.1f} of AdamW's on this input, and there is nothing to tune"
    return {**found, "use": chosen.checkpoint, "because": because}


def in_words(found: dict[str, Any]) -> list[str]:
    """What `advice` gives, in lines.

    Example:
        >>> found = {"use": "adamw", "because": "no parameter of this model is trained", "checkpoint": None}
        >>> in_words(found)
        ['use AdamW: no parameter of this model is trained']
    """
    said = f"use {'AdamW' if found['use'] == 'adamw' else repr(found['use'])}: {found['because']}"
    if found["checkpoint"] is None:
        return [said]
    lines = [
        said,
        "",
        f"checkpoint  {found['checkpoint']}: {found['why']}",
        f"trained     {found['parameters']:,} parameters",
    ]
    if found["symmetries"]:
        lines += [f"symmetries  {found['symmetries'][0]}", *(f"            {each}" for each in found["symmetries"][1:])]
    else:
        lines.append("symmetries  none: it steps weights as they are")
    price = found["price"]
    if price is not None:
        milliseconds = f"{1e3 * price['learned']:.2g} ms, AdamW's {1e3 * price['adamw']:.2g} ms"
        lines.append(f"price       {price['ratio']:.1f} of AdamW's steps ({milliseconds}, both with their passes)")
    lines += [f"expect      {each}" for each in found["expect"]]
    lines += [f"warning     {each}" for each in found["warnings"]]
    if found["use"] != "adamw":
        lines += ["", f"optimizer = metateleport.LearnedOptimizer(model, {found['checkpoint']!r}, total_steps=...)"]
    return lines
