"""Meta-gradients from differences of meta-losses: evolution strategies, and persistent ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.families import TaskStack
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.training.distributed import Ranks
from metateleport.training.estimators import Findings
from metateleport.training.outer import EvolutionSettings, PersistentSettings
from metateleport.training.particles import Particles
from metateleport.training.scoring import priced

__all__ = ["Evolution"]


class Evolution:
    r"""Compares pairs of networks on the same tasks, one pair for each task, window by window.

    In window $t$ the pair $i$ of $P$ takes its inner steps with $\theta \pm \sigma \epsilon_{it}$,
    $\epsilon_{it} \sim N(0, 1)$, each from where it ended in the window before. With $L^\pm_{it}$ the mean log losses
    of the window, the meta-gradient is

    $$g_t = \frac{1}{2 \sigma P} \sum_i \xi_{it} \left(L^+_{it} - L^-_{it}\right), \qquad
      \xi_{it} = \sum_{s \le t} \epsilon_{is}.$$

    The sum over all perturbations so far is what makes it persistent: a window's loss depends on the networks of all
    windows before it as well, and in the mean over a run to the horizon $g_t$ is the gradient of the meta-loss smoothed
    by the perturbations, without the bias of a truncated window. With one window for the whole horizon it is an
    ordinary evolution strategy. No graph is kept, so memory does not depend on the horizon.

    All processes draw the perturbations of all pairs, from the seed, the stack, the window and the pair. What they
    exchange is the difference of each pair, and five numbers for the report.

    Args:
        stack: this process's part of the tasks, at their start, twice one after the other.
        meta: the networks.
        outer: the outer loop's settings.
        ranks: the processes that share the tasks.
        number: the number of the stack.
        steps: of a window.
        total: number of inner steps of the run, where the networks are told.

    Source: Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with persistent
    evolution strategies", ICML 2021 (arXiv 2112.13835), algorithm 2, with antithetic pairs; Salimans et al., "Evolution
    strategies as a scalable alternative to reinforcement learning", 2017 (arXiv 1703.03864), for the exchange.
    """

    def __init__(
        self,
        stack: TaskStack,
        meta: MetaOptimizer,
        outer: EvolutionSettings | PersistentSettings,
        ranks: Ranks,
        number: int,
        steps: int,
        total: int | None = None,
    ) -> None:
        self.meta, self.outer, self.ranks, self.number, self.steps = meta, outer, ranks, number, steps
        self.particles = Particles(stack, meta, total, outer.unseen)
        self.drawn = torch.zeros_like(self._weights()).repeat(outer.tasks, 1)
        """The sum of all perturbations of each pair, in units of the spread, `(pairs, weights)`."""
        self.window = 0

    def meta_gradient(self, blind: bool, seconds: float) -> Findings:
        """The differences of the next window along all perturbations so far; see `metateleport.training.estimators`."""
        outer, pairs = self.outer, self.outer.tasks
        share = self.ranks.share(pairs)
        draws = self._draws()
        self.drawn += draws
        self.window += 1
        moves = outer.spread * draws[share.start : share.stop]
        weights = self._weights() + torch.cat((moves, -moves))
        seen = self.particles.window(self.steps, weights, not blind, outer.last(self.steps))
        scores = priced(seen.losses, seen.opened / seen.counted.clamp_min(1), outer.teleport_cost)
        said = torch.zeros(pairs + 5, dtype=torch.float64, device=scores.device)
        said[share.start : share.stop] = scores[: len(share)] - scores[len(share) :]
        sums = [seen.losses.sum(), seen.opened.sum(), seen.counted.sum(), torch.tensor(float(len(seen.losses)))]
        said[pairs:] = torch.stack([*(each.to(said) for each in sums), said.new_tensor(seconds / self.ranks.size)])
        self.ranks.total(said)
        losses, opened, counted, rows, spent = said[pairs:].tolist()
        gradient = said[:pairs].to(self.drawn) @ self.drawn / (2 * outer.spread * pairs)
        self._put(gradient)
        return Findings(losses / rows, opened / counted if counted else None, True, spent)

    def _weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.meta.parameters()).detach()

    def _draws(self) -> Tensor:
        """The perturbations of all pairs in this window; NumPy draws the same on every kind of machine."""
        size = self.drawn.shape[1]
        places = [(self.outer.seed, self.number, self.window, pair) for pair in range(self.outer.tasks)]
        draws = np.stack([np.random.default_rng(place).standard_normal(size) for place in places])
        return torch.from_numpy(draws).to(self.drawn)

    def _put(self, gradient: Tensor) -> None:
        parameters = list(self.meta.parameters())
        for each, part in zip(parameters, gradient.split([each.numel() for each in parameters]), strict=True):
            each.grad = part.view_as(each).clone()
