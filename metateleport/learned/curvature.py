"""Curvature of the loss along each layer's weights: small matrices, and smooth bounds.

Steps are taken relative to such a bound, and the bound is differentiable. So the meta-gradient sees that a teleport or
a gauge that makes the curvature more even allows a larger step; without that no teleport is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metateleport.gauges import Gauge
from metateleport.linalg import product
from metateleport.point import Point, Tensors, made_of
from metateleport.symmetries import Pair, Symmetry

__all__ = ["curvature_bounds", "largest_of", "output_curvatures", "smooth_largest"]


def smooth_largest(factor: Tensor) -> Tensor:
    r"""A smooth upper bound on the largest eigenvalue of $A = F^\top F$: $(\operatorname{tr} A^{16})^{1/16}$.

    With a lower power the bound grows more with the width if the eigenvalues are alike, and a learned multiple of it
    fits fewer widths: the identity of size 100 is bounded by 1.33 with power 16, and by 3.2 with power 4.

    Args:
        factor: F, `(*batch, rows, columns)`.

    Returns:
        The bound, `(*batch,)`; at most $k^{1/16}$ times the largest eigenvalue, for rank $k$.

    Example:
        >>> smooth_largest(torch.diag(torch.tensor([3.0, 1.0])))
        tensor(9.0000)
    """

    def made() -> Tensor:
        largest: Tensor = _Largest.apply(factor, True)
        return largest

    return made_of(factor, "largest", made)


def largest_of(matrix: Tensor) -> Tensor:
    """The bound of `smooth_largest` for a symmetric positive semidefinite matrix $A$, `(*batch, k, k)`."""
    largest: Tensor = _Largest.apply(matrix, False)
    return largest


class _Largest(torch.autograd.Function):
    r"""$b = (\operatorname{tr} A^{16})^{1/16}$ of $A$, or of a factor's Gram matrix, by three squarings.

    The derivative is $A^{15} / b^{15}$, of which the powers at hand leave three products, where that of the squarings
    would take six. As $b$ is homogeneous of degree one its own scale cancels.
    """

    @staticmethod
    def forward(context: Any, tensor: Tensor, is_factor: bool) -> Tensor:
        tall = tensor.shape[-1] <= tensor.shape[-2]
        matrix = (product(tensor.mT, tensor) if tall else product(tensor, tensor.mT)) if is_factor else tensor
        tiny = torch.finfo(matrix.dtype).tiny
        trace = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1).clamp_min(tiny)
        first = matrix / trace[..., None, None]
        second = product(first, first)
        # Scaled once more, so that the powers neither overflow nor vanish.
        norm = torch.linalg.matrix_norm(second).clamp_min(tiny**0.5)
        second = second / norm[..., None, None]
        fourth = product(second, second)
        eighth = product(fourth, fourth)
        last = torch.linalg.matrix_norm(eighth).clamp_min(tiny**0.5)
        # Of a matrix of zeros the bound is as flat as it is.
        scale = torch.where(trace > tiny, norm ** (-1 / 2) * last ** (-15 / 8), 0.0)
        context.save_for_backward(tensor, scale, first, second, fourth, eighth)
        context.is_factor, context.tall = is_factor, tall
        return trace * norm ** (1 / 2) * last ** (1 / 8)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        tensor, scale, first, second, fourth, eighth = context.saved_tensors
        slope = product(product(first, second), product(fourth, eighth))
        if context.is_factor:
            slope, scale = product(tensor, slope) if context.tall else product(slope, tensor), 2 * scale
        return (gradient * scale)[..., None, None] * slope, None


def output_curvatures(point: Point, symmetries: Sequence[Symmetry]) -> Tensors:
    r"""Curvature of the loss in the outputs of each pair's lower layer: a matrix $S$, up to a scalar.

    For $y = U\, s(z)$ with slopes $d = s'(z)$, and $M$ the matrix $S$ of the layer of $U$ (the identity for the last),

    $$S = (U^\top M U) \circ \frac{1}{n} \sum_{\text{samples}} d\, d^\top,$$

    the Gauss-Newton matrix of squared errors averaged over the samples, slopes of different layers taken as
    independent.

    Args:
        point: with activations.
        symmetries: pairs of linear layers, which give the order of the layers.

    Returns:
        $S$ by the lower layer's name, `(*batch, width, width)`; pairs with convolutions are left out.

    Source: the factorisation is that of Martens and Grosse, ICML 2015 (arXiv 1503.05671), section 3.
    """
    following = {each.first: each for each in symmetries if isinstance(each, Pair) and each.is_dense}
    found: Tensors = {}

    def of(layer: str) -> Tensor | None:
        pair = following.get(layer)
        if pair is None:
            return None
        if layer not in found:
            weight, above = point.parameters[pair.second_weight], of(pair.second)
            matrix = product(weight.mT, weight if above is None else product(above, weight))
            slopes = pair.slopes(point)
            found[layer] = matrix if slopes is None else matrix * product(slopes.mT, slopes) / slopes.shape[-2]
        return found[layer]

    for layer in following:
        of(layer)
    return found


def curvature_bounds(
    point: Point, symmetries: Sequence[Symmetry], gauges: Sequence[Gauge] = (), largest: Tensors | None = None
) -> Tensors:
    r"""Bounds on the Gauss-Newton curvature along each weight and bias of the modules in the symmetries.

    For a layer $z = W h + b$ whose outputs the loss curves in by at most $\gamma$, the curvature along $W$ is at most
    $\gamma\, \lambda_{\max}(h h^\top)$ and along $b$ at most $\gamma$ times the number of samples. For the layer
    nearest to the loss, $\gamma = |\partial L / \partial z|^2 / 2 L$: exact for squared errors, and close for a cross
    entropy. Below, that $\gamma$ is multiplied by $\lambda_{\max}(S)$ of `output_curvatures`; where a convolution
    follows, by $\lambda_{\max}(W^\top W)$ of each layer on the way, whose activation is taken to have slopes of at
    most one. Largest eigenvalues are bounded smoothly (`smooth_largest`). Between linear layers these are bounds; with
    an activation, whose slopes are averaged over the samples, the curvature may be several times larger.

    In a gauge $g$, the bound is that for inputs $g h$ and for $g^{-\top} S g^{-1}$ in the place of $S$.

    Args:
        point: with loss, activations and cotangents.
        symmetries: pairs, which give the order of the layers.
        gauges: the gauges that the tensors are stepped in.
        largest: is given `smooth_largest` of the inputs of each layer that no gauge changes, by the layer's name.

    Returns:
        Bounds by parameter name, `(*batch,)`; parameters of other modules are left out.
    """
    loss = point.loss
    if loss is None:
        return {}
    batch = loss.ndim
    pairs = [symmetry for symmetry in symmetries if isinstance(symmetry, Pair)]
    following = {pair.first: pair.second for pair in pairs}
    layers = list(dict.fromkeys(name for pair in pairs for name in pair.modules))
    seen = {gauge.symmetry.modules[1]: gauge for gauge in gauges if _of_pair(gauge) and gauge.side == "in"}
    shown = {gauge.symmetry.modules[0]: gauge for gauge in gauges if _of_pair(gauge) and gauge.side == "out"}
    tiny = torch.finfo(loss.dtype).tiny
    downstream: Tensors = {}
    known: list[Tensors] = []

    def curvatures() -> Tensors:
        # Not looked at where every gauge holds its bound.
        if not known:
            known.append(output_curvatures(point, pairs))
        return known[0]

    def last(layer: str) -> str:
        return last(following[layer]) if layer in following else layer

    def gamma(layer: str) -> Tensor:
        if layer not in downstream:
            if layer not in following:
                power = point.cotangents[layer].square().sum((-2, -1))
                downstream[layer] = power / (2 * loss.abs()).clamp_min(tiny)
            elif layer in shown:
                above = shown[layer].above
                largest = largest_of(shown[layer].outgoing(curvatures()[layer])) if above is None else above
                downstream[layer] = gamma(last(layer)) * largest
            elif layer in curvatures():
                downstream[layer] = gamma(last(layer)) * largest_of(curvatures()[layer])
            else:
                weight = point.parameters[f"{following[layer]}.weight"]
                through = smooth_largest(weight.flatten(batch + 1)) * _kernel(weight, batch)
                downstream[layer] = gamma(following[layer]) * through
        return downstream[layer]

    bounds = {}
    for layer in layers:
        if layer not in point.cotangents or layer not in point.activations or last(layer) not in point.cotangents:
            continue
        inputs = point.activations[layer]
        if layer in seen:
            size = smooth_largest(seen[layer].incoming(inputs))
        else:
            size = smooth_largest(inputs)
            if largest is not None:
                largest[layer] = size
        size = size * _kernel(point.parameters[f"{layer}.weight"], batch)
        bounds[f"{layer}.weight"] = (gamma(layer) * size).clamp_min(tiny)
        if f"{layer}.bias" in point.parameters:
            samples = point.cotangents[layer].shape[-2]
            bounds[f"{layer}.bias"] = (gamma(layer) * samples).clamp_min(tiny)
    return bounds


def _of_pair(gauge: Gauge) -> bool:
    return isinstance(gauge.symmetry, Pair) and gauge.symmetry.is_dense


def _kernel(weight: Tensor, batch: int) -> int:
    """Number of positions in a convolution's kernel; one for a linear layer."""
    return weight.shape[batch + 2 :].numel()
