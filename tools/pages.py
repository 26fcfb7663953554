"""Pages of the site that are made from sources: symmetries, recipes, API, notebooks."""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["api", "notebook", "recipes", "rooms", "symmetry_kinds"]

ROOT = Path(__file__).resolve().parent.parent


def rooms() -> list[tuple[str, str]]:
    """The rooms in the order of docs/architecture.md, the highest first, each with what it holds."""
    listed = (ROOT / "docs" / "architecture.md").read_text().split("```")[1].strip().splitlines()
    found = []
    for line in listed:
        names, _, words = line.partition("  ")
        found += [(name, words.strip()) for name in names.split()]
    return found[::-1]


def _public(room: str) -> list[str]:
    """Names of the public classes and functions of a room, in its order."""
    module = importlib.import_module(f"metateleport.{room}")
    named = ((name, getattr(module, name)) for name in getattr(module, "__all__", []))
    return [name for name, value in named if inspect.isclass(value) or inspect.isroutine(value)]


def api() -> Iterator[tuple[str, str]]:
    """Pages of the API: path and text, one for each room with public names, and an index."""
    rows = []
    for room, words in rooms():
        names = _public(room)
        if not names or room == "cli":
            continue
        rows.append(f"| [`metateleport.{room}`]({room}.md) | {words} |")
        lines = [f"# metateleport.{room}", "", f"{words[:1].upper()}{words[1:]}.", ""]
        for name in names:
            lines += [f"::: metateleport.{room}.{name}", ""]
        yield f"api/{room}.md", "\n".join(lines)
    head = (
        "The names at the top, as `metateleport.LearnedOptimizer`, are those of these rooms; the highest room is first."
    )
    yield "api/index.md", "\n".join(["# API", "", head, "", "| room | what it holds |", "|---|---|", *rows, ""])


def symmetry_kinds() -> str:
    """A table of all symmetries that can be named: kind, action, exactness."""
    from metateleport import symmetries

    rows = []
    for name in symmetries.__all__:
        kind: Any = getattr(symmetries, name)
        if not (inspect.isclass(kind) and issubclass(kind, symmetries.Symmetry)) or inspect.isabstract(kind):
            continue
        first, _, rest = (inspect.getdoc(kind) or "").partition("\n\n")
        formula = re.search(r"\$\$(.*?)\$\$", rest, re.DOTALL)
        action = " ".join(formula[1].split()).replace("|", r"\vert ") if formula else ""
        exactness = getattr(kind, "exactness", "")
        rows.append(
            f"| [`{name}`](api/symmetries.md#metateleport.symmetries.{name}) | {' '.join(first.split())} | "
            f"{f'${action}$' if action else ''} | {exactness if isinstance(exactness, str) else ''} |"
        )
    return "\n".join(
        [
            "# Symmetries",
            "",
            "`mt.find_symmetries(model, example_input)` finds and certifies those of a model. Each can also be named:",
            '`symmetries=[mt.Rescaling(model, "first", "second")]`. How to add one is in',
            "[contributing.md](contributing.md#a-symmetry). [symmetries.md](symmetries.md) has those of common models.",
            "",
            "*exact* holds for all inputs, *batch-exact* on one batch, *approximate* up to a drift that is measured.",
            "",
            "| symmetry | what it does | action | |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def recipes() -> str:
    """The recipes of the shipped checkpoints."""
    lines = [
        "# Recipes",
        "",
        "A recipe is a TOML file with a table for each part of a meta-training. `metateleport train --recipe NAME`",
        "trains by that of a shipped checkpoint, `--recipe FILE` by yours; `--set PART.KEY=VALUE` changes a setting.",
        "`metateleport train FAMILY` trains by the default recipe. Settings that cannot go together are errors that",
        "name both.",
        "",
        "| part | what it is |",
        "|---|---|",
        "| `family` | the task family and its settings |",
        "| `rule` | the update rule: its `kind` and what that kind takes |",
        "| `teleport` | the teleport that stays; without the table there is none |",
        "| `gauge` | gauges, undone after the step; without the table there are none |",
        "| `outer` | meta-steps, time, tasks side by side, horizon and window of the unroll, seeds |",
        "| `validation` | the tasks that choose the checkpoint, and how often |",
        "",
    ]
    for path in sorted((ROOT / "checkpoints").glob("*/recipe.toml")):
        name = path.parent.name
        learned = [part for part in ("teleport", "gauge") if f"\n[{part}]\n" in path.read_text()]
        lines += [
            f"## {name}",
            "",
            f"A step{''.join(f' and a {part}' for part in learned)}.",
            "",
            "```toml",
            path.read_text().strip(),
            "```",
            "",
        ]
    return "\n".join(lines)


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and the pictures of its outputs by file name."""
    cells, lines, pictures = json.loads(path.read_text())["cells"], [], {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for place, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                name = f"{path.stem}-{number}-{place}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                lines += [f"![output]({name})", ""]
            elif text.strip() and output.get("name") != "stderr":
                lines += ["```text", text.rstrip(), "```", ""]
    return "\n".join(lines), pictures
