"""A stack of tasks: one module whose parameters and data have a task dimension in front."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metateleport.capture import Recording, channel_modules, modules_of, record
from metateleport.families.chain import Chain, chain_of, losses_of, through
from metateleport.families.probed import ProbedLosses
from metateleport.families.stackable import check_stackable, movable
from metateleport.families.task import Batch, Task
from metateleport.point import Point, Tensors, lasting

__all__ = ["TaskStack", "stacked_name"]

_AT_ONCE = 16
"""Minibatches whose rows are picked in one call: of one alone the call would cost as much as the rows."""


class TaskStack(nn.Module):
    """Several tasks of one shape, each with parameters and data of its own, evaluated in one graph.

    Parameters have the task dimension in front. The forward pass runs the model once under `torch.func.vmap`, which
    costs one set of batched kernels and not one set per task. As an ordinary module the stack can be patched by
    `higher`, which replaces its parameters by the tensors of an unroll.

    Parameters that the tasks froze are buffers of the stack, with a value for each task; what tasks share is not
    copied. Data are stacked at first use, on the device of the parameters. A deep copy has its own parameters and
    buffers and shares tasks and data, and so have a stack patched by `higher` and a clone by learn2learn.

    Args:
        tasks: tasks of one family and setting; the loss and the symmetries are those of the first.
        device: of parameters and data.

    Raises:
        ValueError: if there is no task, one has no samples, their models or data differ in shape, their parameters
            are lazy, complex or all frozen, or a symmetry names what the model does not have.

    Example:
        >>> x = torch.ones(4, 2)
        >>> stack = TaskStack([Task(nn.Linear(2, 1), nn.functional.mse_loss, (x,), (x[:, :1],)) for _ in range(3)])
        >>> stack(stack.full).shape
        torch.Size([3])
    """

    def __init__(self, tasks: Sequence[Task], device: torch.device | str = "cpu") -> None:
        super().__init__()
        check_stackable(tasks)
        self.tasks = tuple(tasks)
        self.symmetries = movable(self.template, tasks[0].symmetries)
        self.loss, self.score, self.measure = tasks[0].loss, tasks[0].score, tasks[0].measure
        models = [task.model for task in tasks]
        parameters = [dict(model.named_parameters()) for model in models]
        self.names = tuple(name for name, value in parameters[0].items() if value.requires_grad)
        """Names in the model of the parameters that are trained."""
        self.frozen = tuple(name for name in parameters[0] if name not in self.names)
        """Names in the model of the parameters that are not."""
        for name in (*self.names, *self.frozen):
            values = [own[name] for own in parameters]
            if name in self.names:
                self.register_parameter(
                    stacked_name(name), nn.Parameter(torch.stack([each.detach() for each in values]))
                )
            else:
                self.register_buffer(stacked_name(name), _together(values))
        buffers = [dict(model.named_buffers()) for model in models]
        for name in buffers[0]:
            self.register_buffer(stacked_name(name), torch.stack([own[name] for own in buffers]))
        self._buffer_names = tuple(buffers[0])
        self.moved_buffers = tuple(dict.fromkeys(name for symmetry in self.symmetries for name in symmetry.buffers))
        """Names of the buffers that symmetries move."""
        self.watched = modules_of(self.symmetries)
        """Names of the modules whose inputs and cotangents symmetries need."""
        self._has_channels = channel_modules(self.template, self.watched)
        self._output_shapes: dict[Any, dict[str, torch.Size]] = {}
        self._constant: dict[str, tuple[Any, Tensor]] = {}
        self._epoch: tuple[int, Tensor] | None = None
        self._drawn: tuple[tuple[int, int], Batch] | None = None
        self.batched = True
        """Whether `vmap` batches the tasks; a model that does not go through it is run task by task."""
        self.to(device)

    def __len__(self) -> int:
        return len(self.tasks)

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskStack:
        twin = copy.copy(self)
        memo[id(self)] = twin
        for own in ("_parameters", "_buffers", "_modules"):
            setattr(twin, own, copy.deepcopy(getattr(self, own), memo))
        return twin

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TaskStack:
        # The data follow the parameters to another device: they are stacked there at the next use.
        for name in ("full", "held_out", "_sought", "_data"):
            vars(self).pop(name, None)
        self._epoch = self._drawn = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{len(self)} tasks, each with a {type(self.template).__name__}"

    @property
    def template(self) -> nn.Module:
        """The module whose forward pass all tasks share; its own parameters are not used."""
        return self.tasks[0].model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @functools.cached_property
    def full(self) -> Batch:
        """Every task's training data, stacked at first use (with minibatches they may never be needed)."""
        return self._side_by_side([task.training for task in self.tasks])

    @functools.cached_property
    def held_out(self) -> Batch | None:
        """Every task's held-out data, stacked at first use; None if a task has none."""
        parts = [task.held_out for task in self.tasks if task.held_out is not None]
        return self._side_by_side(parts) if len(parts) == len(self) else None

    @property
    def deterministic(self) -> bool:
        """Whether every evaluation sees the whole training set."""
        return self.tasks[0].batch_size is None

    def batch(self, step: int) -> Batch:
        """Every task's minibatch of one evaluation, stacked."""
        if self.deterministic:
            return self.full
        if not self._alike:
            return self._side_by_side([task.batch(step) for task in self.tasks])
        size = self.tasks[0].batch_size
        assert size is not None
        epoch, place = divmod(step, self.tasks[0].per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            # Drawn once an epoch, and one index for all tasks.
            self._epoch = (epoch, torch.stack([task.order(epoch) for task in self.tasks]).to(self.device))
        first = place - place % _AT_ONCE
        if self._drawn is None or self._drawn[0] != (epoch, first):
            index = self._epoch[1][:, first * size : min(first + _AT_ONCE, self.tasks[0].per_epoch) * size]
            inputs, targets = (tuple(_rows_of(value, index) for value in part) for part in self._data)
            self._drawn = ((epoch, first), (inputs, targets))
        begin = (place - first) * size
        inputs, targets = (tuple(value[:, begin : begin + size] for value in part) for part in self._drawn[1])
        return inputs, targets

    @functools.cached_property
    def _alike(self) -> bool:
        """Whether all tasks have as many samples, a minibatch as large, and tensors of one shape to draw them from."""
        shapes = [
            (task.samples, task.batch_size, [value.shape for value in (*task.inputs, *task.targets)])
            for task in self.tasks
        ]
        return all(each == shapes[0] for each in shapes)

    @functools.cached_property
    def _data(self) -> Batch:
        """All rows that minibatches are drawn from, stacked at first use."""
        return self._side_by_side([(task.inputs, task.targets) for task in self.tasks])

    def measured(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The measure of every task at some parameters, or its full training loss if it has none, `(tasks,)`."""
        if self.measure is None:
            return self.losses_at(parameters, self.full)
        with torch.no_grad():
            return self.each(self.measure.function, {**self.fixed(), **parameters}, *self._sought)

    @functools.cached_property
    def _sought(self) -> tuple[Tensor, ...]:
        """The tensors that the tasks' measures compare with, such as sought matrices, stacked."""
        return self._side_by_side([(task.measure.data, ()) for task in self.tasks if task.measure is not None])[0]

    def _side_by_side(self, batches: Sequence[Batch]) -> Batch:
        """The tasks' tensors stacked; one that they share is not copied."""

        def stacked(values: Sequence[Tensor]) -> Tensor:
            if all(value is values[0] for value in values):
                return values[0].to(self.device).expand(len(values), *values[0].shape)
            return torch.stack(tuple(values)).to(self.device)

        inputs, targets = (
            tuple(stacked(values) for values in zip(*part, strict=True)) for part in zip(*batches, strict=True)
        )
        return inputs, targets

    def each(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of one task for all tasks, under `vmap` if `batched`, else one after the other.

        Args:
            function: maps one task's arguments to tensors.
            arguments: tensors, or containers of tensors, with the task dimension in front.

        Returns:
            The results, with the task dimension in front.
        """
        if self.batched:
            return torch.func.vmap(function, randomness="different")(*arguments)
        found = [function(*pytree.tree_map(lambda value: value[task], arguments)) for task in range(len(self))]  # noqa: B023
        return pytree.tree_map(lambda *values: torch.stack(values), *found)

    def fixed(self) -> Tensors:
        """Frozen parameters and buffers, by their names in the model, `(tasks, ...)`.

        Buffers are copies, as a model may write into them as it runs.
        """
        own = {name: getattr(self, stacked_name(name)) for name in self.frozen}
        return {**own, **{name: getattr(self, stacked_name(name)).clone() for name in self._buffer_names}}

    def tensors(self) -> Tensors:
        """Trained parameters, and the buffers that symmetries move, by their names in the model, `(tasks, ...)`.

        On a stack patched by `higher` these are the tensors of the unroll.
        """
        return {name: getattr(self, stacked_name(name)) for name in (*self.names, *self.moved_buffers)}

    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Overwrites the parameters, in place."""
        with torch.no_grad():
            for name in (*self.names, *self.moved_buffers):
                getattr(self, stacked_name(name)).copy_(parameters[name])

    def forward(self, batch: Batch, probe: bool = False) -> Tensor | ProbedLosses:
        """The loss of every task, `(tasks,)`.

        Args:
            batch: inputs and targets, each with the task dimension in front.
            probe: return `ProbedLosses`, from which a step can be taken.
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
        """Evaluates all tasks at the given parameters, which is one gradient evaluation.

        The point is detached, except for the graph that rebuilds parts of the backward pass.
        """
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
        if self.batched and self._chain is not None and len(inputs) == 1 and inputs[0].ndim == 3:
            values, watched = {**self.fixed(), **parameters}, self.watched if probe else ()
            outputs, activations, probes = through(self._chain, values, inputs[0], watched)
            losses = losses_of(self.loss, outputs, targets)
            losses = self.each(self.loss, outputs, *targets) if losses is None else losses
            return losses, {name: self._same_again(name, value) for name, value in activations.items()}, probes
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
        return losses, {name: self._same_again(name, value) for name, value in activations.items()}, probes

    @functools.cached_property
    def _chain(self) -> Chain | None:
        """The model's layers where they can be run as they are on all tasks at once, without `vmap`."""
        return chain_of(self.template)

    def _same_again(self, name: str, value: Tensor) -> Tensor:
        """Inputs of a module that are the same memory as in the last pass, such as data, as the same lasting tensor."""
        if not self.deterministic or value.requires_grad:
            return value
        seen = (value.data_ptr(), value._version, value.shape, value.stride())
        kept = self._constant.get(name)
        if kept is None or kept[0] != seen:
            kept = self._constant[name] = (seen, lasting(value.view_as(value)))
        return kept[1]

    def _zeros(self, parameters: Tensors, inputs: tuple[Tensor, ...]) -> Tensors:
        """Zeros to add to the outputs of the watched modules: the loss's gradient on them is the cotangent.

        They stand in the graph behind a parameter. To differentiate in leaves, autograd would walk through all of an
        unroll's graph up to there at every step.
        """
        key = tuple((value.shape, value.dtype) for value in inputs)
        if key not in self._output_shapes:
            one = {name: value[0].detach() for name, value in {**self.fixed(), **parameters}.items()}
            with torch.no_grad(), record(self.template, self.watched) as recording:
                torch.func.functional_call(self.template, one, tuple(value[0] for value in inputs))
            self._output_shapes[key] = {name: value.shape for name, value in recording.outputs.items()}
        like = next((value for value in parameters.values() if value.requires_grad), None)
        shapes = {name: (len(self), *shape) for name, shape in self._output_shapes[key].items()}
        if like is None:
            other = next(iter(parameters.values()))
            return {name: other.new_zeros(shape).requires_grad_() for name, shape in shapes.items()}
        return {name: _Behind.apply(like, shape) for name, shape in shapes.items()}


class _Behind(torch.autograd.Function):
    """Zeros that stand behind a tensor in the graph, which they do not depend on."""

    @staticmethod
    def forward(_: Any, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return tensor.new_zeros(shape)

    @staticmethod
    def backward(_: Any, *_gradients: Tensor) -> tuple[None, None]:
        return None, None


def _rows_of(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each task's tensor, `(tasks, batch, ...)`, by their index, `(tasks, batch)`."""
    if values.stride(0) == 0:
        # One set of data that all tasks share.
        return values[0][index]
    return values[torch.arange(len(values), device=index.device).unsqueeze(1), index]


def _together(values: Sequence[Tensor]) -> Tensor:
    """The tasks' tensors stacked; one that they share, as a large frozen base, is not copied."""
    if all(value is values[0] for value in values):
        return values[0].detach().expand(len(values), *values[0].shape)
    return torch.stack([value.detach() for value in values])


def stacked_name(name: str) -> str:
    """The name in a stack of the parameter or buffer `name` of its model.

    The leading slash keeps it apart from the stack's own attributes, whatever the model calls its parameters.

    Example:
        >>> stacked_name("0.weight")
        '/0/weight'
    """
    return "/" + name.replace(".", "/")
