"""A torchvision whose extension does not load is mended in the environment, and everything that imports it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metateleport import torchvision

FAKE = """
import torch

@torch.library.register_fake("torchvision::nms")
def fake(dets, scores, threshold):
    return dets
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a torchvision whose extension is not one, as that for CUDA is none beside a torch for CPUs."""
    folder = tmp_path / "site" / "torchvision"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(FAKE)
    (folder / "_C.so").write_text("not for this machine")
    return tmp_path / "site"


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A process that finds the folder's packages first and runs its .pth files."""
    # Without the environment's own hook, which may have been written.
    start = "import site, sys; sys.meta_path = [f for f in sys.meta_path if '_Finder' not in repr(f)]; "
    start += f"sys.modules.pop({torchvision.HOOK!r}, None); sys.path.insert(0, {str(site)!r}); "
    start += f"site.addsitedir({str(site)!r}); "
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)


@pytest.mark.slow(seconds=4)
def test_the_hook_defines_what_the_extension_would_have(site: Path) -> None:
    broken = run(site, "import torchvision")
    assert "torchvision::nms does not exist" in broken.stderr
    torchvision.mend(site)
    mended = run(
        site, "assert 'torch' not in sys.modules; import torchvision, torch; print(torch.ops.torchvision.qnms)"
    )
    assert mended.returncode == 0, mended.stderr
    assert "qnms" in mended.stdout
    assert not mended.stderr


def test_the_hook_leaves_everything_else_alone(site: Path) -> None:
    torchvision.mend(site)
    found = "from importlib.util import find_spec; assert find_spec('torchvision'); assert not find_spec('nowhere'); "
    done = run(site, f"import wave; {found}print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("said", "after", "code", "words"),
    [
        (None, None, 0, "nothing to mend"),
        ("ImportError: no libjpeg", None, 1, "not for want of its operators"),
        ("RuntimeError: operator torchvision::nms does not exist", None, 0, "defines the operators"),
        ("RuntimeError: operator torchvision::nms does not exist", "worse", 1, "even with its operators"),
    ],
)
def test_what_the_command_does(
    said: str | None,
    after: str | None,
    code: int,
    words: str,
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = [said, after]
    monkeypatch.setattr(torchvision, "_import", lambda: answers.pop(0))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": str(site)})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert torchvision.main() == code
    shown = capsys.readouterr()
    assert words in shown.out + shown.err
    # A hook that does not help does not stay.
    assert (site / f"{torchvision.HOOK}.pth").exists() == (code == 0 and said is not None)
    assert (site / f"{torchvision.HOOK}.py").exists() == (code == 0 and said is not None)


def test_without_torchvision_there_is_nothing_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert torchvision.main() == 0
    assert "not installed" in capsys.readouterr().out


@pytest.mark.slow(seconds=5)
def test_what_a_person_runs_here_imports() -> None:
    """In a process of its own, which the tests have prepared in no way."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    code = "import torchvision; from transformers import GPT2LMHeadModel; import peft; print(torchvision.ops.nms)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"run python -m metateleport.torchvision, as make venv does:\n{done.stderr}"
