"""Teleports inside a training loop: gradients, state, closures, scalers, refusals, resuming, memory."""

from __future__ import annotations

import copy
import gc
import io
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from symmetry_cases import Problem, assert_close, case, relative
from torch import Tensor, nn

import metateleport as mt
from metateleport.learned import LearnedTeleporter
from metateleport.optim import TeleportingOptimizer
from metateleport.point import Point
from metateleport.symmetries import Unsuitable
from metateleport.teleporters import TrustRegion

INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=3e-4, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=5),
}
PROBLEMS = ("linear pair", "rescaling", "2022 form")
TELEPORTERS: dict[str, Callable[[], mt.Teleporter]] = {
    "random": lambda: mt.RandomTeleporter(size=0.3, seed=0),
    "gradient-ascent": lambda: mt.GradientAscentTeleporter(steps=3, step_size=0.02, cap=0.3),
}

each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_inner = pytest.mark.parametrize("inner", INNER)


class Pushing(mt.Teleporter):
    """The generator that it is given, on every symmetry."""

    name = "pushing"

    def __init__(self, generator: Tensor, **region: Any) -> None:
        super().__init__(TrustRegion(**region))
        self.given = generator

    def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        return self.given, state


class Counting(mt.Teleporter):
    """Remembers how often it was asked, and moves by it."""

    name = "counting"

    def initial_state(self, point: Point, symmetries: Any) -> Any:
        return {"count": torch.zeros(1, dtype=torch.float64), "pair": (torch.zeros(1), 0)}

    def generator(self, symmetry: mt.Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        count = state["count"] + 1
        generator = symmetry.group.random_generator(size=0.1 * float(count), seed=1, dtype=torch.float64)
        assert isinstance(state["pair"], tuple)
        return generator, {**state, "count": count}


def wrap(problem: Problem, inner: Any = "sgd", teleporter: Any = None, **keywords: Any) -> TeleportingOptimizer:
    optimizer = INNER[inner](problem.model.parameters()) if isinstance(inner, str) else inner
    teleporter = mt.RandomTeleporter(size=0.5, seed=0) if teleporter is None else teleporter
    keywords.setdefault("symmetries", problem.symmetries)
    return TeleportingOptimizer(optimizer, problem.model, teleporter, **keywords)


def closure_of(problem: Problem, optimizer: Any, calls: list[float] | None = None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_of(problem.model(*problem.inputs))
        loss.backward()
        if calls is not None:
            calls.append(float(loss.detach()))
        return loss

    return closure


def backward(problem: Problem, optimizer: Any, factor: float = 1.0, inputs: tuple[Tensor, ...] | None = None) -> None:
    optimizer.zero_grad()
    (factor * problem.loss_of(problem.model(*(inputs or problem.inputs)))).backward()


def train(problem: Problem, optimizer: Any, steps: int, closure: bool = True) -> list[Tensor]:
    """The parameters after each step."""
    trajectory = []
    for _ in range(steps):
        if closure:
            optimizer.step(closure_of(problem, optimizer))
        else:
            backward(problem, optimizer)
            optimizer.step()
        trajectory.append(torch.cat([p.detach().flatten() for p in problem.model.parameters()]))
    return trajectory


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.detach().clone() for name, value in model.named_parameters() if value.grad is not None}


def fresh_gradients(problem: Problem) -> dict[str, Tensor]:
    loss = problem.loss_of(problem.model(*problem.inputs))
    named = dict(problem.model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def loss_at(problem: Problem) -> float:
    return float(problem.loss_of(problem.outputs()))


def everything(problem: Problem, optimizer: Any) -> dict[str, Tensor]:
    """Weights, gradients, buffers and all tensors of the state, copied."""
    kept = {name: value.detach().clone() for name, value in problem.model.state_dict().items()}
    kept |= {f"{name}.grad": value for name, value in gradients(problem.model).items()}
    for name, parameter in problem.model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                kept[f"{name}.{key}"] = value.clone()
    return kept


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def frozen_steps(problem: Problem, momentum: float = 0.0) -> torch.optim.Optimizer:
    """An optimizer whose steps move nothing, so that only the teleport is seen."""
    return torch.optim.SGD(problem.model.parameters(), lr=0.0, momentum=momentum)


# --- any optimizer on any symmetry -------------------------------------------------------------------------------


@each_problem
@each_inner
def test_without_teleports_it_is_the_inner_optimizer_bit_for_bit(name: str, inner: str) -> None:
    problem, bare = case(name).problem(), case(name).problem()
    optimizer = wrap(problem, inner, mt.NoTeleport(), every=7)
    reference = INNER[inner](bare.model.parameters())
    for mine, theirs in zip(train(problem, optimizer, 60), train(bare, reference, 60), strict=True):
        assert torch.equal(mine, theirs)
    assert len(optimizer.reports) == 9
    assert {(r.accepted, r.size, r.drift, r.evaluations) for r in optimizer.reports} == {(True, 0.0, 0.0, 0.0)}


@each_problem
@each_inner
@pytest.mark.parametrize("teleporter", TELEPORTERS)
@pytest.mark.filterwarnings("ignore:the state")
def test_teleports_keep_the_loss_and_training_stays_finite(name: str, inner: str, teleporter: str) -> None:
    problem = case(name).problem()
    optimizer = wrap(problem, inner, TELEPORTERS[teleporter](), every=20)
    start = loss_at(problem)
    for values in train(problem, optimizer, 200):
        assert bool(values.isfinite().all())
    moved = [report for report in optimizer.reports if report.size > 0]
    assert len(optimizer.reports) == 10
    assert len(moved) >= 9
    assert max(report.drift for report in moved) < 1e-9
    for report in moved:
        assert report.loss_after == pytest.approx(report.loss_before, rel=1e-9)
    assert loss_at(problem) < start


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PROBLEMS, "2024 form", "chain of 2022 forms", "mixed chain", "quadratic"])
@pytest.mark.parametrize("with_closure", [True, False])
def test_carried_gradients_are_those_at_the_moved_weights(name: str, with_closure: bool) -> None:
    problem = case(name).problem()
    optimizer = wrap(problem, frozen_steps(problem), mt.RandomTeleporter(size=0.5, seed=3), max_stretch=100.0)
    before, loss = copy.deepcopy(problem.model.state_dict()), loss_at(problem)
    if with_closure:
        optimizer.step(closure_of(problem, optimizer))
    else:
        backward(problem, optimizer)
        optimizer.step()
    report = optimizer.last_report
    assert report is not None
    assert report.accepted, report.reason
    assert any(not torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())
    assert loss_at(problem) == pytest.approx(loss, rel=1e-9)
    assert_close(gradients(problem.model), fresh_gradients(problem), 1e-9)
    fresh = math.sqrt(sum(float(value.square().sum()) for value in fresh_gradients(problem).values()))
    assert report.gradient_norm_after == pytest.approx(fresh)
    assert math.isnan(report.loss_before) is not with_closure
    if with_closure:
        assert report.loss_before == pytest.approx(loss)


