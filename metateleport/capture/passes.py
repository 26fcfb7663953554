"""The record of one pass of a training loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from metateleport.point import Tensors

__all__ = ["RecordedPass", "Run"]


@dataclasses.dataclass
class Run:
    """One call of a module inside a pass.

    Args:
        input: the module's input, detached.
        output: shape and dtype of the module's output; None if the output is not a tensor.
        cotangent: gradient on the output; None before the backward pass.
        connected: whether the input depends on parameters.
        awaited: whether the module ran without gradients inside a pass with gradients. Under reentrant activation
            checkpointing it runs again in the backward pass, and has a graph only then.
    """

    input: Tensor
    output: tuple[torch.Size, torch.dtype] | None
    cotangent: Tensor | None = None
    connected: bool = False
    awaited: bool = False


@dataclasses.dataclass
class RecordedPass:
    """One forward pass, all that is needed to repeat it, and the gradients that its backward pass left.

    It does not keep the graph alive: the graph goes with the caller's loss.

    Args:
        training: whether the model was in training mode.
        runs: the runs of each module, by its name, in their order.
        reached: whether it has had a backward pass.
        positional: the model's positional inputs. This and all below is empty if the recorder does not replay.
        keywords: its keyword inputs.
        buffers: its buffers before the pass.
        random: state of the random number generators before the pass, by device; None stands for the CPU.
        autocast: device type, whether autocast was on, and its dtype.
        outputs: the model's outputs, copied.
        output_cotangents: gradients on the outputs, by position.
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
        """Modules that ran more than once; the backward pass below a single run of them cannot be rebuilt."""
        return frozenset(name for name, runs in self.runs.items() if len(runs) > 1)

    @property
    def connected(self) -> frozenset[str]:
        """Modules whose input depends on parameters."""
        return frozenset(name for name, runs in self.runs.items() if runs and runs[-1].connected)
