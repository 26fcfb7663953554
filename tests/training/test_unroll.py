"""Windows of an unroll: memory, graphs, and where they go on."""

from __future__ import annotations

import gc
import math

import torch
from learned_cases import shape_of
from torch import Tensor

import metateleport as mt
from metateleport.learned import MetaOptimizer
from metateleport.training import (
    Unroll,
    log_losses,
)


def test_memory_does_not_grow_over_windows() -> None:
    family = mt.load_family("leaky_mlp", {"width": 4, "activation": "identity"})
    meta = MetaOptimizer(shape_of(hidden=4))

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    for track in (True, False):
        unroll = Unroll(family.stack(range(2)), meta)
        counts = []
        for _ in range(4):
            losses = unroll.window(2, track)
            if track:
                losses.mean().backward()
            del losses
            counts.append(alive())
        assert counts[1] == counts[-1], track


def test_an_untracked_unroll_keeps_no_graph() -> None:
    family = mt.load_family("leaky_mlp", {"width": 4, "activation": "identity"})
    meta = MetaOptimizer(shape_of(mode="update+tele", hidden=4))
    tracked, untracked = Unroll(family.stack(range(2)), meta), Unroll(family.stack(range(2)), meta)
    expected, found = tracked.window(4), untracked.window(4, track=False)
    assert torch.equal(expected.detach(), found.detach())
    (gradient,) = torch.autograd.grad(expected.mean(), [next(meta.parameters())])
    assert bool(gradient.any())
    assert not found.requires_grad


def test_windows_go_on_where_the_last_one_ended() -> None:
    family = mt.load_family("leaky_mlp", {"width": 4})
    meta = MetaOptimizer(shape_of(mode="update+tele", hidden=4))
    whole, parts = Unroll(family.stack(range(2)), meta), Unroll(family.stack(range(2)), meta)
    expected = whole.window(6).detach()
    found = torch.cat((parts.window(2).detach(), parts.window(4).detach()))
    assert torch.allclose(found, expected, rtol=1e-9)
    assert parts.steps == 6


def test_log_losses_know_no_scale_and_level_off() -> None:
    start = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
    shares = torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64)
    found = log_losses(shares * start, start)
    assert torch.allclose(found[0], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(found[1], torch.full((3,), math.log(0.5), dtype=torch.float64))
    assert torch.allclose(found[2], torch.full((3,), math.log(1e-26), dtype=torch.float64))
    assert bool(log_losses(torch.zeros(1, 1), torch.zeros(1)).isfinite().all())
