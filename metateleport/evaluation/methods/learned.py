"""The learned optimizer in an evaluation, and the runs of its attribution."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metateleport.checkpoint import Checkpoint
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import TaskStack
from metateleport.gauges import Gauge, GaugeKind
from metateleport.learned import MetaOptimizer
from metateleport.learned.meta_optimizer import InnerLoop, Regauge
from metateleport.learned.rules.gauged import GaugedRule
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import NoTeleport, Teleporter

__all__ = ["ATTRIBUTIONS", "Learned", "learned_methods"]

ATTRIBUTIONS = (
    "learned/teleport-off",
    "learned/stays-off",
    "learned/gauge-off",
    "learned/random-teleport",
    "learned/step-only",
)
"""The runs of the attribution: without the teleport, with random elements, and with the step alone."""

Kind = Literal["learned", "off", "stays-off", "gauge-off", "random"]


@dataclasses.dataclass
class _Sizes:
    """Frobenius norms of the generators of one step, by symmetry and by gauge."""

    stays: dict[str, Tensor]
    gauges: dict[tuple[str, str], Tensor]


class Learned(Method):
    """A meta-optimizer on a stack of tasks.

    A point is recorded once it was evaluated and accepted. The learned optimizer may take its last step back, so a step
    that was not evaluated yet is not recorded.

    Args:
        name: name of the method.
        meta: the meta-optimizer.
        teleport: `learned`; `off` for g = 1 with the same networks; `stays-off` or `gauge-off` for g = 1 in one of the
            two alone; `random` for random elements of the same Frobenius norm at the same steps.
        seed: seed of the random elements.
    """

    def __init__(self, name: str, meta: MetaOptimizer, teleport: Kind = "learned", seed: int = 0) -> None:
        super().__init__(name, {"mode": meta.config.mode, "teleport": teleport})
        self.meta, self.teleport, self.seed = meta, teleport, seed
        stays = meta.teleporter is not None and teleport not in ("off", "stays-off")
        undone = (meta.gauge is not None or meta.rule.reads_factors) and teleport not in ("off", "gauge-off")
        self.teleports = stays or undone  # type: ignore[misc]
        self.moves_by = {(True, True): "both", (True, False): "stays", (False, True): "undone"}.get(
            (stays, undone), "none"
        )

    def identity(self) -> dict[str, Any]:
        weights = hashlib.sha256()
        for name, value in self.meta.state_dict().items():
            weights.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return {**super().identity(), "config": self.meta.config, "weights": weights.hexdigest(), "seed": self.seed}

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        teleporter: Teleporter | None = None
        regauge: Regauge | None = None
        if self.teleport in ("off", "stays-off"):
            teleporter = NoTeleport()
        if self.teleport in ("off", "gauge-off"):
            regauge = _none_of
        if self.teleport == "random" and (self.meta.teleporter is not None or self.meta.gauge is not None):
            sizes: list[_Sizes] = []
            self._run(stack, budget, None, None, sizes)
            source = torch.Generator().manual_seed(self.seed)
            teleporter, regauge = _SameSizes(sizes, source), _SameGauges(sizes, source)
        return self._run(stack, budget, teleporter, regauge, None)

    def _run(
        self,
        stack: TaskStack,
        budget: int,
        teleporter: Teleporter | None,
        regauge: Regauge | None,
        sizes: list[_Sizes] | None,
    ) -> Trajectory:
        meta = _with_gauges_of(self.meta, self.teleport).to(stack.device)
        recorder = Recorder(stack, budget)
        parameters = {name: value.detach() for name, value in stack.tensors().items()}
        # As a rival's schedule, so a rule that cools down by it knows how long the run is.
        total = budget if meta.config.rule.reads_total else None
        loop = InnerLoop(meta, stack.symmetries, stack.deterministic, teleporter, regauge, total=total)
        number = 0
        with torch.no_grad():
            while bool(recorder.affords().any()):
                batch = stack.batch(number)
                point = stack.point_at(parameters, batch)
                recorder.charge(1.0)
                for each in (teleporter, regauge):
                    if isinstance(each, _SameSizes | _SameGauges):
                        each.step = number
                taken = loop.advance(point)
                parameters, reached = taken.parameters, taken.state.accepted
                assert reached is not None
                recorder.record(reached.parameters, taken.accepted)
                if bool((taken.size > 0).any()):
                    recorder.drift(reached.parameters, taken.teleported, batch, where=taken.accepted)
                recorder.charge(taken.evaluations)
                if sizes is not None:
                    stays = {move.symmetry.key: move.size for move in taken.moves}
                    sizes.append(_Sizes(stays, {_place(gauge): gauge.size for gauge in taken.gauges}))
                number += 1
        return recorder.trajectory()


class _SameSizes(Teleporter):
    """A teleporter of random directions, with the sizes that another run's teleports had at the same steps."""

    name = "random"

    def __init__(self, sizes: list[_Sizes], source: torch.Generator) -> None:
        super().__init__()
        self.sizes, self.source, self.step = sizes, source, 0

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        weight = point.parameters[symmetry.parameters[0]]
        assert point.loss is not None
        drawn = symmetry.group.random_generator(
            *point.loss.shape, generator=self.source, dtype=weight.dtype, device=weight.device
        )
        size = self.sizes[self.step].stays.get(symmetry.key) if self.step < len(self.sizes) else None
        return torch.zeros_like(drawn) if size is None else drawn * symmetry.group.expand(size.to(drawn)), state


