"""Windows of meta-training without a loss, and losses that are not positive."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from torch import Tensor, nn
from training_cases import family_of
from training_cases import small as config

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.settings import SettingsError
from metateleport.training import MetaTrainer, Recipe, TruncatedSettings, Unroll, log_losses
from metateleport.training.stack_optimizer import StackOptimizer
from metateleport.training.unroll import runs_blind


def networks(settings: Recipe) -> MetaOptimizerConfig:
    return settings.networks(MetaOptimizerConfig.groups)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_all_windows_is_blind(share: float) -> None:
    drawn = [runs_blind(share, 0, stack, window) for stack in range(200) for window in range(8)]
    assert sum(drawn) == pytest.approx(share * len(drawn), abs=1e-9)
    first = [runs_blind(share, 0, stack, 0) for stack in range(400)]
    assert sum(first) == pytest.approx(share * len(first), abs=40 * (0 < share < 1))


def test_which_windows_are_blind_is_a_matter_of_seed_stack_and_window() -> None:
    drawn = {seed: [runs_blind(0.5, seed, stack, 0) for stack in range(64)] for seed in (1, 1, 2)}
    assert drawn[1] == [runs_blind(0.5, 1, stack, 0) for stack in range(64)]
    assert drawn[1] != drawn[2]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_the_share_is_checked(wrong: float) -> None:
    with pytest.raises(SettingsError, match=r"outer\.blind has to be a share of the windows"):
        TruncatedSettings(blind=wrong)
    assert TruncatedSettings().blind == 0.5


def trained(settings: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[bool]]:
    """A trainer that has run, and which of its windows saw the loss."""
    seen: list[bool] = []
    window = Unroll.window

    def noted(self: Unroll, length: int, track: bool = True, loss_known: bool = True) -> Tensor:
        if track:
            seen.append(loss_known)
        return window(self, length, track, loss_known)

    family = family_of(settings)
    torch.manual_seed(0)
    trainer = MetaTrainer(settings, family, MetaOptimizer(networks(settings)))
    with monkeypatch.context() as patched:
        patched.setattr(Unroll, "window", noted)
        trainer.run()
    return trainer, seen


def test_windows_of_a_training_are_blind_as_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for share, allowed in ((0.0, {True}), (1.0, {False}), (0.5, {True, False})):
        _, seen = trained(config(meta_steps=8, mode="lr", blind=share), monkeypatch)
        assert len(seen) == 8
        assert set(seen) == allowed
    again = trained(config(meta_steps=8, mode="lr", blind=0.5), monkeypatch)[1]
    assert seen == again


def test_a_window_tells_its_optimizer_whether_the_loss_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def noted(model: Any, optimizer: StackOptimizer, track: bool) -> Any:
        told.append(optimizer.loss_known)
        return context(model, optimizer, track)

    module = sys.modules[Unroll.__module__]
    context = module.unroll_context
    monkeypatch.setattr(module, "unroll_context", noted)
    settings = config(mode="lr")
    stack = family_of(settings).stack(range(2))
    run = Unroll(stack, MetaOptimizer(networks(settings)))
    for known in (True, False):
        run.window(2, track=False, loss_known=known)
    assert told == [True, False]


def test_the_measure_is_the_logarithm_of_positive_losses_and_grows_with_every_loss() -> None:
    start, scale = torch.tensor([2.0, 2.0], dtype=torch.float64), torch.tensor([3.0, 0.5], dtype=torch.float64)
    losses = torch.linspace(-5, 5, 101, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
    found = log_losses(losses, start, scale)
    assert bool((found.diff(dim=0) > 0).all())
    torch.testing.assert_close(found[60:], log_losses(losses[60:], start), rtol=0, atol=0)
    for first in (-3.0, 0.0):
        found = log_losses(losses, torch.full_like(start, first), scale)
        assert bool((found.diff(dim=0) > 0).all())
        torch.testing.assert_close(found, ((losses - first) / scale).asinh())


def test_gradients_of_the_measure_are_finite_and_downhill() -> None:
    losses = torch.tensor([[-2.0, 0.0, 1.0, -1.0, 3.0]], requires_grad=True)
    log_losses(
        losses, torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, 0.0, math.inf, math.nan, 2.0])
    ).sum().backward()
    assert losses.grad is not None
    assert bool(losses.grad.isfinite().all())
    assert bool((losses.grad > 0).all())


def unroll_of(shift: float, factor: float = 1.0) -> Unroll:
    torch.manual_seed(0)
    tasks = []
    for seed in range(2):
        model = nn.Linear(3, 2).double()
        x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        tasks.append(mt.Task(model, lambda out, y: factor * (out - y).square().mean() + shift, (x,), (y,), seed=seed))
    settings = shape_of(mode="tele", hidden=4, base_lr=0.05 / factor)
    return Unroll(TaskStack(tasks), MetaOptimizer(settings))


def test_a_loss_below_zero_is_measured_by_its_decrease_whatever_is_added_or_multiplied() -> None:
    found = unroll_of(-10.0).window(4).detach()
    assert bool((found < 0).all())
    assert bool((found.diff(dim=0) < 0).all())
    torch.testing.assert_close(unroll_of(-30.0).window(4).detach(), found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(unroll_of(-50.0, 5.0).window(4).detach(), found, rtol=1e-9, atol=1e-9)
    # Later windows go on with the same scale.
    parts = unroll_of(-10.0)
    torch.testing.assert_close(torch.cat((parts.window(2).detach(), parts.window(2).detach())), found)


def test_a_positive_loss_is_measured_as_ever_and_nothing_is_evaluated_for_a_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = unroll_of(0.0)
    monkeypatch.setattr(run.stack, "point_at", lambda *_: pytest.fail("a scale was evaluated"))
    start = run.stack(run.stack.full).detach()
    found = run.window(3).detach()
    torch.testing.assert_close(found[-1], (run.stack(run.stack.full).detach() / start).log())


@pytest.mark.parametrize("name", ["digits", "leaky_mlp_mixture"])
def test_meta_training_on_losses_below_zero_gives_finite_meta_gradients(name: str) -> None:
    run = unroll_of(-10.0)
    run.meta = mt.checkpoint.load_checkpoint(name).learned
    losses = run.window(3)
    losses.mean().backward()
    gradients = [value.grad for value in run.meta.parameters() if value.grad is not None]
    assert all(bool(value.isfinite().all()) for value in gradients)
    assert any(bool((value != 0).any()) for value in gradients)


def test_a_run_that_goes_on_hides_the_same_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(meta_steps=8, mode="lr", blind=0.5)
    family = family_of(settings)
    whole, _ = trained(settings, monkeypatch)

    torch.manual_seed(0)
    stopped = MetaTrainer(settings, family, MetaOptimizer(networks(settings)))

    def stop(done: Any) -> None:
        if done.meta_step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    resumed = MetaTrainer(settings, family, MetaOptimizer(networks(settings)))
    resumed.restore(stopped.boundary)
    resumed.run()
    assert resumed.progression.meta_losses == whole.progression.meta_losses


def test_the_scale_is_the_decrease_of_weights_that_change_by_their_own_size() -> None:
    run = unroll_of(-10.0)
    point = run.stack.point_at(run.stack.tensors(), run.stack.full)
    sizes = sum(value.flatten(1).square().sum(1) for value in point.parameters.values()).sqrt()
    run.window(1)
    found = run._scale(torch.full((1, 2), -1.0))
    torch.testing.assert_close(found, point.squared_gradient_norm().sqrt() * sizes)
