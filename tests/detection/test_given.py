"""What a person hands in stays as it is, and models are tried on inputs that they run on."""

from __future__ import annotations

import copy
import dataclasses
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from module_cases import Written
from torch import Tensor, nn
from torch.nn import functional

import metateleport as mt
from metateleport.detection.draws import fresh_inputs, seeded
from metateleport.detection.given import copied, inside, mapped
from metateleport.symmetries import Unsuitable


def pair(function: Callable[..., Any], **others: nn.Module) -> nn.Module:
    return Written(function, a=nn.Linear(4, 5), b=nn.Linear(5, 2), **others)


def through(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.relu(m.a(x)))


@dataclasses.dataclass
class Batch:
    x: Tensor
    more: dict[str, Any]


def _writes_tensor(m: Any, x: Tensor) -> Tensor:
    x -= x.mean(0)
    x[:, 0] = 0.5
    return through(m, x.mul_(2))


def _writes_nested(m: Any, data: dict[str, Any]) -> Tensor:
    data["x"].mul_(2)
    data["more"][0].sub_(1)
    return through(m, data.pop("x") + data["more"][0])


def _writes_dataclass(m: Any, batch: Batch) -> Tensor:
    return through(m, batch.x.mul_(2) + batch.more["y"].sub_(1))


WRITES: dict[str, tuple[Callable[..., Tensor], Callable[[], Any]]] = {
    "a tensor": (_writes_tensor, lambda: (torch.randn(6, 4),)),
    "a list": (lambda m, xs: through(m, xs[0].add_(xs[1])), lambda: ([torch.randn(6, 4), torch.randn(6, 4)],)),
    "nested dicts": (_writes_nested, lambda: ({"x": torch.randn(6, 4), "more": [torch.randn(6, 4)]},)),
    "a dataclass": (_writes_dataclass, lambda: (Batch(torch.randn(6, 4), {"y": torch.randn(6, 4), "k": 3}),)),
    "a keyword": (lambda m, x: through(m, x.sub_(0.5).mul_(2)), lambda: {"x": torch.randn(6, 4)}),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_model_may_write_its_input_and_the_callers_stays(name: str) -> None:
    forward, make = WRITES[name]
    given = make()
    before = copy.deepcopy(given)
    found = mt.find_symmetries(pair(forward), given)
    assert [each.kind for each in found.exact] == ["rescaling"]
    report = mt.teleport(pair(forward), mt.RandomTeleporter(size=1.0, seed=0), given, symmetries=found.exact)
    assert report.size == pytest.approx(1.0)
    leaves: list[Tensor] = []
    mapped((before, given), lambda value: leaves.append(value) or value)  # type: ignore[func-returns-value]
    half = len(leaves) // 2
    assert half >= 1
    assert all(torch.equal(one, other) for one, other in zip(leaves[:half], leaves[half:], strict=True))


def test_nothing_of_the_callers_changes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        noise = functional.dropout(m.norm(x)) * (1 + torch.rand(())) + m.table(torch.tensor(1))
        return through(m, noise * random.random() + float(np.random.rand()))

    torch.manual_seed(0)
    model = pair(forward, norm=nn.BatchNorm1d(4), table=nn.Embedding(3, 4, max_norm=0.1))
    model.calls = 0
    model.train()
    model.b.eval()
    x = torch.randn(9, 4)
    before, modes = copy.deepcopy(model.state_dict()), [each.training for each in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = mt.find_symmetries(model, x)
    # It draws numbers that a trace takes for constants: its layers are looked at one by one.
    assert "random numbers" in found.refused[0].reason
    mt.certify(model, [mt.Rescaling(model, "a", "b")], (x,))
    with seeded(model):
        torch.rand(3), random.random(), np.random.rand()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [each.training for each in model.modules()]
    assert model.calls == 0
    assert random.getstate() == states[1]
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), states[2], strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])


def test_torchs_random_numbers_go_on_where_they_were() -> None:
    model = pair(lambda m, x: through(m, functional.dropout(x)))
    x = torch.randn(6, 4)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert len(mt.find_symmetries(model, x).exact) == 1
    mt.teleport(model, mt.RandomTeleporter(seed=0), x)
    assert torch.equal(torch.rand(2), expected)


def _labelled(m: Any, x: Tensor, labels: Tensor) -> Any:
    return functional.cross_entropy(through(m, x), labels)


def _tokens(m: Any, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    scores = through(m, m.table(tokens))
    return {"loss": functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), "scores": scores}


def _columns(m: Any, columns: Tensor) -> Tensor:
    return through(m, torch.cat((m.table(columns[:, 0]), m.other(columns[:, 1])), -1))


