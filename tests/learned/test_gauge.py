"""The learned gauge: what it can express, what it leaves alone, and that it is the same in every basis and width."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from learned_cases import shape_of
from symmetry_cases import case, side_by_side
from torch import Tensor, nn

import metateleport as mt
from metateleport.evaluation.methods.learned import Learned
from metateleport.families import TaskStack
from metateleport.gauges import Gauge, gauge_symmetries, precondition, step_in_gauges
from metateleport.learned import MetaOptimizer
from metateleport.learned.curvature import curvature_bounds, output_curvatures
from metateleport.learned.gauge import GaugeChoice, LearnedGauge
from metateleport.learned.progress import Progress
from metateleport.learned.rules.step import StepRule
from metateleport.point import Point
from metateleport.settings import SettingsError
from metateleport.symmetries import BatchPair2022, LinearisedPair, Unsuitable
from metateleport.teleporters import Teleporter

TASKS = 3


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


def problem(width: int = 5, samples: int = 12, bias: bool = True, seed: int = 0) -> tuple[TaskStack, Point]:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    models = []
    for _ in range(TASKS):
        model = nn.Sequential(
            nn.Linear(4, width, bias=bias), nn.LeakyReLU(0.1), nn.Linear(width, 3, bias=bias)
        ).double()
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(draw(*value.shape))
        models.append(model)
    batch = (draw(TASKS, samples, 4),), (draw(TASKS, samples, 3),)
    model = side_by_side(models, half_squared_error, batch, [mt.Rescaling(models[0], "0", "2")])
    return model, model.point_at(model.tensors(), batch)


def gauge_of(point: Point, symmetries: tuple[mt.Symmetry, ...], **changes: float) -> list[Gauge]:
    """Gauges of a network whose head is a constant: logits of the parts of a choice."""
    learned = LearnedGauge(("GL", "diagonal"), hidden=4).double()
    with torch.no_grad():
        for network in learned.networks.values():
            network.head.weight.zero_()
            for part, value in changes.items():
                network.head.bias[GaugeChoice._fields.index(part)] = value
    state = learned.initial_state(point, symmetries)
    assert point.loss is not None
    progress, _ = Progress.begin(point.loss).judge(point.loss, deterministic=True)
    return learned.choose(point, symmetries, progress, state, deterministic=True)[0]


class Fixed(Teleporter):
    """Answers with one generator."""

    def __init__(self, generator: Tensor) -> None:
        super().__init__()
        self.fixed = generator

    def generator(self, symmetry: mt.Symmetry, point: Point, state: object) -> tuple[Tensor, object]:
        return self.fixed, state


@pytest.mark.parametrize("linearised", [False, True])
def test_a_preconditioned_step_is_a_step_in_a_gauge_that_is_undone(linearised: bool) -> None:
    model, point = problem()
    (symmetry,) = gauge_symmetries(model.symmetries, linearised)
    generator = 0.3 * symmetry.group.random_generator(TASKS, seed=1, dtype=torch.float64)
    element, size = symmetry.group.exp(generator), symmetry.group.norm(generator)
    sides = {"in": ("2.weight",), "out": ("0.weight", "0.bias")}
    for side, names in sides.items():
        gauge = Gauge(symmetry, side, names, element, size)  # type: ignore[arg-type]
        raised = precondition([gauge], point.gradients, point)
        stepped = step_in_gauges(
            point,
            [symmetry],
            lambda _: Fixed(generator),
            lambda at, names: {name: at.parameters[name] - 0.1 * at.gradients[name] for name in names},
            names=names,
        )
        for name in names:
            assert torch.allclose(stepped.parameters[name], point.parameters[name] - 0.1 * raised[name], atol=1e-10)
        for name in point.gradients.keys() - set(names):
            assert torch.equal(raised[name], point.gradients[name])


def test_an_open_gate_on_the_metric_is_the_inverse_of_the_covariance_and_of_the_curvature() -> None:
    model, point = problem()
    symmetries = gauge_symmetries(model.symmetries, linearised=True)
    gauges = gauge_of(point, symmetries, reach=40.0, share=-40.0, gate=40.0)
    raised = precondition(gauges, point.gradients, point)
    features, above = point.activations["2"], output_curvatures(point, symmetries)["0"]
    expected = {
        "2.weight": point.gradients["2.weight"] @ torch.linalg.inv(features.mT @ features),
        "0.weight": torch.linalg.inv(above) @ point.gradients["0.weight"],
    }
    for name, value in expected.items():
        # Up to a scale, which cancels against the bound.
        found, wanted = raised[name].flatten(1), value.flatten(1)
        assert torch.allclose(
            found / found.norm(dim=1, keepdim=True), wanted / wanted.norm(dim=1, keepdim=True), atol=1e-6
        )
    bounds = curvature_bounds(point, model.symmetries, gauges)
    for name in expected:
        # A white layer: a step over the bound takes at most all that this tensor alone could.
        gain = (point.gradients[name] * raised[name]).flatten(1).sum(1) / bounds[name]
        assert point.loss is not None
        assert bool((gain <= 2 * point.loss * (1 + 1e-9)).all())


def test_each_tensor_sees_what_the_steps_of_all_promise_together() -> None:
    model, point = problem()
    bounds = curvature_bounds(point, model.symmetries)
    assert point.loss is not None
    progress, _ = Progress.begin(point.loss).judge(point.loss, deterministic=True)
    seen = StepRule(hidden=4).observe(point, bounds, progress, [], model.symmetries)
    shares = [point.gradients[name].flatten(1).square().sum(1) / (2 * bounds[name] * point.loss) for name in bounds]
    assert len(shares) > 1
    assert torch.allclose((5 * seen[..., 0]).exp(), sum(shares).expand(len(seen), -1), rtol=1e-9)


@pytest.mark.parametrize("reach", [-3.0, 0.0, 3.0])
def test_the_reach_is_how_far_down_the_spectrum_the_metric_is_inverted(reach: float) -> None:
    model, point = problem()
    gauges = gauge_of(point, gauge_symmetries(model.symmetries, linearised=True), reach=reach, share=-40.0, gate=40.0)
    raised = precondition(gauges, point.gradients, point)["2.weight"].flatten(1)
    features = point.activations["2"]
    metric = features.mT @ features
    shift = 1e-13 ** (1 / (1 + math.exp(-reach))) * torch.linalg.eigvalsh(metric)[:, -1]
    damped = metric + shift[:, None, None] * torch.eye(metric.shape[-1], dtype=torch.float64)
    wanted = (point.gradients["2.weight"] @ torch.linalg.inv(damped)).flatten(1)
    assert torch.allclose(
        raised / raised.norm(dim=1, keepdim=True), wanted / wanted.norm(dim=1, keepdim=True), atol=1e-6
    )


def test_layers_share_a_step_that_is_bounded_jointly() -> None:
    """In the Gauss-Newton model it brings at least half of its slope; of a linear network the bounds are exact."""
    source = torch.Generator().manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).double() for _ in range(TASKS)]
    pairs = [mt.LinearPair(models[0], "0", "1"), mt.LinearPair(models[0], "1", "2")]
    inputs, targets = torch.randn(2, TASKS, 12, 4, generator=source, dtype=torch.float64)
    model = side_by_side(models, half_squared_error, ((inputs,), (targets,)), pairs)
    point = model.point_at(model.tensors(), model.full)
    assert point.loss is not None
    progress, _ = Progress.begin(point.loss).judge(point.loss, deterministic=True)
    bounds = curvature_bounds(point, model.symmetries)
    assert set(bounds) == set(point.gradients)

    def outputs(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return inputs @ weights["0.weight"].mT @ weights["1.weight"].mT @ weights["2.weight"].mT

    for seed in range(5):
        torch.manual_seed(seed)
        rule = StepRule(hidden=4).double()
        with torch.no_grad():
            rule.head.weight.mul_(400)
            rule.head.weight[0].zero_()
        scales = rule._velocities(point, model.symmetries, progress, rule.initial_state(point), ())[0]
        shares = torch.stack([scales[name] * bounds[name] for name in bounds]).detach()
        assert torch.allclose(shares.sum(0), torch.ones(TASKS, dtype=torch.float64))
        assert float(shares.max() - shares.min()) > 0.1
        weights = {name: value.detach() for name, value in point.parameters.items()}
        steps = {name: -scales[name][:, None, None].detach() * point.gradients[name] for name in weights}
        _, change = torch.func.jvp(lambda at: outputs(at, inputs), (weights,), (steps,))
        slope = sum((point.gradients[name] * steps[name]).sum((1, 2)) for name in weights)
        assert bool((change.square().sum((1, 2)) <= -slope * (1 + 1e-9)).all())


@pytest.mark.parametrize("longest", [1.5, 20.0])
def test_a_step_starts_at_the_joint_bound_and_grows_to_the_longest(longest: float) -> None:
    model, point = problem(bias=False)
    assert point.loss is not None
    progress, _ = Progress.begin(point.loss).judge(point.loss, deterministic=True)
    bounds = curvature_bounds(point, model.symmetries)
    rule = StepRule(hidden=4, longest=longest).double()
    for bias, wanted in ((None, 1.0), (60.0, longest), (-60.0, 0.0)):
        with torch.no_grad():
            rule.head.weight.zero_()
            if bias is not None:
                rule.head.bias[0] = bias
        scales = rule._velocities(point, model.symmetries, progress, rule.initial_state(point), ())[0]
        total = torch.stack([scales[name] * bounds[name] for name in bounds]).sum(0)
        assert torch.allclose(total, torch.full_like(total, wanted), atol=1e-6)


@pytest.mark.parametrize("secants", [0, 2])
def test_steps_cool_down_with_the_rest_and_only_with_a_cooling_rate(secants: int) -> None:
    model, point = problem(bias=False)
    assert point.loss is not None
    progress, _ = Progress.begin(point.loss).judge(point.loss, deterministic=False)
    rested = dataclasses.replace(progress, rest=torch.tensor([9.0, 11.0, 40.0], dtype=torch.float64))
    bounds = curvature_bounds(point, model.symmetries)
    for cooling, output, wanted in ((0.0, 0.0, (1, 1, 1)), (0.1, 0.0, (1, 1.1, 4)), (0.1, 60.0, (1, 1.739, 23.167))):
        rule = StepRule(hidden=4, secants=secants, cooling=cooling).double()
        with torch.no_grad():
            rule.head.weight.zero_()
            if output:
                rule.head.bias[3] = output
        scales = rule._velocities(point, model.symmetries, rested, rule.initial_state(point), ())[0]
        total = torch.stack([scales[name] * bounds[name] for name in bounds]).sum(0)
        assert torch.allclose(1 / total, torch.tensor(wanted, dtype=torch.float64), rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "update"), [("lr", "coordinate"), ("update", "coordinate"), ("update", "tensor")], ids=str
)
def test_every_rule_that_takes_bounded_steps_takes_their_settings(mode: Any, update: Any) -> None:
    settings = shape_of(mode=mode, update=update, hidden=4, secants=2, longest=7.0, cooling=0.3)
    rule = MetaOptimizer(settings).rule
    assert isinstance(rule, StepRule)
    assert (rule.secants, rule.longest, rule.cooling) == (2, 7.0, 0.3)
    assert rule.head.out_features == 5


def test_a_loss_is_at_rest_while_it_is_only_spread_and_no_longer_than_that() -> None:
    torch.manual_seed(0)
    falling = 0.8 ** torch.arange(30.0)
    spread = 1 + 0.1 * torch.randn(30, dtype=torch.float64)
    level = torch.stack((falling.double(), spread))
    rests, longest = {}, torch.zeros(2, dtype=torch.float64)
    for deterministic in (True, False):
        progress = Progress.begin(level[:, 0])
        for loss in level.T:
            progress, _ = progress.judge(loss, deterministic)
            longest = longest.maximum(progress.rest)
        rests[deterministic] = progress.rest
    assert rests[True].tolist() == [0, 0]
    assert float(rests[False][0]) < 3
    assert 20 < float(rests[False][1]) <= 30
    assert float(longest[0]) < 10
    for loss in 0.5 ** torch.arange(1.0, 16.0, dtype=torch.float64):
        progress, _ = progress.judge(level[:, -1] * loss, deterministic=False)
    assert bool((progress.rest < 5).all())


def test_a_closed_gate_is_no_gauge() -> None:
    model, point = problem()
    gauges = gauge_of(point, gauge_symmetries(model.symmetries, linearised=True), gate=-60.0)
    raised = precondition(gauges, point.gradients, point)
    for name, value in point.gradients.items():
        assert torch.allclose(raised[name], value, rtol=1e-9)


def test_the_curvature_above_is_that_of_the_outputs() -> None:
    """For one sample it is the exact Gauss-Newton matrix in the pre-activations: J^T J by finite differences."""
    model, _ = problem(samples=1)
    source = torch.Generator().manual_seed(5)
    batch = (torch.randn(TASKS, 1, 4, generator=source, dtype=torch.float64),), (torch.zeros(TASKS, 1, 3).double(),)
    point = model.point_at(model.tensors(), batch)
    found = output_curvatures(point, model.symmetries)["0"]
    for task in range(TASKS):
        weights = {name: value[task] for name, value in point.parameters.items()}

        def above(z: Tensor, weights: dict[str, Tensor] = weights) -> Tensor:
            return nn.functional.leaky_relu(z, 0.1) @ weights["2.weight"].mT + weights["2.bias"]

        z = batch[0][0][task, 0] @ weights["0.weight"].mT + weights["0.bias"]
        jacobian = torch.func.jacrev(above)(z)
        assert torch.allclose(found[task], jacobian.mT @ jacobian, atol=1e-10)


def test_slopes_are_read_off_a_homogeneous_activation() -> None:
    model, point = problem()
    rescaling = model.symmetries[0]
    assert isinstance(rescaling, mt.Rescaling)
    slopes = LinearisedPair(rescaling).slopes(point)
    assert slopes is not None
    assert bool(((slopes - 1).abs() < 1e-9).logical_or((slopes - 0.1).abs() < 1e-9).all())
    assert 0.2 < float((slopes > 0.5).double().mean()) < 0.8


def test_permuting_hidden_units_permutes_the_gauge() -> None:
    model, point = problem()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {
        "0.weight": point.parameters["0.weight"][:, order],
        "0.bias": point.parameters["0.bias"][:, order],
        "2.weight": point.parameters["2.weight"][:, :, order],
        "2.bias": point.parameters["2.bias"],
    }
    source = torch.Generator().manual_seed(7)
    batch = (torch.randn(TASKS, 9, 4, generator=source, dtype=torch.float64),), (torch.zeros(TASKS, 9, 3).double(),)
    symmetries = gauge_symmetries(model.symmetries, linearised=True)
    here, there = model.point_at(point.parameters, batch), model.point_at(moved, batch)
    for mine, other in zip(
        gauge_of(here, symmetries, reach=-1.0), gauge_of(there, symmetries, reach=-1.0), strict=True
    ):
        assert torch.allclose(other.element, mine.element[:, order][:, :, order], atol=1e-8)


def test_on_minibatches_the_covariances_are_running_means_and_a_teleport_voids_them() -> None:
    model, point = problem()
    other = problem(seed=1)[1]
    symmetries = gauge_symmetries(model.symmetries, linearised=True)
    learned = LearnedGauge(("GL",), hidden=4).double()
    assert point.loss is not None
    progress, _ = Progress.begin(point.loss).judge(point.loss, deterministic=False)
    state = learned.initial_state(point, symmetries)
    moved = torch.tensor([True, False, False])
    for at, where in ((point, None), (other, moved)):
        _, state = learned.choose(at, symmetries, progress, state, deterministic=False, moved=where)
    (key,) = [name for name in state["covariances"] if name.endswith("in/metric")]
    first, second = (each.activations["2"].mT @ each.activations["2"] for each in (point, other))
    assert torch.allclose(state["covariances"][key][0], second[0])
    assert torch.allclose(state["covariances"][key][1:], (first + second)[1:] / 2)


@pytest.mark.parametrize("memory", [0.0, 0.3])
def test_the_metric_keeps_up_as_its_memory_says_and_the_gradients_do_not(memory: float) -> None:
    model, _ = problem()
    points = [problem(seed=seed)[1] for seed in range(4)]
    symmetries = gauge_symmetries(model.symmetries, linearised=True)
    learned = LearnedGauge(("GL",), hidden=4, metric_memory=memory).double()
    state = learned.initial_state(points[0], symmetries)
    metric: Tensor | float = 0.0
    for seen, at in enumerate(points):
        assert at.loss is not None
        progress, _ = Progress.begin(at.loss).judge(at.loss, deterministic=False)
        _, state = learned.choose(at, symmetries, progress, state, deterministic=False)
        kept = min(memory, seen / (seen + 1))
        metric = kept * metric + (1 - kept) * at.activations["2"].mT @ at.activations["2"]
    (key,) = [name for name in state["covariances"] if name.endswith("in/metric")]
    assert torch.allclose(state["covariances"][key], metric)  # type: ignore[arg-type]
    gradients = torch.stack([each.gradients["2.weight"].mT @ each.gradients["2.weight"] for each in points]).mean(0)
    assert torch.allclose(state["covariances"][key.replace("metric", "gradient")], gradients)


def test_a_gauge_leaves_the_model_in_its_place_and_serves_every_width() -> None:
    torch.manual_seed(0)
    meta = MetaOptimizer(shape_of(stays=False, gauge="linearised", hidden=4))
    for width in (3, 8):
        model, point = problem(width)
        taken = meta.step(point, model.symmetries, meta.initial_state(point, model.symmetries))
        assert len(taken.gauges) == 2
        assert taken.moves == () or not bool((taken.size > 0).any())
        for name, value in taken.teleported.items():
            assert torch.equal(value, point.parameters[name])
        assert bool((taken.evaluations == 0).all())


def test_the_condition_of_a_gauge_is_bounded() -> None:
    model, point = problem(width=6, samples=3)
    for gauge in gauge_of(
        point, gauge_symmetries(model.symmetries, linearised=True), reach=40.0, share=-40.0, gate=40.0
    ):
        assert bool((gauge.size <= -math.log(torch.finfo(torch.float64).eps) / 2 + 1e-9).all())
        assert bool(gauge.element.isfinite().all())


def test_attribution_takes_the_gauges_away_or_draws_others_of_their_size() -> None:
    torch.manual_seed(0)
    meta = MetaOptimizer(shape_of(stays=False, gauge="linearised", hidden=4))
    plain = MetaOptimizer(shape_of(mode="lr", hidden=4))
    plain.rule.load_state_dict(meta.rule.state_dict())  # type: ignore[union-attr]
    stack = mt.load_family("leaky_mlp", {"width": 5, "samples": 8}).stack(range(4), "held-out")
    runs = {kind: Learned(kind, meta, kind) for kind in ("learned", "off", "gauge-off", "random")}  # type: ignore[arg-type]
    losses = {kind: run.run(stack, 8).loss for kind, run in runs.items()}
    without = Learned("plain", plain).run(stack, 8).loss
    assert np.array_equal(losses["off"], without)
    assert np.array_equal(losses["gauge-off"], without)
    assert not np.allclose(losses["learned"], without)
    assert not np.allclose(losses["random"], losses["learned"])
    assert [run.moves_by for run in runs.values()] == ["undone", "none", "none", "undone"]

    seen: dict[str, list[Gauge]] = {}
    own = meta.step

    def step(*arguments: Any) -> Any:
        taken = own(*arguments)
        seen.setdefault("random" if arguments[4] is not None else "learned", []).extend(taken.gauges)
        return taken

    meta.step = step  # type: ignore[method-assign]
    runs["random"].run(stack, 8)
    assert len(seen["random"]) == len(seen["learned"]) > 0
    for drawn, learned in zip(seen["random"], seen["learned"], strict=True):
        assert torch.equal(drawn.size, learned.size)
        assert not torch.allclose(drawn.element, learned.element)


def test_what_a_gauge_may_act_along() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 4), nn.Linear(4, 2))
    batch_pair, linear = BatchPair2022(model, "0", "2", model[1]), mt.LinearPair(model, "2", "3")
    assert [each.kind for each in gauge_symmetries([batch_pair, linear], linearised=True)] == [
        "linearised pair",
        "linear pair",
    ]
    assert gauge_symmetries([batch_pair, linear], linearised=False) == (linear,)
    convolutions = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    with pytest.raises(Unsuitable, match="convolution"):
        LinearisedPair(mt.Rescaling(convolutions, "0", "2"))


def test_configurations_that_cannot_work_say_so() -> None:
    with pytest.raises(SettingsError, match=r"gauge\.kind is one of exact, linearised; not 'some'"):
        shape_of(gauge="some")
    with pytest.raises(SettingsError, match=r"rule\.longest has to be a number above 1"):
        shape_of(longest=1.0)
    with pytest.raises(SettingsError, match=r"rule\.cooling has to be a number that is not negative"):
        shape_of(cooling=-0.1)
    for memory in (1.0, -0.1, math.nan):
        with pytest.raises(SettingsError, match=r"gauge\.metric_memory has to be in \[0, 1\)"):
            shape_of(gauge="exact", metric_memory=memory)
    with pytest.raises(SettingsError, match=r"gauge\.kind = 'exact' does not go with rule\.kind = 'base'"):
        shape_of(mode="tele", gauge="exact")
    with pytest.raises(SettingsError, match=r"gauge\.kind = 'exact' has no element to choose if groups are O"):
        shape_of(gauge="exact", groups=("O",))


def test_the_metric_of_a_head_is_its_own_and_not_its_layer_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer holds several heads, and may be one of a pair of layers beside: that one's curvature is of all units."""
    own = case("attention").problem()
    point, symmetries = own.point(), gauge_symmetries(own.symmetries, linearised=False)
    assert len(symmetries) == 4
    assert point.loss is not None
    one = Point(
        **{
            name: {key: value.unsqueeze(0) for key, value in getattr(point, name).items()}
            for name in ("parameters", "gradients", "activations", "cotangents")
        },
        loss=point.loss.reshape(1),
    )
    learned = LearnedGauge(("GL",), hidden=4).double()
    assert one.loss is not None
    progress, _ = Progress.begin(one.loss).judge(one.loss, deterministic=True)

    def chosen() -> list[Gauge]:
        return learned.choose(one, symmetries, progress, learned.initial_state(one, symmetries), deterministic=True)[0]

    alone = chosen()
    assert len(alone) == 8
    assert len({gauge.symmetry.key for gauge in alone}) == 4
    layers = {name: value.shape[-1] for name, value in one.activations.items()}
    curvatures = {name: torch.diag(torch.arange(1.0, width + 1)).double()[None] for name, width in layers.items()}
    monkeypatch.setattr("metateleport.learned.gauge.output_curvatures", lambda *_: curvatures)
    for first, second in zip(alone, chosen(), strict=True):
        assert torch.equal(first.element, second.element)


def test_where_no_pass_was_seen_there_is_no_gauge() -> None:
    model, point = problem()
    learned, symmetries = LearnedGauge(("GL",), hidden=4), gauge_symmetries(model.symmetries, linearised=True)
    assert len(learned.places(point, symmetries)) == 2
    assert learned.places(point.replace(activations={}), symmetries) == []
