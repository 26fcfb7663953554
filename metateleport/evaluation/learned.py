"""The learned optimizer in an evaluation, and what its result is attributed by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.checkpoint import Checkpoint
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer
from metateleport.point import Point
from metateleport.symmetries import Symmetry
from metateleport.teleporters import NoTeleport, Teleporter

__all__ = ["ATTRIBUTIONS", "Learned", "learned_methods"]

ATTRIBUTIONS = ("learned/teleport-off", "learned/random-teleport", "learned/step-only")
"""Runs that stand beside every learned result: what remains without the teleport, or with another."""

Sizes = list[dict[tuple[str, ...], Tensor]]


class Learned(Method):
    """A meta-optimizer on a stack of tasks.

    A point counts as reached when the evaluation at it has been paid for and it was accepted: the learned optimizer
    may take its last step back, so a step that has not been looked at yet is not credited.

    Args:
        name: of the method.
        meta: the meta-optimizer.
        teleport: `learned`; `off` for g = 1 with the same networks; `random` for an element of the same Frobenius
            norm at the same steps.
        seed: seeds the random elements.
    """

    def __init__(self, name: str, meta: MetaOptimizer, teleport: str = "learned", seed: int = 0) -> None:
        super().__init__(name, {"mode": meta.config.mode, "teleport": teleport})
        self.meta, self.teleport, self.seed = meta, teleport, seed
        self.teleports = meta.teleporter is not None and teleport != "off"  # type: ignore[misc]
        self.gauge = "stays" if self.teleports else "none"

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        teleporter: Teleporter | None = None
        if self.teleport == "off":
            teleporter = NoTeleport()
        elif self.teleport == "random":
            sizes: Sizes = []
            self._run(stack, budget, None, sizes)
            teleporter = _SameSizes(sizes, self.seed)
        return self._run(stack, budget, teleporter, None)

    def _run(self, stack: TaskStack, budget: int, teleporter: Teleporter | None, sizes: Sizes | None) -> Trajectory:
        meta = self.meta.to(stack.device)
        recorder = Recorder(stack, budget)
        parameters = {name: value.detach() for name, value in stack.model.tensors().items()}
        state: Any = None
        number = 0
        with torch.no_grad():
            while bool(recorder.affords().any()):
                batch = stack.batch(number)
                point = stack.model.point_at(parameters, batch)
                recorder.charge(1.0)
                if state is None:
                    state = meta.initial_state(point, stack.symmetries, stack.deterministic, teleporter)
                if isinstance(teleporter, _SameSizes):
                    teleporter.step = number
                taken = meta.step(point, stack.symmetries, state, teleporter)
                state, parameters = taken.state, taken.parameters
                recorder.record(state.accepted.parameters, taken.accepted)
                if self.teleports and bool((taken.size > 0).any()):
                    recorder.drift(state.accepted.parameters, taken.teleported, batch, where=taken.accepted)
                recorder.charge(taken.evaluations)
                if sizes is not None:
                    sizes.append({move.symmetry.parameters: move.size for move in taken.moves})
                number += 1
        return recorder.trajectory()


class _SameSizes(Teleporter):
    """Random directions, of the sizes that another run's teleports had at the same steps."""

    name = "random"

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.source = torch.Generator().manual_seed(seed)
        self.step = 0

    def generator(self, symmetry: Symmetry, point: Point, state: Any) -> tuple[Tensor, Any]:
        weight = point.parameters[symmetry.parameters[0]]
        assert point.loss is not None
        drawn = symmetry.group.random_generator(
            *point.loss.shape, generator=self.source, dtype=weight.dtype, device=weight.device
        )
        if self.step >= len(self.sizes):
            return torch.zeros_like(drawn), state
        return drawn * symmetry.group.expand(self.sizes[self.step][symmetry.parameters].to(drawn)), state


def learned_methods(checkpoint: Checkpoint, wanted: Sequence[str] | None = None, seed: int = 0) -> list[Learned]:
    """The learned optimizer of a checkpoint, and those of its attributions that its mode allows.

    Args:
        checkpoint: the checkpoint.
        wanted: names to make; all if not given.
        seed: seeds the random elements.
    """
    made = [Learned("learned", checkpoint.learned)]
    if checkpoint.learned.teleporter is not None:
        made.append(Learned("learned/teleport-off", checkpoint.learned, "off"))
        made.append(Learned("learned/random-teleport", checkpoint.learned, "random", seed))
    if checkpoint.step_only is not None:
        made.append(Learned("learned/step-only", checkpoint.step_only))
    return [method for method in made if wanted is None or method.name in wanted]
