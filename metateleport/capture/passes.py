"""What is kept of a pass of a training loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from metateleport.point import Tensors

__all__ = ["RecordedPass", "Run"]


@dataclasses.dataclass
class Run:
    """One run of a module inside a pass.

    Args:
        input: what it worked on, detached.
        output: shape and dtype of what it put out; None where that is no tensor.
        cotangent: gradient on what it put out; None until a backward pass has come by.
        connected: whether its input depends on parameters.
        awaited: whether it ran without gradients inside a pass with gradients: a block under reentrant activation
            checkpointing runs again in the backward pass, and only then has a graph.
    """

    input: Tensor
    output: tuple[torch.Size, torch.dtype] | None
    cotangent: Tensor | None = None
    connected: bool = False
    awaited: bool = False


@dataclasses.dataclass
class RecordedPass:
    """One forward pass, all that it takes to repeat it, and what the backward pass said about it.

    It holds no graph: when the caller's loss goes, the graph goes.

    Args:
        training: whether the model was in training mode.
        runs: by module, its runs in the order in which they were made.
        reached: whether a backward pass has come by.
        positional: the model's positional inputs. This and what follows is empty in a recorder that never replays.
        keywords: its keyword inputs.
        buffers: its buffers before the pass.
        random: state of the random numbers before the pass, by device; that of the CPU under None.
        autocast: device type, whether autocast was on, and its dtype.
        outputs: the model's outputs, copied.
        output_cotangents: gradient on each of them, by position.
        replays: how many times the pass was repeated.
    """

    training: bool
    runs: dict[str, list[Run]] = dataclasses.field(default_factory=dict)
    reached: bool = False
    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    buffers: Tensors = dataclasses.field(default_factory=dict)
    random: dict[torch.device | None, Tensor] = dataclasses.field(default_factory=dict)
    autocast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.bfloat16)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    output_cotangents: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    replays: int = 0

    @property
    def repeated(self) -> frozenset[str]:
        """Modules that ran more than once: the backward pass below one of their runs alone cannot be rebuilt."""
        return frozenset(name for name, runs in self.runs.items() if len(runs) > 1)

    @property
    def connected(self) -> frozenset[str]:
        """Modules whose input depends on parameters."""
        return frozenset(name for name, runs in self.runs.items() if runs and runs[-1].connected)
