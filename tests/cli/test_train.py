"""The commands that the pages give are commands that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from metateleport.cli.commands import _parser
from metateleport.cli.common import UsageError
from metateleport.cli.train import _recipe
from metateleport.families import load_family

ROOT = Path(__file__).resolve().parents[2]
# The few-shot page names a card's command, which an earlier version was given; the page on a family of one's own has
# a test that writes its file.
PAGES = [
    ROOT / "README.md",
    ROOT / "Makefile",
    *(page for page in ROOT.glob("docs/**/*.md") if page.name not in ("fewshot.md", "own-family.md")),
]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ").replace("$(DEMO)", "demo").replace("$(BIN)/", "")
        # In a line of their own, or in a sentence between backticks, over several lines.
        found += re.findall(r"^\s*(metateleport train [^`\n#]*)", text, re.MULTILINE)
        found += [" ".join(each.split()) for each in re.findall(r"`(metateleport train [^`]+)`", text)]
    return found


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_a_command_of_the_pages_makes_a_recipe(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Pages write X for any number.
    recipe, _ = _recipe(_parser().parse_args(shlex.split(re.sub(r"=X\b", "=2", command))[1:]))
    load_family(recipe.family.name, recipe.family.settings)


def test_a_family_is_given_once() -> None:
    twice = ["train", "leaky_mlp", "--set", "family.name=digits"]
    with pytest.raises(UsageError, match=r"leaky_mlp and --set family\.name are the same setting"):
        _recipe(_parser().parse_args(twice))
