"""The first phase of a meta-training: an evolution strategy on the constants that the networks put out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from metateleport.learned.meta_optimizer import MetaOptimizer

__all__ = ["constants", "search_round"]

_SPREAD = 1.0
"""Standard deviation of the first round, in logits."""

_DECAY = 0.9
"""Factor on the spread from round to round: late rounds average over the few stacks of each."""


def constants(meta: MetaOptimizer) -> list[nn.Parameter]:
    """The constants that the networks put out: the biases of their last layers.

    Args:
        meta: the meta-optimizer.

    Returns:
        The biases: the step's logits, and each group's coefficients and gate. Empty for a rule that learns nothing.

    Example:
        >>> from metateleport.learned import MetaOptimizerConfig
        >>> [tuple(each.shape) for each in constants(MetaOptimizer(MetaOptimizerConfig(teleport=None)))]
        [(3,)]
    """
    return [value for name, value in meta.named_parameters() if name.endswith("head.bias")]


def search_round(meta: MetaOptimizer, score: Callable[[], float], number: int, seed: int) -> float:
    r"""One round of an evolution strategy on the constants; they are changed in place.

    It draws $\lambda$ candidates $\theta + \sigma \epsilon_i$ in mirrored pairs, scores them on the same tasks, and
    averages the better half by rank,

    $$\theta \mapsto \theta + \sigma \sum_{i \le \lambda / 2} w_i \epsilon_{(i)}, \qquad
      w_i \propto \log(\tfrac{\lambda + 1}{2}) - \log i, \qquad \lambda \approx 4 + 3 \log d,$$

    with $\sigma$ falling from round to round. A truncated window does not show the effect of a constant over the whole
    horizon, and its gradient through an unstable inner loop says little; the score covers all of it without a graph.

    Args:
        meta: the meta-optimizer.
        score: scores the meta-optimizer as it is, on the same tasks throughout a round; smaller is better.
        number: number of the round, from zero.
        seed: seed of the candidates.

    Returns:
        The mean score of the better half of the candidates.

    Raises:
        ValueError: if there are no constants.

    Example:
        >>> from metateleport.learned import MetaOptimizerConfig, StepSettings
        >>> meta = MetaOptimizer(MetaOptimizerConfig(StepSettings(hidden=4), teleport=None))
        >>> bias = constants(meta)[0].detach()
        >>> for number in range(30):
        ...     _ = search_round(meta, lambda: float((bias - 1).square().sum()), number, seed=number)
        >>> bool(((bias - 1).abs() < 0.1).all())
        True

    Source: the ranks' weights and the number of candidates of Hansen, "The CMA evolution strategy: a tutorial", 2016
    (arXiv 1604.00772), without its covariance; mirrored pairs of Brockhoff et al., "Mirrored sampling and sequential
    selection for evolution strategies", PPSN 2010.
    """
    biases = constants(meta)
    if not biases:
        raise ValueError("this meta-optimizer learns nothing: it has no networks whose constants could be searched")
    start = nn.utils.parameters_to_vector(biases).detach().clone()
    pairs = max(2, round((4 + 3 * math.log(len(start))) / 2))
    source = torch.Generator().manual_seed(seed)
    draws = torch.randn(pairs, len(start), generator=source, dtype=start.dtype).to(start.device)
    draws = _SPREAD * _DECAY**number * torch.cat((draws, -draws))
    scores = []
    for draw in draws:
        _put(start + draw, biases)
        scores.append(score())
    ranks = torch.tensor(scores).argsort()[:pairs]
    weights = math.log(pairs + 0.5) - torch.arange(1, pairs + 1, dtype=start.dtype, device=start.device).log()
    move = (weights / weights.sum()) @ draws[ranks.to(start.device)]
    _put(start + move, biases)
    return float(torch.tensor(scores)[ranks].mean())


def _put(vector: Tensor, biases: Sequence[nn.Parameter]) -> None:
    """Copies a vector into the biases; `vector_to_parameters` would make them views of one vector."""
    with torch.no_grad():
        for bias, values in zip(biases, vector.split([bias.numel() for bias in biases]), strict=True):
            bias.copy_(values.view_as(bias))
