"""The meta-optimizer's step: equivariant, never worse, never a NaN; and its rules."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from symmetry_cases import Case, assert_close, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.learned import MODES, MetaOptimizer, MetaState
from metateleport.learned.progress import Progress
from metateleport.learned.rules import BaseRule
from metateleport.learned.rules.coordinate import CoordinateRule
from metateleport.symmetries import BatchPair2022

Batch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
TELEPORTING = ["lr+tele", "update+tele", "tele"]


def meta_optimizer(mode: str, size: float = 10.0, seed: int = 1, **settings: Any) -> MetaOptimizer:
    """In float64, with heads of a size of their own, whatever training starts from, and an open gate."""
    torch.manual_seed(seed)
    config: Any = {"mode": mode, "hidden": 6, "coordinate_hidden": 4, "base_lr": 1e-3, **settings}
    meta = MetaOptimizer(shape_of(**config)).double()
    with torch.no_grad():
        for name, value in meta.named_parameters():
            if "head.weight" in name:
                value.copy_(size * 0.1 * (2 * torch.rand(value.shape, dtype=value.dtype) - 1) / value.shape[-1] ** 0.5)
            if "networks" in name and "head.bias" in name:
                value[-1] = 0.0
    return meta


def square(kind: str) -> Case:
    """As many samples as units, so that no covariance is singular."""

    def build() -> nn.Module:
        between = [] if kind == "linear pairs" else [nn.LeakyReLU(0.1)]
        return nn.Sequential(nn.Linear(4, 4), *between, nn.Linear(4, 4), *between, nn.Linear(4, 4))

    def batch_pairs(model: nn.Module) -> list[mt.Symmetry]:
        return [BatchPair2022(model, a, b, nn.LeakyReLU(0.1)) for a, b in (("0", "2"), ("2", "4"))]

    return Case(kind, build, batch_pairs if kind == "2022 forms" else mt.symmetries_of, (4, 4))


def course(
    meta: MetaOptimizer, model: TaskStack, batch: Batch, steps: int, start: dict[str, Tensor] | None = None
) -> list[Any]:
    """The steps taken from the stack's parameters."""
    parameters = {name: value.detach().clone() for name, value in (start or model.tensors()).items()}
    state: MetaState | None = None
    taken = []
    with torch.no_grad():
        for _ in range(steps):
            point = model.point_at(parameters, batch)
            state = state or meta.initial_state(point, model.symmetries)
            taken.append(meta.step(point, model.symmetries, state))
            state, parameters = taken[-1].state, taken[-1].parameters
    return taken


def layers(problem: Case) -> list[str]:
    return [name for name, module in problem.problem().model.named_modules() if isinstance(module, nn.Linear)]


def permuted(parameters: dict[str, Tensor], names: list[str], orders: list[Tensor]) -> dict[str, Tensor]:
    """Hidden units in another order, layer by layer; the function of the network is the same."""
    moved = dict(parameters)
    for first, second, order in zip(names[:-1], names[1:], orders, strict=True):
        moved[f"{first}.weight"] = moved[f"{first}.weight"][:, order]
        moved[f"{first}.bias"] = moved[f"{first}.bias"][:, order]
        moved[f"{second}.weight"] = moved[f"{second}.weight"][:, :, order]
    return moved


@pytest.mark.parametrize("kind", ["linear pairs", "rescalings", "2022 forms"])
@pytest.mark.parametrize("mode", MODES)
def test_permuting_hidden_units_permutes_the_steps(mode: str, kind: str) -> None:
    problem = square(kind)
    model, batch = problem.stack(2)
    names = layers(problem)
    orders = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 2, 0])]
    meta = meta_optimizer(mode)
    start = {name: value.detach() for name, value in model.tensors().items()}
    ours = course(meta, model, batch, 3, start)
    theirs = course(meta, model, batch, 3, permuted(start, names, orders))
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(other.parameters, permuted(mine.parameters, names, orders), 1e-7)
        assert_close(other.teleported, permuted(mine.teleported, names, orders), 1e-7)
        # Symmetries are travelled from the last to the first.
        assert len(mine.moves) == len(other.moves) == (len(orders) if "tele" in mode else 0)
        for move, moved, order in zip(mine.moves, other.moves, reversed(orders), strict=False):
            element = move.element[:, order]
            element = element if element.ndim == 2 else element[:, :, order]
            assert torch.allclose(moved.element, element, rtol=1e-6, atol=1e-8)
    if "tele" in mode:
        assert bool((ours[0].size > 0.1).all())


