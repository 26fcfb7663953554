"""Where symmetries act: permuted features, shared memory, routing, frozen weights, and keys that tell all apart."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import Written
from symmetry_cases import largest_drift
from torch import Tensor, nn
from torch.nn import functional

import metateleport as mt
from metateleport.symmetries import BatchPair2022, BatchPair2024, Unsuitable
from metateleport.symmetries._memory import overlaps


def held(model: nn.Module, *shape: int, **settings: Any) -> list[str]:
    """Kinds of the exact symmetries that are found, each of which leaves the outputs on other inputs as they were."""
    model = model.double()
    found = mt.find_symmetries(model, torch.randn(shape, dtype=torch.float64), **settings).exact
    assert largest_drift(model, found, torch.randn(shape, dtype=torch.float64)) <= 1e-10
    return [f"{type(each).__name__} {each.group}" for each in found]


def features(turn: Callable[[Tensor], Tensor], act: Callable[[Tensor], Tensor] = torch.relu) -> nn.Module:
    return Written(
        lambda m, x: m.b(torch.flatten(turn(act(m.a(x))), 1)), a=nn.Conv2d(2, 3, 3), b=nn.Linear(3 * 4 * 4, 5)
    )


def units(turn: Callable[[Tensor], Tensor], act: Callable[[Tensor], Tensor] = torch.relu) -> nn.Module:
    return Written(lambda m, x: m.b(turn(act(m.a(x)))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))


def test_a_plain_flattening_is_a_plain_pair() -> None:
    assert held(features(lambda h: h), 5, 2, 6, 6) == ["Rescaling PositiveDiagonal(3)"]
    assert held(features(lambda h: h).to(memory_format=torch.channels_last), 5, 2, 6, 6) == [
        "Rescaling PositiveDiagonal(3)"
    ]
    # Positions in another order leave the channels where they were.
    assert held(features(lambda h: h.transpose(2, 3)), 5, 2, 6, 6) == ["Rescaling PositiveDiagonal(3)"]
    assert held(units(lambda h: h), 7, 4) == ["Rescaling PositiveDiagonal(6)"]


@pytest.mark.parametrize(
    "turn",
    [
        lambda h: h.permute(0, 2, 3, 1),
        lambda h: h.movedim(1, -1).contiguous(),
        lambda h: h.permute(0, 2, 1, 3),
        lambda h: h.flip(1),
        lambda h: h.roll(1, 1),
        lambda h: h.flatten(1).unflatten(1, (3, 4, 4)).transpose(1, 2),
    ],
    ids=["channels last", "moved", "rows first", "flipped", "rolled", "regrouped"],
)
def test_a_permuted_flattening_acts_where_the_features_went(turn: Callable[[Tensor], Tensor]) -> None:
    assert held(features(turn), 5, 2, 6, 6) == ["ChannelRescaling PositiveDiagonal(3)"]


@pytest.mark.parametrize(
    "turn",
    [
        lambda h: h.flip(-1),
        lambda h: h.roll(2, -1),
        lambda h: h.unflatten(-1, (2, 3)).transpose(1, 2).flatten(1),
        lambda h: torch.cat((h[:, 3:], h[:, :3]), -1),
    ],
    ids=["flipped", "rolled", "transposed", "halves exchanged"],
)
def test_permuted_units_keep_their_group(turn: Callable[[Tensor], Tensor]) -> None:
    assert held(units(turn), 7, 4) == ["ChannelRescaling PositiveDiagonal(6)"]
    kinds = held(units(turn, lambda h: h), 7, 4)
    assert kinds == ["LinearChain GeneralLinear(6)", "BiasTranslation Translation(6)"]


class Routed(nn.Module):
    """A mixture of experts, each token to the best of them by a gate."""

    def __init__(self, way: str, best: int = 1) -> None:
        super().__init__()
        self.way, self.best = way, best
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        value, index = scores.topk(self.best, -1)
        if self.way == "dense":
            weight = torch.zeros_like(scores).scatter(1, index, value)
            return (torch.stack([expert(x) for expert in self.experts], 1) * weight.unsqueeze(-1)).sum(1)
        if self.way == "whole":
            return self.experts[int(scores.mean(0).argmax())](x)
        out = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            for place in range(self.best):
                rows = (index[:, place] == number).nonzero().squeeze(-1)
                if self.way == "branching" and not len(rows):
                    continue
                out = out.index_add(0, rows, expert(x[rows]) * value[rows, place, None])
        return out


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("way", ["dense", "indexed", "branching"])
def test_experts_keep_what_is_inside_of_them(way: str, best: int) -> None:
    torch.manual_seed(0)
    # Of an expert that is asked twice in one pass, neither batch is the one that passes its layers.
    twice = best == 2 and way != "dense"
    kind = "ChannelRescaling" if twice else "Rescaling"
    assert held(Routed(way, best), 40, 4) == [f"{kind} PositiveDiagonal(5)"] * 3
    found = mt.find_symmetries(Routed(way, best), torch.randn(40, 4))
    assert all(bool(each.modules) != twice for each in found.exact)


def test_of_experts_that_are_not_asked_nothing_is_said() -> None:
    torch.manual_seed(0)
    assert held(Routed("whole"), 40, 4) == ["Rescaling PositiveDiagonal(5)"]


def _routed_by_hidden(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return torch.where(h.argmax(-1, keepdim=True) > 2, m.b(h), -m.b(h))


def _largest_only(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return m.b(torch.zeros_like(h).scatter(1, h.topk(2, -1).indices, 1.0) * h)


def _nearest(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.cdist(m.a(x), m.a.weight.mT.new_ones(3, 6)).argmin(-1).to(x.dtype).unsqueeze(-1).expand(-1, 6))


def _seldom(m: Any, x: Tensor) -> Tensor:
    return m.inner(x) if float(x[0, 0]) > -4 else m.inner[2](m.inner[0](x).tanh())


def _skipping(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h if random.random() < 0.5 else h + m.block(h))


ROUTES: dict[str, Callable[[], nn.Module]] = {
    "by what would be scaled": lambda: Written(_routed_by_hidden, a=nn.Linear(4, 6), b=nn.Linear(6, 2)),
    "only the largest": lambda: Written(_largest_only, a=nn.Linear(4, 6), b=nn.Linear(6, 2)),
    "the nearest": lambda: Written(_nearest, a=nn.Linear(4, 6), b=nn.Linear(6, 2)),
    "a way that is seldom taken": lambda: Written(
        _seldom, inner=nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    ),
    "a block left out by chance": lambda: Written(
        _skipping, a=nn.Linear(4, 5), block=nn.Linear(5, 5), b=nn.Linear(5, 2)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROUTES)
def test_hard_routing_is_no_scaling(name: str) -> None:
    torch.manual_seed(0)
    assert not mt.find_symmetries(ROUTES[name](), torch.randn(40, 4)).exact


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def flattened(model: nn.Module) -> Tensor:
    """Makes a model's parameters views of one buffer, as sharding and fused optimizers do."""
    named = dict(model.named_parameters())
    flat = torch.cat([value.detach().reshape(-1) for value in named.values()])
    start = 0
    for name, value in named.items():
        module, _, own = name.rpartition(".")
        view = flat[start : start + value.numel()].view(value.shape)
        setattr(model.get_submodule(module), own, nn.Parameter(view))
        start += value.numel()
    return flat


