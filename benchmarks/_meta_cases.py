"""What is timed of meta-training: this library's networks, the source's own loop, its roof and the floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks._counting import Counting, kept_for_backward
from benchmarks._source_loop import FLOOR, SOURCE_HIDDEN, SourceNetworks, SourceTask, window
from metateleport import TaskFamily
from metateleport.families import load_family
from metateleport.learned import (
    BaseOptimizerSettings,
    CoordinateSettings,
    MetaOptimizer,
    MetaOptimizerConfig,
    RuleSettings,
    StepSettings,
    TeleportSettings,
)
from metateleport.learned.rules.tensor import TensorSettings
from metateleport.papers.flat import FlatSettings
from metateleport.training import Unroll

__all__ = ["DTYPES", "Case", "SourceCase", "StackedCase", "cases_of"]

DTYPES = {"float64": torch.float64, "float32": torch.float32}

_RULES: dict[str, RuleSettings] = {
    "lr": StepSettings(),
    "update": CoordinateSettings(),
    "tele": BaseOptimizerSettings(),
}
_FLAT_MODES = ("lr+tele", "update+tele")

Networks = TypeVar("Networks", bound=nn.Module)


class Case:
    """Networks and the optimizer that trains them; its steps are so small that every round does the same work.

    Args:
        name: of the case.
        networks: that are trained.
        tasks: followed side by side.
        unroll: inner steps of a meta-step.

    Attributes:
        kind: whose networks, and in which setting.
        mode: what they learn.
        hidden: units of their LSTMs.
        dtype: of the tasks.
        over: name of the source's loop of the same mode and dtype, or empty.
    """

    def __init__(self, name: str, networks: nn.Module, tasks: int, unroll: int) -> None:
        self.name, self.networks, self.tasks, self.length = name, networks, tasks, unroll
        self.task_steps = tasks * unroll
        self.kind = self.mode = self.dtype = self.over = ""
        self.hidden = 0
        self.optimizer = torch.optim.Adam(networks.parameters(), lr=1e-9)

    def rewind(self) -> None:
        """Goes back to the start, untimed."""
        raise NotImplementedError

    def losses(self) -> list[Callable[[], Tensor]]:
        """Computes the meta-loss, in parts that are differentiated one after the other."""
        raise NotImplementedError

    def meta_gradient(self) -> None:
        """Forward passes, inner steps and the meta-backward pass."""
        self.optimizer.zero_grad()
        for loss in self.losses():
            loss().backward()

    def meta_step(self) -> float:
        """Clips and takes the optimizer's step; returns the norm of the meta-gradient."""
        norm = torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        return float(norm)

    def counts(self) -> dict[str, float]:
        """Counts of one meta-gradient: per inner step of the whole stack, and bytes per task-step."""
        self.rewind()
        self.optimizer.zero_grad()
        counting, kept = Counting(), 0
        for loss in self.losses():
            with kept_for_backward() as known:
                with counting:
                    value = loss()
                kept = max(kept, known())
            with counting:
                value.backward()
        return {
            "operations": counting.operations / self.length,
            "waits": counting.waits / self.length,
            "factorisations": counting.factorisations / self.length,
            "factorised_per_task_step": counting.factorised / self.task_steps,
            "kept_bytes": kept,
        }


class StackedCase(Case):
    """This library's meta-training on a stack of tasks.

    Args:
        kind: whose networks, and in which setting.
        config: their shape.
        family: of the tasks.
        tasks: their number.
        unroll: inner steps of a meta-step.
        device: to run on.
        dtype: of the tasks.
        at_once: tasks in one graph; all of them if not given.
    """

    def __init__(
        self,
        kind: str,
        config: MetaOptimizerConfig,
        family: TaskFamily,
        tasks: int,
        unroll: int,
        device: torch.device,
        dtype: str = "float64",
        at_once: int | None = None,
    ) -> None:
        self.meta = _seeded(lambda: MetaOptimizer(config)).to(device)
        super().__init__(_named(kind, config.mode, str(tasks), dtype), self.meta, tasks, unroll)
        self.kind, self.mode, self.dtype = kind, config.mode, dtype
        self.hidden = next(shape["hidden"] for shape in config.table().values() if "hidden" in shape)
        self.over = _named("source", self.mode, "", dtype) if self.mode in SOURCE_HIDDEN else ""
        some = at_once or tasks
        parts = [range(start, min(start + some, tasks)) for start in range(0, tasks, some)]
        self.stacks = [family.stack(part, dtype=DTYPES[dtype], device=device) for part in parts]
        self.starts = [{name: value.detach().clone() for name, value in each.tensors().items()} for each in self.stacks]
        self.unrolls: list[Unroll] = []

    @classmethod
    def of(
        cls, kind: str, config: MetaOptimizerConfig, width: int, tasks: int, unroll: int, at_once: int | None
    ) -> StackedCase:
        """A case by itself, on the CPU in float64."""
        family = load_family("leaky_mlp", {"width": width})
        return cls(kind, config, family, tasks, unroll, torch.device("cpu"), at_once=at_once)

    def rewind(self) -> None:
        for stack, start in zip(self.stacks, self.starts, strict=True):
            stack.load(start)
        self.unrolls = [Unroll(stack, self.meta) for stack in self.stacks]

    def losses(self) -> list[Callable[[], Tensor]]:
        def of(unroll: Unroll) -> Callable[[], Tensor]:
            return lambda: unroll.window(self.length).mean() * (len(unroll.stack) / self.tasks)

        return [of(unroll) for unroll in self.unrolls]


