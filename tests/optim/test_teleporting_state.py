"""The inner optimizer's state after a teleport: what is carried, kept and reset, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from symmetry_cases import Problem, assert_close, case, relative
from teleporting_cases import Pushing, closure_of, everything, fresh_gradients, train, wrap
from torch import Tensor

import metateleport as mt
from metateleport.optim import TeleportingOptimizer


def seen_by_the_step(problem: Problem, optimizer: TeleportingOptimizer, teleporter: mt.Teleporter) -> dict[str, Tensor]:
    """Weights, gradients and state that the inner optimizer meets after a teleport."""
    seen: list[dict[str, Tensor]] = []
    handle = optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(everything(problem, optimizer)))
    packed = optimizer.state_dict()
    packed["teleporting"].update(steps=0, teleporter=teleporter.name)
    optimizer.teleporter = teleporter
    optimizer.load_state_dict(packed)
    optimizer.step(closure_of(problem, optimizer))
    handle.remove()
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    return seen[0]


def test_momentum_goes_as_the_gradient_does() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, "momentum", mt.NoTeleport(), every=100)
    train(problem, optimizer, 5)
    before = everything(problem, optimizer)
    generator = 0.3 * torch.randn(4, 4, dtype=torch.float64)
    after = seen_by_the_step(problem, optimizer, Pushing(generator))
    g = torch.linalg.matrix_exp(generator)
    expected = {
        "0.weight": torch.linalg.inv(g).mT @ before["0.weight.momentum_buffer"],
        "0.bias": torch.linalg.inv(g).mT @ before["0.bias.momentum_buffer"],
        "1.weight": before["1.weight.momentum_buffer"] @ g.mT,
        "1.bias": before["1.bias.momentum_buffer"],
    }
    assert relative(after["0.weight"], g @ before["0.weight"]) < 1e-12
    assert_close({name: after[f"{name}.momentum_buffer"] for name in expected}, expected, 1e-12)
    assert optimizer.last_report is not None
    assert optimizer.last_report.state == "transport"


def test_momentum_after_a_chain_of_moves_is_the_gradient_there_if_it_was_before() -> None:
    problem = case("chain of linear pairs").problem()
    optimizer = wrap(problem, torch.optim.SGD(problem.model.parameters(), lr=0.0, momentum=0.5))
    optimizer.teleporter = mt.NoTeleport()
    train(problem, optimizer, 1)
    after = seen_by_the_step(problem, optimizer, mt.RandomTeleporter(size=0.5, seed=1))
    for name, value in fresh_gradients(problem).items():
        assert relative(after[f"{name}.momentum_buffer"], value) < 1e-9


def test_under_a_rescaling_the_state_of_adam_is_that_of_scaled_gradients() -> None:
    problem = case("rescaling").problem()
    optimizer = wrap(problem, "adam", mt.NoTeleport(), every=100)
    train(problem, optimizer, 5)
    before = everything(problem, optimizer)
    generator = torch.tensor([0.5, -0.5, 0.2, 0.0], dtype=torch.float64)
    after = seen_by_the_step(problem, optimizer, Pushing(generator))
    d = generator.exp()
    for name, factor in {"0.weight": 1 / d[:, None], "0.bias": 1 / d, "2.weight": d, "2.bias": torch.ones(1)}.items():
        for key, power in {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "step": 0}.items():
            expected = before[f"{name}.{key}"] * (factor**power if power else 1)
            assert relative(after[f"{name}.{key}"], expected) < 1e-12
    assert optimizer.last_report is not None
    assert optimizer.last_report.state == "transport"


def test_squares_of_a_centred_optimizer_stay_above_the_square_of_the_mean() -> None:
    problem = case("linear pair").problem()
    inner = torch.optim.RMSprop(problem.model.parameters(), lr=1e-4, alpha=0.5, centered=True)
    optimizer = wrap(problem, inner, mt.NoTeleport(), every=100)
    train(problem, optimizer, 20)
    after = seen_by_the_step(problem, optimizer, mt.RandomTeleporter(size=2.0, seed=1))
    for name, _ in problem.model.named_parameters():
        assert bool((after[f"{name}.square_avg"] >= after[f"{name}.grad_avg"].square()).all())


@pytest.mark.parametrize(
    ("name", "inner", "asked", "told"),
    [
        ("linear pair", "sgd", "transport", "transport"),
        ("linear pair", "momentum", "transport", "transport"),
        ("linear pair", "adam", "transport", "approximate"),
        ("rescaling", "adam", "transport", "transport"),
        ("rescaling", "rmsprop", "transport", "transport"),
        ("linear pair", "rmsprop", "transport", "approximate"),
        ("2022 form", "momentum", "transport", "approximate"),
        ("linear pair", "lbfgs", "transport", "reset"),
        ("linear pair", "adam", "keep", "keep"),
        ("linear pair", "adam", "reset", "reset"),
    ],
)
def test_the_report_says_what_became_of_the_state(name: str, inner: str, asked: str, told: str) -> None:
    problem = case(name).problem()
    optimizer = wrap(problem, inner, every=3, state=asked)
    train(problem, optimizer, 4)
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    assert optimizer.last_report.state == told


def test_reset_drops_the_state_of_what_moved_and_keep_leaves_it() -> None:
    for how in ("reset", "keep"):
        problem = case("linear pair").problem()
        optimizer = wrap(problem, "adam", mt.NoTeleport(), every=100, state=how)
        train(problem, optimizer, 3)
        before = everything(problem, optimizer)
        after = seen_by_the_step(problem, optimizer, mt.RandomTeleporter(seed=0))
        for key in [key for key in before if "exp_avg" in key or "step" in key]:
            if how == "keep" or key.startswith("1.bias"):
                assert torch.equal(after[key], before[key])
            else:
                assert key not in after


def test_lbfgs_starts_anew_after_a_teleport_and_only_then() -> None:
    problem = case("linear pair").problem()
    optimizer, left = wrap(problem, "lbfgs", every=2), []
    optimizer.optimizer.register_step_pre_hook(lambda inner, *_: left.append(len(inner.state)))
    train(problem, optimizer, 4)
    assert left == [0, 1, 0, 1]


def test_state_of_unknown_meaning_stays_and_is_named_once() -> None:
    problem = case("rescaling").problem()
    optimizer = wrap(problem, torch.optim.Adadelta(problem.model.parameters()), every=2)
    with pytest.warns(UserWarning, match="'acc_delta' in the state of Adadelta") as caught:
        train(problem, optimizer, 7)
    assert len(caught) == 1
    assert optimizer.last_report is not None
    assert optimizer.last_report.state == "approximate"


def test_weight_decay_that_a_teleport_changes_is_reported() -> None:
    problem = case("rescaling").problem()
    optimizer = wrap(problem, torch.optim.SGD(problem.model.parameters(), lr=0.0, weight_decay=0.1))
    moved = [value for name, value in problem.model.named_parameters() if name != "2.bias"]
    before = sum(float(value.detach().square().sum()) for value in moved) / 2
    optimizer.step(closure_of(problem, optimizer))
    after = sum(float(value.detach().square().sum()) for value in moved) / 2
    assert optimizer.last_report is not None
    assert optimizer.last_report.weight_decay_change == pytest.approx(after - before)
    assert abs(after - before) > 1e-3
