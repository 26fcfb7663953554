"""Smooth bounds on how strongly the loss curves along each layer's weights.

A step is taken relative to such a bound, and the bound is differentiable: through it the meta-gradient sees that a
teleport which evens a layer's inputs out allows a larger step. Without that nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metateleport.point import Point, Tensors
from metateleport.symmetries import Pair, Symmetry

__all__ = ["curvature_bounds", "smooth_largest"]


def smooth_largest(factor: Tensor) -> Tensor:
    r"""A smooth upper bound on the largest eigenvalue of $A = F^\top F$: $(\operatorname{tr} A^4)^{1/4}$.

    Args:
        factor: F, `(*batch, rows, columns)`.

    Returns:
        The bound, `(*batch,)`; at most $k^{1/4}$ times the eigenvalue, for rank $k$.

    Example:
        >>> smooth_largest(torch.diag(torch.tensor([3.0, 1.0])))
        tensor(9.0003)
    """
    gram = factor.mT @ factor if factor.shape[-1] <= factor.shape[-2] else factor @ factor.mT
    # Scaled so that the eighth powers neither overflow nor vanish.
    scale = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    unit = gram / scale[..., None, None]
    return scale * (unit @ unit).square().sum((-2, -1)).clamp_min(torch.finfo(gram.dtype).tiny) ** 0.25


def curvature_bounds(point: Point, symmetries: Sequence[Symmetry]) -> Tensors:
    r"""Bounds on the Gauss-Newton curvature along each weight and bias that the symmetries' modules show.

    For a layer $z = W h + b$ whose outputs the loss curves in by at most $\gamma$, the curvature along $W$ is at most
    $\gamma\, \lambda_{\max}(h h^\top)$ and along $b$ at most $\gamma$ times the number of samples. For the layer
    nearest to the loss, $\gamma = |\partial L / \partial z|^2 / 2 L$: exact for squared errors, and close for a cross
    entropy. Below, $\gamma$ is multiplied by $\lambda_{\max}(W^\top W)$ of each layer on the way, whose activation
    is taken to have slopes of at most one. Largest eigenvalues are bounded smoothly (`smooth_largest`).

    Args:
        point: with loss, activations and cotangents.
        symmetries: pairs, which tell which layer follows which.

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
    tiny = torch.finfo(loss.dtype).tiny
    downstream: Tensors = {}

    def gamma(layer: str) -> Tensor:
        if layer not in downstream:
            if layer in following:
                weight = point.parameters[f"{following[layer]}.weight"]
                through = smooth_largest(weight.flatten(batch + 1)) * _kernel(weight, batch)
                downstream[layer] = gamma(following[layer]) * through
            else:
                power = point.cotangents[layer].square().sum((-2, -1))
                downstream[layer] = power / (2 * loss.abs()).clamp_min(tiny)
        return downstream[layer]

    bounds = {}
    for layer in layers:
        if layer not in point.cotangents or layer not in point.activations:
            continue
        inputs = smooth_largest(point.activations[layer]) * _kernel(point.parameters[f"{layer}.weight"], batch)
        bounds[f"{layer}.weight"] = (gamma(layer) * inputs).clamp_min(tiny)
        if f"{layer}.bias" in point.parameters:
            samples = point.cotangents[layer].shape[-2]
            bounds[f"{layer}.bias"] = (gamma(layer) * samples).clamp_min(tiny)
    return bounds


def _kernel(weight: Tensor, batch: int) -> int:
    """Places of a convolution's kernel, each of which sees every input once; one for a linear layer."""
    return weight[(0,) * (batch + 2)].numel()