class SourceCase(Case):
    """The source's loop, where a meta-step is one window of one task and the next has another; or tasks in a batch.

    Args:
        mode: of the source's code, or `sgd`.
        hidden: units of its LSTMs.
        family: of the tasks.
        width: of the tasks' layers.
        unroll: inner steps of a meta-step.
        device: to run on.
        dtype: of the tasks.
        tasks: batched by hand, for the roof and the floor; one for the source's own loop.
    """

    def __init__(
        self,
        mode: str,
        hidden: int,
        family: TaskFamily,
        width: int,
        unroll: int,
        device: torch.device,
        dtype: str = "float64",
        tasks: int = 1,
    ) -> None:
        self.source = _seeded(lambda: SourceNetworks(mode, width, hidden)).to(device)
        kind = "floor" if mode == FLOOR else "roof" if tasks > 1 else "source"
        own = hidden == SOURCE_HIDDEN.get(mode, hidden)
        size = str(tasks) if tasks > 1 else "" if own else f"hidden={hidden}"
        super().__init__(_named(kind, mode, size, dtype), self.source, tasks, unroll)
        self.kind, self.mode, self.hidden, self.dtype = kind, mode, hidden, dtype
        self.over = _named("source", mode, "", dtype) if kind == "roof" else ""
        drawn = [family.task(index, dtype=DTYPES[dtype]) for index in range(max(tasks, 4))]
        each = [SourceTask.of(task, device) for task in drawn]
        self.waiting = each if tasks == 1 else [SourceTask.stacked(each[:tasks])]

    def rewind(self) -> None:
        self.waiting.append(self.waiting.pop(0))

    def losses(self) -> list[Callable[[], Tensor]]:
        return [lambda: window(self.source, self.waiting[0], self.length) / self.tasks]


def _named(kind: str, mode: str, size: str, dtype: str) -> str:
    return "/".join(part for part in (kind, mode, size, "" if dtype == "float64" else dtype) if part)


def _seeded(make: Callable[[], Networks]) -> Networks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def cases_of(
    modes: Sequence[str],
    tasks: Sequence[int],
    width: int,
    unroll: int,
    device: torch.device,
    dtypes: Sequence[str] = ("float64",),
    at_once: int | None = None,
) -> list[Case]:
    """All cases that are timed side by side.

    Args:
        modes: modes of the meta-optimizer. Those with an update have the rules `coordinate` and `tensor`, those with a
            teleport also kept logarithms; `flat` networks, the source's loop and its roof are added if they have the
            mode.
        tasks: sizes of stacks.
        width: of the task's layers.
        unroll: inner steps of a meta-step.
        device: device to run on.
        dtypes: of the tasks.
        at_once: largest number of tasks in one graph; all of a stack if not given.
    """
    family = load_family("leaky_mlp", {"width": width})
    example = family.stack([0])
    groups = tuple(dict.fromkeys(symmetry.group.name for symmetry in example.symmetries))
    shapes = tuple((name, tuple(value.shape[1:])) for name, value in example.tensors().items())
    largest = max(tasks)
    cases: list[Case] = []
    for dtype in dtypes:
        for mode in modes:
            step = mode.removesuffix("+tele")
            teleport = TeleportSettings() if "tele" in mode else None
            shape = {"equivariant": MetaOptimizerConfig(_RULES[step], teleport, groups=groups)}
            if step == "update":
                shape["tensor"] = MetaOptimizerConfig(TensorSettings(), teleport, groups=groups)
            if mode in _FLAT_MODES:
                hidden = SOURCE_HIDDEN[mode]
                flat = FlatSettings(shapes, hidden, per_coordinate=step == "update")
                shape["flat"] = MetaOptimizerConfig(flat, TeleportSettings(hidden), groups=groups)
            cases += [
                StackedCase(kind, config, family, count, unroll, device, dtype, at_once)
                for kind, config in shape.items()
                for count in tasks
            ]
            if mode in SOURCE_HIDDEN:
                source = (mode, SOURCE_HIDDEN[mode], family, width, unroll, device, dtype)
                cases.append(SourceCase(*source))
                if largest > 1:
                    cases.append(SourceCase(*source, tasks=largest))
            if mode == "lr+tele" and dtype == dtypes[0]:
                # The paper's networks are of this size throughout; its code takes 20 units where it learns the rate.
                cases.append(SourceCase(mode, 300, family, width, unroll, device, dtype))
        if largest > 1:
            cases.append(SourceCase(FLOOR, 0, family, width, unroll, device, dtype, largest))
    return cases
