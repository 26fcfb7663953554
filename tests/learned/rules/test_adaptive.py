"""The update for minibatches: what it starts as, what it does with a step taken back, its scale, its meta-gradient."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from gradient_cases import Batch, analytic, attached, compare, error, plain, recorded, stack, unrolled
from learned_cases import shape_of
from symmetry_cases import side_by_side
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import TaskStack
from metateleport.gauges import Gauge
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.progress import Progress, Tolerance
from metateleport.learned.rules.adaptive import AdaptiveRule, AdaptiveSettings
from metateleport.point import Point

TOLERANCE = 1e-6


ADAM, POLAR, GAUGE = ((*(80.0 * float(place == each) for each in range(3)),) for place in range(3))


def rule_of(
    size: float = 0.0, memory: float = 0.9, calm: float = 40.0, mixture: Sequence[float] = ADAM, head: float = 0.0
) -> AdaptiveRule:
    """A rule in float64 that always says the same, unless `head` lets it see something."""
    torch.manual_seed(0)
    rule = AdaptiveRule(hidden=5).double()
    with torch.no_grad():
        rule.head.weight.copy_(head * (torch.rand(rule.head.weight.shape) - 0.5))
        rule.head.bias.copy_(torch.tensor([size, math.log(memory / (1 - memory)), calm, *mixture], dtype=torch.float64))
    return rule


def meta_optimizer(mode: str = "update", **config: object) -> MetaOptimizer:
    torch.manual_seed(0)
    shape = shape_of(mode=mode, update="adaptive", hidden=4, **config)
    meta = MetaOptimizer(shape).double()
    with torch.no_grad():
        assert isinstance(meta.rule, AdaptiveRule)
        meta.rule.head.weight.mul_(10)
        # Short steps, so that none is taken back.
        meta.rule.head.bias.copy_(torch.tensor([-6.0, 1.0, 0.5, 0.3, 0.5, 0.0]))
    return meta


def walk(rule: AdaptiveRule, model: TaskStack, batch: Batch, steps: int) -> list[dict[str, Tensor]]:
    """Parameters before and after each of some steps, all of them accepted."""
    along: list[dict[str, Tensor]] = [dict(model.tensors())]
    state, progress = None, None
    for _ in range(steps):
        point = model.point_at(along[-1], batch)
        assert point.loss is not None
        progress = Progress.begin(point.loss).judge(point.loss, deterministic=True)[0]
        state = rule.initial_state(point) if state is None else state
        with torch.no_grad():
            moved, state = rule.step(point, model.symmetries, progress, state)
        along.append(moved)
    return along


def first_length(parameters: dict[str, Tensor]) -> Tensor:
    """1.25 times the geometric mean of the layers' sizes, over their number, `(tasks,)`."""
    layers: dict[str, list[Tensor]] = {}
    for name, value in parameters.items():
        layers.setdefault(name.rpartition(".")[0], []).append(value.flatten(1))
    sizes = torch.stack([torch.cat(parts, 1).square().mean(1).sqrt() for parts in layers.values()])
    return 1.25 * sizes.log().mean(0).exp() / len(sizes)


def size_of(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize("calm", [40.0, -40.0, 0.0])
def test_unmixed_it_is_adam_with_a_step_relative_to_the_weights(calm: float) -> None:
    model, batch = stack("rescaling")
    along = walk(rule_of(calm=calm), model, batch, 6)
    first = first_length(along[0])
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in along[0].items()}
    recent = dict.fromkeys(along[0], 0.0)
    for step, (before, after) in enumerate(itertools.pairwise(along), start=1):
        gradients = model.point_at(before, batch).gradients
        for name, gradient in gradients.items():
            mean, square = moments[name]
            moments[name] = mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
            shape = (-1, *(1,) * (gradient.ndim - 1))
            normal = square / (1 - 0.999**step)
            smallest = 1e-8 * normal.flatten(1).mean(1).reshape(shape)
            direction = mean / (1 - 0.9**step) / (normal + smallest).sqrt()
            recent[name] = 0.95 * recent[name] + 0.05 * size_of(gradient) ** 2
            steady = size_of(mean / (1 - 0.9**step)) / (recent[name] / (1 - 0.95**step)) ** 0.5
            exponent = 1 / (1 + math.exp(-calm))
            length = first * size_of(direction) ** (exponent - 1) * steady ** (1 - exponent)
            expected = before[name] - length.reshape(shape) * direction
            torch.testing.assert_close(after[name], expected, rtol=1e-9, atol=1e-12)


