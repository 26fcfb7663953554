"""Tasks of one shape, stacked: one module whose parameters have a task dimension in front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from metateleport.capture import Recording, channel_modules, modules_of, record
from metateleport.families.probed import ProbedLosses
from metateleport.point import Point, Tensors
from metateleport.symmetries import Symmetry

__all__ = ["Batch", "StackedModel"]

Batch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Inputs of the model and targets of the loss."""


class StackedModel(nn.Module):
    """Several copies of one model, each with parameters and data of its own, evaluated in one graph.

    Parameters carry the task dimension in front. The forward pass runs the model once under `torch.func.vmap`, so
    that it costs one set of batched kernels and not one set a task. Being an ordinary module it can be patched by
    `higher`, which puts tensors of an unroll in the place of its parameters.

    Parameters that the models froze are no parameters of the stack: each task keeps its own, as it keeps its buffers.

    Args:
        models: modules of one architecture and of equal shapes.
        loss: maps a model's outputs and the targets to a scalar.
        symmetries: symmetries of one model; the modules they name are recorded.

    Raises:
        ValueError: if there is no model, their parameters do not have equal names and shapes, are lazy or complex, or
            none of them is to be trained.

    Example:
        >>> models = [nn.Linear(2, 1) for _ in range(3)]
        >>> stacked = StackedModel(models, nn.functional.mse_loss, ())
        >>> stacked(((torch.ones(3, 4, 2),), (torch.zeros(3, 4, 1),))).shape
        torch.Size([3])
    """

    def __init__(
        self, models: Sequence[nn.Module], loss: Callable[..., Tensor], symmetries: Sequence[Symmetry] = ()
    ) -> None:
        super().__init__()
        if not models:
            raise ValueError("a stack needs at least one model")
        parameters = [dict(model.named_parameters()) for model in models]
        _check(parameters)
        first = parameters[0]
        self.names = tuple(name for name, value in first.items() if value.requires_grad)
        for name in self.names:
            self.register_parameter(_key(name), nn.Parameter(torch.stack([own[name].detach() for own in parameters])))
        self.frozen = tuple(name for name in first if name not in self.names)
        for name in self.frozen:
            self.register_buffer(_key(name), torch.stack([own[name].detach() for own in parameters]))
        for name in dict(models[0].named_buffers()):
            self.register_buffer(_key(name), torch.stack([dict(model.named_buffers())[name] for model in models]))
        self.symmetries = tuple(symmetries)
        self.loss = loss
        self.tasks = len(models)
        # In a tuple, so that the template's own parameters are not parameters of the stack.
        self._template = (models[0],)
        self._buffer_names = tuple(name for name, _ in models[0].named_buffers())
        self.moved_buffers = tuple(dict.fromkeys(name for symmetry in symmetries for name in symmetry.buffers))
        self.watched = modules_of(symmetries)
        """Names of the modules that symmetries look at."""
        known = {name for name, _ in models[0].named_modules()}
        missing = [name for name in self.watched if name not in known]
        missing += [name for symmetry in symmetries for name in symmetry.parameters if name not in first]
        if missing:
            raise ValueError(
                f"a symmetry names {missing[0]!r}, which the model does not have (a tied weight goes by its first name)"
            )
        self._has_channels = channel_modules(models[0], self.watched)
        self._output_shapes: dict[Any, dict[str, torch.Size]] = {}
        self.batched = True
        """Whether one set of batched kernels serves all tasks; where a model does not go through `vmap`, none does."""

    @property
    def template(self) -> nn.Module:
        """The module whose forward pass all tasks share; its own parameters are not used."""
        return self._template[0]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def each(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function of one task, called for all of them: under `vmap`, or one after the other where that cannot be.

        Args:
            function: maps one task's arguments to tensors.
            arguments: tensors, or containers of tensors, with the task dimension in front.

        Returns:
            What it gave, with the task dimension in front.
        """
        if self.batched:
            return torch.func.vmap(function, randomness="different")(*arguments)
        found = [function(*pytree.tree_map(lambda value: value[task], arguments)) for task in range(self.tasks)]  # noqa: B023
        return pytree.tree_map(lambda *values: torch.stack(values), *found)

    def fixed(self) -> Tensors:
        """What a step does not change: frozen parameters and buffers by their names in the model, `(tasks, ...)`.

        Buffers are copies: a model may write into them as it runs, and the stack stays as it is.
        """
        own = {name: getattr(self, _key(name)) for name in self.frozen}
        return {**own, **{name: getattr(self, _key(name)).clone() for name in self._buffer_names}}

    def tensors(self) -> Tensors:
        """The current parameters, and the buffers that symmetries move, by their names in the model, `(tasks, ...)`;
        those of an unroll where patched."""
        return {name: getattr(self, _key(name)) for name in (*self.names, *self.moved_buffers)}

    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Overwrites the parameters, in place."""
        with torch.no_grad():
            for name in (*self.names, *self.moved_buffers):
                getattr(self, _key(name)).copy_(parameters[name])

    def forward(self, batch: Batch, probe: bool = False) -> Tensor | ProbedLosses:
        """The loss of every task, `(tasks,)`.

        Args:
            batch: inputs and targets, each with the task dimension in front.
            probe: return the losses with what a step is taken from: activations, and gradients on module outputs.
        """
        parameters = self.tensors()
        return self._probed(parameters, batch) if probe else self._run(parameters, batch, probe=False)[0]

    def outputs(self, parameters: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """Outputs of every task at the given parameters, without a graph, `(tasks, ...)`."""

        def single(values: Tensors, buffers: Tensors, one: tuple[Tensor, ...]) -> Tensor:
            return torch.func.functional_call(self.template, {**buffers, **values}, one)

        with torch.no_grad():
            return self.each(single, dict(parameters), self.fixed(), inputs)

    def losses_at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Losses at the given parameters, without a graph, `(tasks,)`."""
        with torch.no_grad():
            return self._run(dict(parameters), batch, probe=False)[0]

    def point_at(self, parameters: Mapping[str, Tensor], batch: Batch) -> Point:
        """Evaluates all tasks at the given parameters: one gradient evaluation; detached from any graph but for
        what rebuilds the backward pass."""
        leaves = {name: parameters[name].detach().requires_grad_() for name in self.names}
        leaves.update({name: parameters[name].detach() for name in self.moved_buffers})
        with torch.enable_grad():
            seen = self._probed(leaves, batch)
        point = seen.point(in_graph=False)
        fixed = point.parameters

        def loss_at(moved: Mapping[str, Tensor]) -> Tensor:
            return self._run({**fixed, **moved}, batch, probe=False)[0]

        return point.replace(loss_at=loss_at)

    def _probed(self, parameters: Tensors, batch: Batch) -> ProbedLosses:
        losses, activations, probes = self._run(parameters, batch, probe=True)
        return ProbedLosses(losses, parameters, activations, probes, self._layout)

    def _layout(self, cotangents: Mapping[str, Tensor]) -> Tensors:
        return Recording(self._has_channels).layout(cotangents, batch=1)

    def _run(self, parameters: Tensors, batch: Batch, probe: bool) -> tuple[Tensor, Tensors, Tensors]:
        inputs, targets = batch
        probes = self._zeros(parameters, inputs) if probe and self.watched else {}

        def single(
            values: Tensors, buffers: Tensors, one: tuple[Tensor, ...], wanted: tuple[Tensor, ...], added: Tensors
        ) -> tuple[Tensor, Tensors]:
            watched = self.watched if probe else ()
            with record(self.template, watched, lambda name, output: output + added[name]) as recording:
                outputs = torch.func.functional_call(self.template, {**buffers, **values}, one)
            activations = recording.activations()
            return self.loss(outputs, *wanted), activations

        losses, activations = self.each(single, parameters, self.fixed(), inputs, targets, probes)
        return losses, activations, probes

    def _zeros(self, parameters: Tensors, inputs: tuple[Tensor, ...]) -> Tensors:
        """Zeros to add to the outputs of the watched modules: the loss's gradient on them is the cotangent."""
        key = tuple((value.shape, value.dtype) for value in inputs)
        if key not in self._output_shapes:
            one = {name: value[0].detach() for name, value in {**self.fixed(), **parameters}.items()}
            with torch.no_grad(), record(self.template, self.watched) as recording:
                torch.func.functional_call(self.template, one, tuple(value[0] for value in inputs))
            self._output_shapes[key] = {name: value.shape for name, value in recording.outputs.items()}
        like = next(iter(parameters.values()))
        return {
            name: like.new_zeros(self.tasks, *shape).requires_grad_()
            for name, shape in self._output_shapes[key].items()
        }


def _key(name: str) -> str:
    return name.replace(".", "/")


def _check(parameters: Sequence[Mapping[str, nn.Parameter]]) -> None:
    """Refuses parameters that cannot be stacked or stepped."""
    first = parameters[0]
    for name, value in first.items():
        if is_lazy(value):
            raise ValueError(f"{name!r} has no shape yet: run lazy modules once, on the task's inputs, in sample()")
        if value.is_complex():
            raise ValueError(
                f"{name!r} is complex, and steps are learned for real weights: keep its real and imaginary parts in a "
                "real parameter and use torch.view_as_complex in forward()"
            )
    shapes = [{name: value.shape for name, value in own.items()} for own in parameters]
    if any(other != shapes[0] for other in shapes):
        raise ValueError("only models of one architecture can be stacked: their parameters differ in name or shape")
    trained = [{name for name, value in own.items() if value.requires_grad} for own in parameters]
    if any(other != trained[0] for other in trained):
        raise ValueError("only models with the same parameters frozen can be stacked: theirs differ in requires_grad")
    if not trained[0]:
        raise ValueError("there is nothing to train: the model has no parameter with requires_grad=True")
