"""Steps in whitening gauges: the laws that make them independent of how a product is split."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.gauges import DIRECTIONS, factor_pairs, in_gauge, inverse_root, polar_by_gram, whitening_roots
from metateleport.gauges.factors import Coordinates, gathered, spread
from metateleport.gauges.polar import definite
from metateleport.gauges.roots import orthonormalising
from metateleport.linalg import polar_factors
from metateleport.symmetries import AttentionVO, LoRAPair


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def element(size: int, condition: float, seed: int = 0, scale: float = 1.0) -> Tensor:
    """An element of GL with a given condition number."""
    left, right = (torch.linalg.qr(drawn(size, size, seed=seed + shift))[0] for shift in (11, 12))
    values = torch.logspace(-math.log10(condition) / 2, math.log10(condition) / 2, size, dtype=torch.float64)
    return scale * left @ torch.diag(values) @ right


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
def test_the_orthonormalising_root_is_as_exact_as_the_qr_decomposition(condition: float) -> None:
    rows = drawn(2, 12, 4) @ element(4, condition)
    root, inverse = orthonormalising(rows)
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(root @ inverse, eye.expand(2, 4, 4), atol=1e-9)
    q = rows @ inverse
    assert torch.allclose(q.mT @ q, eye.expand(2, 4, 4), atol=1e-15 * 100 * condition)
    reference = torch.linalg.qr(rows)[1]
    assert torch.allclose(root, reference * reference.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1), rtol=1e-6)


def test_the_root_of_dependent_or_missing_columns_is_finite() -> None:
    for rows in (torch.zeros(1, 5, 3).double(), drawn(1, 2, 4), drawn(1, 6, 1).expand(1, 6, 3), torch.zeros(1, 1, 2)):
        root, inverse = orthonormalising(rows)
        assert bool(root.isfinite().all())
        assert bool(inverse.isfinite().all())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions_move_along_with_an_element(direction: str, zero: bool, swapped: bool) -> None:
    """step(g . W) = g . step(W), also where one factor is zero."""
    out, into = drawn(1, 9, 3, seed=1), drawn(1, 7, 3, seed=2)
    if zero and swapped:
        out = torch.zeros_like(out)
    elif zero:
        into = torch.zeros_like(into)
    covectors = drawn(1, 9, 3, seed=3), drawn(1, 7, 3, seed=4)
    squares = tuple((x := drawn(1, 20, 3, seed=seed)).mT @ x for seed in (5, 6))
    sketches = drawn(1, 9, 4, seed=7), drawn(1, 7, 4, seed=8)
    g = element(3, 1e3, scale=17.0)
    inverse = torch.linalg.inv(g)

    def steps(moved: bool) -> tuple[Tensor, Tensor]:
        # Rows go by these from the right, and covectors by their transposed inverses.
        acts = (g.mT, inverse) if moved else (torch.eye(3).double(),) * 2
        roots = whitening_roots(out @ acts[0], into @ acts[1], 0.3, swapped)
        found = []
        both = (roots.outgoing, roots.incoming)
        for covector, act, root, square, sketch in zip(covectors, acts, both, squares, sketches, strict=True):
            dual = torch.linalg.inv(act).mT
            moved_square = dual.mT @ square @ dual
            step = in_gauge(direction, covector @ dual, root, moved_square, sketch)  # type: ignore[arg-type]
            found.append(step @ torch.linalg.inv(act))
        return found[0], found[1]

    for home, away in zip(steps(False), steps(True), strict=True):
        assert float((home - away).norm()) <= 1e-8 * float(home.norm())


def test_polar_by_gram_is_the_polar_factor_of_any_shape() -> None:
    for shape in ((2, 9, 3), (2, 3, 9), (1, 4, 4)):
        x = drawn(*shape)
        assert torch.allclose(polar_by_gram(x), polar_factors([x])[0], atol=1e-12)
    assert not bool(polar_by_gram(torch.zeros(1, 4, 2)).any())


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_the_inverse_root(condition: float) -> None:
    root = element(4, condition**0.5)
    matrix = (root @ root.mT).unsqueeze(0)
    found = inverse_root(matrix)
    assert torch.allclose(found @ matrix @ found, torch.eye(4).double().unsqueeze(0), atol=1e-2)
    assert not bool(inverse_root(torch.zeros(1, 3, 3)).any())


@pytest.mark.parametrize("size", [32, 192])
def test_the_inverse_root_of_a_gram_matrix_of_low_rank_is_finite(size: int) -> None:
    """In single precision, where rounding leaves eigenvalues below zero."""
    for seed in range(5):
        source = torch.Generator().manual_seed(seed)
        rows = torch.randn(1, size // 2, size, generator=source) * torch.logspace(0, 3, size)
        assert bool(inverse_root(rows.mT @ rows).isfinite().all())


def test_a_gram_matrix_keeps_what_is_above_zero() -> None:
    root = element(4, 10.0).float()
    gram = (root @ root.mT).unsqueeze(0)
    assert torch.allclose(definite(gram), gram, rtol=1e-6)
    below = gram - 2 * torch.eye(4) * torch.linalg.eigvalsh(gram).amin()
    assert float(torch.linalg.eigvalsh(definite(below)).amin()) > -1e-5 * float(below.diagonal(dim1=1, dim2=2).sum())


def test_polar_is_the_geometric_mean_of_metric_and_gradient() -> None:
    """M (C # N)^-1, up to the accuracy of the polynomial."""
    metric, covector = (drawn(1, 30, 3, seed=seed) for seed in (1, 2))
    roots = whitening_roots(metric, drawn(1, 5, 3), 0.1)
    exact = torch.linalg.svd(covector @ roots.incoming, full_matrices=False)
    want = exact[0] @ exact[2] @ roots.incoming.mT
    found = in_gauge("polar", covector, roots.incoming)
    assert 0.6 < float(found.norm() / want.norm()) < 1.3


def test_rows_are_gathered_and_spread() -> None:
    tensor = drawn(2, 6, 3, 2)
    for places, axis in (([[4, 0]], 0), ([[0, 1, 2]], 1), ([[0, 1], [2, 3]], 0), ([[1, 0]], 2)):
        leg = Coordinates("w", torch.tensor(places), axis)
        rows = gathered(leg, tensor)
        assert torch.equal(spread(leg, rows, tensor), tensor)
        changed = spread(leg, 2 * rows, tensor)
        assert torch.equal(gathered(leg, changed), 2 * rows)
        assert (changed != tensor).sum() == rows.numel()


def test_factor_pairs_share_no_entries() -> None:
    chain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    pairs = factor_pairs(mt.symmetries_of(chain))
    assert [pair.names("out") for pair in pairs] == [("0.weight", "0.bias")]
    attention = nn.ModuleDict({"v": nn.Linear(6, 8), "o": nn.Linear(8, 6)})
    pairs = factor_pairs(AttentionVO.of_heads(attention, "v", "o", heads=2))
    assert [pair.names("in") for pair in pairs] == [("o.weight",), ("o.weight",)]
    assert not factor_pairs(mt.symmetries_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))


def test_an_adapter_is_named() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(2, 5)), "b": nn.Parameter(torch.zeros(3, 2))})
    assert LoRAPair.of(model, "a", "b").group.size == 2
    for names, said in ((("a", "c"), "no parameter 'c'"), (("b", "a"), "no factors A and B")):
        with pytest.raises(mt.symmetries.Unsuitable, match=said):
            LoRAPair.of(model, *names)
