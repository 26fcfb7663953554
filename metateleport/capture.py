"""Catching what passes through a model's modules: inputs, and gradients on outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from metateleport.point import Point, pullback_through
from metateleport.symmetries import Symmetry

__all__ = ["Recording", "channel_modules", "first_input", "modules_of", "point_of", "record", "rows"]


def rows(tensor: Tensor, batch: int = 0, channels: bool = False) -> Tensor:
    """Lays a module's input or output out with samples in rows, `(*batch, samples, features)`.

    Args:
        tensor: `(*batch, samples, ..., features)`, or `(*batch, samples, channels, ...)` for convolutions; a vector
            is one sample, a scalar one sample of one feature.
        batch: number of batch dimensions in front.
        channels: whether the features stand behind the samples (convolutions), not last.

    Example:
        >>> rows(torch.zeros(8, 3, 5, 5), channels=True).shape
        torch.Size([200, 3])
    """
    if channels:
        tensor = tensor.movedim(batch + 1, -1)
    while tensor.ndim < batch + 2:
        tensor = tensor.unsqueeze(batch)
    return tensor.reshape(*tensor.shape[:batch], -1, tensor.shape[-1])


def modules_of(symmetries: Iterable[Symmetry]) -> tuple[str, ...]:
    """Names of the modules that some symmetries want to see, each once."""
    return tuple(dict.fromkeys(name for symmetry in symmetries for name in symmetry.modules))


def channel_modules(model: nn.Module, modules: Iterable[str]) -> dict[str, bool]:
    """Which of the named modules are convolutions: their features stand behind the samples, not last."""
    named = dict(model.named_modules())
    return {name: isinstance(named[name], (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for name in modules}


def first_input(inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a module works on: its first argument, however it is passed."""
    return inputs[0] if inputs else next(iter(keywords.values()))


class Recording:
    """Inputs and outputs of modules in one forward pass, in the order of the data flow.

    Args:
        has_channels: names of the modules whose features stand in dimension 1 (convolutions).
    """

    def __init__(self, has_channels: Mapping[str, bool]) -> None:
        self.has_channels = has_channels
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def activations(self, batch: int = 0) -> dict[str, Tensor]:
        """Inputs by module name, samples in rows."""
        return {name: rows(value, batch, self.has_channels[name]) for name, value in self.inputs.items()}

    def layout(self, values: Mapping[str, Tensor], batch: int = 0) -> dict[str, Tensor]:
        """Gradients on outputs by module name, samples in rows."""
        return {name: rows(value, batch, self.has_channels[name]) for name, value in values.items()}


@contextlib.contextmanager
def record(
    model: nn.Module, modules: Iterable[str], adjust: Callable[[str, Tensor], Tensor] | None = None
) -> Iterator[Recording]:
    """Records the named modules' first inputs and outputs while the block runs.

    Args:
        model: whose modules are hooked; the hooks are gone afterwards.
        modules: names, as in `named_modules()`.
        adjust: gets each output and returns what the model goes on with.

    Yields:
        The recording, filled as the model runs; of several passes the last one stays.

    Raises:
        KeyError: if the model has no such module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with record(model, ["0"]) as recording:
        ...     _ = model(torch.ones(4, 2))
        >>> recording.activations()["0"].shape
        torch.Size([4, 2])
    """
    named = dict(model.named_modules())
    modules = tuple(modules)
    missing = [name for name in modules if name not in named]
    if missing:
        raise KeyError(f"the model has no module named {missing[0]!r}; it has {', '.join(map(repr, named))}")
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
    """Evaluates a model once and gathers what its symmetries need.

    Args:
        model: the model, in the mode (train or eval) that it shall be evaluated in.
        symmetries: whose modules are recorded.
        inputs: positional inputs of the model.
        keywords: keyword inputs of the model.
        loss: maps the outputs to a scalar; without it there are no gradients and no cotangents.
        also: names of modules to record besides those of the symmetries.

    Returns:
        The point and the outputs, detached from the graph but for what rebuilds the backward pass. Gradients are of
        the parameters that require one. The model's buffers stay as they are.

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
        with torch.no_grad(), record(model, modules) as recording:
            outputs = torch.func.functional_call(model, {**leaves, **buffers}, inputs, keywords)
        return Point(parameters={**leaves, **moved}, activations=recording.activations()), outputs
    wanted = {name: leaves[name].requires_grad_() for name, value in model.named_parameters() if value.requires_grad}
    # The model goes on with a copy: an activation in place would turn the recorded output into its own.
    with torch.enable_grad(), record(model, modules, lambda _, output: output.clone()) as recording:
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
    # Outputs may be any container of tensors.
    detached = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, outputs)
    return point.detach().replace(pullback=pullback), detached
