"""What teleports cost in meta-training: how far their group elements lie from the identity, between 0 and 1."""

from __future__ import annotations

import torch
from torch import Tensor

from metateleport.groups import Group
from metateleport.learned.meta_optimizer import Step

__all__ = ["openness", "openness_of"]


def openness(group: Group, element: Tensor) -> Tensor:
    r"""How far a group element is from the identity: 0 there, towards 1 far off.

    $$r^2 = \frac{|g - 1|^2 + |g^{-1} - 1|^2}{2k}, \qquad s = \log(1 + r), \qquad o = \frac{s}{1 + s}$$

    For $g = \exp T$ near the identity $r$ is $|T| / \sqrt k$, and far from it $s$ grows as $T$'s largest eigenvalue
    does: it tells a weak teleport from a strong one at every width, and $g$ and $g^{-1}$ are equally far. Close to the
    identity it is linear in the generator, not quadratic, so that a price on it closes a gate whose gain is below
    the price, in the place of shrinking every gate a little.

    Args:
        group: the element's group, acting on k dimensions.
        element: `(*batch, *group.shape)`, in the graph of what chose it.

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
    # The root's derivative is infinite at zero, where a refused element would put a NaN.
    away = square > torch.finfo(square.dtype).eps ** 2
    size = torch.where(away, torch.where(away, square, 1.0).sqrt(), 0.0).log1p()
    return size / (1 + size)


def openness_of(step: Step, stays: bool) -> Tensor | None:
    """Mean openness of a step's group elements, over the teleports that stay and the gauges, `(tasks,)`.

    Args:
        step: what the meta-optimizer gave.
        stays: whether it learns a teleport that stays; without one, its moves are all empty and do not count.

    Returns:
        In the graph; what was refused counts as closed. None where the step chooses no group element.
    """
    chosen = [(move.symmetry.group, move.element) for move in step.moves] if stays else []
    chosen += [(gauge.symmetry.group, gauge.element) for gauge in step.gauges]
    if not chosen:
        return None
    return torch.stack([openness(group, element) for group, element in chosen]).mean(0)