@pytest.mark.parametrize("kept", ["", "attribute", "list", "buffer", "parameter"])
def test_parameters_that_are_views_of_one_buffer_move(kept: str) -> None:
    torch.manual_seed(0)
    model = mlp().double()
    flat = flattened(model)
    if kept == "attribute":
        model.flat = flat
    elif kept == "list":
        model.flat = [flat]  # type: ignore[assignment]
    elif kept == "buffer":
        model.register_buffer("flat", flat)
    elif kept == "parameter":
        model.flat = nn.Parameter(flat)
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    x = torch.randn(7, 4).double()
    (found,) = mt.find_symmetries(model, x).exact
    before, outputs = flat.clone(), model(x).detach()
    assert mt.teleport(model, mt.RandomTeleporter(size=1.0, seed=0), x, symmetries=[found]).size > 0
    assert not torch.equal(flat, before)
    assert torch.equal(flat[:20].view(5, 4), model[0].weight)
    assert torch.allclose(model(x), outputs, rtol=1e-10)


def test_memory_that_two_look_at_holds_both() -> None:
    flat = torch.zeros(10)
    views = {"a": flat[:4], "b": flat[4:7], "c": flat[6:]}
    assert overlaps(views) == {"b", "c"}
    assert overlaps({"a": flat[:4]}, [flat[3:]]) == {"a"}
    assert overlaps({"a": flat[:4]}, [views["a"], flat[4:], torch.zeros(10)]) == {"a"}
    assert overlaps({"a": flat[:4]}, [flat[4:], torch.zeros(10), flat[:0]]) == set()
    image = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert overlaps({"whole": image, "last": image[1:]}) == {"whole", "last"}
    assert overlaps({"first": image[:1], "last": image[1:]}) == set()
    assert overlaps({"on meta": torch.zeros(3, device="meta"), "sparse": torch.eye(2).to_sparse()}) == set()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight.data = model[0].weight.data
    assert not mt.find_symmetries(model, torch.randn(6, 4)).exact
    with pytest.raises(Unsuitable, match="shares the memory of"):
        mt.Rescaling(model, "0", "2")