@each_problem
@pytest.mark.parametrize("teleporter", TELEPORTERS)
def test_with_and_without_a_closure_the_steps_are_the_same(name: str, teleporter: str) -> None:
    one, other = case(name).problem(), case(name).problem()
    mine = train(one, wrap(one, "momentum", TELEPORTERS[teleporter](), every=3), 8)
    theirs = train(other, wrap(other, "momentum", TELEPORTERS[teleporter](), every=3), 8, closure=False)
    assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_a_learned_teleporter_moves_and_remembers() -> None:
    problem = case("linear pair").problem()
    teleporter = LearnedTeleporter(hidden=4)
    optimizer = wrap(problem, "momentum", teleporter, every=2, max_stretch=None)
    train(problem, optimizer, 3)
    packed = copy.deepcopy((problem.model.state_dict(), optimizer.state_dict()))
    expected = train(problem, optimizer, 4)
    assert all(report.size > 0 for report in optimizer.reports)
    problem.model.load_state_dict(packed[0])
    resumed = wrap(problem, "momentum", teleporter, every=2, max_stretch=None)
    resumed.load_state_dict(packed[1])
    assert all(torch.equal(*pair) for pair in zip(train(problem, resumed, 4), expected, strict=True))
    # Forgetting shows.
    problem.model.load_state_dict(packed[0])
    packed[1]["teleporting"]["state"] = None
    resumed.load_state_dict(packed[1])
    assert not torch.equal(train(problem, resumed, 4)[-1], expected[-1])