def test_permutation_is_noticed_by_flat_networks() -> None:
    """The source paper's networks know no symmetry: the test above can fail."""
    problem = square("linear pairs")
    model, batch = problem.stack(1)
    shapes = tuple((name, tuple(value.shape[1:])) for name, value in model.tensors().items())
    meta = meta_optimizer("lr+tele", network="flat", shapes=shapes)
    start = {name: value.detach() for name, value in model.tensors().items()}
    orders = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 2, 0])]
    mine = course(meta, model, batch, 1, start)[0]
    other = course(meta, model, batch, 1, permuted(start, layers(problem), orders))[0]
    assert not torch.allclose(other.moves[0].element, mine.moves[0].element[:, orders[1]][:, :, orders[1]], rtol=1e-3)


def test_tasks_do_not_see_one_another() -> None:
    problem = square("linear pairs")
    together, batch = problem.stack(3)
    meta = meta_optimizer("update+tele")
    three = course(meta, together, batch, 3)[-1]
    alone, one = problem.stack(1)
    single = course(meta, alone, one, 3)[-1]
    assert_close({name: value[:1] for name, value in three.parameters.items()}, single.parameters, 1e-8)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01)),
    ],
)
def test_base_optimizers_are_torch_s(name: str, make: Any) -> None:
    problem = case("rescaling").problem()
    model, batch = case("rescaling").stack(1)
    optimizer = make(problem.model.parameters())
    rule, state, parameters = BaseRule(name, 0.01), None, dict(model.tensors())
    for _ in range(6):
        point = model.point_at(parameters, batch)
        assert point.loss is not None
        # Undamped, and never taken back, as torch's optimizers.
        state = state or rule.initial_state(point)
        parameters, state = rule.step(point, model.symmetries, Progress.begin(point.loss), state)
        optimizer.zero_grad()
        problem.loss_of(problem.model(*problem.inputs)).backward()
        optimizer.step()
        expected = {key: value.detach().unsqueeze(0) for key, value in problem.model.named_parameters()}
        assert_close(parameters, expected, 1e-12)


def test_a_base_optimizer_starts_again_without_momentum() -> None:
    model, batch = case("rescaling").stack(2)
    point = model.point_at(model.tensors(), batch)
    assert point.loss is not None
    progress, _ = Progress.begin(point.loss).judge(point.loss, deterministic=True)
    progress, accepted = progress.judge(point.loss * torch.tensor([0.5, 2.0]), deterministic=True)
    assert accepted.tolist() == [True, False]
    rule = BaseRule("momentum", 0.01)
    momentum = {name: torch.ones_like(value) for name, value in point.gradients.items()}
    moved, _ = rule.step(point, (), progress, {**rule.initial_state(point), "momentum": momentum})
    for name, gradient in point.gradients.items():
        change = point.parameters[name] - moved[name]
        assert torch.allclose(change[0], 0.01 * (0.9 + gradient[0]))
        assert torch.allclose(change[1], 0.3 * 0.01 * gradient[1])


def test_refused_base_optimizers() -> None:
    with pytest.raises(ValueError, match="sgd, momentum, adam"):
        BaseRule("rmsprop")
    with pytest.raises(ValueError, match="positive"):
        BaseRule("sgd", 0.0)


def worse_second_task(batch: Batch) -> Batch:
    """The data at the second evaluation: the second task's loss is far up, the others are as they were."""
    (inputs,), (targets,) = batch
    targets = targets.clone()
    targets[1] += 100.0
    return (inputs,), (targets,)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_made_a_task_worse_goes_back(mode: str) -> None:
    problem = square("rescalings")
    model, batch = problem.stack(3)
    meta = meta_optimizer(mode)

    def run(second: Batch) -> list[Any]:
        parameters, state, taken = dict(model.tensors()), None, []
        with torch.no_grad():
            for data in (batch, second):
                point = model.point_at(parameters, data)
                state = state or meta.initial_state(point, model.symmetries)
                taken.append(meta.step(point, model.symmetries, state))
                state, parameters = taken[-1].state, taken[-1].parameters
        return taken

    good, bad = run(batch), run(worse_second_task(batch))
    assert good[1].accepted.tolist() == [True, True, True]
    assert bad[1].accepted.tolist() == [True, False, True]
    back = bad[1].state.accepted
    for name, value in model.tensors().items():
        # Back to the start, bit for bit, gradients too.
        assert torch.equal(back.parameters[name][1], value[1])
        assert torch.equal(back.gradients[name][1], bad[0].state.accepted.gradients[name][1])
        # The others take the very same step.
        for task in (0, 2):
            assert torch.equal(bad[1].parameters[name][task], good[1].parameters[name][task])
    assert float(bad[1].size.reshape(-1)[1]) == 0
    assert float(bad[1].state.progress.damping[1]) == pytest.approx(0.3)
    assert bad[1].state.progress.rejected.tolist() == [0, 1, 0]
    assert bad[1].state.progress.damping[[0, 2]].tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["lr", "lr+tele", "update+tele", "tele"])
