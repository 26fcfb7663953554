"""The learned optimizer in two processes under DistributedDataParallel."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

_REPLICAS = """
import sys, warnings
import torch
import torch.distributed as dist
from torch import nn
import metateleport as mt

warnings.simplefilter("ignore")
folder, rank, name, how = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.1), nn.Linear(16, 3))
start = model[0].weight.detach().clone()
ddp = nn.parallel.DistributedDataParallel(model)
optimizer = mt.LearnedOptimizer(ddp if how == "told" else model, name)
source = torch.Generator().manual_seed(rank)
x = torch.randn(64, 8, generator=source)
y = (x[:, 0] > 0).long()
for step in range(8):
    optimizer.zero_grad()
    # What one rank sees by itself is far from what the other sees.
    loss = nn.functional.cross_entropy(ddp(x), y)
    loss.backward()
    optimizer.step(loss=loss.detach() * (1 + 100 * rank * step) if how == "told" else None)
assert not torch.equal(start, model[0].weight)
torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), f"{folder}/{rank}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["told", "untold"])
@pytest.mark.parametrize("name", ["digits", "leaky_mlp_mixture"])
def test_replicas_stay_equal(name: str, how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_REPLICAS), str(tmp_path)]
    both = [subprocess.Popen([*command, str(rank), name, how], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [each.communicate(timeout=180)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    one, other = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert torch.equal(one, other)
