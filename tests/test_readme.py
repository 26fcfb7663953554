"""README.md: short, and every line of it works."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from metateleport.cli.commands import _parser
from metateleport.cli.common import UsageError

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
README = (ROOT / "README.md").read_text()


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 120


def test_its_python_is_one_script_and_each_use_is_short() -> None:
    """`test_doctests` runs the blocks, one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    first, *uses = blocks
    assert len([line for line in first.split("\n\n")[-1].splitlines() if line]) <= 10
    assert all(len(use.splitlines()) <= 4 for use in uses)


def commands(page: Path) -> list[str]:
    """Commands of this program in a page: lines of their own, and in sentences between backticks."""
    text = page.read_text()
    found = re.findall(r"^(metateleport [^`\n#]+)", text, re.MULTILINE)
    found += re.findall(r"`(metateleport [^`]+)`", text)
    return [" ".join(each.split()) for each in found]


def told_by_the_parser(words: list[str]) -> str | None:
    """What is wrong with a command; None if nothing is."""
    try:
        _parser().parse_args(words)
    except SystemExit as ended:
        return str(ended.code) if ended.code else None
    except UsageError as error:
        return str(error)
    return None


# What pages write for what a person fills in.
PLACEHOLDERS = {"COMMAND", "NAME", "CHECKPOINT", "TASK", "FAMILY", "X", "FOLDER", "FILE", "..."}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_are_commands(page: Path) -> None:
    for command in commands(page):
        # Behind a command stands what it does, behind three spaces or a sign.
        words = shlex.split(re.split(r"   +", command)[0])[1:]
        # With square brackets it is what a command takes, not a command.
        if not words or words[0] in PLACEHOLDERS or "[" in command or page.name == "fewshot.md":
            continue
        said = told_by_the_parser([re.sub(r"=X\b", "=2", word) for word in words])
        # A sentence may name a command, or one of its options, without all that it takes.
        assert said is None or "required" in said or "expected" in said, f"{command}: {said}"


def test_its_other_commands_are_there() -> None:
    done = subprocess.run(["make", "-C", str(ROOT)], check=True, capture_output=True, text=True)
    targets = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    named = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert named
    assert named <= targets
    assert "TORCH ?= cpu" in (ROOT / "Makefile").read_text()
    for module in re.findall(r"`python -m ([\w.]+)`", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_it_says_what_a_person_asks() -> None:
    """What is it, is it for my model, how do I use it, how do I compare, what does it cost, when does it not help."""
    for words in ("**learns to move**", "Which checkpoint for my model?", "Ten lines", "metateleport evaluate"):
        assert words in README
    assert "**When not to use it**" in README
    assert "seconds, over Adam's" in README