def test_the_loss_of_accepted_points_never_rises(mode: str) -> None:
    problem = square("2022 forms")
    model, batch = problem.stack(4)
    last = None
    for taken in course(meta_optimizer(mode, size=50.0, base_lr=0.05), model, batch, 40):
        loss = model.losses_at(taken.state.accepted.parameters, batch)
        assert last is None or bool((loss <= last * (1 + 1e-12)).all())
        last = loss


def test_progress_on_minibatches_allows_for_their_spread() -> None:
    start = torch.tensor([1.0, 1.0, 1.0])
    progress, accepted = Progress.begin(start).judge(start, deterministic=False)
    assert bool(accepted.all())
    progress, accepted = progress.judge(torch.tensor([1.05, 5.0, float("nan")]), deterministic=False)
    assert accepted.tolist() == [True, False, False]
    noisy = Progress.begin(start[:1])
    for value in (1.0, 1.1, 0.9, 1.2, 0.9, 1.1, 1.3):
        noisy, accepted = noisy.judge(torch.tensor([value]), deterministic=False)
        assert bool(accepted)
    assert 0.9 < float(noisy.last) < 1.3
    assert bool(noisy.features().isfinite().all())


def test_damping_recovers() -> None:
    start = torch.ones(1)
    progress, _ = Progress.begin(start).judge(start, deterministic=True)
    progress, _ = progress.judge(torch.full((1,), 2.0), deterministic=True)
    seen = [float(progress.damping)]
    for _ in range(4):
        progress, _ = progress.judge(start, deterministic=True)
        seen.append(float(progress.damping))
    assert seen == pytest.approx([0.3, 0.9, 1.0, 1.0, 1.0])


def test_a_first_loss_that_is_not_finite_does_not_count() -> None:
    for bad in (float("nan"), float("inf")):
        first = torch.tensor([bad, 3.0])
        progress, accepted = Progress.begin(first).judge(first, deterministic=True)
        assert accepted.tolist() == [False, True]
        assert bool(progress.gain.isfinite().all())
        progress, accepted = progress.judge(torch.tensor([5.0, 2.0]), deterministic=True)
        assert accepted.tolist() == [True, True]
        assert progress.start.tolist() == [5.0, 3.0]
        assert bool(progress.features().isfinite().all())


@pytest.mark.parametrize("mode", ["lr+tele", "update+tele"])
def test_a_task_that_is_not_finite_leaves_the_others_meta_gradient_finite(mode: str) -> None:
    model, ((inputs,), targets) = square("rescalings").stack(3)
    spoilt = inputs.clone()
    spoilt[1] = float("nan")
    meta = meta_optimizer(mode)
    point = model.point_at(model.tensors(), ((spoilt,), targets))
    taken = meta.step(point, model.symmetries, meta.initial_state(point, model.symmetries))
    sum(value[[0, 2]].square().sum() for value in taken.parameters.values()).backward()  # type: ignore[union-attr]
    gradients = [value.grad for value in meta.parameters() if value.grad is not None]
    assert any(bool(value.any()) for value in gradients)
    assert all(bool(value.isfinite().all()) for value in gradients)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_never_a_nan_in_the_weights(mode: str, deterministic: bool) -> None:
    """Absurd networks, and tasks from tiny to huge, some of which are not finite from the start."""
    source = torch.Generator().manual_seed(0)
    scales = [1e-8, 1.0, 1e8, 1e150]
    problem = square("linear pairs")
    model, (inputs, targets) = problem.stack(len(scales) + 1)
    factors = torch.tensor([*scales, float("nan")], dtype=torch.float64).reshape(-1, 1, 1)
    batch = (tuple(value * factors for value in inputs), tuple(value * factors for value in targets))
    with torch.no_grad():
        for name, value in model.tensors().items():
            if name.endswith("weight"):
                value[:3].mul_(factors[:3].abs())
    meta = meta_optimizer(mode, size=1e3, base_lr=1e6)
    with torch.no_grad():
        for value in meta.parameters():
            value.add_(torch.randn(value.shape, generator=source, dtype=value.dtype) * 10)
    parameters, state = dict(model.tensors()), None
    with torch.no_grad():
        for _ in range(50):
            point = model.point_at(parameters, batch)
            state = state or meta.initial_state(point, model.symmetries, deterministic)
            taken = meta.step(point, model.symmetries, state)
            state, parameters = taken.state, taken.parameters
            for name, value in parameters.items():
                assert bool(value.isfinite().all()), name
    # What is not finite from the start stays where it is.
    for name, value in model.tensors().items():
        assert torch.equal(parameters[name][-1], value[-1])


