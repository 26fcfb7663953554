"""Models that people use: counts from the architecture's own arithmetic, and what is found holds."""

from __future__ import annotations

import copy
import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.detection.draws import fresh_inputs, random_element
from metateleport.detection.trace import observables, split
from metateleport.point import Point
from metateleport.symmetries.rotary import PlaneScaling

ROOT = Path(__file__).resolve().parents[2]
Built = tuple[nn.Module, Any, mt.Symmetries]
_BUILT: dict[str, Built] = {}


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def built(name: str) -> Built:
    """A model, its example input and its symmetries, found once."""
    from benchmarks._symmetry_models import build

    if name not in _BUILT:
        try:
            model, example = build(name)
        except ModuleNotFoundError as missing:
            pytest.skip(str(missing))
        _BUILT[name] = (model, example, mt.find_symmetries(model, example))
    return _BUILT[name]


def dimensions(name: str) -> dict[str, tuple[int, int]]:
    """How many exact symmetries there are of each kind, and their dimensions together."""
    return built(name)[2].exact.by_kind()


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_mlp() -> None:
    assert dimensions("MLP") == {"rescaling": (2, 8 + 10)}


def test_linear_autoencoder() -> None:
    assert dimensions("linear autoencoder") == {"linear pair": (1, 3**2), "translation": (1, 3)}


def test_unet() -> None:
    # Two blocks of two convolutions and one behind; what comes up again has no activation.
    assert dimensions("U-Net") == {"rescaling": (5, 4 + 4 + 8 + 8 + 4), "linear chain": (1, 4**2)}
    (skip,) = (each for each in built("U-Net")[2] if each.parameters[0] == "above.2.weight")
    assert skip.parameters == ("above.2.weight", "above.2.bias", "below.0.weight", "out.0.weight")


@pytest.mark.slow(seconds=3)
def test_resnet18() -> None:
    model = built("resnet18")[0]
    every = norms(model)
    blocks = [64, 64, 128, 128, 256, 256, 512, 512]
    streams = [64, 128, 256, 512]
    assert dimensions("resnet18") == {
        "before batch norm": (len(every), sum(norm.num_features for norm in every)),
        "after batch norm": (len(blocks) + len(streams), sum(blocks) + sum(streams)),
    }


@pytest.mark.slow(seconds=3)
def test_vgg11_bn() -> None:
    model = built("vgg11_bn")[0]
    widths = sum(norm.num_features for norm in norms(model))
    assert dimensions("vgg11_bn") == {
        "before batch norm": (8, widths),
        "after batch norm": (8, widths),
        "rescaling": (2, 64 + 64),
    }


def test_mobilenet_v3_small() -> None:
    model = built("mobilenet_v3_small")[0]
    every = norms(model)
    squeezes = [module.fc1.out_channels for module in model.modules() if type(module).__name__ == "SqueezeExcitation"]
    # Residual streams between blocks, and in the blocks with ReLU their expanded features, twice where expanded.
    streams = [16, 24, 40, 48, 96]
    expanded = [16, 72, 72, 88, 88]
    assert dimensions("mobilenet_v3_small") == {
        "before batch norm": (len(every), sum(norm.num_features for norm in every)),
        "after batch norm": (len(streams) + len(expanded), sum(streams) + sum(expanded)),
        "rescaling": (len(squeezes), sum(squeezes)),
    }


def test_vision_transformer() -> None:
    layers, heads, width = 2, 4, 32
    size = width // heads
    assert dimensions("vit") == {
        "norm gain": (2 * layers + 1, (2 * layers + 1) * width),
        "attention QK": (layers * heads, layers * heads * size**2),
        "attention VO": (layers * heads, layers * heads * size**2),
        "translation": (2 * layers * heads, 2 * layers * heads * size),
    }


def test_convnext() -> None:
    # A norm in each block, one before each stage but the first, one before the head; the first norm is in the stream.
    blocks, between, head = [8, 8, 16], [8], [16]
    norms = blocks + between + head
    assert dimensions("ConvNeXt") == {
        "norm gain": (len(norms), sum(norms)),
        "layer scale": (len(blocks), sum(blocks)),
    }


def test_gpt2() -> None:
    layers, heads, width = 2, 4, 16
    size = width // heads
    # The last norm is read by the head, whose weights are those of the embedding.
    assert dimensions("GPT-2") == {
        "norm gain": (2 * layers, 2 * layers * width),
        "attention QK": (layers * heads, layers * heads * size**2),
        "attention VO": (layers * heads, layers * heads * size**2),
        "translation": (2 * layers * heads, 2 * layers * heads * size),
    }


def test_llama() -> None:
    layers, key_heads, width, inner = 2, 2, 16, 24
    size = width // 4
    assert dimensions("Llama") == {
        "norm gain": (2 * layers + 1, (2 * layers + 1) * width),
        "attention QK": (layers * key_heads, layers * key_heads * size),
        "attention VO": (layers * key_heads, layers * key_heads * size**2),
        "gated MLP": (layers, layers * inner),
    }
    rotary = [each for each in built("Llama")[2] if each.kind == "attention QK"]
    assert all(each.group == PlaneScaling(size) for each in rotary)


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize(("name", "layers", "heads", "size"), [("BERT", 2, 4, 4), ("MiniLM", 6, 12, 32)])
def test_bert_and_a_trained_one(name: str, layers: int, heads: int, size: int) -> None:
    # Norms stand behind the sums, in the stream, and cannot move.
    assert dimensions(name) == {
        "attention QK": (layers * heads, layers * heads * size**2),
        "attention VO": (layers * heads, layers * heads * size**2),
        "translation": (2 * layers * heads, 2 * layers * heads * size),
    }


