"""What is found in modules of every kind: counts, groups, order, and how it is told."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import Written
from torch import Tensor, nn

import metateleport as mt
from metateleport.symmetries import BatchPair2022, BatchPair2024


def kinds(found: mt.Symmetries) -> dict[str, int]:
    """Dimensions by kind, but for translations."""
    return {kind: total for kind, (_, total) in found.by_kind().items() if kind != "translation"}


def x(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_a_chain_gives_its_pairs_in_the_order_of_the_data_flow() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2), nn.Linear(2, 5), nn.PReLU(), nn.Linear(5, 1))
    found = mt.find_symmetries(model, x(6, 3))
    told = [(each.kind, each.dimension, each.exactness) for each in found]
    expected = [("rescaling", 4), ("linear pair", 4), ("translation", 2), ("rescaling", 5)]
    assert told == [(kind, dimension, "exact") for kind, dimension in expected]
    assert isinstance(found[0], mt.Rescaling)
    assert isinstance(found[1], mt.LinearPair)
    assert found[1].parameters == ("2.weight", "2.bias", "3.weight")
    assert all(each.drift <= 1e-12 for each in found)
    assert found.dimension == 15
    assert not found.refused


def test_the_order_is_that_of_the_flow_not_that_of_definition() -> None:
    model = Written(lambda m, h: m.a(m.b(torch.relu(m.c(h)))), a=nn.Linear(5, 2), b=nn.Linear(4, 5), c=nn.Linear(3, 4))
    found = [each for each in mt.find_symmetries(model, x(6, 3)) if each.kind != "translation"]
    assert [each.parameters for each in found] == [
        ("c.weight", "c.bias", "b.weight"),
        ("b.weight", "b.bias", "a.weight"),
    ]


def test_functional_calls_residual_streams_and_containers() -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(m: Any, h: Tensor) -> Tensor:
        h = nn.functional.relu(m.inwards(h))
        for block in m.blocks:
            h = h + nn.functional.leaky_relu(block(h), 0.2)
        return m.out(nn.functional.dropout(h, 0.5, m.training))

    model = Written(forward, inwards=nn.Linear(3, 4), blocks=blocks, out=nn.Linear(4, 2))
    for mode in (True, False):
        (stream,) = mt.find_symmetries(model.train(mode), x(6, 3))
        assert (stream.kind, stream.dimension) == ("rescaling", 4)
        assert set(stream.parameters) == {name for name, _ in model.named_parameters()} - {"out.bias"}


@pytest.mark.parametrize("unit", [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ReLU6(), nn.Softplus(), nn.ELU(), nn.Softmax(-1)])
def test_what_is_not_homogeneous_lets_nothing_pass_and_is_named(unit: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), unit, nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    found = mt.find_symmetries(model, x(6, 3))
    assert [each.parameters for each in found] == [("2.weight", "2.bias", "4.weight")]
    (refused,) = (each for each in found.refused if "batch pair" not in each.reason)
    assert refused.module == "1"
    assert "not followed" in refused.reason
    assert "0.weight" in refused.parameters


@pytest.mark.parametrize(
    ("between", "shape"),
    [
        ([nn.MaxPool2d(2), nn.Dropout(0.5)], (3, 2, 8, 8)),
        ([nn.AvgPool2d(2), nn.ReLU()], (3, 2, 8, 8)),
        ([nn.AdaptiveAvgPool2d(4), nn.PReLU()], (3, 2, 8, 8)),
        ([nn.ZeroPad2d(1), nn.LeakyReLU(0.1)], (3, 2, 8, 8)),
        ([nn.Upsample(scale_factor=2), nn.ReLU()], (3, 2, 8, 8)),
    ],
    ids=lambda value: value[0].__class__.__name__ if isinstance(value, list) else "",
)
def test_convolutions_through_what_stands_between(between: list[nn.Module], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), *between, nn.Conv2d(6, 4, 2, groups=2), nn.ReLU(), nn.Flatten())
    model.append(nn.LazyLinear(3))
    model(x(*shape))
    assert kinds(mt.find_symmetries(model, x(*shape))) == {"rescaling": 10}


def test_convolutions_alone_have_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2))
    assert kinds(mt.find_symmetries(model, x(3, 2, 8, 8))) == {"linear chain": 16}


def test_depthwise_kernels_move_on_both_sides() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv1d(8, 2, 1))
    found = mt.find_symmetries(model, x(3, 2, 12))
    assert [(each.kind, each.dimension) for each in found] == [("rescaling", 4), ("rescaling", 8)]


def test_batch_norm_in_training_and_evaluation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    before, after = mt.find_symmetries(model.eval(), x(16, 3))
    assert (before.kind, before.exactness, before.dimension) == ("before batch norm", "exact", 4)
    assert before.buffers == ("1.running_mean", "1.running_var")
    assert (after.kind, after.exactness) == ("after batch norm", "exact")
    before, after = mt.find_symmetries(model.train(), x(16, 3))
    assert (before.exactness, after.exactness) == ("approximate", "exact")
    assert 1e-12 < before.drift < 1e-2
    assert after.drift <= 1e-12


def test_moved_running_statistics_reach_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    inputs = x(16, 3).double()
    expected, variance = model(inputs).detach(), model[1].running_var.clone()
    assert mt.teleport(model, mt.RandomTeleporter(seed=0), inputs).accepted
    assert not torch.equal(model[1].running_var, variance)
    assert torch.allclose(model(inputs), expected, rtol=1e-12)


def test_frozen_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model[0].bias.requires_grad_(False)
    found = mt.find_symmetries(model, x(6, 3))
    assert [each.parameters for each in found] == [("2.weight", "2.bias", "4.weight")]
    assert any("frozen" in each.reason and each.parameters == ("0.bias",) for each in found.refused)


def test_what_needs_nothing_frozen_remains() -> None:
    layers = {name: nn.Linear(8, 8) for name in ("query", "key", "value", "out")}

    def forward(m: Any, h: Tensor) -> Tensor:
        query, key, value = (getattr(m, name)(h).unflatten(-1, (2, 4)).transpose(-2, -3) for name in list(layers)[:3])
        return m.out(nn.functional.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2))

    model = Written(forward, **layers)
    assert kinds(mt.find_symmetries(model, x(2, 5, 8))) == {"attention QK": 32, "attention VO": 32}
    model.out.weight.requires_grad_(False)
    found = mt.find_symmetries(model, x(2, 5, 8))
    assert kinds(found) == {"attention QK": 32}
    assert {each.parameters for each in found if each.kind == "translation"} == {("key.bias",)}


def test_embeddings_and_heads_take_part() -> None:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        h = m.tokens(tokens) + m.places(torch.arange(tokens.shape[-1]))
        return m.head(m.norm(torch.tanh(m.up(h))))

    model = Written(
        forward,
        tokens=nn.Embedding(11, 3),
        places=nn.Embedding(7, 3),
        up=nn.Linear(3, 6),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, 11),
    )
    embedded, gain = mt.find_symmetries(model, torch.randint(0, 11, (4, 7)))
    assert (embedded.kind, embedded.dimension) == ("linear chain", 9)
    assert embedded.parameters == ("tokens.weight", "places.weight", "up.weight")
    assert (gain.kind, gain.parameters) == ("norm gain", ("norm.weight", "norm.bias", "head.weight"))


def test_a_teleport_finds_the_exact_ones_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 2)).double()
    inputs = x(4, 6).double()
    assert len(mt.find_symmetries(model, inputs)) == 2
    report = mt.teleport(model, mt.RandomTeleporter(seed=0), inputs)
    assert report.accepted
    assert len(report.sizes) == 1


def test_batch_pairs_are_found_where_the_samples_are_few() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1), nn.Linear(5, 2))
    few = mt.find_symmetries(model, x(4, 6))
    assert [(each.exactness, each.dimension) for each in few] == [("exact", 5), ("batch-exact", 25)]
    assert isinstance(few[1], BatchPair2022)
    many = mt.find_symmetries(model, x(7, 6))
    assert [each.exactness for each in many] == ["exact"]
    reasons = [each.reason for each in many.refused]
    assert [each.split(":")[0] for each in reasons] == ["batch pair, 2022 form", "batch pair, 2024 form"]
    assert all("more samples" in each for each in reasons)
    assert [each.exactness for each in few.exact] == ["exact"]
    # Five samples are no more than what the first layer puts out, but more than it takes in.
    narrow = nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.1), nn.Linear(5, 2))
    assert [each.kind for each in mt.find_symmetries(narrow, x(5, 3))] == ["rescaling", "batch pair, 2024 form"]


ELEMENTWISE = [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Softplus(2.0), nn.ELU(0.5)]
ELEMENTWISE += [nn.SELU(), nn.CELU(0.7), nn.LogSigmoid(), nn.Hardswish(), nn.ReLU(), nn.ELU(inplace=True)]


@pytest.mark.parametrize("unit", ELEMENTWISE, ids=repr)
def test_the_2024_form_is_found_through_any_activation_and_holds_on_its_batch_only(unit: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 8), unit, nn.Dropout(0.5), nn.Linear(8, 2)).double().eval()
    inputs, fresh = x(5, 6).double(), x(5, 6).double()
    (found,) = (each for each in mt.find_symmetries(model, inputs) if each.exactness == "batch-exact")
    assert isinstance(found, BatchPair2024)
    assert found.dimension == 64
    assert 0 < found.drift <= 1e-10
    expected, elsewhere = model(inputs).detach(), model(fresh).detach()
    report = mt.teleport(model, mt.RandomTeleporter(size=1.0, seed=0), inputs, symmetries=[found])
    assert report.accepted
    with torch.no_grad():
        assert float((model(inputs) - expected).norm() / expected.norm()) <= 1e-10
        assert float((model(fresh) - elsewhere).norm() / elsewhere.norm()) > 1e-4


def test_batch_pairs_through_functions_sequences_and_chains() -> None:
    def forward(m: Any, h: Tensor) -> Tensor:
        return m.c(nn.functional.gelu(m.b(torch.tanh(m.a(h))), approximate="tanh"))

    model = Written(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 9), c=nn.Linear(9, 2))
    found = mt.find_symmetries(model, x(2, 3, 4))
    assert [(each.kind, each.dimension) for each in found] == [
        ("batch pair, 2024 form", 64),
        ("batch pair, 2024 form", 81),
    ]
    assert repr(found[1].activation) == "GELU(approximate='tanh')"  # type: ignore[attr-defined]


@pytest.mark.parametrize("between", [[nn.Softmax(-1)], [nn.Tanh(), nn.LayerNorm(8)], [nn.Tanh(), nn.Dropout(0.5)]])
def test_batch_pairs_need_one_activation_and_nothing_else(between: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 2)).train()
    assert not [each for each in mt.find_symmetries(model, x(3, 6)) if each.exactness == "batch-exact"]


ONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "a unit": (lambda: nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2)), (6, 3), {"rescaling": 1}),
    "a bottleneck": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 3)), (6, 3), {"rescaling": 1}),
    "units in a row": (
        lambda: nn.Sequential(nn.Linear(3, 1), nn.PReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 4)),
        (6, 3),
        {"rescaling": 2},
    ),
    "a channel": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(49, 2)),
        (2, 1, 9, 9),
        {"rescaling": 1},
    ),
    "a normed unit": (
        lambda: nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(1, 2)).eval(),
        (6, 3),
        {"before batch norm": 1, "after batch norm": 1},
    ),
    "an output": (lambda: nn.Linear(3, 1), (6, 3), {}),
    "a squashed unit": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)), (6, 3), {}),
    "an adapter of rank one": (lambda: _adapter(1), (6, 4), {"LoRA pair": 1}),
}


@pytest.mark.parametrize("name", ONES)
def test_axes_of_one_entry_have_groups_of_dimension_one(name: str) -> None:
    build, shape, expected = ONES[name]
    found = mt.find_symmetries(build(), x(*shape))
    assert kinds(found) == expected
    assert all(each.drift <= 1e-12 for each in found)


def _adapter(rank: int) -> nn.Module:
    layers = {
        "base": nn.Linear(4, 3),
        "lora_A": nn.Linear(4, rank, bias=False),
        "lora_B": nn.Linear(rank, 3, bias=False),
    }
    nn.init.zeros_(layers["lora_B"].weight)
    return Written(lambda m, h: m.base(h) + m.lora_B(m.lora_A(h)), **layers)


class Scaled(nn.Module):
    """A branch with a vector of gains at its end, joined to a stream."""

    def __init__(self, joined: bool, unit: Callable[[Tensor], Tensor], inplace: bool = False) -> None:
        super().__init__()
        self.inwards, self.branch, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.gamma = nn.Parameter(torch.full((4,), 1e-6))
        self.joined, self.unit, self.inplace = joined, unit, inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.unit(self.inwards(x))
        branch = self.branch(h)
        branch = branch.mul_(self.gamma) if self.inplace else self.gamma * branch
        return self.out(self.unit(h + branch if self.joined else branch))


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_scales_undo_what_they_take_in(inplace: bool) -> None:
    branch = ("branch.weight", "branch.bias", "gamma")
    (only,) = mt.find_symmetries(Scaled(True, torch.tanh, inplace), x(9, 3))
    assert (only.kind, only.parameters, only.dimension) == ("layer scale", branch, 4)
    stream, scale = mt.find_symmetries(Scaled(True, torch.relu, inplace), x(9, 3))
    assert (stream.kind, stream.dimension, len(stream.parameters)) == ("rescaling", 4, 5)
    assert "gamma" in stream.parameters
    assert scale.parameters == branch
    before, scale, behind = mt.find_symmetries(Scaled(False, torch.relu, inplace), x(9, 3))
    assert before.parameters == ("inwards.weight", "inwards.bias", "branch.weight")
    assert scale.parameters == branch
    assert (behind.kind, behind.parameters) == ("rescaling", ("gamma", "out.weight"))


def test_a_frozen_or_shared_layer_scale_undoes_nothing() -> None:
    frozen = Scaled(False, torch.relu)
    frozen.gamma.requires_grad_(False)
    found = mt.find_symmetries(frozen, x(9, 3))
    assert [each.parameters for each in found] == [
        ("inwards.weight", "inwards.bias", "branch.weight"),
        ("branch.weight", "branch.bias", "out.weight"),
    ]
    shared = Scaled(True, torch.tanh)
    shared.out = Written(lambda m, h: m.layer(h) + m.gamma.sum(), layer=nn.Linear(4, 2))
    shared.out.gamma = shared.gamma
    assert len(mt.find_symmetries(shared, x(9, 3))) == 0
    # In a second place it scales what cannot move: not even tried.
    twice = Written(lambda m, h: m.out(torch.tanh(m.gamma * m.branch(h)) + m.gamma * h))
    twice.gamma, twice.branch, twice.out = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 2)
    found = mt.find_symmetries(twice, x(9, 4))
    assert len(found) == 0
    assert not any("drift" in each.reason for each in found.refused)


def test_inputs_as_tensor_tuple_and_dict() -> None:
    model = Written(lambda m, a, b: m.out(torch.relu(m.into(a) + b)), into=nn.Linear(3, 4), out=nn.Linear(4, 2))
    assert len(mt.find_symmetries(model, (x(6, 3), torch.zeros(4)))) == 0
    scaled = Written(lambda m, a, b: m.out(torch.relu(m.into(a)) * b), into=nn.Linear(3, 4), out=nn.Linear(4, 2))
    for example in ((x(6, 3), torch.tensor(2.0)), {"a": x(6, 3), "b": torch.tensor(2.0)}):
        assert kinds(mt.find_symmetries(scaled, example)) == {"rescaling": 4}


def test_a_loss_may_leave_more_free_than_the_outputs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = mt.find_symmetries(model, x(6, 3), loss=lambda outputs: outputs.square().mean())
    assert kinds(found) == {"rescaling": 4}


def test_nothing_of_the_model_is_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model(x(8, 3)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [value.grad.clone() for value in model.parameters()]  # type: ignore[union-attr]
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    mt.find_symmetries(model, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), drawn)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for value, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(value.grad, gradient)  # type: ignore[arg-type]
        assert value.requires_grad


def test_a_table_and_json_are_made_of_what_was_found() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2))
    found = mt.find_symmetries(model, x(6, 3))
    text = str(found)
    assert "0.weight, 0.bias, 2.weight" in text
    assert "PositiveDiagonal(4)" in text
    assert "3: tanh is not followed [2.weight]" in text
    data = json.loads(found.to_json())
    assert set(data) == {"schema", "symmetries", "refused"}
    (entry,) = data["symmetries"]
    assert entry["parameters"] == ["0.weight", "0.bias", "2.weight"]
    assert entry["kind"] == "rescaling"
    assert entry["dimension"] == 4
    assert entry["drift"] <= 1e-12
    assert data["refused"][0]["module"] == "3"
    assert isinstance(found[:1], mt.Symmetries)


def test_a_symmetry_named_by_hand_has_no_drift() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert math.isnan(mt.LinearPair(model, "0", "1").drift)


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        mt.find_symmetries(nn.ReLU(), x(2, 3))
    with pytest.raises(ValueError, match="does not run on its example input"):
        mt.find_symmetries(nn.Linear(3, 2), x(2, 4))


def test_optimizers_find_what_an_example_shows() -> None:
    torch.manual_seed(0)
    model = Written(lambda m, h: m.out(nn.functional.silu(m.gate(h)) * m.up(h)), **_gated()).double()
    inputs = x(6, 3).double()
    optimizer = mt.TeleportingOptimizer(
        torch.optim.SGD(model.parameters(), 1e-3), model, mt.RandomTeleporter(seed=0), every=1, example_input=inputs
    )
    assert [each.kind for each in optimizer.symmetries] == ["gated MLP"]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_report is not None
    assert optimizer.last_report.accepted
    assert optimizer.last_report.drift <= 1e-12
    half = mt.TeleportingOptimizer(
        torch.optim.SGD(nn.Sequential(model.up, model.out).parameters(), 1e-3),
        model,
        mt.RandomTeleporter(seed=0),
        example_input=inputs,
    )
    assert [each.kind for each in half.symmetries] == ["gated MLP"]


def test_optimizers_tell_that_they_move_no_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    found = mt.find_symmetries(model, x(16, 3))
    inner = torch.optim.SGD(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match=r"moves the buffer '1\.running_mean'"):
        mt.TeleportingOptimizer(inner, model, mt.RandomTeleporter(), symmetries=found)
    quiet = mt.TeleportingOptimizer(inner, model, mt.RandomTeleporter(), example_input=x(16, 3))
    assert [each.kind for each in quiet.symmetries] == ["after batch norm"]


def _gated() -> dict[str, nn.Module]:
    return {"gate": nn.Linear(3, 4), "up": nn.Linear(3, 4), "out": nn.Linear(4, 2)}


def test_heads_are_told_apart_by_a_learned_teleporter() -> None:

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    found = mt.find_symmetries(attention, (x(2, 5, 8),) * 3)
    assert Counter(each.kind for each in found)["attention QK"] == 2
    assert len({each.key for each in found}) == len(found)
