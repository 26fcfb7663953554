"""A forward pass of a stack that was recorded for a step: losses, activations, and probes for the cotangents."""

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
    """The losses of a `TaskStack` with the recorded forward pass that a step needs, in its graph.

    `stack(batch, probe=True)` returns it. Called on the patched module of an unroll, it holds the fast weights. A
    probe is a module's output, or zeros added to it: the gradient of the loss on it is the cotangent of that output.

    Args:
        losses: of every task, `(tasks,)`.
        parameters: the parameters of the pass, and the buffers that symmetries move, by name.
        activations: inputs of the watched modules, by name.
        probes: of the watched modules, by name.
        layout: reshapes gradients on the probes into cotangents.

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
        """Checks the argument of a step, and returns it.

        Args:
            given: should be a `ProbedLosses`.
            parameters: the parameters that the step starts from, by name.

        Raises:
            TypeError: if it is something else, losses for example.
            ValueError: if it was computed at other parameters.

        Example:
            >>> ProbedLosses.checked(torch.ones(2), {})
            Traceback (most recent call last):
            TypeError: a step of a stack needs stack(batch, probe=True), not a Tensor: losses alone do not hold the ...
        """
        if not isinstance(given, ProbedLosses):
            raise TypeError(
                f"a step of a stack needs stack(batch, probe=True), not a {type(given).__name__}: losses alone do not "
                "hold the modules' inputs and cotangents"
            )
        if any(given.parameters.get(name) is not value for name, value in parameters.items()):
            raise ValueError(
                "these losses were computed at other parameters than the step starts from: call the stack that is "
                "stepped, with probe=True, before every step"
            )
        return given
