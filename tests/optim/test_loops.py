"""Teleports in loops as people write them: saving, closures, frozen tensors, NaN, wrapped, compiled, replicated."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import run_both, teleporting
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import metateleport as mt
from metateleport.optim import TeleportingOptimizer
from metateleport.optim.closure import known_at_first


def mlp(layers: int = 2, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [each for _ in range(layers - 1) for each in (nn.Linear(6, 6), nn.LeakyReLU(0.1))]
    return nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.1), *hidden, nn.Linear(6, 3)).to(dtype)


def batch(samples: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def made(model: nn.Module, inner: Any = None, teleporter: Any = None, **keywords: Any) -> TeleportingOptimizer:
    keywords.setdefault("every", 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.0) if inner is None else inner
    return TeleportingOptimizer(inner, model, teleporter or mt.RandomTeleporter(size=0.5, seed=0), **keywords)


def train(model: nn.Module, optimizer: Any, steps: int = 1, x: Tensor | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch() if x is None else x).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


# --- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [None, batch()], ids=["no example", "example"])
def test_saving_before_the_first_step_neither_moves_nor_counts(example: Tensor | None) -> None:
    model = mlp()
    optimizer = made(model, torch.optim.Adam(model.parameters()), every=5, example_input=example)
    start = weights(model)
    model(batch(3))  # a validation pass that forgot torch.no_grad()
    get_optimizer_state_dict(model, optimizer)
    assert torch.equal(weights(model), start)
    assert not optimizer.reports
    train(model, optimizer, 7)
    assert len(optimizer.reports) == 2
    before = weights(model)
    saved = get_optimizer_state_dict(model, optimizer)
    assert torch.equal(weights(model), before)
    other = mlp()
    fresh = made(other, torch.optim.Adam(other.parameters()), every=5, example_input=example)
    set_optimizer_state_dict(other, fresh, saved)
    assert torch.equal(fresh.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_model_and_optimizer_copied_or_pickled_go_on_by_themselves() -> None:
    model = mlp()
    optimizer = made(model, torch.optim.Adam(model.parameters(), lr=1e-2), every=2)
    train(model, optimizer, 3)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    stretched = optimizer._orbit.stretch(optimizer.symmetries)
    assert stretched > 1
    train(model, optimizer, 4)
    for other, twin in twins:
        assert twin._orbit.stretch(twin.symmetries) == pytest.approx(stretched)
        train(other, twin, 4)
        assert torch.equal(weights(other), weights(model))


# --- closures ----------------------------------------------------------------------------------------------------


class Twice(torch.optim.SGD):
    """Sharpness-aware: climbs through `.data`, evaluates again there and steps back."""

    def step(self, closure: Any = None) -> Any:
        held = [value for group in self.param_groups for value in group["params"]]
        loss = closure()
        steps = [0.05 * value.grad for value in held]
        for value, step in zip(held, steps, strict=True):
            value.data += step
        closure()
        for value, step in zip(held, steps, strict=True):
            value.data -= step
        super().step()
        return loss


def test_an_optimizer_that_writes_through_data_gets_what_it_would_get_bare() -> None:
    model, bare = mlp(), mlp()
    optimizer = made(model, Twice(model.parameters(), lr=0.1), mt.NoTeleport())
    reference = Twice(bare.parameters(), lr=0.1)
    calls: list[int] = []

    def closure_of(model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss = model(batch()).square().mean()
            loss.backward()
            return loss

        return closure

    for _ in range(4):
        optimizer.step(closure_of(model, optimizer))
        reference.step(closure_of(bare, reference))
    assert torch.equal(weights(model), weights(bare))
    assert len(calls) == 16


def test_what_is_known_is_forgotten_once_anything_has_changed() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    closure = known_at_first(lambda: "evaluated", "known", [{"params": [parameter]}])
    assert closure() == "known"
    parameter.grad.data.mul_(2)
    assert closure() == "evaluated"
    parameter.grad.data.div_(2)
    assert closure() == "evaluated"


def test_the_loss_may_be_told_as_a_value() -> None:
    model = mlp()
    optimizer = made(model, teleporter=mt.load("digits"))
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(batch()).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        assert optimizer.last_report is not None
        assert optimizer.last_report.loss_before == pytest.approx(float(loss.detach()))
    optimizer.zero_grad()
    model(batch()).square().mean().backward()
    start = weights(model)
    optimizer.step(loss=float("nan"))
    assert "the loss is not finite" in optimizer.last_report.reason
    assert torch.equal(weights(model), start)


def test_an_average_across_teleports_is_warned_of() -> None:
    model = mlp()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = made(model)
    with pytest.warns(UserWarning, match="AveragedModel averages"):
        train(model, optimizer, 2)
    del averaged
    other = mlp(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, made(other), 2)


# --- what cannot be moved now --------------------------------------------------------------------------------------


def test_one_frozen_tensor_leaves_the_other_symmetries_alone() -> None:
    model = mlp(3)
    optimizer = made(model)
    model[0].bias.requires_grad_(False)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    with pytest.warns(UserWarning, match="'0.bias' is frozen") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    report = optimizer.last_report
    assert report is not None
    assert report.accepted
    assert report.size > 0
    assert "'0.bias' is frozen" in report.reason
    assert report.sizes[0] == 0
    assert report.sizes[1] > 0
    assert torch.equal(model[0].weight, start["0.weight"])
    assert not torch.equal(model[4].weight, start["4.weight"])
    model[0].bias.requires_grad_(True)
    train(model, optimizer)
    assert optimizer.last_report is not None
    assert min(optimizer.last_report.sizes) > 0
    assert not optimizer.last_report.reason


@pytest.mark.parametrize("teleporter", ["leaky_mlp_mixture", "digits"])
def test_a_learned_teleporter_meets_a_symmetry_later(teleporter: str) -> None:
    model = mlp(3)
    optimizer = made(model, teleporter=mt.load(teleporter))
    model[0].bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, 2)
        model[0].bias.requires_grad_(True)
        train(model, optimizer, 2)
        saved = optimizer.state_dict()
        other = made(mlp(3), teleporter=mt.load(teleporter))
        other.load_state_dict(saved)
        other.model[2].bias.requires_grad_(False)  # type: ignore[index]
        train(other.model, other, 2)
    assert not any("finite" in report.reason for report in optimizer.reports)


class Branch(nn.Module):
    """Two branches, of which one is not always used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.both = True

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x) if self.both else self.one(x)