def test_the_polar_factor_s_direction_has_the_length_of_adam_s() -> None:
    model, batch = stack("rescaling")
    before, after = walk(rule_of(mixture=POLAR), model, batch, 1)
    adam = walk(rule_of(), model, batch, 1)[-1]
    for name, gradient in model.point_at(before, batch).gradients.items():
        step, other = before[name] - after[name], before[name] - adam[name]
        torch.testing.assert_close(size_of(step), size_of(other))
        if gradient.ndim == 2:  # A bias has no polar factor.
            torch.testing.assert_close(step, other)
            continue
        left, _, right = torch.linalg.svd(gradient.detach(), full_matrices=False)
        polar = left @ right
        assert float((step * polar).sum().detach() / (step.norm() * polar.norm())) > 0.95
        assert not torch.allclose(step, other, rtol=0.1)


def test_tensors_without_a_gauge_share_out_what_it_would_have() -> None:
    model, batch = stack("rescaling")
    without = walk(rule_of(mixture=(1.0, 1.0, 5.0)), model, batch, 2)[-1]
    for name, value in walk(rule_of(mixture=(1.0, 1.0, -40.0)), model, batch, 2)[-1].items():
        torch.testing.assert_close(without[name], value)


def test_in_a_gauge_it_steps_along_the_raised_velocity() -> None:
    model, batch = stack("linear pair")
    pair = model.symmetries[0]
    element = pair.group.exp(pair.group.random_generator(2, seed=0, dtype=torch.float64))
    gauge = Gauge(pair, "in", ("1.weight",), element, torch.ones(2))
    point = model.point_at(model.tensors(), batch)
    assert point.loss is not None
    progress = Progress.begin(point.loss).judge(point.loss, deterministic=False)[0]
    rule = rule_of(mixture=GAUGE)
    with torch.no_grad():
        moved, _ = rule.step(point, model.symmetries, progress, rule.initial_state(point), [gauge])
    step = point.parameters["1.weight"] - moved["1.weight"]
    raised = point.gradients["1.weight"] @ element.mT @ element
    shape = (-1, 1, 1)
    torch.testing.assert_close(step / size_of(step).reshape(shape), raised / size_of(raised).reshape(shape))


@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_it_does_not_see_the_scale_of_the_loss(factor: float) -> None:
    model, batch = stack("rescaling")
    task = model.tasks[0]
    scaled = TaskStack([dataclasses.replace(task, loss=lambda *given: factor * model.loss(*given))])
    alone = TaskStack([task])
    first = tuple(tuple(value[:1] for value in part) for part in batch)
    ours, theirs = (
        walk(rule_of(mixture=(0.0, 0.0, 0.0), calm=0.0, head=1.0), each, first, 4)[-1] for each in (scaled, alone)
    )
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-8)


def test_a_step_that_is_taken_back_is_taken_again_damped() -> None:
    model, batch = stack("rescaling")
    rule = rule_of(mixture=(0.0, 0.0, 0.0))
    point = model.point_at(model.tensors(), batch)
    assert point.loss is not None
    progress = Progress.begin(point.loss).judge(point.loss, deterministic=False)[0]
    with torch.no_grad():
        first, state = rule.step(point, model.symmetries, progress, rule.initial_state(point))
        back = dataclasses.replace(
            progress, accepted=torch.zeros_like(progress.accepted), damping=0.3 * progress.damping
        )
        again, after = rule.step(point, model.symmetries, back, state)
    for name, value in point.parameters.items():
        torch.testing.assert_close(again[name] - value, 0.3 * (first[name] - value), rtol=1e-9, atol=1e-12)
        assert torch.equal(after["squares"][name], state["squares"][name])


