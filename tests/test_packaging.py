"""What an installation carries, and the commands of the Makefile that need no installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from metateleport.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["metateleport", "tasks", "checkpoints", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
LARGEST = 10_000_000
# learn2learn has no wheel.
COMPILED = {"learn2learn"}


def _files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel, made from a copy of the sources, is unpacked into."""
    sources, site = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources / name)
    # Meta-seeds lie deeper than any other file.
    shutil.copytree(sources / "checkpoints" / "digits", sources / "checkpoints" / "several" / "meta_seeds" / "1")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(site)], cwd=sources, check=True, capture_output=True)
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def _metadata(site: Path) -> Message:
    (path,) = site.glob("*.dist-info/METADATA")
    return message_from_string(path.read_text())


@pytest.mark.slow(seconds=2)
def test_a_wheel_is_small_and_says_under_which_licence_it_is(installed: Path) -> None:
    (wheel,) = installed.glob("*.whl")
    # The checkpoint that `installed` adds is in it.
    assert wheel.stat().st_size < LARGEST
    metadata = _metadata(installed)
    assert metadata["License-Expression"] == "Apache-2.0"
    (licence,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "Version 2.0, January 2004" in licence.read_text()


def test_what_is_cited_is_this_version(installed: Path) -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == _metadata(installed)["Version"] == VERSION


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog: versions with a date or `unreleased`, this one first, and six kinds of changes."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\]( - (unreleased|\d{4}-\d\d-\d\d))?", each) for each in versions)
    assert versions[0].startswith(f"[{VERSION}]")
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.slow(seconds=90)
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_wheel_installs_without_a_compiler(installed: Path, version: str, tmp_path: Path) -> None:
    """All that it asks for, and all of its extras but one, are there as wheels; nothing is installed."""
    (wheel,) = installed.glob("*.whl")
    extras = set(_metadata(installed).get_all("Provides-Extra", [])) - COMPILED
    assert extras
    where = ["--target", str(tmp_path), "--python-version", version, "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", *where]
    done = subprocess.run(
        [*command, f"{wheel}[{','.join(sorted(extras))}]"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    would = done.stdout.rpartition("Would install ")[2]
    assert f"metateleport-{VERSION}" in would
    assert "torch-" in would


def _in_installation(site: Path, code: str) -> object:
    """What `code` prints as JSON where only the unpacked wheel is found, in a folder that holds nothing."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(("beside", "inside"), [("tasks", "_gallery"), ("checkpoints", "_checkpoints")])
def test_a_wheel_carries_what_lies_beside_the_package(installed: Path, beside: str, inside: str) -> None:
    carried = _files(installed / "metateleport" / inside)
    deep = {name: carried.pop(name) for name in list(carried) if name.startswith("several/")}
    assert carried == _files(ROOT / beside)
    if beside == "checkpoints":
        assert {name.rpartition("/")[2] for name in deep} == {"card.json", "recipe.toml", "weights.safetensors"}


def test_a_wheel_carries_the_whole_package(installed: Path) -> None:
    inside = _files(installed / "metateleport")
    carried = {name: text for name, text in inside.items() if not name.startswith(("_gallery/", "_checkpoints/"))}
    assert carried == _files(ROOT / "metateleport")


def test_bare_names_resolve_in_an_installation_from_any_folder(installed: Path) -> None:
    code = """
import json
import metateleport.families
import metateleport.checkpoint
found = metateleport.families.gallery() | {
    f"checkpoint {name}": path for name, path in metateleport.checkpoint.shipped_checkpoints().items()
}
metateleport.families.load_family("leaky_mlp")
print(json.dumps({name: str(path) for name, path in found.items()}))
"""
    found = _in_installation(installed, code)
    package = installed / "metateleport"
    expected = {path.stem: str(package / "_gallery" / path.name) for path in (ROOT / "tasks").glob("*.py")}
    for card in (ROOT / "checkpoints").glob("*/card.json"):
        expected[f"checkpoint {card.parent.name}"] = str(package / "_checkpoints" / card.parent.name)
    assert found == expected


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "-C", str(ROOT)], check=True, capture_output=True, text=True)
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    assert {"venv", "demo", "test", "lint", "format", "wheel", "clean"} <= listed


@pytest.mark.parametrize(
    ("version", "message"), [(None, "there is no python-of-the-test"), ("3.9", "needs Python 3.10 or later")]
)
def test_make_venv_refuses_an_interpreter_that_cannot_serve(tmp_path: Path, version: str | None, message: str) -> None:
    (tmp_path / "metateleport").mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "setup.py", "metateleport/torchvision.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "bin" / "python-of-the-test"
    if version is not None:
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo Python {version} && exit\nexit 1\n')
        python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["make", "venv", f"PYTHON={python.name}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / ".venv").exists()