def test_an_unused_module_leaves_out_its_own_symmetry_only() -> None:
    model = Branch().double()
    optimizer = made(model, symmetries=[mt.Rescaling(model, f"{each}.0", f"{each}.2") for each in ("one", "other")])
    model.both = False
    with pytest.warns(UserWarning, match="did not run"):
        train(model, optimizer)
    assert optimizer.last_report is not None
    assert optimizer.last_report.sizes[0] > 0
    assert optimizer.last_report.sizes[1] == 0
    model.both = True
    train(model, optimizer)
    assert min(optimizer.last_report.sizes) > 0


@pytest.mark.parametrize("what", ["loss", "gradient", "empty"])
@pytest.mark.parametrize("name", ["random", "leaky_mlp_mixture", "ascent"])
def test_what_is_not_finite_is_refused_and_training_goes_on(what: str, name: str) -> None:
    model = mlp()
    teleporters = {
        "random": lambda: mt.RandomTeleporter(size=0.5, seed=0),
        "leaky_mlp_mixture": lambda: mt.load("leaky_mlp_mixture"),
        "ascent": lambda: mt.GradientAscentTeleporter(steps=2),
    }
    optimizer = made(model, teleporter=teleporters[name]())
    start = weights(model)
    x = batch(0) if what == "empty" else batch()
    loss = model(x).square().mean() if what != "loss" else model(x * float("nan")).square().mean()
    loss.backward()
    if what == "gradient":
        model[0].weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
    optimizer.optimizer.step = lambda *_: None  # type: ignore[method-assign]
    optimizer.step()
    report = optimizer.last_report
    assert report is not None
    assert not report.accepted
    assert "not finite" in report.reason or "empty" in report.reason
    assert torch.equal(weights(model), start)
    optimizer.step(_closure(model, optimizer, batch()))
    optimizer.step(_closure(model, optimizer, batch(3)))
    assert optimizer.last_report.accepted