def test_evaluations_count_the_drift_and_what_is_rebuilt() -> None:
    linear = case("linear pair").problem()
    optimizer = wrap(linear)
    optimizer.step(closure_of(linear, optimizer))
    assert optimizer.last_report is not None
    assert optimizer.last_report.evaluations == pytest.approx(1 / 3)
    chain = case("chain of 2022 forms").problem()
    optimizer = wrap(chain)
    forwards: list[int] = []
    chain.model[0].register_forward_hook(lambda *_: forwards.append(1))  # type: ignore[index]
    optimizer.step(closure_of(chain, optimizer))
    point = chain.point()
    rebuilt = sum(symmetry.rebuild_cost(point) for symmetry in chain.symmetries)
    # One pass for the drift, one for the graph that the caller's backward pass has freed; and the closure's own.
    assert optimizer.last_report is not None
    assert optimizer.last_report.evaluations == pytest.approx(rebuilt + 2 / 3)
    assert len(forwards) == 3 + 1


def test_a_gradient_summed_over_batches_is_carried_by_exact_symmetries() -> None:
    for name in ("linear pair", "rescaling"):
        problem = case(name).problem()
        optimizer = wrap(problem, frozen_steps(problem))
        other = case(name).fresh_inputs()

        def total(problem: Problem = problem, other: tuple[Tensor, ...] = other) -> None:
            problem.model.zero_grad()
            for inputs in (other, problem.inputs):
                problem.loss_of(problem.model(*inputs)).backward()

        total()
        optimizer.step()
        carried = gradients(problem.model)
        assert optimizer.last_report is not None
        assert optimizer.last_report.size > 0
        total()
        assert_close(carried, gradients(problem.model), 1e-10)


def test_a_gradient_summed_over_batches_is_refused_by_batch_pairs() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem, frozen_steps(problem))
    for inputs in (case("2022 form").fresh_inputs(), problem.inputs):
        problem.loss_of(problem.model(*inputs)).backward()
    before = everything(problem, optimizer)
    optimizer.step()
    assert same(before, everything(problem, optimizer))
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert "no multiple of the last pass's" in optimizer.last_report.reason


@each_problem
def test_a_clipped_gradient_is_carried_clipped(name: str) -> None:
    problem = case(name).problem()
    optimizer = wrap(problem, frozen_steps(problem))
    backward(problem, optimizer)
    norm = float(nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1))
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    fresh = {key: 0.1 / norm * value for key, value in fresh_gradients(problem).items()}
    assert_close(gradients(problem.model), fresh, 1e-5)


