"""Naming the symmetries of plain chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from symmetry_cases import largest_drift
from torch import Tensor, nn
from torch.nn.utils import prune

import metateleport as mt
from metateleport.symmetries import Unsuitable


def names(model: nn.Module) -> list[tuple[str, str, str]]:
    return [(type(s).__name__, s.first, s.second) for s in mt.symmetries_of(model)]  # type: ignore[attr-defined]


def test_linear_pairs_and_rescalings_in_the_order_of_the_data_flow() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 2)
    )
    assert names(model) == [("LinearPair", "0", "1"), ("Rescaling", "1", "4"), ("LinearPair", "4", "6")]


def test_other_activations_break_the_chain() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "2", "4")]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "2", "4")]


def test_what_acts_on_single_units_leaves_the_diagonal_only() -> None:
    for between in (nn.Dropout(0.5), nn.ReLU(), nn.PReLU()):
        assert names(nn.Sequential(nn.Linear(3, 4), between, nn.Linear(4, 2))) == [("Rescaling", "0", "2")]


def test_nested_chains_convolutions_and_flattening() -> None:
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.LeakyReLU(0.1))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    assert names(model) == [("Rescaling", "0.0", "0.3"), ("Rescaling", "0.3", "2"), ("Rescaling", "2", "4")]
    report = mt.teleport(model, mt.RandomTeleporter(seed=0), torch.randn(4, 1, 8, 8).double())
    assert report.accepted
    assert report.drift <= 1e-12


def test_pairs_that_cannot_move_are_left_out() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(Unsuitable, match="no two layers"):
        mt.symmetries_of(model)
    frozen = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    frozen[0].requires_grad_(False)
    assert names(frozen) == [("Rescaling", "2", "4")]


def test_a_flattened_sequence_is_not_taken_for_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "3", "5")]


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.Sequential()],
)
def test_a_chain_without_symmetries_is_refused(model: nn.Module) -> None:
    with pytest.raises(Unsuitable, match="no two layers"):
        mt.symmetries_of(model)


def test_any_other_module_is_told_how_to_name_its_symmetries() -> None:
    with pytest.raises(Unsuitable, match=r"nn.Sequential.*this is a Transformer.*symmetries=\["):
        mt.symmetries_of(nn.TransformerEncoderLayer(4, 2))


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=0.1)


class Shifted(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1


class Squared(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight, bias).square()


class Skip(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(self._modules.values())  # type: ignore[arg-type]


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


def chain(*between: nn.Module, width: int = 5) -> nn.Sequential:
    """Something between two layers of which nothing is known, and a pair behind it."""
    return nn.Sequential(nn.Linear(4, width), *between, nn.Linear(width, 5), nn.Sequential(nn.ReLU()), nn.Linear(5, 2))


def convolved(*between: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), *between, nn.Linear(features, 5), nn.Sequential(nn.ReLU()), nn.Linear(5, 2)
    )


def changed(model: nn.Sequential, change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    change(model)
    return model


def _twice(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), module, nn.Linear(5, 5), module, nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))


def _same_memory(model: nn.Sequential) -> None:
    model[2].weight.data = model[0].weight.data


def _own_forward(model: nn.Sequential) -> None:
    model[1].forward = torch.tanh  # type: ignore[method-assign,assignment]


def _computed(model: nn.Sequential) -> None:
    weight = model[2].weight.detach().double()
    del model[2].weight
    model[2].weight = weight


SQUARE = (lambda: nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), (9, 5))
NEXT = [("2", "4")]
LAST = "the last pair"
GAPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "a layer with its own forward": (lambda: chain(nn.ReLU(), Clipped(5, 5), nn.ReLU()), (9, 4), LAST),
    "an activation with its own forward": (lambda: chain(Shifted()), (9, 4), LAST),
    "a convolution with half a forward": (
        lambda: nn.Sequential(Squared(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        (2, 1, 8, 8),
        NEXT,
    ),
    "a skip": (lambda: chain(nn.ReLU(), Skip(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)), nn.ReLU()), (9, 4), LAST),
    "a chain read backwards": (lambda: chain(nn.ReLU(), Backwards(nn.ReLU(), nn.Tanh())), (9, 4), LAST),
    "one activation that stands twice": (lambda: _twice(nn.Tanh()), (9, 4), [("4", "6")]),
    "an inner hook": (
        lambda: changed(SQUARE[0](), lambda m: m[1].register_forward_hook(lambda *told: told[-1] + 0.1)),
        SQUARE[1],
        NEXT,
    ),
    "a pre-hook of a layer": (
        lambda: changed(SQUARE[0](), lambda m: m[2].register_forward_pre_hook(lambda _, inputs: inputs[0].tanh())),
        SQUARE[1],
        [],
    ),
    "a pre-hook of a nested chain": (
        lambda: changed(chain(nn.ReLU()), lambda m: m[3].register_forward_pre_hook(lambda _, inputs: inputs[0].tanh())),
        (9, 4),
        [("0", "2")],
    ),
    "a hook of a nested chain": (
        lambda: changed(chain(nn.ReLU()), lambda m: m[3].register_forward_hook(lambda *told: told[-1].tanh())),
        (9, 4),
        [("0", "2")],
    ),
    "a forward put in place of a module's": (lambda: changed(SQUARE[0](), _own_forward), SQUARE[1], NEXT),
    "pruned": (
        lambda: changed(SQUARE[0](), lambda m: prune.l1_unstructured(m[0], "weight", 0.3)),
        SQUARE[1],
        NEXT,
    ),
    "weight norm": (
        lambda: changed(SQUARE[0](), lambda m: nn.utils.parametrizations.weight_norm(m[0])),
        SQUARE[1],
        NEXT,
    ),
    "weight norm of old": (lambda: changed(SQUARE[0](), lambda m: nn.utils.weight_norm(m[0])), SQUARE[1], NEXT),
    "a weight that is no parameter": (lambda: changed(SQUARE[0](), _computed), SQUARE[1], []),
    "one memory": (lambda: changed(SQUARE[0]().double(), _same_memory), SQUARE[1], []),
    "complex weights": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).to(torch.cfloat), None, []),
    "no units": (lambda: nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 5)), (9, 4), []),
    "features turned": (lambda: convolved(Turned(), nn.Flatten(), features=144), (2, 1, 8, 8), LAST),
    "a flattening of positions": (lambda: convolved(nn.Flatten(2), features=36), (2, 1, 8, 8), LAST),
    "a flattening of all": (lambda: convolved(nn.Flatten(0), features=144), (1, 1, 8, 8), LAST),
    "no flattening": (lambda: convolved(features=6), (2, 1, 8, 8), LAST),
    "an unflattening": (lambda: chain(nn.Unflatten(1, (2, 4)), nn.Flatten(), width=8), (9, 4), LAST),
    "a shuffle of positions": (
        lambda: convolved(nn.PixelShuffle(2), nn.Flatten(), features=144),
        (2, 1, 8, 8),
        LAST,
    ),
    "a pool over features": (lambda: chain(nn.MaxPool1d(3, 1, 1), width=8), (9, 4), LAST),
    "a pool over flattened channels": (
        lambda: convolved(nn.Flatten(), nn.AvgPool1d(3, 1, 1), features=144),
        (2, 1, 8, 8),
        LAST,
    ),
    "a pool over channels and positions": (
        lambda: nn.Sequential(nn.Conv1d(1, 8, 3), nn.MaxPool2d(3, 1, 1), nn.Conv1d(8, 5, 1), nn.ReLU()),
        (3, 1, 8),
        [],
    ),
    "a softmax": (lambda: chain(nn.Softmax(-1)), (9, 4), LAST),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GAPS)
def test_nothing_is_taken_across_what_is_not_understood(name: str) -> None:
    build, shape, expected = GAPS[name]
    torch.manual_seed(0)
    model = build()
    if shape is not None:
        model = model.double()
    if expected == []:
        with pytest.raises(Unsuitable, match=r"no two layers.*example_input=.*symmetries=\["):
            mt.symmetries_of(model)
        return
    found = mt.symmetries_of(model)
    size = len(model)  # type: ignore[arg-type]
    pairs = [(str(size - 3), str(size - 1))] if expected == LAST else expected
    assert [(each.first, each.second) for each in found] == pairs  # type: ignore[attr-defined]
    assert found.refused
    assert largest_drift(model, found, torch.randn(shape, dtype=torch.float64)) <= 1e-10


def test_what_only_looks_unusual_is_kept() -> None:
    class Named(nn.Sequential):
        """A class of one's own around torch's forward."""

    relu = nn.ReLU()
    model = Named(nn.Linear(4, 5), relu, Named(nn.Linear(5, 5), relu), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "0", "2.0"), ("Rescaling", "2.0", "3")]
    assert names(_twice(nn.LeakyReLU(0.1)))[0] == ("Rescaling", "0", "2")
    # A hook of the whole stands outside of every pair, and those of an optimizer of this library look on.
    model.register_forward_hook(lambda *told: told[-1].tanh())
    mt.TeleportingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, mt.RandomTeleporter(), every=1)
    assert len(mt.symmetries_of(model)) == 2


def test_a_shared_block_moves_nowhere() -> None:
    block = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), block, block, nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    assert names(model) == [("Rescaling", "4", "6")]


def test_global_hooks_and_forwards_of_the_whole_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(Unsuitable, match="global forward hook"):
            mt.symmetries_of(model)
    finally:
        handle.remove()
    assert len(mt.symmetries_of(model)) == 1
    for wrong in (Skip(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), Backwards(nn.Linear(4, 4), nn.Linear(4, 4))):
        with pytest.raises(Unsuitable, match=r"forward of its own: .*example_input=.*symmetries=\["):
            mt.symmetries_of(wrong)


def test_frozen_layers_are_named_and_move_with_the_switch() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Identity(), nn.Linear(5, 2)).double()
    model[0].bias.requires_grad_(False)
    found = mt.symmetries_of(model)
    assert [each.kind for each in found] == ["linear pair"]
    assert [("0.bias" in each.reason, "frozen=True" in each.reason) for each in found.refused] == [(True, True)]
    both = mt.symmetries_of(model, frozen=True)
    assert [each.kind for each in both] == ["rescaling", "linear pair"]
    assert largest_drift(model, both, torch.randn(7, 4).double()) <= 1e-12


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.DataParallel(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))), "give the model inside .*'module'"),
        (torch.compile(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), backend="eager"), "inside .*'_orig_mod'"),
        (nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 2)), "'0.weight'.* lazy .*one forward pass"),
        (nn.Sequential(nn.Linear(4, 5), nn.LazyBatchNorm1d(), nn.Linear(5, 2)), "'1.weight'.* lazy"),
    ],
    ids=["data parallel", "compiled", "lazy", "lazy norm"],
)
def test_models_that_are_not_ready_are_told_what_to_do(model: nn.Module, says: str) -> None:
    for look in (
        lambda: mt.symmetries_of(model),
        lambda: mt.find_symmetries(model, torch.randn(6, 4)),
        lambda: mt.certify(model, [mt.LinearPair(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), "0", "1")], ()),
    ):
        with pytest.raises(Unsuitable, match=says):
            look()