@pytest.mark.parametrize("mode", TELEPORTING)
def test_what_a_step_reports(mode: str) -> None:
    model, batch = square("2022 forms").stack(2)
    taken = course(meta_optimizer(mode), model, batch, 2)[-1]
    assert [move.symmetry for move in taken.moves] == list(reversed(model.symmetries))
    sizes = torch.stack([move.size for move in taken.moves])
    assert torch.allclose(taken.size, sizes.square().sum(0).sqrt())
    costs = [symmetry.rebuild_cost(taken.state.accepted) for symmetry in model.symmetries]
    assert torch.allclose(taken.evaluations, torch.full((2,), sum(costs), dtype=torch.float64))
    assert taken.refused.tolist() == [0, 0]
    # The teleport stays on the orbit.
    before = model.losses_at(taken.state.accepted.parameters, batch)
    assert torch.allclose(model.losses_at(taken.teleported, batch), before, rtol=1e-6)


def test_another_teleporter_may_take_its_place() -> None:
    model, batch = square("linear pairs").stack(2)
    meta = meta_optimizer("lr+tele")
    point = model.point_at(model.tensors(), batch)
    with torch.no_grad():
        state = meta.initial_state(point, model.symmetries, teleporter=mt.NoTeleport())
        still = meta.step(point, model.symmetries, state, mt.NoTeleport())
        assert not bool(still.size.any())
        drawn = meta.step(point, model.symmetries, state, mt.RandomTeleporter(0.5, seed=0))
        assert torch.allclose(drawn.size, torch.full((2,), 0.5 * 2**0.5, dtype=torch.float64))


def test_a_point_has_to_be_evaluated() -> None:
    model, batch = square("linear pairs").stack(1)
    meta = meta_optimizer("lr")
    point = model.point_at(model.tensors(), batch)
    state = meta.initial_state(point, model.symmetries)
    for bare in (point.replace(loss=None), point.replace(gradients={})):
        with pytest.raises(ValueError, match="evaluated"):
            meta.step(bare, model.symmetries, state)


def test_states_hold_no_graph_of_the_evaluation() -> None:
    model, batch = square("2022 forms").stack(1)
    taken = course(meta_optimizer("lr+tele"), model, batch, 1)[-1]
    assert taken.state.accepted.pullback is None


def test_states_are_mapped_throughout() -> None:
    model, batch = square("linear pairs").stack(2)
    for mode in MODES:
        state = course(meta_optimizer(mode), model, batch, 2)[-1].state
        seen: list[int] = []

        def single(value: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(1)
            return value.float() if value.is_floating_point() else value

        mapped = state.map(single)
        assert mapped.progress.last.dtype == torch.float32
        assert mapped.accepted.parameters["0.weight"].dtype == torch.float32
        assert mapped.deterministic == state.deterministic
        assert len(seen) > 20
        doubles = [name for name, value in tensors(mapped).items() if value.dtype == torch.float64]
        assert doubles == []


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    found: dict[str, Tensor] = {}
    if isinstance(value, dict):
        for key, each in value.items():
            found.update(tensors(each, f"{name}/{key}"))
    return found


def test_a_group_without_a_basis_is_refused() -> None:
    with pytest.raises(ValueError, match="no basis for the group 'SL'"):
        MetaOptimizer(shape_of(groups=("SL",)))


def test_the_attribution_twin_has_the_same_step() -> None:
    for mode, alone in (("lr+tele", "lr"), ("update+tele", "update")):
        config = shape_of(mode=mode, hidden=5, coordinate_hidden=3)
        twin = config.without_teleport()
        assert twin.mode == alone
        assert dataclasses.replace(twin, teleport=config.teleport) == config
        assert not twin.teleports
        assert twin.steps


def test_the_update_starts_as_the_learned_step() -> None:
    """With its coordinate head at zero the learned update is the learned step."""
    model, batch = square("linear pairs").stack(2)
    update = meta_optimizer("update", size=1.0)
    step = meta_optimizer("lr", size=1.0)
    assert isinstance(update.rule, CoordinateRule)
    step.rule.load_state_dict(  # type: ignore[attr-defined]
        {name: value for name, value in update.rule.state_dict().items() if name.split(".")[0] in ("cell", "head")}
    )
    with torch.no_grad():
        update.rule.coordinate_head.weight.zero_()
    for mine, other in zip(course(update, model, batch, 3), course(step, model, batch, 3), strict=True):
        assert_close(mine.parameters, other.parameters, 1e-10)


def test_networks_copy() -> None:
    model, batch = square("linear pairs").stack(1)
    meta = meta_optimizer("update+tele")
    copied = copy.deepcopy(meta)
    assert_close(course(meta, model, batch, 2)[-1].parameters, course(copied, model, batch, 2)[-1].parameters, 0.0)