class _SameGauges:
    """Random gauges, with the sizes that another run's gauges had at the same steps."""

    def __init__(self, sizes: list[_Sizes], source: torch.Generator) -> None:
        self.sizes, self.source, self.step = sizes, source, 0

    def __call__(self, gauges: list[Gauge]) -> list[Gauge]:
        if self.step >= len(self.sizes):
            return []
        drawn = []
        for gauge in gauges:
            group, size = gauge.symmetry.group, self.sizes[self.step].gauges[_place(gauge)].to(gauge.element)
            generator = group.random_generator(
                *size.shape, generator=self.source, dtype=gauge.element.dtype, device=gauge.element.device
            )
            drawn.append(dataclasses.replace(gauge, element=group.exp(generator * group.expand(size)), size=size))
        return drawn


def _place(gauge: Gauge) -> tuple[str, str]:
    return (gauge.symmetry.key, gauge.side)


def learned_methods(checkpoint: Checkpoint, wanted: Sequence[str] | None = None, seed: int = 0) -> list[Learned]:
    """The learned optimizer of a checkpoint, and the runs of its attribution that its mode has.

    Args:
        checkpoint: the checkpoint.
        wanted: names of the methods; all if not given.
        seed: seeds the random elements.
    """
    made = [Learned("learned", checkpoint.learned)]
    stays = checkpoint.learned.teleporter is not None
    undone = checkpoint.learned.gauge is not None or checkpoint.learned.rule.reads_factors
    if stays or undone:
        made.append(Learned("learned/teleport-off", checkpoint.learned, "off"))
        if stays and undone:
            made.append(Learned("learned/stays-off", checkpoint.learned, "stays-off"))
            made.append(Learned("learned/gauge-off", checkpoint.learned, "gauge-off"))
        made.append(Learned("learned/random-teleport", checkpoint.learned, "random", seed))
    if checkpoint.step_only is not None:
        made.append(Learned("learned/step-only", checkpoint.step_only))
    return [method for method in made if wanted is None or method.name in wanted]


def _with_gauges_of(meta: MetaOptimizer, teleport: Kind) -> MetaOptimizer:
    """The networks, with other gauges where a rule has gauges of its own: none, or random ones of the same spectrum."""
    kinds: dict[str, GaugeKind] = {"off": "identity", "gauge-off": "identity", "random": "random"}
    if not isinstance(meta.rule, GaugedRule) or teleport not in kinds:
        return meta
    changed = copy.deepcopy(meta)
    assert isinstance(changed.rule, GaugedRule)
    changed.rule.kind = kinds[teleport]
    return changed


def _none_of(gauges: list[Gauge]) -> list[Gauge]:
    return gauges[:0]