@each_problem
def test_a_scaler_of_gradients_works(name: str) -> None:
    problem, plain = case(name).problem(), case(name).problem()
    optimizer, reference = wrap(problem, "momentum"), wrap(plain, "momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(12):
        optimizer.zero_grad()
        scaler.scale(problem.loss_of(problem.model(*problem.inputs))).backward()
        scaler.step(optimizer)
        scaler.update()
    train(plain, reference, 12, closure=False)
    assert_close(dict(problem.model.named_parameters()), dict(plain.model.named_parameters()), 1e-8)
    assert [r.size for r in optimizer.reports] == pytest.approx([0.5, 0.5])
    assert loss_at(problem) < loss_at(case(name).problem())


def test_a_step_that_the_scaler_skips_is_no_step() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(problem.model.state_dict())
    scaler.scale(problem.loss_of(problem.model(*problem.inputs))).backward()
    next(problem.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steps == 0
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())


def test_autocast_teleports_within_its_rounding() -> None:
    problem = case("rescaling").problem()
    model, inputs, targets = problem.model.float(), problem.inputs[0].float(), problem.targets[0].float()
    optimizer = wrap(problem, frozen_steps(problem), mt.RandomTeleporter(size=0.3, seed=0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(inputs)
    assert out.dtype == torch.bfloat16
    (out.float() - targets).square().sum().backward()
    optimizer.step()
    report = optimizer.last_report
    assert report is not None
    assert report.accepted, report.reason
    assert 0 < report.drift < 1e-2


# --- state -------------------------------------------------------------------------------------------------------


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
    with pytest.warns(UserWarning, match="'acc_delta' of Adadelta") as caught:
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


# --- closures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_a_closure_is_evaluated_once_a_step_and_its_loss_returned(inner: str) -> None:
    problem = case("linear pair").problem()
    optimizer, calls = wrap(problem, inner, every=2), []
    for step in range(4):
        loss = optimizer.step(closure_of(problem, optimizer, calls))
        assert len(calls) == step + 1
        assert float(loss.detach()) == calls[-1]


def test_lbfgs_starts_from_the_known_evaluation() -> None:
    problem, bare = case("linear pair").problem(), case("linear pair").problem()
    calls: list[float] = []
    theirs: list[float] = []
    optimizer = wrap(problem, "lbfgs", every=1)
    optimizer.step(closure_of(problem, optimizer, calls))
    reference = INNER["lbfgs"](bare.model.parameters())
    reference.step(closure_of(bare, reference, theirs))
    assert len(calls) == len(theirs)


def test_a_closure_is_asked_again_once_the_weights_have_changed() -> None:
    """As optimizers do that perturb the weights before they look at the loss."""

    class Perturbing(torch.optim.SGD):
        seen: list[float] = []

        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for group in self.param_groups:
                    for value in group["params"]:
                        value.add_(0.1)
            with torch.enable_grad():
                self.seen.append(float(closure().detach()))
            return self.seen[-1]

    problem = case("linear pair").problem()
    optimizer = wrap(problem, Perturbing(problem.model.parameters(), lr=0.0))
    optimizer.step(closure_of(problem, optimizer))
    assert Perturbing.seen == [pytest.approx(loss_at(problem))]


def test_the_loss_after_is_told_to_first_order() -> None:
    """A symmetry that does not quite hold: the predicted change is the real one, up to the square of the drift."""

    class Loose(mt.Rescaling):
        def act(self, element: Tensor, point: Point) -> Point:
            moved = super().act(element, point)
            return moved.update({self.first_weight: moved.parameters[self.first_weight] * (1 + 1e-5)})

    problem = case("rescaling").problem()
    optimizer = wrap(problem, frozen_steps(problem), symmetries=[Loose(problem.model, "0", "2")])
    optimizer.step(closure_of(problem, optimizer))
    report = optimizer.last_report
    assert report is not None
    assert report.loss_after - report.loss_before == pytest.approx(loss_at(problem) - report.loss_before, rel=1e-3)
    assert report.loss_after != report.loss_before


# --- no forward pass, refusals -----------------------------------------------------------------------------------


def test_a_step_without_a_forward_pass_says_so() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem)
    before = everything(problem, optimizer)
    with pytest.warns(UserWarning, match=r"no forward pass of the model since the last step.*example_input="):
        optimizer.step()
    with torch.no_grad():
        problem.model(*problem.inputs)
    optimizer.step()
    assert same(before, everything(problem, optimizer))
    # The inner optimizer steps as ever, and the report says why there was no teleport.
    bare = case("linear pair").problem()
    inner = torch.optim.SGD(bare.model.parameters(), lr=0.1)
    optimizer = wrap(problem, torch.optim.SGD(problem.model.parameters(), lr=0.1), every=1)
    for each, stepping in ((problem, optimizer), (bare, inner)):
        each.loss_of(each.model(*each.inputs)).backward()
        each.model.eval()
        if stepping is optimizer:
            with pytest.warns(UserWarning, match="in training mode and the model now is in evaluation mode"):
                stepping.step()
        else:
            stepping.step()
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert "in evaluation mode" in optimizer.last_report.reason
    for value, expected in zip(problem.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(value, expected)
    ascending = wrap(problem, teleporter=mt.GradientAscentTeleporter())
    problem.model.train()(*problem.inputs)
    ascending.zero_grad()
    with pytest.warns(UserWarning, match=r"call backward\(\) before step"):
        ascending.step()


def test_a_pass_is_good_for_one_step_only() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, every=1)
    backward(problem, optimizer)
    optimizer.step()
    with pytest.warns(UserWarning, match="no forward pass"):
        optimizer.step()
    assert [each.accepted for each in optimizer.reports] == [True, False]


def test_an_example_stands_in_for_a_forward_pass() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, frozen_steps(problem), example_input=problem.inputs)
    named = dict(problem.model.named_parameters())
    for name, value in fresh_gradients(problem).items():
        named[name].grad = value
    optimizer._recorder.clear()  # type: ignore[union-attr]
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.size > 0
    assert optimizer.last_report.evaluations == pytest.approx(2 / 3)
    assert_close(gradients(problem.model), fresh_gradients(problem), 1e-10)


@each_problem
@pytest.mark.parametrize("region", [{"max_drift": 0.0}, {"max_size": 0.1}, {"max_condition": 1.0001}])
def test_what_is_refused_leaves_everything_bit_for_bit(name: str, region: dict[str, float]) -> None:
    problem = case(name).problem()
    inner = torch.optim.Adam(problem.model.parameters(), lr=0.0, betas=(0.9, 0.99))
    optimizer = wrap(problem, inner, mt.NoTeleport(), every=5)
    train(problem, optimizer, 5)
    optimizer.teleporter = mt.RandomTeleporter(size=0.5, seed=0, trust_region=TrustRegion(**region))
    seen: list[dict[str, Tensor]] = []
    inner.register_step_pre_hook(lambda *_: seen.append(everything(problem, inner)))
    backward(problem, optimizer)
    before = everything(problem, inner)
    optimizer.step()
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert optimizer.last_report.reason
    assert optimizer.last_report.size == optimizer.last_report.drift == 0.0
    assert same(before, seen[0])


def test_a_value_that_is_not_finite_never_reaches_the_weights() -> None:
    problem = case("rescaling").problem()
    generator = torch.tensor([800.0, 0, 0, 0], dtype=torch.float64)
    teleporter = Pushing(generator, max_size=1e4, max_condition=float("inf"), max_drift=float("inf"))
    optimizer = wrap(problem, frozen_steps(problem), teleporter)
    before = everything(problem, optimizer)
    optimizer.step(closure_of(problem, optimizer))
    optimizer.zero_grad()
    assert optimizer.last_report is not None
    assert not optimizer.last_report.accepted
    assert same(before, everything(problem, optimizer))


def test_what_is_frozen_later_is_not_moved() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, frozen_steps(problem))
    problem.model[0].weight.requires_grad_(False)  # type: ignore[index]
    before = {name: value.detach().clone() for name, value in problem.model.named_parameters()}
    optimizer.step(closure_of(problem, optimizer))
    assert optimizer.last_report is not None
    assert "is frozen" in optimizer.last_report.reason
    assert all(torch.equal(value, before[name]) for name, value in problem.model.named_parameters())


