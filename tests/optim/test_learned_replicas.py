"""The learned optimizer in two processes under DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replicas import learned, run_both


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("name", ["digits", "leaky_mlp_mixture"])
def test_replicas_stay_equal(name: str, told: bool, tmp_path: Path) -> None:
    one, other = run_both(learned, tmp_path, name, told)
    assert torch.equal(one, other)
