"""`mt.teleport` on models as people have them: outputs of any form, half precision, wrappers, sparse gradients."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_cases import Written
from symmetry_cases import relative
from torch import Tensor, nn
from torch.nn import functional

import metateleport as mt
from metateleport.point import Point
from metateleport.symmetries import Unsuitable
from metateleport.teleporters import LevelSetTeleporter, TrustRegion
from metateleport.teleporters.precision import change_of

Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1])


@dataclasses.dataclass
class Out:
    scores: Tensor
    hidden: tuple[Tensor, ...]
    count: int = 3


FORMS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any], Tensor]]] = {
    "a dict": (
        lambda m, x: {"scores": m.b(x), "chosen": m.b(x).argmax(-1), "nothing": None},
        lambda out: out["scores"],
    ),
    "a dataclass": (lambda m, x: Out(m.b(x), (m.b(x).sum(),)), lambda out: out.scores),
    "a tuple": (lambda m, x: (m.b(x), [m.b(x).mean(0)]), lambda out: out[0]),
    "a complex tensor": (lambda m, x: torch.complex(m.b(x), m.b(x) * 2), lambda out: out.real),
    "infinite scores": (
        lambda m, x: m.b(x).masked_fill(torch.tensor([True, False, False]), float("-inf")),
        lambda out: out[:, 1:].repeat(1, 2)[:, :3],
    ),
}
SEEKERS: dict[str, Callable[[], mt.Teleporter]] = {
    "random": lambda: mt.RandomTeleporter(size=0.7, seed=0),
    "ascent": mt.GradientAscentTeleporter,
    "whitening": mt.WhiteningTeleporter,
    "level set": LevelSetTeleporter,
}


@pytest.mark.parametrize("seeker", ["random", "ascent", "level set"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_every_form(form: str, seeker: str) -> None:
    forward, scores = FORMS[form]
    torch.manual_seed(0)
    model = Written(forward, b=mlp(8, 16, 3)).double()
    x, y = torch.randn(12, 8).double(), Y.double()
    before = scores(model(x)).detach()
    teleporter = SEEKERS[seeker]()
    held = (torch.randn(5, 8).double(), lambda out: scores(out).square().mean())
    report = mt.teleport(model, teleporter, x, lambda out: (scores(out) - y).square().mean(), held_out=held)
    assert report.accepted
    assert report.size > 0
    after = scores(model(x)).detach()
    assert relative(after, before) <= 1e-9 or teleporter.keeps == "loss"
    if teleporter.keeps == "outputs":
        assert report.held_out_drift <= 1e-9
        assert report.held_out_after == pytest.approx(report.held_out_before)
    assert report.loss_after == pytest.approx(float((after - y).square().mean()))


def test_any_output_may_drift() -> None:
    class Wrong(mt.Rescaling):
        """Forgets to undo what it does."""

        def act(self, element: Tensor, point: Point) -> Point:
            weight = point.parameters[self.first_weight] * element.unsqueeze(-1)
            return point.update({self.first_weight: weight})

    def forward(m: Any, x: Tensor) -> dict[str, Any]:
        return {"fixed": x, "moved": m.b(x), "chosen": m.b(x).argmax(-1)}

    model = Written(forward, b=mlp(8, 16, 3))
    x = torch.randn(40, 8)
    start = model.b[0].weight.clone()
    wrong = [Wrong(model, "b.0", "b.2")]
    report = mt.teleport(model, mt.RandomTeleporter(size=3.0, seed=0), x, symmetries=wrong)
    assert not report.accepted
    assert "outputs would change" in report.reason
    model.function = lambda m, x: m.b(x).argmax(-1)
    report = mt.teleport(model, mt.RandomTeleporter(size=3.0, seed=0), x, symmetries=wrong)
    assert not report.accepted
    model.function = lambda m, x: m.b(x).masked_fill(m.b(x) < 0, float("-inf"))
    assert not mt.teleport(model, mt.RandomTeleporter(size=3.0, seed=0), x, symmetries=wrong).accepted
    assert torch.equal(model.b[0].weight, start)


def test_a_change_is_seen_wherever_it_is() -> None:
    ones, inf = torch.ones(4), float("inf")
    masked = torch.tensor([-inf, 1.0])
    assert change_of((ones, 1e6 * ones), (1.5 * ones, 1e6 * ones)) == pytest.approx(0.5)
    assert change_of(masked, masked.clone()) == 0
    for other in ([0.0, 1.0], [inf, 1.0], [-inf, -inf], [-inf, float("nan")]):
        assert change_of(masked, torch.tensor(other)) == inf
    assert change_of(torch.complex(ones, ones), torch.complex(ones, -ones)) == pytest.approx(2**0.5)
    assert change_of(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert change_of({"ids": torch.tensor([1]), "x": ones}, {"ids": torch.tensor([2]), "x": ones}) == 0


@pytest.mark.parametrize("seeker", SEEKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear pair", "rescaling"])
def test_half_precision_is_moved_in_float32(kind: str, dtype: torch.dtype, seeker: str) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)) if kind == "linear pair" else mlp(8, 16, 3)
    wide = wide.to(dtype).float()
    narrow = copy.deepcopy(wide).to(dtype)
    x = torch.randn(12, 8).to(dtype)
    before = [value.detach().clone() for value in narrow.parameters()]
    report = mt.teleport(narrow, SEEKERS[seeker](), x, lambda out: (out.float() - Y).square().mean())
    assert report.accepted
    assert report.size > 0
    assert 0 < report.drift <= 8 * torch.finfo(dtype).eps
    assert all(value.dtype == dtype for value in narrow.parameters())
    assert not all(torch.equal(one, other) for one, other in zip(before, narrow.parameters(), strict=True))
    # The same element as in float32, which is rounded once: at its end.
    if seeker == "random":
        mt.teleport(wide, SEEKERS[seeker](), x.float())
        for one, other in zip(wide.parameters(), narrow.parameters(), strict=True):
            assert torch.equal(one.to(dtype), other)


def test_what_rounding_would_spoil_is_refused() -> None:
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).to(torch.bfloat16)
    before = pair[0].weight.clone()
    report = mt.teleport(pair, mt.RandomTeleporter(size=9.0, seed=0), torch.randn(12, 8, dtype=torch.bfloat16))
    assert not report.accepted
    assert "more than 0.0625" in report.reason
    assert torch.equal(pair[0].weight, before)
    # In float32 the bound is the teleporter's own, however strict.
    strict = mt.RandomTeleporter(size=1.0, seed=0, trust_region=TrustRegion(max_drift=1e-12))
    assert not mt.teleport(pair.float(), strict, torch.randn(12, 8)).accepted


@pytest.mark.parametrize("seeker", ["random", "ascent"])
def test_parts_of_several_precisions(seeker: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.relu(m.a(x.to(torch.bfloat16))).float())

    torch.manual_seed(0)
    model = Written(forward, a=nn.Linear(8, 16).to(torch.bfloat16), b=nn.Linear(16, 3))
    report = mt.teleport(model, SEEKERS[seeker](), torch.randn(12, 8), lambda out: (out - Y).square().mean())
    assert report.size > 0
    assert (model.a.weight.dtype, model.b.weight.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        report = mt.teleport(mlp(8, 16, 3), SEEKERS[seeker](), torch.randn(12, 8), lambda out: out.float().sum())
    assert report.size > 0


@pytest.mark.parametrize(
    "teleporter", [mt.NoTeleport(), mt.RandomTeleporter(size=0.0, seed=0)], ids=["none", "of size zero"]
)
def test_a_teleport_of_size_zero_says_so(teleporter: mt.Teleporter) -> None:
    report = mt.teleport(mlp(8, 16, 3), teleporter, torch.randn(12, 8))
    assert report.size == 0
    assert "nothing moves" in report.reason
    assert mt.teleport(mlp(8, 16, 3), mt.RandomTeleporter(seed=0), torch.randn(12, 8)).reason == ""


@pytest.mark.parametrize("seeker", SEEKERS)
def test_sparse_gradients(seeker: str) -> None:
    torch.manual_seed(0)
    model = Written(lambda m, tokens: m.b(m.table(tokens)), table=nn.Embedding(9, 8, sparse=True), b=mlp(8, 16, 3))
    tokens = torch.randint(9, (12,))
    report = mt.teleport(model, SEEKERS[seeker](), tokens, lambda out: (out - Y).square().mean())
    assert report.size > 0
    assert model.table.sparse
    functional.mse_loss(model(tokens), Y).backward()
    assert model.table.weight.grad.is_sparse


def test_of_a_wrapped_model_the_one_inside_is_moved() -> None:
    torch.manual_seed(0)
    model, x = mlp(8, 16, 3), torch.randn(12, 8)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        before, outputs = model[0].weight.clone(), wrapped(x).detach()
        assert mt.teleport(wrapped, mt.RandomTeleporter(seed=0), x).accepted
        assert not torch.equal(before, model[0].weight)
        assert torch.allclose(wrapped(x), outputs, atol=1e-5)
        assert mt.teleport(wrapped, mt.RandomTeleporter(seed=0), x, symmetries=mt.symmetries_of(model)).accepted


def test_what_cannot_be_moved_is_told_beforehand() -> None:
    model, x = mlp(8, 16, 3), torch.randn(12, 8)
    other = mt.symmetries_of(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Identity(), nn.Linear(6, 3)))
    with pytest.raises(ValueError, match=r"'3\.weight', which this Sequential does not have"):
        mt.teleport(model, mt.RandomTeleporter(seed=0), x, symmetries=other)
    with pytest.raises(Unsuitable, match="one forward pass"):
        mt.teleport(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), mt.RandomTeleporter(seed=0), x)


@pytest.mark.parametrize("seeker", ["random", "ascent", "level set"])
def test_inputs_and_buffers_stay(seeker: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.seen += 1
        return m.b(m.norm(x.mul_(2)))

    torch.manual_seed(0)
    model = Written(forward, norm=nn.BatchNorm1d(8), b=mlp(8, 16, 3))
    model.register_buffer("seen", torch.zeros(()))
    x = torch.randn(12, 8)
    kept, buffers = x.clone(), {name: value.clone() for name, value in model.named_buffers()}
    report = mt.teleport(model, SEEKERS[seeker](), x, lambda out: (out - Y).square().mean())
    assert report.size > 0
    assert report.drift <= 1e-3
    assert torch.equal(x, kept)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_a_siamese_network_with_batches_of_two_sizes() -> None:
    def encode(m: Any, x: Tensor) -> Tensor:
        return m.b(torch.relu(m.a(x)))

    def forward(m: Any, x: Tensor) -> Tensor:
        return encode(m, x) + encode(m, x[: len(x) // 2]).mean(0)

    torch.manual_seed(0)
    model, x = Written(forward, a=nn.Linear(8, 16), b=nn.Linear(16, 3)).double(), torch.randn(12, 8).double()
    found = mt.find_symmetries(model, x).exact
    assert [each.dimension for each in found] == [16]
    for symmetries in (found, [mt.Rescaling(model, "a", "b")]):
        report = mt.teleport(
            model, mt.GradientAscentTeleporter(), x, lambda out: (out - Y.double()).square().mean(), symmetries
        )
        assert report.size > 0
        assert report.drift <= 1e-12
        assert report.gradient_norm_after > report.gradient_norm_before