def _packed(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    return through(m, m.cell(packed)[1][-1])


RANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int]] = {
    "labels of -100": (
        lambda: pair(_labelled),
        lambda: (torch.randn(6, 4), torch.tensor([0, 1, 1, -100, 0, -100])),
        1,
    ),
    "labels of -100 by keyword": (
        lambda: pair(_tokens, table=nn.Embedding(9, 4)),
        lambda: {"tokens": torch.randint(9, (2, 5)), "labels": torch.tensor([[0, 1, -100, 1, 0], [-100, 1, 0, 1, 1]])},
        2,
    ),
    "another vocabulary in each column": (
        lambda: pair(_columns, table=nn.Embedding(3, 2), other=nn.Embedding(70, 2)),
        lambda: torch.stack((torch.randint(3, (9,)), torch.randint(70, (9,))), 1),
        3,
    ),
    "offsets": (
        lambda: pair(lambda m, tokens, offsets: through(m, m.bag(tokens, offsets)), bag=nn.EmbeddingBag(9, 4)),
        lambda: (torch.randint(9, (6,)), torch.tensor([0, 2, 3])),
        1,
    ),
    "lengths in descending order": (
        lambda: pair(_packed, cell=nn.GRU(3, 4, batch_first=True)),
        lambda: (torch.randn(3, 6, 3), torch.tensor([6, 4, 1])),
        0,
    ),
    "positive numbers": (lambda: pair(lambda m, x: through(m, x.log())), lambda: torch.rand(6, 4) + 0.1, 1),
    "probabilities": (
        lambda: pair(lambda m, x, p: functional.binary_cross_entropy(torch.sigmoid(through(m, x)), p)),
        lambda: (torch.randn(6, 4), torch.rand(6, 2)),
        1,
    ),
    "an additive mask": (
        lambda: pair(lambda m, x, mask: through(m, x) + mask),
        lambda: (torch.randn(6, 4), torch.tensor([0.0, float("-inf")])),
        1,
    ),
    "infinite scores": (
        lambda: pair(lambda m, x: through(m, x).masked_fill(torch.tensor([True, False]), float("-inf"))),
        lambda: torch.randn(6, 4),
        1,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RANGES)
def test_models_are_tried_on_inputs_that_they_run_on(name: str) -> None:
    build, make, count = RANGES[name]
    torch.manual_seed(0)
    found = mt.find_symmetries(build(), make())
    assert len(found.exact) == count, found
    assert all(each.certificate is not None and each.certificate.weights == 3 for each in found.exact)


def test_whole_numbers_are_those_given_in_another_order() -> None:
    given = {
        "labels": torch.tensor([3, -100, 7, 9, -100, 8]),
        "offsets": torch.tensor([0, 2, 2, 5]),
        "columns": torch.stack((torch.arange(20), 100 + torch.arange(20)), 1),
        "row": torch.arange(9).reshape(1, 9),
        "bits": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "none": torch.zeros(0, dtype=torch.int64),
        "one": torch.tensor(4),
        "complex": torch.randn(5, dtype=torch.cfloat),
        "sparse": torch.eye(3).to_sparse(),
    }
    fresh = fresh_inputs(given, seed=3)
    for name in ("labels", "columns", "row", "complex"):
        assert not torch.equal(fresh[name], given[name]), name
    assert torch.equal(fresh["labels"].sort().values, given["labels"].sort().values)
    assert torch.equal(fresh["columns"].sort(0).values, given["columns"])
    for name in ("offsets", "bits", "none", "one"):
        assert torch.equal(fresh[name], given[name]), name
    same = fresh_inputs({"labels": given["labels"], "x": torch.rand(8)}, seed=3, daring=0)
    assert torch.equal(same["labels"], given["labels"])
    positive = torch.rand(50)
    assert torch.equal(fresh_inputs(positive, seed=1, daring=1).sort().values, positive.sort().values)
    assert float(fresh_inputs(positive, 1, 2, 10.0).std()) > 5 * float(positive.std())


def test_copies_keep_what_is_one() -> None:
    x = torch.randn(3, requires_grad=True)
    one, (other, batch) = copied((x, [x, Batch(x, {"y": x})]))
    assert one is other is batch.x is batch.more["y"] is not x
    assert one.requires_grad
    assert one.is_leaf


def test_what_is_wrapped_is_found() -> None:
    model = nn.Linear(2, 3)
    assert inside(nn.DataParallel(model)) is model
    assert inside(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert inside(model) is model


class MixedPrecision(nn.Module):
    """Half of it runs in bfloat16, by casts of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5).to(torch.bfloat16), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.to(torch.bfloat16))).float())


def test_a_model_of_several_precisions_is_certified_in_one() -> None:
    (found,) = mt.find_symmetries(MixedPrecision(), torch.randn(6, 4)).exact
    assert found.drift <= 1e-12
    for dtype in (torch.bfloat16, torch.float16):
        (found,) = mt.find_symmetries(pair(through).to(dtype), torch.randn(6, 4).to(dtype)).exact
        assert found.drift <= 1e-12


def test_a_model_that_runs_in_no_other_precision_is_told() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.a.weight.dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")
        return through(m, x)

    model = pair(forward).to(torch.bfloat16)
    with pytest.raises(Unsuitable, match=r"neither in float64 nor in float32.*bfloat16"):
        mt.certify(model, [mt.Rescaling(model, "a", "b")], (torch.randn(6, 4, dtype=torch.bfloat16),))


def test_what_a_model_keeps_is_copied_or_told() -> None:
    model, x = pair(through), torch.randn(6, 4)
    model.kept = {"last": [model(x)]}
    assert len(mt.find_symmetries(model, x).exact) == 1
    assert model.kept["last"][0].grad_fn is not None
    model.lock = threading.Lock()
    with pytest.raises(Unsuitable, match=r"cannot be copied by copy.deepcopy \(TypeError"):
        mt.certify(model, [mt.Rescaling(model, "a", "b")], (x,))


def _derivative(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    y = through(m, x)
    return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_by_its_input() -> None:
    torch.manual_seed(0)
    model, x = pair(_derivative), torch.randn(6, 4)
    symmetries = [mt.Rescaling(model, "a", "b")]
    (certificate,) = mt.certify(model, symmetries, (x,))
    assert certificate.holds
    report = mt.teleport(model, mt.RandomTeleporter(size=1.0, seed=0), x, lambda out: out[1].square().sum(), symmetries)
    assert report.size > 0
    assert report.drift <= 1e-5
    assert not x.requires_grad


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_part_is_named_and_left_alone() -> None:
    model = pair(lambda m, x: through(m, m.inner(x)), inner=torch.jit.script(nn.Linear(4, 4)))
    found = mt.find_symmetries(model, torch.randn(6, 4))
    assert found.refused
    assert all("inner" not in name for each in found for name in each.parameters)
