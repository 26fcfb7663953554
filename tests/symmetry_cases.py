"""One small problem for every kind of symmetry, shared by the tests of symmetries, teleporters and stacks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from covering import pairwise
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import point_of
from metateleport.families import Batch, TaskStack
from metateleport.point import Point
from metateleport.symmetries import BatchPair2022, BatchPair2024, QuadraticRotation


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum() / 2


def itself(outputs: Tensor) -> Tensor:
    return outputs


def side_by_side(
    models: Sequence[nn.Module],
    loss: Callable[..., Tensor],
    batch: Batch,
    symmetries: Sequence[mt.Symmetry] = (),
) -> TaskStack:
    """A stack of models, each on its own part of a batch with the tasks in front."""
    parts = [tuple(tuple(value[task] for value in part) for part in batch) for task in range(len(models))]
    return TaskStack([mt.Task(model, loss, *part, symmetries) for model, part in zip(models, parts, strict=True)])


@dataclasses.dataclass
class Problem:
    """A model in float64 with data, a loss and symmetries in the order of the data flow."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    loss: Callable[..., Tensor]
    symmetries: Sequence[mt.Symmetry]

    @property
    def task(self) -> mt.Task:
        return mt.Task(self.model, self.loss, self.inputs, self.targets, self.symmetries)

    def loss_of(self, outputs: Tensor) -> Tensor:
        return self.loss(outputs, *self.targets)

    def at(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the model at other parameters."""
        model = copy.deepcopy(self.model)
        model.load_state_dict({name: value.detach() for name, value in parameters.items()}, strict=False)
        return model

    def point(self, parameters: Mapping[str, Tensor] | None = None) -> Point:
        """A fresh evaluation of the model, or of the model at other parameters."""
        model = self.model if parameters is None else self.at(parameters)
        return point_of(model, self.symmetries, self.inputs, None, self.loss_of)[0]

    def outputs(
        self, parameters: Mapping[str, Tensor] | None = None, inputs: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """The model's outputs, on its own inputs if no others are given."""
        model = self.model if parameters is None else self.at(parameters)
        with torch.no_grad():
            return model(*(self.inputs if inputs is None else inputs))


@functools.cache
def _symmetries(case: Case) -> Sequence[mt.Symmetry]:
    """Those of one problem of a case: tests are collected by what kind they are."""
    return case.problem().symmetries


@dataclasses.dataclass(frozen=True)
class Case:
    """A family of problems of one shape."""

    name: str
    build: Callable[[], nn.Module]
    symmetries: Callable[[nn.Module], Sequence[mt.Symmetry]]
    shape: tuple[int, ...]
    group_law: bool = True
    """Whether acting twice is acting with the product."""
    conditioned: bool = True
    """Whether large elements are ill-conditioned, and not rotations or translations."""

    def __str__(self) -> str:
        return self.name

    @property
    def diagonal(self) -> bool:
        return all(symmetry.group.name == "diagonal" for symmetry in _symmetries(self))

    @property
    def exact(self) -> bool:
        return all(symmetry.exactness == "exact" for symmetry in _symmetries(self))

    @property
    def moves_buffers(self) -> bool:
        return any(symmetry.buffers for symmetry in _symmetries(self))

    def problem(self, seed: int = 0) -> Problem:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = self.build().double()
            inputs = torch.randn(self.shape, dtype=torch.float64)
            with torch.no_grad():
                outputs = model(inputs)
            targets = torch.randn(outputs.shape, dtype=torch.float64)
        return Problem(model, (inputs,), (targets,), half_squared_error, self.symmetries(model))

    def fresh_inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64),)

    def stack(self, tasks: int = 3) -> tuple[TaskStack, Batch]:
        """Problems of different seeds in one graph, and their data."""
        problems = [self.problem(seed) for seed in range(tasks)]
        stack = TaskStack([each.task for each in problems])
        return stack, stack.full


class Quadratic(nn.Module):
    """Half of x^T A x; A is the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(size))

    def forward(self, matrix: Tensor) -> Tensor:
        return self.x @ matrix @ self.x / 2


class QuadraticCase(Case):
    def problem(self, seed: int = 0) -> Problem:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = self.build().double()
            root = torch.randn(self.shape, dtype=torch.float64)
        matrix = root @ root.mT + 0.1 * torch.eye(self.shape[0], dtype=torch.float64)
        return Problem(model, (matrix,), (), itself, self.symmetries(model))


def _mlp(*sizes: int, activation: Callable[[], nn.Module] | None, bias: bool = True) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers.append(nn.Linear(inputs, outputs, bias=bias))
            if activation is not None:
                layers.append(activation())
        return nn.Sequential(*(layers if activation is None else layers[:-1]))

    return build


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.1)


def _batch(kind: type, *firsts: int) -> Callable[[nn.Module], Sequence[mt.Symmetry]]:
    def symmetries(model: nn.Module) -> Sequence[mt.Symmetry]:
        return [kind(model, str(first), str(first + 2), model[first + 1]) for first in firsts]  # type: ignore[index]

    return symmetries


def _conv_linear() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))


def _conv_conv() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.LeakyReLU(0.2), nn.Conv1d(3, 2, 2, padding=1), nn.Flatten())


def _mixed(model: nn.Module) -> Sequence[mt.Symmetry]:
    return [
        mt.Rescaling(model, "0", "2"),
        BatchPair2024(model, "2", "4", nn.LeakyReLU(0.1)),
        BatchPair2022(model, "4", "6", nn.LeakyReLU(0.1)),
    ]


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2),
        nn.AvgPool2d(3),
        nn.PReLU(6),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


class _Streams(nn.Module):
    """A residual stream with no norm, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.block, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(9, 2)
        self.branch = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inwards(x))
        h = torch.relu(h + self.block(h))
        return self.out(torch.cat((torch.nn.functional.leaky_relu(self.branch(h)), h), -1))


