"""The basis of the Lie algebra, its logarithms, the invariants, and the bounds on the curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from symmetry_cases import LEARNED, Case, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.capture import point_of
from metateleport.learned.curvature import curvature_bounds, smooth_largest
from metateleport.learned.teleporter import BASIS, FEATURES, observe
from metateleport.linalg import Spectrum, quick_spectrum, symmetric_log, symmetric_spectrum
from metateleport.point import Point

every_case = pytest.mark.parametrize("case", LEARNED, ids=str)


def spectrum(*values: float, seed: int = 0) -> Tensor:
    """A symmetric matrix with the given eigenvalues in a random basis."""
    source = torch.Generator().manual_seed(seed)
    size = len(values)
    axes, _ = torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64))
    return (axes * torch.tensor(values, dtype=torch.float64)) @ axes.mT


def test_the_logarithm_undoes_the_exponential() -> None:
    for seed in range(3):
        matrix = spectrum(0.1, 1.0, 3.0, 7.0, seed=seed)
        log, logs = symmetric_log(matrix)
        assert torch.allclose(torch.linalg.matrix_exp(log), matrix, atol=1e-11)
        assert torch.allclose(logs, torch.tensor([0.1, 1.0, 3.0, 7.0], dtype=torch.float64).log(), atol=1e-10)
        assert torch.equal(log, log.mT) or torch.allclose(log, log.mT, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_the_logarithm_of_any_scale(scale: float) -> None:
    log, logs = symmetric_log(spectrum(1.0, 2.0, 5.0) * scale)
    expected = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log() + math.log(scale)
    assert torch.allclose(logs, expected, atol=1e-9)
    assert torch.allclose(log, spectrum(*expected.tolist()), atol=1e-8)


def test_a_singular_matrix_is_shifted() -> None:
    log, logs = symmetric_log(spectrum(0.0, 0.0, 2.0))
    assert bool(log.isfinite().all())
    assert float(logs[-1]) == pytest.approx(math.log(2.0))
    # The relative shift of float64, and the rounding that the zeros of a rotated matrix carry.
    assert float(logs[0]) == pytest.approx(math.log(2e-13), abs=0.1)
    single, _ = symmetric_log(torch.zeros(3, 3))
    assert bool(single.isfinite().all())
    assert single.dtype == torch.float32


@pytest.mark.parametrize("of", [symmetric_spectrum, quick_spectrum])
def test_a_matrix_that_is_not_finite_is_left_out_alone(of: Callable[..., Spectrum]) -> None:
    good = spectrum(1.0, 2.0, 5.0)
    for bad in (float("nan"), float("inf")):
        stacked = torch.stack((good, torch.full_like(good, bad), good * 3))
        log, logs = of(stacked).both(1e-13)
        alone, _ = of(good).both(1e-13)
        assert torch.allclose(log[0], alone, atol=1e-14)
        assert not bool(log[1].any())
        assert not bool(logs[1].any())
        assert bool(log[2].isfinite().all())


def failing(monkeypatch: pytest.MonkeyPatch, fails: int) -> list[int]:
    """Lets `eigh` fail for stacks, and for so many single matrices after them."""
    own = torch.linalg.eigh
    calls: list[int] = []
    left: Iterator[bool] = iter([True] * fails)

    def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix.ndim)
        if matrix.ndim > 2 or next(left, False):
            raise torch.linalg.LinAlgError("did not converge")
        return own(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return calls


def test_where_eigh_fails_a_larger_shift_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = torch.stack((spectrum(1.0, 2.0, 5.0), spectrum(0.5, 2.0, 3.0)))
    expected, _ = symmetric_log(stacked)
    calls = failing(monkeypatch, fails=1)
    log, logs = symmetric_log(stacked)
    assert calls == [3, 2, 2, 2]
    assert log.shape == expected.shape
    assert logs.shape == (2, 3)
    assert torch.allclose(log, expected, atol=1e-6)


def test_where_eigh_fails_for_good_the_generator_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = torch.stack((spectrum(1.0, 2.0, 5.0), spectrum(0.5, 2.0, 3.0)))
    expected, _ = symmetric_log(stacked)
    failing(monkeypatch, fails=2)
    log, _ = symmetric_log(stacked)
    assert not bool(log[0].any())
    assert torch.allclose(log[1], expected[1])


@every_case
def test_shapes_and_orders_of_magnitude(case: Case) -> None:
    problem = case.problem()
    point = problem.point()
    for symmetry in problem.symmetries:
        seen = observe(symmetry, point)
        group = symmetry.group
        assert seen.basis.shape == (len(BASIS[group.name]), *group.shape)
        assert seen.features.shape == (FEATURES[group.name],)
        assert bool(seen.basis.isfinite().all())
        assert float(seen.features.abs().max()) < 10
        # A generator is in the Lie algebra.
        if group.name == "O":
            assert torch.allclose(seen.basis, -seen.basis.mT)


@every_case
def test_a_stack_sees_what_single_models_see(case: Case) -> None:
    stacked, batch = case.stack(2)
    point = stacked.point_at(stacked.tensors(), batch)
    for symmetry in stacked.symmetries:
        together = observe(symmetry, point)
        for seed in range(2):
            alone = observe(symmetry, case.problem(seed).point())
            # Logarithms of singular covariances carry the rounding of their zeros.
            assert torch.allclose(together.features[seed], alone.features, atol=1e-3)
            assert torch.allclose(together.basis[seed][-3:], alone.basis[-3:], atol=1e-9)


@pytest.mark.parametrize("name", ["linear pair", "rescaling", "2022 form, samples at width", "quadratic"])
def test_features_know_no_scale(name: str) -> None:
    """Loss, gradients and weights in other units, balanced between the layers: the features stay."""
    problem = case(name).problem()
    point = problem.point()
    for factor in (1e-6, 1e6):
        scaled = point.replace(
            gradients={key: value * factor for key, value in point.gradients.items()},
            cotangents={key: value * factor for key, value in point.cotangents.items()},
        )
        for symmetry in problem.symmetries:
            seen, expected = observe(symmetry, scaled).features, observe(symmetry, point).features
            assert torch.allclose(seen, expected, atol=2e-3)


def test_what_a_point_does_not_tell_is_zero() -> None:
    problem = case("linear pair").problem()
    bare = Point(parameters=problem.point().parameters)
    seen = observe(problem.symmetries[0], bare)
    names = BASIS["GL"]
    for name, generator in zip(names, seen.basis, strict=True):
        known = name in ("log outgoing_covariance", "log incoming_covariance", "identity")
        assert bool(generator.any()) == known, name
    assert bool(seen.features.isfinite().all())


def test_detached_unless_told_otherwise() -> None:
    stacked, batch = case("linear pair").stack(2)
    point = stacked(batch, probe=True).point(in_graph=True)
    assert not observe(stacked.symmetries[0], point).basis.requires_grad
    assert observe(stacked.symmetries[0], point, detach=False).basis.requires_grad


def test_logarithms_below_rounding_do_not_depend_on_the_noise() -> None:
    logs = [
        symmetric_log(torch.diag(torch.tensor([1.0, noise], dtype=torch.float64)))[0] for noise in (3e-16, -2e-16, 0.0)
    ]
    assert torch.equal(logs[0], logs[1])
    assert torch.equal(logs[0], logs[2])
    # What is above rounding is seen.
    assert not torch.allclose(symmetric_log(torch.diag(torch.tensor([1.0, 1e-12]).double()))[0], logs[0])


def test_smooth_bound_on_the_largest_eigenvalue() -> None:
    source = torch.Generator().manual_seed(0)
    for rows, columns in ((3, 7), (7, 3), (5, 5), (1, 4)):
        factor = torch.randn(20, rows, columns, generator=source, dtype=torch.float64)
        largest = torch.linalg.svdvals(factor)[..., 0] ** 2
        bound = smooth_largest(factor)
        rank = min(rows, columns)
        assert bool((bound >= largest * (1 - 1e-12)).all())
        assert bool((bound <= largest * rank ** (1 / 16) * (1 + 1e-12)).all())
        assert torch.allclose(bound, torch.linalg.svdvals(factor).pow(32).sum(-1) ** (1 / 16))
    for scale in (1e-100, 1e100):
        assert torch.allclose(smooth_largest(scale * factor) / scale**2, bound)
    assert bool(smooth_largest(torch.zeros(2, 3, 4)).isfinite().all())


def two_layers(activation: nn.Module | None, bias: bool) -> tuple[nn.Sequential, list[mt.Symmetry], Tensor, Tensor]:
    between = [] if activation is None else [activation]
    model = nn.Sequential(nn.Linear(4, 3, bias=bias), *between, nn.Linear(3, 2, bias=bias)).double()
    names = ("0", str(1 + len(between)))
    pair = mt.LinearPair(model, *names) if activation is None else mt.Rescaling(model, *names)
    return model, [pair], torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, nn.LeakyReLU(0.1), nn.ReLU()])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_lie_above_the_gauss_newton_curvature(seed: int, activation: nn.Module | None, bias: bool) -> None:
    r"""For squared errors, the largest eigenvalue of $J^\top J$ along each weight and bias."""
    torch.manual_seed(seed)
    model, symmetries, inputs, targets = two_layers(activation, bias)
    point, _ = point_of(model, symmetries, (inputs,), None, lambda y: (y - targets).square().sum() / 2)
    bounds = curvature_bounds(point, symmetries)
    assert set(bounds) == set(point.parameters)
    for name, value in point.parameters.items():

        def outputs(one: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(model, {**point.parameters, name: one}, (inputs,)).flatten()

        jacobian = torch.autograd.functional.jacobian(outputs, value.detach()).flatten(1)
        curvature = float(torch.linalg.svdvals(jacobian)[0] ** 2)
        # Slopes are averaged over the samples, which is a bound only where there are none.
        share = 1 - 1e-9 if activation is None else 0.1
        assert float(bounds[name]) >= curvature * share, name
        # Not so far above that no step would be left.
        assert float(bounds[name]) <= 30 * curvature, name


def test_bounds_scale_as_the_curvature_does() -> None:
    model, symmetries, inputs, targets = two_layers(None, bias=True)

    def bounds(loss_scale: float, input_scale: float) -> dict[str, Tensor]:
        half = loss_scale / 2
        with torch.no_grad():
            model[0].bias.zero_()
        scaled = inputs * input_scale
        point, _ = point_of(model, symmetries, (scaled,), None, lambda y: half * (y - targets).square().sum())
        return curvature_bounds(point, symmetries)

    usual, steep, wide = bounds(1.0, 1.0), bounds(1e6, 1.0), bounds(1.0, 1e3)
    for name, value in usual.items():
        assert float(steep[name]) == pytest.approx(1e6 * float(value), rel=1e-9)
    assert float(wide["0.weight"]) == pytest.approx(1e6 * float(usual["0.weight"]), rel=1e-9)
    assert float(wide["0.bias"]) == pytest.approx(float(usual["0.bias"]), rel=1e-9)
    assert float(wide["1.weight"]) == pytest.approx(1e6 * float(usual["1.weight"]), rel=1e-9)


def test_bounds_see_a_whitening_teleport() -> None:
    """Through them the meta-gradient learns that evening the features out brings all curvatures up to the bound."""
    model, symmetries, inputs, targets = two_layers(None, bias=False)
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([[10.0], [1.0], [0.1]]))
    point, _ = point_of(model, symmetries, (inputs,), None, lambda y: (y - targets).square().sum() / 2)
    covariance = symmetries[0].matrices(point)["feature_covariance"]
    generator = (-symmetric_log(covariance)[0] / 2).requires_grad_()

    def evenness(size: float) -> Tensor:
        """Smallest curvature along the last layer over its bound: how much of it a step within the bound takes."""
        moved = symmetries[0].act(torch.linalg.matrix_exp(size * generator), point)
        features = symmetries[0].matrices(moved)["feature_covariance"]
        return torch.linalg.eigvalsh(features)[0] / curvature_bounds(moved, symmetries)["1.weight"]

    # For squared errors the loss curves by one along the outputs.
    assert float(evenness(1.0)) == pytest.approx(3 ** (-1 / 16), rel=1e-5)
    assert float(evenness(0.0)) < 1e-3
    (gradient,) = torch.autograd.grad(evenness(0.5), generator)
    assert float((gradient * generator).sum()) > 0


def test_no_bounds_without_a_loss_or_a_pair() -> None:
    problem = case("linear pair").problem()
    point = problem.point()
    assert curvature_bounds(point.replace(loss=None), problem.symmetries) == {}
    assert curvature_bounds(point, []) == {}
    quadratic = case("quadratic").problem()
    assert curvature_bounds(quadratic.point(), quadratic.symmetries) == {}


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 4), (3, 3)], ids=str)
def test_derivative_of_the_smooth_bound(shape: tuple[int, ...]) -> None:
    factor = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(smooth_largest, (factor,))
    # Homogeneous of degree two: the derivative along the factor itself is twice the bound, whatever the scale.
    for scale in (1e-100, 1e100):
        scaled = (scale * factor.detach()).requires_grad_()
        bound = smooth_largest(scaled)
        (slope,) = torch.autograd.grad(bound.sum(), scaled)
        assert torch.allclose((slope * scaled).sum((-2, -1)), 2 * bound, rtol=1e-10, atol=0)
    zero = torch.zeros(*shape, requires_grad=True)
    (slope,) = torch.autograd.grad(smooth_largest(zero).sum(), zero)
    assert torch.equal(slope, torch.zeros(*shape))
