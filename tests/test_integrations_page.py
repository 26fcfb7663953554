"""The blocks of the page on other trainers run as they stand, and train."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"
SECTIONS: dict[str, list[str]] = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for title, _, text in (part.partition("\n") for part in PAGE.read_text().split("\n## "))
}
LONGEST = 17
"""Lines of a block; those that define what is trained are more than the ten that matter."""


def _run(title: str, names: dict[str, Any]) -> None:
    for block in SECTIONS[title]:
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the first block of the page defines."""
    defined: dict[str, Any] = {}
    _run("# In other trainers", defined)
    return defined


def _weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad])


@pytest.mark.parametrize(
    ("title", "library"),
    [
        ("A plain loop with mixed precision and accumulation", "torch"),
        ("transformers' Trainer", "transformers"),
        ("Lightning", "lightning"),
        ("accelerate", "accelerate"),
    ],
)
def test_a_section_runs(title: str, library: str, names: dict[str, Any]) -> None:
    pytest.importorskip(library)
    # Optimizers as the page makes them, from whatever it makes them of.
    made: list[Any] = []
    whole = names["mt"].LearnedOptimizer

    class Noted(whole):  # type: ignore[misc,valid-type]
        def __init__(self, model: nn.Module, *given: Any, **named: Any) -> None:
            super().__init__(model, *given, **named)
            made.append((model, _weights(model).clone(), self))

    names["mt"] = type("mt", (), {"LearnedOptimizer": Noted})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(title, names)
    ((model, start, optimizer),) = made
    moved = (_weights(model) - start).norm()
    assert 0 < moved < float("inf")
    assert optimizer.skipped == 0


def test_adapters_are_trained_and_nothing_else(names: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(SECTIONS["transformers' Trainer"][0].partition("\noptimizer =")[0], names)
        _run("PEFT", names)
    moved = {name: value for name, value in names["model"].named_parameters() if value.requires_grad}
    assert moved
    assert all("lora_" in name for name in moved)
    # B starts at zero.
    assert all(value.abs().sum() > 0 for name, value in moved.items() if "lora_B" in name)


def test_the_page_has_every_section_and_short_ones() -> None:
    assert len(SECTIONS) == 7
    for title, blocks in SECTIONS.items():
        assert len(blocks) == 1, title
        assert len([line for line in blocks[0].splitlines() if line.strip()]) <= LONGEST, title


@pytest.mark.slow(seconds=30)
def test_the_file_for_torchrun_runs_in_two_processes(tmp_path: Path) -> None:
    (block,) = SECTIONS["torchrun and DistributedDataParallel"]
    (tmp_path / "train.py").write_text(block)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stretches = dict(re.findall(r"rank (\d) stretch (\S+)", done.stdout))
    assert stretches.keys() == {"0", "1"}
    # Replicas stay equal.
    assert stretches["0"] == stretches["1"]
    assert float(stretches["0"]) > 1