def test_a_layer_that_starts_at_zero_moves() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    symmetry = mt.Rescaling(model, "0", "2")
    batch = ((torch.randn(1, 8, 3).double(),), (torch.ones(1, 8, 2).double(),))
    stacked = side_by_side([model], nn.functional.mse_loss, batch, [symmetry])
    moved = walk(rule_of(), stacked, batch, 1)[-1]
    assert float(moved["2.weight"].abs().max()) > 1e-4


def test_units_that_are_never_on_spoil_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias[0] = -30.0
    batch = ((torch.randn(1, 8, 3).double(),), (torch.randn(1, 8, 2).double(),))
    stacked = side_by_side([model], nn.functional.mse_loss, batch, [mt.Rescaling(model, "0", "2")])
    meta = meta_optimizer()
    with torch.no_grad():
        meta.rule.head.bias[0] = -4.0
    assert all(bool(value.isfinite().all()) for value in analytic(meta, (stacked, batch), 4))


@pytest.mark.parametrize("guarded", [False, True])
def test_gradients_that_are_only_rounding_move_nothing(guarded: bool) -> None:
    """A bias in front of a batch norm, and a tensor whose gradient is zero, beside others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = AdaptiveSettings(hidden=3, guarded=guarded)
    optimizer = mt.LearnedOptimizer(model, MetaOptimizer(MetaOptimizerConfig(settings)), [])
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(16, 3)) - 1).square().mean().backward()
        model[3].weight.grad.zero_()  # type: ignore[union-attr]
        optimizer.step()
    far = {name: float((value - before[name]).norm()) for name, value in model.named_parameters()}
    assert far["0.bias"] < 1e-3 * far["1.bias"]
    assert far["3.weight"] == 0
    assert min(far[name] for name in ("0.weight", "1.bias", "3.bias")) > 1e-4
    assert optimizer.skipped == 0


def test_small_gradients_of_the_first_layers_of_a_deep_model_are_no_rounding() -> None:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(16, 32), nn.ReLU()]
    for _ in range(12):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    before = [value.detach().clone() for value in model.parameters()]
    optimizer = mt.LearnedOptimizer(model, MetaOptimizer(MetaOptimizerConfig(AdaptiveSettings(hidden=3))), [])
    nn.functional.cross_entropy(model(torch.rand(32, 16)), torch.randint(4, (32,))).backward()
    sizes = torch.stack([value.grad.square().mean().sqrt() for value in model.parameters()])  # type: ignore[union-attr]
    assert float(sizes.min() / sizes.max()) < 100 * torch.finfo(torch.float32).eps
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_on_minibatches_it_allows_what_a_narrower_test_takes_back() -> None:
    calm = torch.ones(1)
    progress = Progress.begin(calm).judge(calm, deterministic=False)[0]
    worse = 1.9 * calm
    assert not bool(progress.judge(worse, False)[1])
    assert bool(progress.judge(worse, False, AdaptiveRule.tolerance)[1])
    assert not bool(progress.judge(worse, True, AdaptiveRule.tolerance)[1])
    assert not bool(progress.judge(2.1 * calm, False, Tolerance(5.0, 1.0, 0.9))[1])


def test_far_below_the_first_loss_no_step_is_taken_back() -> None:
    first = torch.ones(1)
    progress = Progress.begin(first).judge(first, deterministic=False)[0]
    for _ in range(100):
        progress, _ = progress.judge(0.01 * first, False, AdaptiveRule.tolerance)
    assert bool(progress.judge(0.4 * first, False, AdaptiveRule.tolerance)[1])
    assert not bool(progress.judge(0.6 * first, False, AdaptiveRule.tolerance)[1])
    assert not bool(progress.judge(0.4 * first, True, AdaptiveRule.tolerance)[1])


@pytest.mark.parametrize("mode", ["update", "update+tele"])
@pytest.mark.parametrize("kind", ["linear pair", "rescaling"])
class TestMetaGradient:
    def test_over_five_steps_with_nothing_detached(self, mode: str, kind: str) -> None:
        meta, problem = attached(meta_optimizer(mode)), stack(kind)
        assert compare(meta, problem, 5, plain(meta, problem, 5)) < TOLERANCE

    def test_over_five_steps_at_recorded_features(self, mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        meta, problem = meta_optimizer(mode), stack(kind)
        gradient = analytic(meta, problem, 5)
        evaluate = recorded(meta, problem, 5, monkeypatch)
        assert error(gradient, evaluate, meta) < TOLERANCE


def test_a_run_that_goes_on_from_its_state_takes_the_same_steps() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 3), torch.randn(16, 2)

    def begun() -> tuple[nn.Module, mt.LearnedOptimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2))
        return model, mt.LearnedOptimizer(model, meta_optimizer().float())

    def run(model: nn.Module, optimizer: mt.LearnedOptimizer, steps: int) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        return float([optimizer.step(closure) for _ in range(steps)][-1])

    model, optimizer = begun()
    start = run(model, optimizer, 1)
    run(model, optimizer, 4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    end = run(model, optimizer, 5)
    other, again = begun()
    other.load_state_dict(weights)
    again.load_state_dict(saved)
    assert run(other, again, 5) == end < start


def test_a_loss_that_creeps_up_is_taken_back_above_twice_the_first() -> None:
    first = torch.ones(1)
    progress, _ = Progress.begin(first).judge(first, deterministic=False, tolerance=AdaptiveRule.tolerance)
    for loss in 1.3 ** torch.arange(1.0, 30.0):
        progress, accepted = progress.judge(loss[None], deterministic=False, tolerance=AdaptiveRule.tolerance)
        assert bool(accepted) == bool(loss <= 2)
    assert float(progress.last) <= 2


@pytest.mark.parametrize("time", [1, 50, 300])
def test_steps_cool_down_with_the_root_of_time(time: int) -> None:
    model, batch = stack("linear pair")
    point = model.point_at(model.tensors(), batch)
    assert point.loss is not None
    progress = Progress.begin(point.loss).judge(point.loss, deterministic=False)[0]
    progress = dataclasses.replace(progress, time=time)
    moved = {}
    for cooling in (0.0, 0.04):
        rule = rule_of()
        rule.cooling = cooling
        with torch.no_grad():
            moved[cooling], _ = rule.step(point, model.symmetries, progress, rule.initial_state(point))
    for name, value in point.parameters.items():
        expected = (moved[0.0][name] - value) / math.sqrt(1 + 0.04 * time)
        assert torch.allclose(moved[0.04][name] - value, expected)
        assert float(expected.abs().max()) > 0


def test_the_rate_of_a_configuration_reaches_the_rule_and_may_differ_from_its_start() -> None:
    meta = meta_optimizer(cooling=0.04)
    assert isinstance(meta.rule, AdaptiveRule)
    assert meta.rule.cooling == 0.04
    meta.load_state_dict(meta_optimizer().state_dict())


def test_tables_of_embeddings_do_not_lengthen_the_steps_of_other_layers() -> None:
    torch.manual_seed(0)
    weights = {"a.weight": 0.1 * torch.randn(2, 6, 4), "b.weight": 0.1 * torch.randn(2, 3, 6)}
    table = {"words.weight": torch.randn(2, 50, 4)}

    def scale(parameters: dict[str, Tensor]) -> Tensor:
        point = Point(parameters, gradients=parameters, loss=torch.ones(2))
        return AdaptiveRule(hidden=4).initial_state(point)["scale"]

    torch.testing.assert_close(scale({**weights, **table}) * 3, scale(weights) * 2)
    # A model of nothing else has its own size.
    assert bool((scale(table) > 0.9).all())


def test_a_rule_that_is_told_anneals_to_the_end_of_the_run() -> None:
    torch.manual_seed(0)
    rule = AdaptiveRule(hidden=3, told=True).double()
    with torch.no_grad():
        rule.head.weight.zero_()
    model, batch = stack("rescaling")
    point = model.point_at(dict(model.tensors()), batch)
    assert point.loss is not None
    progress = Progress.begin(point.loss).judge(point.loss, deterministic=True)[0]

    def step(time: int, total: int | None) -> dict[str, Tensor]:
        at = dataclasses.replace(progress, time=time, total=total)
        moved, _ = rule.step(point, model.symmetries, at, rule.initial_state(point))
        return {name: moved[name].detach() - value for name, value in point.parameters.items()}

    whole = step(51, None)
    for time, total, left in ((1, 100, 1.0), (51, 100, 0.5), (100, 100, 0.01), (200, 100, 0.0)):
        for name, value in step(time, total).items():
            share = 3 ** (1 / 3) * left ** (3 / (1 + math.exp(1.5)))
            torch.testing.assert_close(value, whole[name] * share, rtol=1e-6, atol=1e-12)
    # Neither a run of a few steps nor one of a million is stepped out of all proportion.
    for total, factor in ((300, 1.0), (2400, 0.5), (10**6, 30 ** (-1 / 3)), (1, 10 ** (1 / 3))):
        for name, value in step(1, total).items():
            torch.testing.assert_close(value, whole[name] * factor, rtol=1e-6, atol=1e-12)


def test_only_a_rule_that_is_told_has_an_output_for_it() -> None:
    settings = AdaptiveSettings(hidden=3)
    assert not settings.reads_total
    assert dataclasses.replace(settings, told=True).reads_total
    assert dataclasses.replace(settings, told=True).rule().head.out_features == settings.rule().head.out_features + 1


def test_small_tensors_step_side_by_side_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = stack("rescaling")
    found = []
    for entries in (2**18, 0):
        monkeypatch.setattr("metateleport.linalg._SMALL", entries)
        meta = meta_optimizer()
        loss = unrolled(meta, problem, 4, track=True)[0]
        gradients = torch.autograd.grad(loss, list(meta.rule.parameters()))
        found.append((loss, *gradients))
    for joined, separate in zip(*found, strict=True):
        assert torch.allclose(joined, separate, rtol=1e-9, atol=1e-12)


def test_what_may_be_spent_is_let_go_of_and_the_given_point_stays() -> None:
    model, batch = stack("rescaling")
    point = model.point_at(model.tensors(), batch)
    assert point.loss is not None
    names = set(point.gradients)
    progress = Progress.begin(point.loss).judge(point.loss, deterministic=True)[0]
    found = []
    for spend in (True, False):
        own = point.replace(gradients=dict(point.gradients))
        rule = rule_of(mixture=(0.3, 0.5, 0.0))
        with torch.no_grad():
            moved, _ = rule.step(own, model.symmetries, progress, rule.initial_state(point), spend=spend)
        assert set(own.gradients) == (set() if spend else names)
        found.append(moved)
    for name in names:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-9)
    for mode in ("update", "update+tele"):
        meta = meta_optimizer(mode)
        step, given = meta.rule.step, []

        def noted(point: Point, *others: Any) -> Any:
            given.append(point)  # noqa: B023
            return step(point, *others)  # noqa: B023

        with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
            patched.setattr(meta.rule, "step", noted)
            taken = meta.step(point, model.symmetries, meta.initial_state(point, model.symmetries), spend=True)
        assert point.activations
        assert not given[0].activations
        assert bool(taken.moves) == (mode == "update+tele")
        assert set(point.gradients) == names
        assert taken.state.accepted is not None
        assert set(taken.state.accepted.gradients) == names
