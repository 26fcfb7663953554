"""Whether a checkpoint, a model and its parameters go together is said once, when the optimizer is made."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from learned_cases import backward, meta_of, mlp
from torch import Tensor, nn

import metateleport as mt
from metateleport.groups import PositiveDiagonal
from metateleport.optim import fitting
from metateleport.optim.fitting import check_parameters, fitting_symmetries, say_what_fits
from metateleport.symmetries import Rescaling, Symmetry
from metateleport.symmetries.base import Carried


def said(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(each.message) for each in caught]


def plain(wide: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, wide), nn.LeakyReLU(0.1), nn.Linear(wide, 3))


# --- what fits -------------------------------------------------------------------------------------------------------


def test_digits_on_a_perceptron_is_said_nothing_of() -> None:
    assert said(lambda: mt.LearnedOptimizer(plain(), "digits")) == []
    assert said(lambda: mt.LearnedOptimizer(plain().parameters(), "digits")) == []


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("leaky_mlp", "data sets that every step sees whole, which deterministic=True promises"),
        ("bottleneck_digits", "models with symmetries of GL, of which there is none"),
    ],
)
def test_a_checkpoint_that_is_not_for_this_says_why_in_one_warning(checkpoint: str, words: str) -> None:
    (text,) = said(lambda: mt.LearnedOptimizer(plain(), checkpoint))
    assert text.startswith(f"'{checkpoint}' is not made for this: ")
    assert words in text
    assert text.endswith("'default' is made for any model, on minibatches")


def test_groups_that_no_network_serves_are_named() -> None:
    (text,) = said(
        lambda: mt.LearnedOptimizer(plain(), meta_of(mode="update+tele", groups=("GL",)), deterministic=True)
    )
    assert "this meta-optimizer is not made for this" in text
    assert "symmetries of GL, and this model's are of diagonal: it steps without teleports and gauges" in text


def test_the_promise_of_equal_data_is_what_takes_the_warning_away() -> None:
    assert said(lambda: mt.LearnedOptimizer(plain(), "leaky_mlp", deterministic=True)) == []


def test_a_bound_that_holds_few_of_the_weights_is_told_in_percent() -> None:
    meta = meta_of(mode="lr")
    model = plain()
    pair = mt.symmetries_of(model)
    parameters = {**dict(model.named_parameters()), "words.weight": torch.ones(201, 1)}
    inside = sum(value.numel() for value in model.parameters())
    (text,) = said(lambda: say_what_fits(meta, "x", {}, pair, parameters, False))
    assert f"holds {inside / (inside + 201):.0%} of these weights" in text
    assert said(lambda: say_what_fits(meta, "x", {}, pair, dict(model.named_parameters()), False)) == []
    # A rule that needs no bound is not asked.
    assert said(lambda: say_what_fits(meta_of(), "x", {}, (), parameters, False)) == []


@pytest.mark.parametrize(
    ("config", "served"),
    [
        ({"mode": "update"}, True),
        ({"mode": "update+tele", "groups": ("diagonal",)}, True),
        ({"mode": "update+tele", "groups": ("GL",)}, False),
        ({"mode": "lr+tele", "groups": ("GL",), "stays": False, "gauge": "linearised"}, True),
        ({"mode": "lr+tele", "groups": ("GL",), "stays": False, "gauge": "exact"}, False),
        ({"mode": "lr+tele", "groups": ("diagonal",), "stays": False, "gauge": "exact"}, True),
    ],
)
def test_networks_for_a_rescaling(config: dict[str, Any], served: bool) -> None:
    model = plain()
    text = said(lambda: mt.LearnedOptimizer(model, meta_of(**config), [mt.Rescaling(model, "0", "2")]))
    assert ("it has networks for symmetries of" in "".join(text)) == (not served)


def test_symmetries_without_a_network_are_named_once() -> None:
    class Mixed(nn.Module):
        """Two linear layers that follow one another, and a ReLU behind them."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, x = Mixed(), torch.ones(5, 3)
    (text,) = said(lambda: mt.LearnedOptimizer(model, "digits", example_input=x))
    assert "leaves 1 of 2 symmetries alone, the first one LinearPair" in text
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    (text,) = said(lambda: mt.TeleportingOptimizer(inner, model, mt.load("digits"), example_input=x))
    assert "leaves 1 of 2 symmetries alone, the first one LinearPair" in text
    assert said(lambda: mt.LearnedOptimizer(model, "digits", [mt.Rescaling(model, "net.1", "net.3")])) == []
    assert said(lambda: mt.LearnedOptimizer(model, "default", example_input=x)) == []


# --- symmetries ------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A model that only an example finds the symmetries of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_where_none_can_be_found_one_warning_says_what_to_give() -> None:
    meta = meta_of(mode="update+tele", groups=("diagonal",))
    (text,) = said(lambda: mt.LearnedOptimizer(Own(), meta))
    assert text.startswith("LearnedOptimizer goes on without symmetries")
    assert text.count("give example_input=") == text.count("name them with symmetries=") == 1
    assert said(lambda: mt.LearnedOptimizer(Own(), meta, [])) == []
    assert said(lambda: mt.LearnedOptimizer(Own(), meta, example_input=torch.ones(5, 4))) == []


def test_a_meta_optimizer_that_reads_none_looks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "symmetries_of", lambda *_: pytest.fail("it was looked for symmetries"))
    assert fitting_symmetries(plain(), meta_of(), None, None) == ()


def test_given_symmetries_are_kept_and_checked() -> None:
    model, meta = plain(), meta_of(mode="update+tele", groups=("diagonal",))
    pair = mt.Rescaling(model, "0", "2")
    assert fitting_symmetries(model, meta, [pair], None) == (pair,)
    other = nn.Sequential(plain())
    with pytest.raises(ValueError, match=r"names '0\.0\.weight', which the model does not have"):
        fitting_symmetries(model, meta, [mt.Rescaling(other, "0.0", "0.2")], None)


