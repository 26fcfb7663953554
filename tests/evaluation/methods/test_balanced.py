"""AdamW with balancing teleports, beside the library's own on single models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

import metateleport as mt
from metateleport import Task, load_family
from metateleport.evaluation import RIVALS
from metateleport.evaluation.methods.balanced import BalancedAdamW
from metateleport.families import TaskStack

LORA = {"width": 12, "depth": 3, "rank": 2, "samples": 60, "batch": 20, "activation": "tanh"}
EVERY = 4


@pytest.fixture
def stack() -> TaskStack:
    return load_family("lora_digits", LORA).stack(range(2), "held-out", dtype=torch.float64)


def trained(stack: TaskStack, steps: int, every: int = EVERY) -> dict[str, Tensor]:
    own = copy.deepcopy(stack)
    optimizer = BalancedAdamW(own, lr=0.01, every=every)
    for step in range(steps):
        optimizer.zero_grad()
        own(own.batch(step)).sum().backward()
        optimizer.step()
    return {name: value.detach() for name, value in own.tensors().items()}


def by_hand(task: Task, steps: int) -> dict[str, Tensor]:
    """One task's weights under `TeleportingOptimizer`."""
    model = copy.deepcopy(task.model)
    own = [value for value in model.parameters() if value.requires_grad]
    optimizer = mt.TeleportingOptimizer(
        torch.optim.AdamW(own, lr=0.01, betas=(0.9, 0.999), weight_decay=0.0),
        model,
        mt.WhiteningTeleporter("balanced"),
        schedule=mt.optim.Every(EVERY, start=EVERY),
        symmetries=task.symmetries,
        max_stretch=None,
    )
    for step in range(steps):
        inputs, targets = task.batch(step)
        optimizer.zero_grad()
        task.loss(model(*inputs), *targets).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def test_a_teleport_makes_both_factors_alike_and_leaves_the_model_where_it_is(stack: TaskStack) -> None:
    # The steps up to a teleport are AdamW's, and it comes after the last of them.
    plain, moved = trained(stack, EVERY, every=100), trained(stack, EVERY)
    for name, down in moved.items():
        if "lora_A" in name:
            up = moved[name.replace("lora_A", "lora_B")]
            apart = down @ down.mT - up.mT @ up
            # Up to the teleporter's damping; before the move A is far larger.
            assert float(apart.norm()) < 1e-4 * float((down @ down.mT).norm())
            before = plain[name.replace("lora_A", "lora_B")] @ plain[name]
            torch.testing.assert_close(up @ down, before, rtol=1e-8, atol=1e-12)
            assert float((down - plain[name]).norm()) > 0.1 * float(plain[name].norm())


def test_a_stack_goes_where_single_models_go(stack: TaskStack) -> None:
    """The library's teleport comes before a step that is due, ours after the one before: between them is nothing."""
    steps = 2 * EVERY + 1
    found = trained(stack, steps)
    for number, task in enumerate(stack.tasks):
        alone = by_hand(task, steps)
        for name, value in found.items():
            torch.testing.assert_close(value[number], alone[name], rtol=1e-6, atol=1e-9)


def test_it_is_a_rival_that_is_run_on_request(stack: TaskStack) -> None:
    rival = RIVALS["balanced-adamw"]
    assert rival.on_request
    assert not rival.fair
    assert rival.needs == "LoRA pair"
    method = rival.make(lr=0.01, every=EVERY)
    assert method.moves_by == "stays"
    loss = method.run(stack, 12).loss
    assert (loss[:, -1] < loss[:, 0]).all()
    other = RIVALS["adamw"].make(lr=0.01).run(stack, 12).loss
    np.testing.assert_allclose(loss[:, EVERY], other[:, EVERY], rtol=1e-10)
    assert (abs(loss[:, -1] / other[:, -1] - 1) > 1e-3).all()
