"""A recipe makes its checkpoint again, bit for bit.

`digits`, of the rule `adaptive`, did so too until that rule took its passes over all tensors together, and
`leaky_mlp_stays`, of the rule `lr`, until exponentials and their inverses came from one polynomial: sums in another
order round otherwise, as they do on another processor, and a training carries that on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metateleport.checkpoint import load_checkpoint
from metateleport.training import load_recipe, train

MADE_WITH = "2.13.0+cpu"
"""The build of torch that the shipped checkpoints were trained with; another one rounds otherwise."""


@pytest.mark.skipif(torch.__version__ != MADE_WITH, reason=f"needs torch {MADE_WITH}")
# What they start from is what these seeds keep, whatever rounding does.
@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize(("name", "seed"), [("default", 0), ("default", 1)])
def test_a_recipe_makes_its_checkpoint_again(name: str, seed: int, tmp_path: Path) -> None:
    (shipped,) = (each.path for each in load_checkpoint(name).meta_seeds if each.seed == seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = train(load_recipe(name).changed({"outer.seed": str(seed), "outer.device": "cpu"}), tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    assert (again / "weights.safetensors").read_bytes() == (shipped / "weights.safetensors").read_bytes()