def test_lora_as_peft_builds_it() -> None:
    layers, rank = 6, 4
    model, _, found = built("LoRA on MiniLM")
    assert found.by_kind() == {"LoRA pair": (2 * layers, 2 * layers * rank**2)}
    assert all("lora_" in name for each in found for name in each.parameters)
    assert all(dict(model.named_parameters())[name].requires_grad for each in found for name in each.parameters)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize(
    ("name", "layers", "inner"), [("vit", 2, 64), ("vgg11_bn", 2, 64), ("BERT", 2, 24), ("MiniLM", 6, 1536)]
)
def test_batch_pairs_of_layers_wider_than_the_batch(name: str, layers: int, inner: int) -> None:
    batch = [each for each in built(name)[2] if each.exactness == "batch-exact"]
    assert [(each.kind, each.dimension) for each in batch] == [("batch pair, 2024 form", inner**2)] * layers
    assert all(0 < each.drift <= 1e-6 for each in batch)


NAMES = ["MLP", "linear autoencoder", "U-Net", "resnet18", "vgg11_bn", "mobilenet_v3_small", "vit", "ConvNeXt"]
NAMES += ["GPT-2", "Llama", "BERT", "MiniLM", "LoRA on MiniLM"]
LARGE, SLOW = ("resnet18", "vgg11_bn", "MiniLM"), pytest.mark.slow(seconds=3)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in LARGE else ()) for name in NAMES])
def test_outputs_stay_on_inputs_never_seen_and_the_way_back_returns_the_weights(
    name: str, dtype: torch.dtype, limit: float
) -> None:
    model, example, found = built(name)
    model = copy.deepcopy(model).to(dtype)
    given = torch.utils._pytree.tree_map_only(
        Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, split(example)
    )
    inputs, keywords = fresh_inputs(given, seed=12345)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    source = torch.Generator().manual_seed(77)
    with torch.no_grad():
        expected = observables(model(*inputs, **keywords))
        start = {name: value.clone() for name, value in tensors.items()}
        elements = [random_element(each.group, 1.0, source, dtype) for each in found.exact]
        for symmetry, element in zip(found.exact, elements, strict=True):
            _move(symmetry, element, tensors)
        for old, new in zip(expected, observables(model(*inputs, **keywords)), strict=True):
            assert float((new - old).norm()) <= limit * float(old.norm())
        for symmetry, element in zip(reversed(found.exact), reversed(elements), strict=True):
            _move(symmetry, symmetry.group.inverse(element), tensors)
        for key, value in start.items():
            scale = 1 + float(value.double().norm())
            assert float((tensors[key].double() - value.double()).norm()) <= limit * scale, key


def peak(function: Callable[[], object]) -> int:
    """The most bytes that torch held at a time while a function ran, beyond those it held before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((each.start_ns(), each.nbytes()) for each in results.events() if each.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in events))


def test_finding_takes_the_memory_of_two_copies_of_the_model() -> None:
    model = built("resnet18")[0]
    inputs = torch.randn(2, 3, 64, 64)
    size = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    certified = copy.deepcopy(model).double()

    def passes() -> None:
        with torch.no_grad():
            certified(inputs.double())

    # A pass has its own needs, whoever makes it. Running statistics are copied for each: two percent are for them.
    assert size * 1.9 <= peak(lambda: mt.find_symmetries(model, inputs)) - peak(passes) <= size * 2.02


def _move(symmetry: mt.Symmetry, element: Tensor, tensors: dict[str, Tensor]) -> None:
    names = (*symmetry.parameters, *symmetry.buffers)
    moved = symmetry.act(element, Point({name: tensors[name] for name in names}))
    for name in names:
        tensors[name].copy_(moved.parameters[name])


def test_the_command_makes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.symmetries import main

    chosen = ["--models", "MLP", "linear autoencoder", "--rounds", "2"]
    assert main([*chosen, "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]) == 0
    printed = capsys.readouterr().out
    assert "| MLP | 179 | rescaling 2 (18) | 18 |" in printed
    assert printed in (tmp_path / "a.md").read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["models"]
    assert [row["model"] for row in rows] == ["MLP", "linear autoencoder"]
    assert rows[0]["kinds"] == {"rescaling": {"count": 2, "dimension": 18}}
    ratios = rows[0]["passes_per_kind"]
    assert 0 < ratios["min"] <= ratios["median"] <= ratios["max"]


def test_the_cost_is_told_by_the_shape_of_the_input() -> None:
    from benchmarks.symmetries import cost_of, cost_table

    try:
        cost = cost_of((1, 3, 32, 32), rounds=1)
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    assert cost["kinds"] == 2
    assert cost["passes_per_kind"]["median"] == pytest.approx(cost["seconds"] / cost["pass_seconds"] / 2)
    assert f"| 1x3x32x32 | {cost['seconds']:.2f} |" in cost_table([cost], 1)


def test_the_drift_told_is_small_and_measured() -> None:
    for name in NAMES[:7]:
        for symmetry in built(name)[2].exact:
            assert 0 < symmetry.drift <= 1e-10
            assert symmetry.certificate is not None
            assert symmetry.certificate.dtype == torch.float64