# --- parameters ------------------------------------------------------------------------------------------------------


def test_parameters_on_several_devices_are_refused_by_name() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]}]
    with pytest.raises(ValueError, match=r"several devices \(cpu, meta\).*for the parameters of each device"):
        check_parameters(groups)
    check_parameters([{"params": groups[0]["params"][:1]}, {"params": [nn.Parameter(torch.ones(1))]}])
    with pytest.raises(ValueError, match="several devices"):
        mt.LearnedOptimizer(groups[0]["params"], "digits")


class FlatParameter(nn.Parameter):
    """Stands in for that of FSDP, which needs a process group."""


def test_sharded_parameters_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"are sharded.*DistributedDataParallel"):
        mt.LearnedOptimizer([FlatParameter(torch.ones(2))], "digits")
    monkeypatch.setattr("torch.distributed.tensor.DTensor", nn.Parameter)
    with pytest.raises(ValueError, match="are sharded"):
        mt.LearnedOptimizer([nn.Parameter(torch.ones(2))], "digits")


def test_nothing_moves_before_a_refusal() -> None:
    model = mlp()
    backward(model)
    before = [value.detach().clone() for value in model.parameters()]
    with pytest.raises(ValueError, match="several devices"):
        mt.LearnedOptimizer([*model.parameters(), nn.Parameter(torch.ones(1, device="meta"))], "digits")
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_factors_without_a_gauge_are_told() -> None:
    """Their rank is above what the layer takes in: they step like other tensors."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match=r"steps 1 pairs of factors like other tensors, the first one 0\.weight"):
        mt.LearnedOptimizer(model, "lora")
    assert said(lambda: mt.LearnedOptimizer(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)), "lora")) == []


def test_adapters_that_a_learned_rule_of_factors_is_given_later_are_told() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5))
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.lora_A = nn.Parameter(torch.randn(2, layer.in_features))
            layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, 2))
    later = [model[2].lora_A, model[2].lora_B]
    del model[2].lora_A, model[2].lora_B
    optimizer = mt.LearnedOptimizer(model, "lora")
    model[2].lora_A, model[2].lora_B = later
    with pytest.warns(UserWarning, match="adapters that are added later step like other tensors"):
        optimizer.add_param_group({"params": later})


def test_adapters_that_their_names_and_a_pass_tell_are_there_once() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(5, 4).requires_grad_(False)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.lora_A.T @ self.lora_B.T

    found = mt.LearnedOptimizer(Adapted(), "lora", example_input=torch.randn(6, 5)).symmetries
    assert [each.parameters for each in found] == [("lora_A", "lora_B")]


class Scaled(Symmetry):
    """Written by a person: act and carry, and no more."""

    kind = "scaled"
    exactness = "exact"

    def __init__(self) -> None:
        self.parameters, self.group = ("0.weight", "0.bias", "2.weight"), PositiveDiagonal(4)

    def _by(self, element: Tensor, tensors: Any, power: float) -> dict[str, Tensor]:
        column = (element**power).unsqueeze(-1)
        factors = {"0.weight": column, "0.bias": element**power, "2.weight": 1 / column.mT}
        return {name: tensors[name] * factor for name, factor in factors.items() if name in tensors}

    def act(self, element: Tensor, point: Any) -> Any:
        return point.update(self._by(element, point.parameters, 1), self._by(element, point.gradients, -1))

    def carry_covectors(self, element: Tensor, covectors: Any, point: Any) -> Carried:
        return Carried(self._by(element, covectors, -1), True)

    def carry_squares(self, element: Tensor, squares: Any, point: Any) -> Carried:
        return Carried(self._by(element, squares, -2), True)


def test_a_symmetry_without_matrices_is_refused_where_they_are_read() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Scaled has no matrices"):
        mt.LearnedOptimizer(model, "digits", symmetries=[Scaled()])
    inner = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="Scaled has no matrices"):
        mt.TeleportingOptimizer(inner, model, mt.load("digits"), symmetries=[Scaled()])
    mt.TeleportingOptimizer(inner, model, mt.teleporters.RandomTeleporter(0.1), symmetries=[Scaled()])


class Attention(nn.Module):
    """Its keys' bias may be anything, and no network reads that symmetry; values and outputs have one that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, inputs: Tensor) -> Tensor:
        mixed = torch.nn.functional.scaled_dot_product_attention(
            self.query(inputs), self.key(inputs), self.value(inputs)
        )
        return self.out(mixed)


def test_a_found_symmetry_without_matrices_stays_and_the_others_are_moved_along() -> None:
    torch.manual_seed(0)
    model, inputs = Attention(), torch.randn(5, 3, 4)
    inner = torch.optim.AdamW(model.parameters())
    optimizer = mt.TeleportingOptimizer(inner, model, mt.load("leaky_mlp_mixture"), every=1, example_input=inputs)
    assert not all(each.has_matrices for each in optimizer.symmetries)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    sizes = dict(zip(optimizer.symmetries, optimizer.reports[-1].sizes, strict=True))
    assert all((size > 0) <= each.has_matrices for each, size in sizes.items())
    assert max(sizes.values()) > 0


def test_what_a_subclass_carries_by_itself_may_read_the_place() -> None:
    class Own(Rescaling):
        def carry_squares(self, element: Tensor, squares: Any, point: Any) -> Carried:
            return super().carry_squares(element, squares, point)

    class Named(Rescaling):
        kind = "named"

    assert (Rescaling.reads_place, Own.reads_place, Named.reads_place) == (False, True, False)