def test_dropout_and_batch_norm_are_repeated_and_not_disturbed() -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        ).double()

    inputs = torch.randn(8, 3, dtype=torch.float64)
    results = []
    for teleports in (True, False):
        model = build()
        inner = torch.optim.SGD(model.parameters(), lr=0.0)
        symmetries = [mt.Rescaling(model, "0", "3")]
        optimizer: Any = inner
        if teleports:
            optimizer = TeleportingOptimizer(inner, model, mt.RandomTeleporter(size=0.5, seed=0), symmetries, every=1)
        torch.manual_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        if teleports:
            assert max(report.drift for report in optimizer.reports) < 1e-12
            assert min(report.size for report in optimizer.reports) > 0
        results.append((torch.rand(3), dict(model.named_buffers())))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert relative(value.double(), results[1][1][name].double()) < 1e-12


# --- as an optimizer ---------------------------------------------------------------------------------------------


def test_it_shares_groups_state_and_defaults() -> None:
    problem = case("linear pair").problem()
    inner = torch.optim.SGD(problem.model[0].parameters(), lr=0.1, momentum=0.9)  # type: ignore[index]
    inner.add_param_group({"params": [problem.model[1].weight]})  # type: ignore[index]
    optimizer = wrap(problem, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    optimizer.add_param_group({"params": problem.model[1].bias, "lr": 0.5})  # type: ignore[index]
    assert inner.param_groups[2]["lr"] == 0.5
    train(problem, optimizer, 2)
    assert optimizer.state is inner.state
    assert len(inner.state) == 4
    optimizer.zero_grad()
    assert not gradients(problem.model)
    with pytest.raises(ValueError, match="not the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_step_hooks_run() -> None:
    problem = case("linear pair").problem()
    optimizer, seen = wrap(problem), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append("inner"))
    optimizer.step(closure_of(problem, optimizer))
    assert seen == ["before", "inner", "after"]


@pytest.mark.parametrize("schedule", ["step", "one-cycle"])
def test_schedulers_of_the_learning_rate_work(schedule: str) -> None:
    def make(optimizer: Any) -> Any:
        if schedule == "step":
            return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10)

    problem, bare = case("linear pair").problem(), case("linear pair").problem()
    optimizer = wrap(problem, "momentum", mt.NoTeleport(), every=2)
    reference = INNER["momentum"](bare.model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for run, stepper in ((problem, optimizer), (bare, reference)):
            scheduler = make(stepper)
            for _ in range(8):
                train(run, stepper, 1)
                scheduler.step()
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(problem.model.parameters(), bare.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("make", [lambda: mt.RandomTeleporter(0.5, seed=4), Counting], ids=["random", "remembering"])
def test_a_run_that_goes_on_from_a_state_dict_takes_the_same_steps(make: Callable[[], mt.Teleporter]) -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, "adam", make(), every=3)
    train(problem, optimizer, 7)
    file = io.BytesIO()
    torch.save({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    expected = train(problem, optimizer, 7)
    resumed = case("linear pair").problem()
    resumed.model.load_state_dict(saved["model"])
    other = wrap(resumed, "adam", make(), every=3)
    other.load_state_dict(saved["optimizer"])
    # Saved again before it was used, nothing is lost.
    other.load_state_dict(other.state_dict())
    for mine, theirs in zip(train(resumed, other, 7), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert [r.size for r in other.reports] == [r.size for r in optimizer.reports][-2:]


def test_state_dicts_go_to_and_from_the_bare_optimizer() -> None:
    problem, bare = case("linear pair").problem(), case("linear pair").problem()
    optimizer, inner = wrap(problem, "adam"), INNER["adam"](bare.model.parameters())
    train(problem, optimizer, 2)
    inner.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(inner.state_dict())
    assert optimizer.steps == 0
    with pytest.raises(ValueError, match="saved with the teleporter 'random'"):
        wrap(problem, "adam", mt.NoTeleport()).load_state_dict(optimizer.state_dict())


def test_a_saved_state_of_another_shape_is_refused() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, "sgd", Counting())
    train(problem, optimizer, 1)
    saved = optimizer.state_dict()
    saved["teleporting"].update(steps=0, state={"count": torch.zeros(3)})
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="does not fit this model"):
        optimizer.step(closure_of(problem, optimizer))


def test_a_copy_goes_on_alike_and_alone() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, "adam", every=2)
    train(problem, optimizer, 3)
    model, twin = copy.deepcopy((problem.model, optimizer))
    assert twin.model is model
    copied = Problem(model, problem.inputs, problem.targets, problem.loss, problem.symmetries)
    for mine, theirs in zip(train(copied, twin, 4), train(problem, optimizer, 4), strict=True):
        assert torch.equal(mine, theirs)


# --- hooks and memory --------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def test_hooks_are_removed_and_the_inner_optimizer_goes_on() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem, every=1)
    assert hooks(problem.model) > 0
    train(problem, optimizer, 1)
    optimizer.remove_hooks()
    optimizer.remove_hooks()
    assert hooks(problem.model) == 0
    train(problem, optimizer, 2, closure=False)
    assert len(optimizer.reports) == 1
    assert optimizer.state_dict()["teleporting"]["steps"] == 3


def test_the_model_is_copied_and_saved_with_its_hooks_on() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem, every=1)
    empty, file = io.BytesIO(), io.BytesIO()
    torch.save(problem.model, empty)
    out = problem.model(*problem.inputs)
    torch.save(problem.model, file)
    # Nothing that was caught goes with it.
    assert file.tell() == empty.tell()
    file.seek(0)
    for other in (copy.deepcopy(problem.model), torch.load(file, weights_only=False)):
        assert torch.equal(other(*problem.inputs), out)
    # What copies do is not seen.
    problem.loss_of(out).backward()
    optimizer.step()
    assert optimizer.last_report is not None
    assert optimizer.last_report.accepted


