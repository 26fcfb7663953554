"""A single pass of a model under temporary hooks, and the point evaluated in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from metateleport.capture.layout import channel_modules, first_input, modules_of, named_module, rows
from metateleport.point import Point, pullback_through
from metateleport.symmetries import Symmetry

__all__ = ["Recording", "is_repetition", "point_of", "record", "unseen"]


_repetitions: list[None] = []
"""One entry for each block of `unseen` that is running."""


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Inside the block no `PassRecorder` records passes: they are repetitions or trials, not the training loop's.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> from metateleport.capture import PassRecorder
        >>> recorder = PassRecorder(model, [""])
        >>> with unseen():
        ...     _ = model(torch.ones(3, 2))
        >>> recorder.passes
        0
    """
    _repetitions.append(None)
    try:
        yield
    finally:
        _repetitions.pop()


class Recording:
    """Inputs and outputs of modules in one forward pass, in the order of the data flow.

    Args:
        has_channels: by module name whether its features are in dimension 1, as for convolutions.
    """

    def __init__(self, has_channels: Mapping[str, bool]) -> None:
        self.has_channels = has_channels
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def activations(self, batch: int = 0) -> dict[str, Tensor]:
        """Inputs by module name, samples in rows."""
        return {name: rows(value, batch, self.has_channels[name]) for name, value in self.inputs.items()}

    def layout(self, values: Mapping[str, Tensor], batch: int = 0) -> dict[str, Tensor]:
        """Values in the layout of the modules' outputs, such as gradients on them, with samples in rows."""
        return {name: rows(value, batch, self.has_channels[name]) for name, value in values.items()}


@contextlib.contextmanager
def record(
    model: nn.Module, modules: Iterable[str], adjust: Callable[[str, Tensor], Tensor] | None = None
) -> Iterator[Recording]:
    """Records the named modules' first inputs and outputs while the block runs.

    Args:
        model: the model; its hooks are removed afterwards.
        modules: names, as in `named_modules()`.
        adjust: gets each module's name and output and returns the output that the model goes on with.

    Yields:
        The recording, filled as the model runs. After several passes it holds the last one.

    Raises:
        KeyError: if the model has no such module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with record(model, ["0"]) as recording:
        ...     _ = model(torch.ones(4, 2))
        >>> recording.activations()["0"].shape
        torch.Size([4, 2])
    """
    modules = tuple(modules)
    named = named_module(model, modules)
    recording = Recording(channel_modules(model, modules))

    def hook(name: str) -> Callable[..., Tensor]:
        def caught(_: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor) -> Tensor:
            recording.inputs.pop(name, None)
            recording.inputs[name] = first_input(inputs, keywords)
            recording.outputs[name] = output
            return output if adjust is None else adjust(name, output)

        return caught

    handles = [named[name].register_forward_hook(hook(name), with_kwargs=True) for name in modules]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def point_of(
    model: nn.Module,
    symmetries: Iterable[Symmetry],
    inputs: tuple[object, ...],
    keywords: Mapping[str, object] | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
    also: Iterable[str] = (),
) -> tuple[Point, Tensor]:
    """Evaluates a model once and makes the point that its symmetries need.

    Args:
        model: the model, in the mode (train or eval) to evaluate it in.
        symmetries: the symmetries; the modules that they read are recorded.
        inputs: positional inputs of the model.
        keywords: keyword inputs of the model.
        loss: maps the outputs to a scalar; without it there are no gradients and no cotangents.
        also: names of further modules to record.

    Returns:
        The point and the outputs. Both are detached from the graph; only the point's pullback keeps it, to rebuild the
        backward pass. There are gradients for the parameters that require one. The model's buffers do not change.

    Raises:
        ValueError: if the loss is not a scalar, or does not depend on any parameter that requires a gradient.
    """
    symmetries = tuple(symmetries)
    leaves = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    moved = {name: buffers[name].clone() for symmetry in symmetries for name in symmetry.buffers}
    keywords = dict(keywords or {})
    modules = tuple(dict.fromkeys((*modules_of(symmetries), *also)))
    if loss is None:
        with torch.no_grad(), unseen(), record(model, modules) as recording:
            outputs = torch.func.functional_call(model, {**leaves, **buffers}, inputs, keywords)
        return Point(parameters={**leaves, **moved}, activations=recording.activations()), outputs
    wanted = {name: leaves[name].requires_grad_() for name, value in model.named_parameters() if value.requires_grad}
    # The model goes on with a copy: an in-place activation would overwrite the recorded output.
    with torch.enable_grad(), unseen(), record(model, modules, lambda _, output: output.clone()) as recording:
        outputs = torch.func.functional_call(model, {**leaves, **buffers}, inputs, keywords)
        value = loss(outputs)
        if value.ndim:
            raise ValueError(f"the loss has to be a scalar; it has shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("the loss does not depend on any parameter that requires a gradient")
        watched = {name: output for name, output in recording.outputs.items() if output.requires_grad}
        targets = [*wanted.values(), *watched.values()]
        found = torch.autograd.grad(value, targets, allow_unused=True, retain_graph=True)
    gradients = {name: grad for name, grad in zip(wanted, found, strict=False) if grad is not None}

    def loss_at(parameters: Mapping[str, Tensor]) -> Tensor:
        values = {**leaves, **{name: value.clone() for name, value in buffers.items()}, **parameters}
        with unseen():
            return loss(torch.func.functional_call(model, values, inputs, keywords))

    on_outputs = {name: grad for name, grad in zip(watched, found[len(wanted) :], strict=True) if grad is not None}
    point = Point(
        parameters={**leaves, **moved},
        gradients=gradients,
        activations=recording.activations(),
        cotangents=recording.layout(on_outputs),
        loss=value,
        loss_at=loss_at,
    )
    pullback = pullback_through(recording.activations(), wanted, watched, recording.layout)
    # The outputs may be any container of tensors.
    detached = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, outputs)
    return point.detach().replace(pullback=pullback), detached


def is_repetition() -> bool:
    """Whether a block of `unseen` is running."""
    return bool(_repetitions)