def _closure(model: nn.Module, optimizer: Any, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return closure


def test_a_validation_pass_between_backward_and_step() -> None:
    model = mlp()
    optimizer = made(model)
    model(batch()).square().mean().backward()
    model.eval()
    model(batch(3))
    model.train()
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    fresh = torch.autograd.grad(model(batch()).square().mean(), list(model.parameters()))
    for gradient, value in zip(fresh, model.parameters(), strict=True):
        assert value.grad is not None
        assert torch.allclose(gradient, value.grad, rtol=1e-9, atol=1e-12)


# --- errors that lead on -------------------------------------------------------------------------------------------


def test_a_model_whose_symmetries_cannot_be_read_asks_for_an_example() -> None:
    with pytest.raises(ValueError, match=r"example_input=.*symmetries="):
        made(Branch())
    with pytest.raises(ValueError, match=r"example_input=.*symmetries="):
        made(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    model = Branch().double()
    optimizer = made(model, example_input=batch())
    assert len(optimizer.symmetries) >= 2
    inner = torch.optim.SGD([model.one[0].weight])
    with pytest.raises(ValueError, match="none were found that move only what the optimizer trains"):
        made(model, inner, example_input=batch())


@pytest.mark.parametrize("name", ["leaky_mlp", "matrix_factorisation"])
def test_a_checkpoint_without_a_network_for_the_model_says_so_when_made(name: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"networks for the group 'GL' only, .* the group 'diagonal'"):
        made(model, teleporter=mt.load(name))
    assert not any(module._forward_hooks for module in model.modules())
    linear = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    optimizer = made(linear, teleporter=mt.load(name))
    train(linear, optimizer)


def test_a_teleport_of_no_size_has_a_reason() -> None:
    model = mlp()
    optimizer = made(model, teleporter=mt.NoTeleport())
    train(model, optimizer)
    assert optimizer.last_report is not None
    assert optimizer.last_report.accepted
    assert optimizer.last_report.reason == "the teleporter chose to stay where it is"


def test_what_was_found_is_not_certified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr("metateleport.optim.teleporting.try_symmetries", lambda *_: tried.append(1))
    model = mlp()
    found = made(model, example_input=batch()).symmetries
    assert not tried
    made(model, symmetries=found, example_input=batch())
    assert tried


def test_the_example_is_left_as_it_is() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.mul_(2))

    model, x = Writing(), batch()
    optimizer = made(model, example_input=x, symmetries=[mt.Rescaling(model, "net.0", "net.2")])
    model(batch()).square().mean().backward()
    optimizer._recorder.clear()  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    assert torch.equal(x, batch())


def test_sharded_parameters_are_refused_in_words() -> None:
    class DTensor(nn.Parameter):
        """Stands in for torch's, which needs a process group."""

    model = mlp()
    model[0].weight = DTensor(model[0].weight.detach())
    object.__setattr__(model[0].weight, "device_mesh", "a mesh")
    with pytest.raises(ValueError, match="sharded over processes"):
        made(model)


# --- wrapped, compiled, replicated -----------------------------------------------------------------------------------


def test_a_model_in_data_parallel_teleports() -> None:
    model, bare = nn.DataParallel(mlp()), mlp()
    optimizer = made(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    train(model, optimizer, 4)
    train(bare, made(bare, torch.optim.Adam(bare.parameters(), lr=1e-2)), 4)
    assert torch.equal(weights(model), weights(bare))
    assert all(report.size > 0 for report in optimizer.reports)
    model, x = nn.DataParallel(mlp()), batch()
    assert len(made(model, example_input=x).symmetries) == 2


@pytest.mark.parametrize("first", ["optimizer", "compiled call"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_teleports(first: str, backend: str) -> None:
    torch._dynamo.reset()
    inner, bare = mlp(), mlp()
    model: Any = torch.compile(inner, backend=backend)
    if first == "compiled call":
        model(batch())
    optimizer = made(model, torch.optim.SGD(model.parameters(), lr=1e-2), every=2)
    train(model, optimizer, 4)
    train(bare, made(bare, torch.optim.SGD(bare.parameters(), lr=1e-2), every=2), 4)
    assert torch.allclose(weights(inner), weights(bare), rtol=1e-10)
    assert all(report.size > 0 for report in optimizer.reports)
    assert optimizer.last_report is not None
    assert optimizer.last_report.evaluations == pytest.approx(2 / 3)


def test_a_model_compiled_in_place_says_why_there_is_no_pass() -> None:
    torch._dynamo.reset()
    model = mlp()
    model.compile(backend="eager")
    optimizer = made(model)
    with pytest.warns(UserWarning, match=r"the model is compiled.*example_input="):
        train(model, optimizer)
    optimizer = made(model, symmetries=mt.symmetries_of(model), example_input=batch())
    train(model, optimizer, 2)
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0


def test_half_precision_moves_in_single_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = mlp(dtype=dtype)
        before = model(batch(dtype=dtype)).float()
        optimizer = made(model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9))
        train(model, optimizer, 1, batch(dtype=dtype))
        assert optimizer.last_report is not None
        assert optimizer.last_report.size > 0, optimizer.last_report.reason
        assert float((model(batch(dtype=dtype)).float() - before).norm() / before.norm()) < 2e-2


@pytest.mark.parametrize("how", ["ddp", "inside", "seedless", "nan", "free"])
def test_replicas_stay_equal(how: str, tmp_path: Path) -> None:
    one, other = run_both(teleporting, tmp_path, how)
    assert torch.equal(one, other)


def test_a_teleport_under_autocast_is_as_exact_as_outside() -> None:
    model, x = mlp(dtype=torch.float32), batch(dtype=torch.float32)
    optimizer = made(model, teleporter=mt.load("leaky_mlp_mixture"), example_input=x)
    before = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()
    assert optimizer.reports[0].size > 0
    assert float((model(x) - before).detach().norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("checkpoint", ["default", "digits", "leaky_mlp_mixture"])
@pytest.mark.filterwarnings("ignore:this meta-optimizer is not made for this", "ignore:'leaky_mlp_mixture' is not made")
def test_a_learned_step_under_autocast_is_that_outside(checkpoint: str) -> None:
    after = []
    for inside in (True, False):
        model, x = mlp(dtype=torch.float32), batch(dtype=torch.float32)
        optimizer = mt.LearnedOptimizer(model, checkpoint)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).float().square().mean()
                loss.backward()
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
        after.append([value.detach().clone() for value in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*after, strict=True))
