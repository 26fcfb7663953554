"""A meta-optimizer as in the source paper, which takes no step back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from metateleport.learned import MetaOptimizer
from metateleport.learned.meta_optimizer import MetaState
from metateleport.learned.progress import Progress, Tolerance
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Teleporter

__all__ = ["Unguarded"]


@dataclasses.dataclass(frozen=True)
class _Accepting(Progress):
    """Accepts every point, and damps nothing."""

    def judge(self, loss: Tensor, deterministic: bool, tolerance: Tolerance | None = None) -> tuple[Progress, Tensor]:
        judged, _ = super().judge(loss, deterministic, tolerance)
        accepted, one = torch.ones_like(loss, dtype=torch.bool), torch.ones_like(loss)
        kept = {field.name: getattr(judged, field.name) for field in dataclasses.fields(judged)}
        return _Accepting(**{**kept, "last": loss, "damping": one, "rejected": 0 * one, "accepted": accepted}), accepted


class Unguarded(MetaOptimizer):
    """A meta-optimizer that goes on from every point its step leads to, better or worse, as in the source's code."""

    def initial_state(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        deterministic: bool = True,
        teleporter: Teleporter | None = None,
    ) -> MetaState:
        assert point.loss is not None
        state = super().initial_state(point, symmetries, deterministic, teleporter)
        return dataclasses.replace(state, progress=_Accepting.begin(point.loss.detach()))
