"""What a probed forward pass of a stack has seen: its losses, and what their gradients are taken from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metateleport.point import Point, Tensors, pullback_through

__all__ = ["ProbedLosses"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ProbedLosses:
    """One forward pass of a `TaskStack` with its graph: what a step is given.

    Made by `TaskStack.forward(batch, probe=True)`, and by the patched module of an unroll, whose fast weights it
    then holds.

    Args:
        losses: of every task, `(tasks,)`.
        parameters: the tensors that it ran at, and the buffers that symmetries move, by name.
        activations: inputs of the watched modules.
        probes: zeros that were added to their outputs.
        layout: lays gradients on outputs out as cotangents.

    Example:
        >>> from metateleport.families import Task, TaskStack
        >>> x = torch.ones(4, 2)
        >>> stack = TaskStack([Task(nn.Linear(2, 1), nn.functional.mse_loss, (x,), (x[:, :1],)) for _ in range(3)])
        >>> seen = stack(stack.full, probe=True)
        >>> seen.losses.shape, seen.point(in_graph=False).gradients["weight"].shape
        (torch.Size([3]), torch.Size([3, 1, 2]))
    """

    losses: Tensor
    parameters: Tensors
    activations: Tensors
    probes: Tensors
    layout: Callable[[Mapping[str, Tensor]], Tensors]

    def point(self, in_graph: bool, second_order: bool | None = None) -> Point:
        """Gradients of every task, from one backward pass.

        Args:
            in_graph: keep parameters, activations and losses in the graph of an unroll.
            second_order: keep the gradients in it too; as `in_graph` if not given.
        """
        second_order = in_graph if second_order is None else second_order
        wanted = {name: value for name, value in self.parameters.items() if value.requires_grad}
        targets = [*wanted.values(), *self.probes.values()]
        ones = torch.ones_like(self.losses)
        # What the loss does not depend on has a gradient of zero: it stays, as under torch's optimizers.
        found = torch.autograd.grad(
            self.losses, targets, ones, create_graph=second_order, retain_graph=True, materialize_grads=True
        )
        gradients = dict(zip(wanted, found, strict=False))
        cotangents = dict(zip(self.probes, found[len(wanted) :], strict=True))
        point = Point(
            parameters=self.parameters,
            gradients=gradients,
            activations=self.activations,
            cotangents=self.layout(cotangents),
            loss=self.losses,
        )
        pullback = pullback_through(self.activations, wanted, self.probes, self.layout)
        return (point if in_graph else point.detach()).replace(pullback=pullback)

    @staticmethod
    def checked(given: Any, parameters: Mapping[str, Tensor]) -> ProbedLosses:
        """What a step was given, if it can be stepped from.

        Args:
            given: should be what a probed forward pass returned.
            parameters: where the step starts, by name.

        Raises:
            TypeError: if it is something else, losses for example.
            ValueError: if it was seen at other parameters than these.

        Example:
            >>> ProbedLosses.checked(torch.ones(2), {})
            Traceback (most recent call last):
            TypeError: a stack's step is given what stack(batch, probe=True) returns, not a Tensor: losses alone do ...
        """
        if not isinstance(given, ProbedLosses):
            raise TypeError(
                f"a stack's step is given what stack(batch, probe=True) returns, not a {type(given).__name__}: losses "
                "alone do not say what the modules saw"
            )
        if any(given.parameters.get(name) is not value for name, value in parameters.items()):
            raise ValueError(
                "these losses were seen at other parameters than the step starts from: run the stack that is stepped "
                "with probe=True before every step"
            )
        return given