class Unusual(nn.Module):
    """A pair among parameters of every unusual kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=True)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
        self.none, self.scale = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.tensor(2.0))
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.cfloat))
        self.whole = nn.Parameter(torch.arange(2), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.b(torch.relu(self.a(self.table(tokens)))) * self.scale + self.none.sum() + self.whole
        return (h * self.phase).abs()


def test_parameters_of_every_kind_stand_by() -> None:
    torch.manual_seed(0)
    model, tokens = Unusual(), torch.randint(7, (9,))
    found = mt.find_symmetries(model, tokens)
    assert [(each.kind, each.dimension) for each in found.exact] == [("linear chain", 16), ("rescaling", 5)]
    told = {name: each.reason for each in found.refused for name in each.parameters}
    assert "complex64" in told["phase"]
    assert "int64" in told["whole"]
    report = mt.teleport(model, mt.GradientAscentTeleporter(), tokens, lambda out: out.sum())
    assert report.size > 0
    assert report.drift <= 1e-5


def folded() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    first = torch.nn.utils.fusion.fuse_conv_bn_eval(nn.Conv2d(2, 3, 3, bias=False).eval(), norm)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(3, 2, 3)).double()


def test_a_folded_network_moves_with_its_frozen_biases() -> None:
    model, x = folded(), torch.randn(3, 2, 8, 8).double()
    assert not model[0].bias.requires_grad
    nothing = mt.find_symmetries(model, x)
    assert len(nothing.exact) == 0
    assert [each.parameters for each in nothing.refused if "frozen=True" in each.reason] == [("0.bias",)]
    with pytest.raises(Unsuitable, match=r"example_input=.*symmetries=\[.*frozen=True"):
        mt.teleport(model, mt.RandomTeleporter(size=1.0, seed=0), x)
    assert held(model, 3, 2, 8, 8, frozen=True) == ["Rescaling PositiveDiagonal(3)"]
    bias, outputs = model[0].bias.clone(), model(x).detach()
    report = mt.teleport(model, mt.RandomTeleporter(size=1.0, seed=0), x, frozen=True)
    assert report.accepted
    assert report.size == pytest.approx(1.0)
    assert not torch.equal(model[0].bias, bias)
    assert not model[0].bias.requires_grad
    assert torch.allclose(model(x), outputs, rtol=1e-10)


def test_the_switch_is_for_every_kind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.Linear(8, 8), nn.Linear(8, 2))
    kinds = [each.kind for each in mt.find_symmetries(model, torch.randn(4, 8))]
    model.requires_grad_(False)
    found = mt.find_symmetries(model, torch.randn(4, 8))
    assert len(found) == 0
    assert found.refused[0].parameters == tuple(name for name, _ in model.named_parameters())
    assert [each.kind for each in mt.find_symmetries(model, torch.randn(4, 8), frozen=True)] == kinds
    assert any("batch pair" in kind for kind in kinds)
    for make in (mt.Rescaling, mt.LinearPair):
        with pytest.raises(Unsuitable, match="frozen=True"):
            make(model, "2", "3")
        assert make(model, "2", "3", frozen=True).dimension
    for form in (BatchPair2022, BatchPair2024):
        with pytest.raises(Unsuitable, match="frozen=True"):
            form(model, "0", "2", nn.LeakyReLU(0.1))
        assert form(model, "0", "2", nn.LeakyReLU(0.1), frozen=True).dimension == 64


def _interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return torch.cat((m.b(h[:, ::2]), m.c(h[:, 1::2])), -1)


def _one_weight(m: Any, x: Tensor) -> Tensor:
    # Units in turn belong to one of two groups, and both are taken in by the same weight.
    h, weight = torch.relu(m.a(x)), m.b.weight
    return torch.cat((functional.linear(h[:, ::2], weight[:, ::2]), functional.linear(h[:, 1::2], weight[:, 1::2])), -1)


KEYED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)),
        lambda: torch.randn(3, 4),
        3,
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 3, 1),
            nn.Conv2d(3, 1, 1),
        ),
        lambda: torch.randn(2, 2, 8, 8),
        3,
    ),
    "multi-head attention": (
        lambda: nn.MultiheadAttention(8, 4, batch_first=True),
        lambda: (torch.randn(2, 5, 8),) * 3,
        12,
    ),
    "an encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(),
        lambda: torch.randn(2, 5, 8),
        12,
    ),
    "slices": (
        lambda: Written(_interleaved, a=nn.Linear(4, 6), b=nn.Linear(3, 2), c=nn.Linear(3, 2)),
        lambda: torch.randn(7, 4),
        4,
    ),
    "two groups in the same parameters": (
        lambda: Written(_one_weight, a=nn.Linear(4, 6), b=nn.Linear(6, 2)),
        lambda: torch.randn(7, 4),
        2,
    ),
    "experts": (lambda: Routed("dense", 2), lambda: torch.randn(9, 4), 3),
}


def _all_apart(found: mt.Symmetries, at_least: int) -> None:
    keys = [each.key for each in found]
    assert len(keys) >= at_least, found
    assert len(set(keys)) == len(keys), keys
    assert len({repr(each) for each in found}) <= len(keys)


@pytest.mark.parametrize("name", KEYED)
def test_keys_tell_all_symmetries_of_a_model_apart(name: str) -> None:
    build, make, at_least = KEYED[name]
    torch.manual_seed(0)
    model, example = build(), make()
    found = mt.find_symmetries(model, example)
    _all_apart(found, at_least)
    # What is kept under a key is found again in another process, and another copy of the model.
    assert [each.key for each in mt.find_symmetries(model, example)] == [each.key for each in found]


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora"])
def test_keys_of_transformers_are_apart(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    if name == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            **sizes,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    if name == "lora":
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, settings)
    example = {"input_ids": torch.randint(50, (2, 6)), "labels": torch.tensor([[1, -100, 3, 4, 5, -100]] * 2)}
    found = mt.find_symmetries(model.eval(), example)
    _all_apart(found, {"gpt2": 16, "llama": 15, "lora": 6}[name])
    if name == "lora":
        frozen = mt.find_symmetries(model, example, frozen=True)
        _all_apart(frozen, 16)
        assert {each.key for each in found} <= {each.key for each in frozen}