def test_old_activations_are_let_go() -> None:
    problem = case("chain of 2022 forms").problem()
    optimizer = wrap(problem, every=2)
    inputs = problem.inputs[0].clone()
    caught: list[weakref.ref[Tensor]] = []
    outputs: list[weakref.ref[Tensor]] = []
    problem.model[2].register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))  # type: ignore[index]
    for _ in range(6):
        optimizer.zero_grad()
        problem.loss_of(problem.model(inputs)).backward()
        last = optimizer._recorder.last  # type: ignore[union-attr]
        if last is not None:
            for run in (run for runs in last.runs.values() for run in runs):
                caught += [weakref.ref(value) for value in (run.input, run.cotangent) if value is not None]
            del last, run
        optimizer.step()
        # By counting references alone, without the collector of cycles.
        gc.disable()
    try:
        assert caught
        assert not any(reference() is not None for reference in caught)
        assert not any(reference() is not None for reference in outputs)
    finally:
        gc.enable()


def test_the_model_does_not_keep_the_optimizer_alive() -> None:
    problem = case("2022 form").problem()
    optimizer = wrap(problem)
    backward(problem, optimizer)
    watch = weakref.ref(optimizer._recorder)  # type: ignore[arg-type]
    del optimizer
    gc.collect()
    assert watch() is None
    problem.model(*problem.inputs)


