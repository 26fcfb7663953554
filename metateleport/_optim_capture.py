"""Catching the passes of a training loop by hooks that stay on the model."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import Recording, channel_modules, first_input, record
from metateleport.point import Tensors, pullback_through

__all__ = ["CaughtPass", "Watch", "tensors_in"]


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output: a tensor, or tuples, lists, dicts and dataclasses of them.

    Example:
        >>> [t.shape[0] for t in tensors_in({"logits": torch.ones(2), "states": (torch.ones(3), None)})]
        [2, 3]
    """
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in tensors_in(each)]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in tensors_in(getattr(value, field.name))]
    return []


@dataclasses.dataclass
class CaughtPass:
    """One forward pass, all that it takes to repeat it, and what the backward pass said about it.

    It holds no graph: when the caller's loss goes, the graph goes.

    Args:
        positional: the model's positional inputs.
        keywords: its keyword inputs.
        training: whether the model was in training mode.
        buffers: its buffers before the pass.
        random: state of the random numbers before the pass, by device; that of the CPU under None.
        autocast: device type, whether autocast was on, and its dtype.
        inputs: input of each watched module.
        connected: names of the watched modules whose input depends on parameters.
        cotangents: gradient on the output of each watched module.
        outputs: the model's outputs, copied.
        output_cotangents: gradient on each of them, by position.
        replays: how many times the pass was repeated.
    """

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    training: bool
    buffers: Tensors
    random: dict[torch.device | None, Tensor]
    autocast: tuple[str, bool, torch.dtype]
    inputs: Tensors = dataclasses.field(default_factory=dict)
    connected: set[str] = dataclasses.field(default_factory=set)
    cotangents: Tensors = dataclasses.field(default_factory=dict)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    output_cotangents: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    replays: int = 0