def _batch_normed() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    )
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model.eval()


def _normed() -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(1, 2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 3),
        nn.Flatten(),
        nn.LayerNorm(24),
        nn.Linear(24, 5, bias=False),
        nn.RMSNorm(5),
        nn.Linear(5, 2),
    )


class _Attention(nn.Module):
    """Two heads, written by hand, with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def heads(self, x: Tensor, layer: nn.Module) -> Tensor:
        return layer(x).unflatten(-1, (2, 4)).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.heads(x, layer) for layer in (self.query, self.key, self.value))
        scores = (query @ key.mT / 2).softmax(-1)
        return self.out((scores @ value).transpose(-2, -3).flatten(-2))


class _FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class _RotaryAttention(nn.Module):
    """Two query heads that share a key and a value head, with a rotary embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.out = nn.Linear(8, 8)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2]).unsqueeze(-1) * torch.tensor([1.0, 0.1]).to(x.dtype)
        angles = torch.cat((angles, angles), -1)
        return x * angles.cos() + torch.cat((-x[..., 2:], x[..., :2]), -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        query = self.turned(self.query(x).unflatten(-1, (2, 4)).transpose(-2, -3))
        key, value = self.turned(self.key(x).unsqueeze(-3)), self.value(x).unsqueeze(-3)
        key, value = (each.expand(query.shape) for each in (key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class _Adapter(nn.Module):
    """A layer with a low-rank adapter, named as PEFT does."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.lora_A, self.lora_B = nn.Linear(6, 3, bias=False), nn.Linear(3, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.lora_B(self.lora_A(x))


class _LayerScaled(nn.Module):
    """A layer whose outputs a vector of gains scales."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.branch, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.gamma = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.gamma * self.branch(torch.tanh(self.inwards(x)))))


class _LinearStream(nn.Module):
    """A residual stream of linear layers, behind a convolution of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards, self.block, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Conv1d(4, 5, 1)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inwards(x)
        h = h + self.block(h)
        return self.last(self.out(h.unsqueeze(-1)).squeeze(-1))


def _found_case(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], kinds: Sequence[str], **settings: bool
) -> Case:
    """A case whose symmetries are found, once: those of some kinds, which have to be as many as expected."""

    @functools.cache
    def found() -> Sequence[mt.Symmetry]:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            every = mt.find_symmetries(build().double(), torch.randn(shape, dtype=torch.float64))
        # A key's bias that moves freely has no gradient that could be compared.
        chosen = [each for each in every if each.kind in kinds and each.parameters != ("key.bias",)]
        assert sorted(each.kind for each in chosen) == sorted(kinds), every
        return chosen

    return Case(name, build, lambda _: found(), shape, **settings)


CASES: list[Case] = [
    Case("linear pair", _mlp(3, 4, 2, activation=None), lambda m: [mt.LinearPair(m, "0", "1")], (6, 3)),
    Case(
        "linear pair without bias",
        _mlp(3, 4, 2, activation=None, bias=False),
        lambda m: [mt.LinearPair(m, "0", "1")],
        (6, 3),
    ),
    Case("rescaling", _mlp(3, 4, 2, activation=_leaky), lambda m: [mt.Rescaling(m, "0", "2")], (6, 3)),
    Case(
        "rescaling without bias",
        _mlp(3, 4, 2, activation=nn.ReLU, bias=False),
        lambda m: [mt.Rescaling(m, "0", "2")],
        (6, 3),
    ),
    Case("rescaling, PReLU", _mlp(3, 4, 2, activation=nn.PReLU), lambda m: [mt.Rescaling(m, "0", "2")], (6, 3)),
    Case("rescaling, convolution to linear", _conv_linear, lambda m: [mt.Rescaling(m, "0", "4")], (5, 2, 6, 6)),
    Case("rescaling, convolutions", _conv_conv, lambda m: [mt.Rescaling(m, "0", "2")], (4, 2, 7)),
    Case("2022 form", _mlp(6, 5, 3, activation=_leaky), _batch(BatchPair2022, 0), (4, 6)),
    Case("2022 form, samples at width", _mlp(5, 5, 3, activation=_leaky, bias=False), _batch(BatchPair2022, 0), (5, 5)),
    Case("2024 form", _mlp(3, 7, 3, activation=nn.Tanh), _batch(BatchPair2024, 0), (4, 3), group_law=False),
    Case("2024 form, samples at width", _mlp(4, 4, 3, activation=nn.Tanh), _batch(BatchPair2024, 0), (4, 4)),
    Case(
        "chain of linear pairs",
        _mlp(3, 4, 5, 2, activation=None),
        lambda m: [mt.LinearPair(m, "0", "1"), mt.LinearPair(m, "1", "2")],
        (6, 3),
    ),
    Case("chain of rescalings", _mlp(3, 4, 5, 2, activation=_leaky), mt.symmetries_of, (6, 3)),
    Case("chain of 2022 forms", _mlp(5, 6, 4, 3, activation=_leaky), _batch(BatchPair2022, 0, 2), (3, 5)),
    Case(
        "chain of 2024 forms",
        _mlp(4, 6, 6, 3, activation=nn.Tanh),
        _batch(BatchPair2024, 0, 2),
        (4, 4),
        group_law=False,
    ),
    Case("mixed chain", _mlp(4, 6, 6, 6, 3, activation=_leaky), _mixed, (4, 4), group_law=False),
    QuadraticCase("quadratic", lambda: Quadratic(4), lambda m: [QuadraticRotation(m)], (4, 4), conditioned=False),
    _found_case("rescaling, grouped and depthwise convolutions", _grouped, (3, 2, 7, 7), ["rescaling"] * 3),
    _found_case("rescaling, residual stream and concatenated skip", _Streams, (3, 3), ["rescaling"] * 2),
    _found_case("batch norm, evaluation", _batch_normed, (4, 2, 6, 6), ["before batch norm", "after batch norm"] * 2),
    _found_case("norm gains", _normed, (3, 2, 6, 4), ["norm gain"] * 3),
    _found_case("attention", _Attention, (3, 5, 8), ["attention QK"] * 2 + ["attention VO"] * 2),
    _found_case("attention, one projection", _FusedAttention, (3, 5, 8), ["attention QK"] * 2 + ["attention VO"] * 2),
    _found_case("attention, rotary and grouped", _RotaryAttention, (3, 5, 8), ["attention QK", "attention VO"]),
    _found_case("gated", _Gated, (5, 3), ["gated MLP"]),
    _found_case("low-rank adapter", _Adapter, (5, 6), ["LoRA pair"]),
    _found_case("layer scale", _LayerScaled, (5, 3), ["layer scale"]),
    _found_case("rescaling of one unit", _mlp(3, 1, 2, activation=_leaky), (6, 3), ["rescaling"], conditioned=False),
    _found_case("linear chain", _LinearStream, (5, 3), ["linear chain"] * 2),
    _found_case("translations", _Attention, (3, 5, 8), ["translation"] * 2, conditioned=False),
]


def by_kind(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases of each kind of symmetry, or of each mixture of kinds, in the order in which the kinds appear."""
    kinds: dict[tuple[str, ...], list[Case]] = {}
    for each in cases:
        kinds.setdefault(tuple(sorted({symmetry.kind for symmetry in each.problem().symmetries})), []).append(each)
    return list(kinds.values())


def meeting(values: Sequence[Any], cases: Sequence[Case]) -> list[tuple[Any, Case]]:
    """A covering design: each value meets every kind of symmetry, and every case is met.

    A kind has several cases; which of them a value meets goes round.

    Args:
        values: what is tried on symmetries.
        cases: those that it is tried on.

    Returns:
        Pairs of a value and a case, none of them twice.
    """
    kinds = by_kind(cases)
    rows = pairwise(range(len(values)), range(len(kinds)), range(max(len(kind) for kind in kinds)))
    pairs = dict.fromkeys((number, kind, place % len(kinds[kind])) for number, kind, place in rows)
    return [(values[number], kinds[kind][place]) for number, kind, place in pairs]


LEARNED: list[Case] = [each for each in CASES if each.name != "translations"]
"""Cases that a learned teleporter moves along; it has no basis for translations and leaves them alone."""


def case(name: str) -> Case:
    return next(each for each in CASES if each.name == name)


def relative(new: Tensor, old: Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    return float((new - old).norm() / old.norm().clamp_min(1e-30))


def assert_close(new: Mapping[str, Tensor], old: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    """Equal entries up to a relative difference, on the scale of the largest of them."""
    assert set(new) == set(old)
    scale = max((float(value.detach().norm()) for value in old.values()), default=1.0)
    for name, value in old.items():
        assert new[name].shape == value.shape, name
        assert float((new[name] - value).detach().norm()) <= tolerance * scale, name


def largest_drift(model: nn.Module, symmetries: Sequence[mt.Symmetry], *inputs: Tensor, size: float = 0.7) -> float:
    """The largest relative change of a float64 model's output under a random element of each of some symmetries."""
    point = Point({name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())})
    with torch.no_grad():
        before = model(*inputs)
        worst = 0.0
        for number, symmetry in enumerate(symmetries):
            element = symmetry.group.random(size=size, seed=number, dtype=torch.float64)
            moved = symmetry.act(element, point).parameters
            worst = max(worst, relative(torch.func.functional_call(model, moved, inputs), before))
    return worst
