"""Hooks of mkdocs: pages from sources, links to files beside docs/, formulas as MathML.

Pages that mkdocs.yml does not name are put under "More", so that a new page needs no other line.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import pages  # noqa: E402
from tools.mathml import formulas_as_mathml  # noqa: E402

BESIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
"""Pages that stand beside docs/, and what they are called in the site."""

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_config(config: Any) -> Any:
    """Completes the navigation: API, notebooks, and pages that it does not name."""
    docs = Path(config.docs_dir)
    named = set(_paths(config.nav))
    api = sorted(path for path, _ in pages.api() if path != "api/index.md")
    notebooks = sorted(f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb"))
    config.nav.append({"Notebooks": notebooks})
    config.nav.append({"API": ["api/index.md", *({Path(path).stem: path} for path in api)]})
    listed = (path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md")))
    others = [path for path in listed if path not in named]
    for section in config.nav:
        # Pages in folders of results and experiments stand with the page that leads to them.
        for title, folder in (("Results", "results/"), ("Experiments", "experiments/")):
            if title in section:
                section[title] += [path for path in others if path.startswith(folder)]
                others = [path for path in others if not path.startswith(folder)]
    if others:
        config.nav.append({"More": others})
    return config


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    if isinstance(nav, dict):
        return [path for value in nav.values() for path in _paths(value)]
    return [path for value in nav or [] for path in _paths(value)]


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made from sources."""
    from mkdocs.structure.files import File

    made: dict[str, str | bytes] = {
        **dict(pages.api()),
        "symmetry-kinds.md": pages.symmetry_kinds(),
        "recipes.md": pages.recipes(),
    }
    for source, name in BESIDE.items():
        if name != "index.md":
            made[name] = (ROOT / source).read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = pages.notebook(path)
        made[f"notebooks/{path.stem}.md"] = text
        made.update({f"notebooks/{name}": data for name, data in pictures.items()})
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files beside docs/ into links to their pages, or into names of files of the repository."""
    here = page.file.src_uri
    # Where the page stands in the repository: those beside docs/ have links from there.
    origin = next((source for source, name in BESIDE.items() if name == here and here != "index.md"), f"docs/{here}")
    if here.startswith("notebooks/"):
        origin = here

    def moved(found: re.Match[str]) -> str:
        target, anchor = found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if path.startswith("docs/") and origin.startswith("docs/"):
            return found[0]
        inside = BESIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if path.startswith("notebooks/") and path.endswith(".ipynb"):
            inside = path.removesuffix(".ipynb") + ".md"
        if inside is not None:
            return f"{found[1]}{posixpath.relpath(inside, posixpath.dirname(here) or '.')}{anchor}{found[4]}"
        # Sources are no pages; they have to be there all the same.
        return f"]({target}{anchor})" if not (ROOT / path).exists() else f"] (`{path}`)"

    return re.sub(r"\[([^\]\n]*)\] \(`", r"\1 (`", _LINK.sub(moved, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML."""
    return formulas_as_mathml(html)