class Watch:
    """Hooks on a model that keep its last forward pass with gradients, while they are wanted.

    The hooks know the watch by a weak reference, so the model keeps nothing alive, and a copy or a saved file of the
    model carries hooks that do nothing.

    Args:
        model: the model.
        modules: names of the modules whose inputs and output gradients are kept.
    """

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        named = dict(model.named_modules())
        self.model = model
        self.modules = tuple(modules)
        self.has_channels = channel_modules(model, self.modules)
        self.wanted = True
        self.last: CaughtPass | None = None
        self.passes = 0
        self._running: CaughtPass | None = None
        self._muted = False
        self._handles = [model.register_forward_pre_hook(_Hook(self, "_begin"), prepend=True, with_kwargs=True)]
        for name in self.modules:
            self._handles.append(named[name].register_forward_hook(_Hook(self, "_see", name), with_kwargs=True))
        self._handles.append(model.register_forward_hook(_Hook(self, "_end"), with_kwargs=True))

    def close(self) -> None:
        """Takes the hooks off the model."""
        self.clear()
        self.wanted = False
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forgets what was caught."""
        self.last, self._running, self.passes = None, None, 0

    def activations(self, caught: CaughtPass) -> Tensors:
        """Inputs of the watched modules, samples in rows, in the dtype of the module's weight."""
        return self._in_dtype(Recording(self.has_channels).layout(caught.inputs))

    def cotangents(self, caught: CaughtPass) -> Tensors:
        """Gradients on the outputs of the watched modules, samples in rows, in the dtype of the module's weight."""
        return self._in_dtype(Recording(self.has_channels).layout(caught.cotangents))

    def evaluate(self, positional: tuple[Any, ...], keywords: dict[str, Any]) -> CaughtPass:
        """A forward pass of its own, without gradients; buffers and random numbers are left as they were."""
        caught = self._snapshot(positional, keywords)
        with record(self.model, self.modules) as recording:
            caught.outputs = self.replay(caught, dict(self.model.named_parameters()))
        caught.inputs = {name: value.detach() for name, value in recording.inputs.items()}
        return caught

    def replay(self, caught: CaughtPass, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs at other parameters, all else as in the caught pass: a third of a gradient evaluation."""
        caught.replays += 1
        with torch.no_grad(), self._as_caught(caught):
            return tensors_in(self._call(caught, parameters))

    def outputs_at(self, caught: CaughtPass, parameters: Mapping[str, Tensor], read: Callable[[Any], Tensor]) -> Tensor:
        """What `read` makes of the outputs at other parameters, in the graph, all else as in the caught pass."""
        with self._as_caught(caught):
            return read(self._call(caught, parameters))

    def pullback(
        self, caught: CaughtPass, parameters: Mapping[str, Tensor], wanted: Iterable[str]
    ) -> Callable[[str, Tensor], tuple[Tensors, Tensors]]:
        """A point's pullback: the caller's graph is gone, so the pass is repeated when it is first needed."""
        wanted = tuple(wanted)
        built: list[Callable[[str, Tensor], tuple[Tensors, Tensors]]] = []

        def pullback(module: str, cotangent: Tensor) -> tuple[Tensors, Tensors]:
            if module not in caught.connected:
                return {}, {}
            if not built:
                built.append(self._graph_of(caught, parameters, wanted))
            return built[0](module, cotangent)

        return pullback

    def _graph_of(
        self, caught: CaughtPass, parameters: Mapping[str, Tensor], wanted: tuple[str, ...]
    ) -> Callable[[str, Tensor], tuple[Tensors, Tensors]]:
        caught.replays += 1
        leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in parameters.items()}
        # The model goes on with a copy: an activation in place would turn the recorded output into its own.
        with (
            torch.enable_grad(),
            self._as_caught(caught),
            record(self.model, self.modules, lambda _, output: output.clone()) as recording,
        ):
            self._call(caught, leaves)
        watched = {name: output for name, output in recording.outputs.items() if output.requires_grad}
        with torch.enable_grad():
            activations = self._in_dtype(recording.activations())

        def layout(cotangents: Mapping[str, Tensor]) -> Tensors:
            return self._in_dtype(recording.layout(cotangents))

        return pullback_through(activations, {name: leaves[name] for name in wanted}, watched, layout)

    def _call(self, caught: CaughtPass, parameters: Mapping[str, Tensor]) -> Any:
        buffers = {name: value.clone() for name, value in caught.buffers.items()}
        return torch.func.functional_call(
            self.model, {**parameters, **buffers}, caught.positional, caught.keywords or None
        )

    @contextlib.contextmanager
    def _as_caught(self, caught: CaughtPass) -> Iterator[None]:
        """Random numbers and autocast as in the caught pass; the watch looks away."""
        devices = [device for device in caught.random if device is not None]
        kind, enabled, dtype = caught.autocast
        before, self._muted = self._muted, True
        try:
            with torch.random.fork_rng(devices), torch.autocast(kind, dtype=dtype, enabled=enabled):
                for device, state in caught.random.items():
                    if device is None:
                        torch.set_rng_state(state)
                    else:
                        torch.cuda.set_rng_state(state, device)
                yield
        finally:
            self._muted = before

    def _snapshot(self, positional: tuple[Any, ...], keywords: dict[str, Any]) -> CaughtPass:
        devices = {value.device for value in self.model.parameters()}
        kind = next(iter(devices)).type
        random: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
        random |= {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        return CaughtPass(
            positional=positional,
            keywords=dict(keywords),
            training=self.model.training,
            buffers={name: value.clone() for name, value in self.model.named_buffers()},
            random=random,
            autocast=(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        )

    def _in_dtype(self, tensors: Mapping[str, Tensor]) -> Tensors:
        modules = dict(self.model.named_modules())
        weights = {name: getattr(modules[name], "weight", None) for name in tensors}
        return {
            name: value if weights[name] is None else value.to(weights[name].dtype)  # type: ignore[union-attr]
            for name, value in tensors.items()
        }

    def _begin(self, _: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._running = None
        if self.wanted and not self._muted and torch.is_grad_enabled():
            self._running = self._snapshot(positional, keywords)

    def _see(self, name: str, _: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        caught = self._running
        if caught is None:
            return
        seen = first_input(positional, keywords)
        # A module that runs again stands where it ran last.
        caught.inputs.pop(name, None)
        caught.inputs[name] = seen.detach()
        caught.connected.discard(name)
        if seen.requires_grad:
            caught.connected.add(name)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: _add(caught.cotangents, name, gradient))

    def _end(self, _: nn.Module, _positional: Any, _keywords: Any, output: Any) -> None:
        caught = self._running
        if caught is None:
            return
        self._running, self.last, self.passes = None, caught, self.passes + 1
        for place, tensor in enumerate(tensors_in(output)):
            # Copied, as the caller may go on in place.
            caught.outputs.append(tensor.detach().clone())
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, place=place: _add(caught.output_cotangents, place, gradient))


class _Hook:
    """Calls a method of a watch as long as it lives; copied and saved without it."""

    def __init__(self, watch: Watch | None, method: str, *first: Any) -> None:
        self.watch = None if watch is None else weakref.ref(watch)
        self.method, self.first = method, first

    def __call__(self, *arguments: Any) -> None:
        watch = None if self.watch is None else self.watch()
        if watch is not None:
            getattr(watch, self.method)(*self.first, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, (None, self.method, *self.first))


def _add(tensors: dict[Any, Tensor], key: Any, gradient: Tensor) -> None:
    tensors[key] = tensors[key] + gradient.detach() if key in tensors else gradient.detach()