def test_between_teleports_nothing_is_caught() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem, every=3)
    train(problem, optimizer, 1)
    backward(problem, optimizer)
    assert optimizer._recorder is not None
    assert optimizer._recorder.last is None


def test_reports_are_bounded() -> None:
    problem = case("linear pair").problem()
    optimizer = wrap(problem)
    assert optimizer.reports.maxlen == TeleportingOptimizer.REPORTS
    assert optimizer.last_report is None


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    problem, other = case("linear pair").problem(), case("linear pair").problem()
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every is the number of steps"):
            wrap(problem, every=every)
    with pytest.raises(ValueError, match="state is one of transport, keep, reset, not 'drop'"):
        wrap(problem, state="drop")
    with pytest.raises(ValueError, match="not the model's"):
        wrap(problem, INNER["sgd"](other.model.parameters()))
    with pytest.raises(ValueError, match=r"'1.weight', which the optimizer does not hold"):
        wrap(problem, INNER["sgd"](problem.model[0].parameters()))  # type: ignore[index]
    with pytest.raises(ValueError, match="no symmetry to move along"):
        wrap(problem, symmetries=[])
    with pytest.raises(TypeError, match=r"torch.optim optimizer, not a Sequential"):
        wrap(problem, problem.model)
    with pytest.raises(TypeError, match=r"a metateleport.Teleporter, not a str"):
        wrap(problem, teleporter="random")
    wide = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="which the model does not have"):
        wrap(problem, symmetries=[mt.LinearPair(wide, "1", "2")])
    problem.model[0].weight.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(ValueError, match="is frozen"):
        wrap(problem)
    assert hooks(problem.model) == 0


def test_a_symmetry_that_does_not_hold_is_found_on_the_example() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(Unsuitable, match="does not hold in this model"):
        TeleportingOptimizer(inner, model, mt.NoTeleport(), [mt.Rescaling(model, "0", "2")], example_input=inputs)
    assert hooks(model) == 0


def test_outputs_may_be_nested() -> None:
    class Wrapped(nn.Module):
        def __init__(self, chain: nn.Module) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, *, x: Tensor) -> dict[str, Any]:
            return {"logits": self.chain(x), "more": (None, torch.tensor(3))}

    problem = case("linear pair").problem()
    model = Wrapped(problem.model)
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    pair = mt.LinearPair(model, "chain.0", "chain.1")
    optimizer = TeleportingOptimizer(inner, model, mt.RandomTeleporter(seed=0), [pair])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss_of(model(x=problem.inputs[0])["logits"])
        loss.backward()
        return loss

    optimizer.step(closure)
    report = optimizer.last_report
    assert report is not None
    assert report.accepted
    assert 0 < report.drift < 1e-12
    assert report.loss_after == pytest.approx(report.loss_before)
