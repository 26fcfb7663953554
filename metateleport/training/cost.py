"""The price on teleports in meta-training: how far group elements are from the identity, between 0 and 1."""

from __future__ import annotations

import torch
from torch import Tensor

from metateleport.groups import Group
from metateleport.learned.meta_optimizer import Step

__all__ = ["openness", "openness_of"]


def openness(group: Group, element: Tensor) -> Tensor:
    r"""The distance of a group element from the identity, on a scale from 0 at the identity towards 1 far away.

    $$r^2 = \frac{|g - 1|^2 + |g^{-1} - 1|^2}{2k}, \qquad s = \log(1 + r), \qquad o = \frac{s}{1 + s}$$

    For $g = \exp T$ near the identity $r$ is $|T| / \sqrt k$; far from it $s$ grows with the largest eigenvalue of $T$.
    So $o$ tells a weak teleport from a strong one at every width, and it is the same for $g$ and $g^{-1}$. Near the
    identity it is linear in the generator, not quadratic: a price on it closes a gate whose gain is below the price,
    instead of closing every gate a little.

    Args:
        group: the element's group, acting on k dimensions.
        element: the element, `(*batch, *group.shape)`, in the graph.

    Returns:
        `(*batch,)`, in the graph; its gradient at the identity itself is zero.

    Example:
        >>> from metateleport.groups import GeneralLinear
        >>> openness(GeneralLinear(2), torch.eye(2))
        tensor(0.)
    """
    one = group.identity(dtype=element.dtype, device=element.device)
    square = sum(group.norm(each - one).square() for each in (element, group.inverse(element))) / (2 * group.size)
    assert isinstance(square, Tensor)
    # The root's derivative is infinite at zero: a refused element, which is the identity, would give a NaN.
    away = square > torch.finfo(square.dtype).eps ** 2
    size = torch.where(away, torch.where(away, square, 1.0).sqrt(), 0.0).log1p()
    return size / (1 + size)


def openness_of(step: Step, stays: bool) -> Tensor | None:
    """Mean openness of a step's group elements, over the teleports that stay and the gauges, `(tasks,)`.

    Args:
        step: the meta-optimizer's step.
        stays: whether it learns a teleport that stays; if not, its moves are empty and do not count.

    Returns:
        The openness, in the graph; a refused element counts as the identity. None if no group element is learned.
    """
    chosen = [(move.symmetry.group, move.element) for move in step.moves] if stays else []
    chosen += [(gauge.symmetry.group, gauge.element) for gauge in step.gauges]
    if not chosen:
        return None
    return torch.stack([openness(group, element) for group, element in chosen]).mean(0)
