"""The questions of docs/faq.md are what the library says, and every warning of the learned optimizer is among them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "faq.md").read_text()
ASKED = re.findall(r'^### "(.*)"$', PAGE, re.MULTILINE)
ANY = "…"


def text_of(node: ast.expr) -> str | None:
    """A literal's text, with a sign for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or ANY for part in node.values)
    return None


def said(folder: Path) -> list[str]:
    """All texts in the sources of a folder."""
    nodes = (node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return [text for node in nodes if isinstance(node, ast.expr) if (text := text_of(node)) is not None]


SAID = said(ROOT / "metateleport")


@pytest.mark.parametrize("question", ASKED)
def test_a_question_is_what_the_library_says(question: str) -> None:
    parts = [re.escape(part) for part in question.split(ANY)]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(text) for text in SAID)


@pytest.mark.parametrize("question", ASKED)
def test_every_question_has_a_cause_and_a_cure(question: str) -> None:
    answer = PAGE.split(f'### "{question}"')[1].split("\n#")[0]
    assert "**Cause**:" in answer
    assert "**Cure**:" in answer


def warned() -> list[str]:
    """What LearnedOptimizer warns of while training."""
    tree = ast.parse((ROOT / "metateleport" / "optim" / "learned.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    says = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "_say"]
    return [text for call in says if (text := text_of(call.args[0])) is not None]


def test_every_warning_of_the_learned_optimizer_is_answered() -> None:
    found = warned()
    assert len(found) > 5
    patterns = [re.compile(".*".join(re.escape(part) for part in each.split(ANY)), re.DOTALL) for each in ASKED]
    assert [text for text in found if not any(pattern.search(text) for pattern in patterns)] == []
