"""The price on teleports in meta-training: how far group elements are from the identity, between 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metateleport.gauges import Gauge
from metateleport.groups import Group
from metateleport.learned.meta_optimizer import Step
from metateleport.teleporters import Move

__all__ = ["Elements", "elements_of", "openness", "openness_along"]


def openness(group: Group, element: Tensor, inverse: Tensor | None = None) -> Tensor:
    r"""The distance of a group element from the identity, on a scale from 0 at the identity towards 1 far away.

    $$r^2 = \frac{|g - 1|^2 + |g^{-1} - 1|^2}{2k}, \qquad s = \log(1 + r), \qquad o = \frac{s}{1 + s}$$

    For $g = \exp T$ near the identity $r$ is $|T| / \sqrt k$; far from it $s$ grows with the largest eigenvalue of $T$.
    So $o$ tells a weak teleport from a strong one at every width, and it is the same for $g$ and $g^{-1}$. Near the
    identity it is linear in the generator, not quadratic: a price on it closes a gate whose gain is below the price,
    instead of closing every gate a little.

    Args:
        group: the element's group, acting on k dimensions.
        element: the element, `(*batch, *group.shape)`, in the graph.
        inverse: its inverse, where that is known.

    Returns:
        `(*batch,)`, in the graph; its gradient at the identity itself is zero.

    Example:
        >>> from metateleport.groups import GeneralLinear
        >>> openness(GeneralLinear(2), torch.eye(2))
        tensor(0.)
    """
    one = group.identity(dtype=element.dtype, device=element.device)
    inverse = group.inverse(element) if inverse is None else inverse
    square = (group.norm(element - one).square() + group.norm(inverse - one).square()) / (2 * group.size)
    # The root's derivative is infinite at zero: a refused element, which is the identity, would give a NaN.
    away = square > torch.finfo(square.dtype).eps ** 2
    size = torch.where(away, torch.where(away, square, 1.0).sqrt(), 0.0).log1p()
    return size / (1 + size)


Elements = list[tuple[Group, Tensor, Tensor]]
"""Group elements with their groups and inverses."""


def elements_of(step: Step, stays: bool) -> Elements:
    """A step's group elements: those of the teleports that stay and of the gauges; a refused one is the identity.

    Args:
        step: the meta-optimizer's step.
        stays: whether it learns a teleport that stays; if not, its moves are empty and do not count.
    """
    chosen: list[Move | Gauge] = [*(step.moves if stays else ()), *step.gauges]
    return [(each.symmetry.group, each.element, each.symmetry.group.inverse(each.element)) for each in chosen]


def openness_along(steps: Sequence[Elements]) -> Tensor | None:
    """Mean openness of each step's group elements, `(steps, tasks)`, in the graph; None if none is learned.

    Elements that stand in the same place at every step are measured together.

    Args:
        steps: the group elements of each step.
    """
    if not steps or not steps[0]:
        return None
    alike = all(len(each) == len(steps[0]) for each in steps)
    if not alike:
        return torch.stack([_mean_openness([each]) for each in steps]).squeeze(1)
    return _mean_openness(steps)


def _mean_openness(steps: Sequence[Elements]) -> Tensor:
    found = []
    for place in zip(*steps, strict=True):
        (group, _, _), *_ = place
        found.append(openness(group, *(torch.stack([each[part] for each in place]) for part in (1, 2))))
    return torch.stack(found).mean(0)
