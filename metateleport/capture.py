"""Catching what passes through a model's modules: inputs, and gradients on outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from metateleport.point import Point, Tensors, pullback_through
from metateleport.symmetries import Symmetry

__all__ = [
    "PassRecorder",
    "RecordedPass",
    "Recording",
    "channel_modules",
    "first_input",
    "input_of",
    "modules_of",
    "named_module",
    "output_of",
    "point_of",
    "record",
    "rows",
    "tensors_in",
    "unseen",
    "unwrapped",
]


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
    named = dict(model.named_modules(remove_duplicate=False))
    return {name: isinstance(named[name], (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for name in modules}


def first_input(inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> Tensor:
    """The tensor that a module works on: its first argument, however it is passed."""
    return inputs[0] if inputs else next(iter(keywords.values()))


def named_module(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The named modules of a model.

    Raises:
        KeyError: if the model has no such module.
    """
    named, names = dict(model.named_modules(remove_duplicate=False)), tuple(names)
    missing = [name for name in names if name not in named]
    if missing:
        raise KeyError(f"the model has no module named {missing[0]!r}; it has {', '.join(map(repr, named))}")
    return {name: named[name] for name in names}


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside `torch.compile`, `nn.DataParallel` and the like, and what the wrappers put before its names.

    Example:
        >>> inner = nn.Linear(2, 1)
        >>> found, prefix = unwrapped(nn.DataParallel(inner))
        >>> found is inner, prefix
        (True, 'module.')
    """
    prefix = ""
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model, prefix = model.module, f"{prefix}module."
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model, prefix = model._orig_mod, f"{prefix}_orig_mod."  # type: ignore[assignment]
        else:
            return model, prefix


def _is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has wrapped a model, inside other wrappers or none."""
    return "_orig_mod." in unwrapped(model)[1]


def input_of(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among a module's arguments; None if it is given none."""
    return next((each for each in (*inputs, *keywords.values()) if isinstance(each, Tensor)), None)


def output_of(output: Any) -> Tensor | None:
    """The tensor that a module puts out, the first of several; None if it puts out none."""
    return output if isinstance(output, Tensor) else next(iter(tensors_in(output)), None)


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
        with torch.no_grad(), unseen(), record(model, modules) as recording:
            outputs = torch.func.functional_call(model, {**leaves, **buffers}, inputs, keywords)
        return Point(parameters={**leaves, **moved}, activations=recording.activations()), outputs
    wanted = {name: leaves[name].requires_grad_() for name, value in model.named_parameters() if value.requires_grad}
    # The model goes on with a copy: an activation in place would turn the recorded output into its own.
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
    return point.detach().replace(pullback=pullback), outputs.detach()


_repetitions: list[None] = []
"""One entry for each repetition of a pass that is running: no recorder takes it for a pass of the training loop."""


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Runs of a model inside the block are repetitions or trials: no `PassRecorder` records them.

    Example:
        >>> model = nn.Linear(2, 1)
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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for field in dataclasses.fields(value) for t in tensors_in(getattr(value, field.name))]
    return []


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


class PassRecorder:
    """Hooks on a model that keep the forward pass with gradients that its parameters' gradients came from.

    The hooks are set once. They know the recorder by a weak reference, so the model keeps nothing alive, and a copy or
    a saved file of the model carries hooks that do nothing. Passes without gradients are not seen, nor are those inside
    `unseen`; the recomputation of activation checkpointing is no second pass.

    Args:
        model: the model, or what it was wrapped in (`torch.compile`, `nn.DataParallel`, `DistributedDataParallel`).
        modules: names of the modules whose inputs and output gradients are kept, as in the model that is given or as
            in the one inside the wrappers.
        replays: whether a pass shall be repeatable: its inputs, outputs, buffers and random numbers are kept too.

    Raises:
        KeyError: if the model has no such module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> recorder = PassRecorder(model, ["2"], replays=False)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> _ = model(torch.ones(9, 2))  # a validation pass that forgot torch.no_grad()
        >>> seen, sent = recorder.activations(recorder.last), recorder.cotangents(recorder.last)
        >>> torch.allclose(sent["2"].mT @ seen["2"], model[2].weight.grad)
        True
        >>> recorder.passes, recorder.reached
        (2, 1)
    """

    def __init__(self, model: nn.Module, modules: Iterable[str], replays: bool = True) -> None:
        self.modules = tuple(dict.fromkeys(modules))
        self.replays = replays
        given, inner = model, unwrapped(model)[0]
        known = dict(inner.named_modules(remove_duplicate=False))
        self.model = inner if all(name in known for name in self.modules) else model
        named = named_module(self.model, self.modules)
        # A wrapper's own hooks run where those of the compiled model inside never do.
        model = model if _is_compiled(model) else inner
        self.outer = model
        self._copies = len(given.device_ids) if isinstance(given, nn.DataParallel) else 1
        self.replicas: Any = None
        """Process group of the `DistributedDataParallel` that the model was seen to run in; None for none."""
        self.has_channels = channel_modules(self.model, self.modules)
        self.wanted = True
        """Whether passes that begin from now on are recorded."""
        self.passes = 0
        """Number of forward passes with gradients since `clear`."""
        self.reached = 0
        """Number of them that a backward pass has come by."""
        self._begun = 0
        self._last: RecordedPass | None = None
        self._newest: RecordedPass | None = None
        self._running: RecordedPass | None = None
        self._awaiting: list[weakref.ref[RecordedPass]] = []
        self._hooks = [_Hook(self, "_begin"), _Hook(self, "_end"), *(_Hook(self, "_see", name) for name in named)]
        self._handles = [model.register_forward_pre_hook(self._hooks[0], prepend=True, with_kwargs=True)]
        for hook, module in zip(self._hooks[2:], named.values(), strict=True):
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._hooks[1], with_kwargs=True))

    @property
    def last(self) -> RecordedPass | None:
        """The last pass that a backward pass has come by; where none has, the last forward pass with gradients."""
        return self._newest if self._last is None else self._last

    @property
    def silent(self) -> str:
        """Why nothing of the modules can be recorded, in words; empty if it can."""
        if any(hook.compiled for hook in self._hooks):
            return "the model is compiled, and hooks inside compiled code never run"
        named = dict(self.outer.named_modules(remove_duplicate=False))
        own = {id(module): name for name, module in named.items()}
        inside = dict(self.model.named_modules(remove_duplicate=False))
        for name in self.modules or ("",):
            parts = own.get(id(inside[name]), "").split(".")
            for end in range(len(parts) + 1):
                above = named.get(".".join(parts[:end]))
                compiled = getattr(above, "_compiled_call_impl", None) is not None
                if compiled or (self.modules and hasattr(above, "_orig_mod")):
                    return "the model is compiled, and hooks inside compiled code never run"
        if self._copies > 1:
            return "nn.DataParallel runs copies of the model, whose hooks see a part of the batch each"
        return ""

    def close(self) -> None:
        """Takes the hooks off the model."""
        self.clear()
        self.wanted = False
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forgets what was recorded; a backward pass through what was recorded before changes nothing any more."""
        self._last = self._newest = self._running = None
        self.passes, self.reached = 0, 0
        self._begun += 1
        self._awaiting = []

    def activations(self, recorded: RecordedPass) -> Tensors:
        """Inputs of the modules, samples in rows, of several runs one below the other.

        They have the dtype of the module's weight, float32 where that has half precision. Integers (of embeddings)
        stay integers, in one column.
        """
        return {name: torch.cat([self._laid(name, run.input) for run in runs]) for name, runs in recorded.runs.items()}

    def cotangents(self, recorded: RecordedPass) -> Tensors:
        """Gradients on the outputs of the modules that a backward pass has come by, in the rows of `activations`.

        A run that the loss does not depend on has zeros, so that the product of the two is the weight's gradient.
        """
        found = {}
        for name, runs in recorded.runs.items():
            if any(run.cotangent is not None for run in runs):
                each = [_cotangent(run) for run in runs]
                found[name] = torch.cat([self._laid(name, value) for value in each if value is not None])
        return found

    def evaluate(self, positional: tuple[Any, ...], keywords: dict[str, Any]) -> RecordedPass:
        """A forward pass of its own, without gradients; buffers and random numbers are left as they were."""
        recorded = self._snapshot(positional, keywords)
        recorded.outputs = self.complete(recorded)
        return recorded

    def complete(self, recorded: RecordedPass) -> list[Tensor]:
        """Repeats a pass to see the inputs of the modules where hooks could not (`silent`); gives the outputs."""
        with _record_runs(self.model, self.modules) as runs:
            outputs = self.replay(recorded, dict(self.model.named_parameters()))
        recorded.runs = runs
        return outputs

    def replay(self, recorded: RecordedPass, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs at other parameters, all else as in the recorded pass: a third of a gradient evaluation."""
        recorded.replays += 1
        with torch.no_grad(), self._as_recorded(recorded):
            return tensors_in(self._call(recorded, parameters))

    def outputs_at(
        self, recorded: RecordedPass, parameters: Mapping[str, Tensor], read: Callable[[Any], Tensor]
    ) -> Tensor:
        """What `read` makes of the outputs at other parameters, in the graph, all else as in the recorded pass."""
        with self._as_recorded(recorded):
            return read(self._call(recorded, parameters))

    def pullback(
        self, recorded: RecordedPass, parameters: Mapping[str, Tensor], wanted: Iterable[str]
    ) -> Callable[[str, Tensor], tuple[Tensors, Tensors]]:
        """A point's pullback: the caller's graph is gone, so the pass is repeated when it is first needed."""
        wanted = tuple(wanted)
        built: list[Callable[[str, Tensor], tuple[Tensors, Tensors]]] = []

        def pullback(module: str, cotangent: Tensor) -> tuple[Tensors, Tensors]:
            if module not in recorded.connected:
                return {}, {}
            if not built:
                built.append(self._graph_of(recorded, parameters, wanted))
            return built[0](module, cotangent)

        return pullback

    def _graph_of(
        self, recorded: RecordedPass, parameters: Mapping[str, Tensor], wanted: tuple[str, ...]
    ) -> Callable[[str, Tensor], tuple[Tensors, Tensors]]:
        recorded.replays += 1
        leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in parameters.items()}
        # The model goes on with a copy: an activation in place would turn the recorded output into its own.
        with (
            torch.enable_grad(),
            self._as_recorded(recorded),
            record(self.model, self.modules, lambda _, output: output.clone()) as recording,
        ):
            self._call(recorded, leaves)
        watched = {name: output for name, output in recording.outputs.items() if output.requires_grad}
        with torch.enable_grad():
            activations = {name: self._laid(name, value) for name, value in recording.inputs.items()}

        def layout(cotangents: Mapping[str, Tensor]) -> Tensors:
            return {name: self._laid(name, value) for name, value in cotangents.items()}

        return pullback_through(activations, {name: leaves[name] for name in wanted}, watched, layout)

    def _call(self, recorded: RecordedPass, parameters: Mapping[str, Tensor]) -> Any:
        model, prefix = unwrapped(self.model)
        buffers = {name: value.clone() for name, value in recorded.buffers.items()}
        values = {name.removeprefix(prefix): value for name, value in (*parameters.items(), *buffers.items())}
        for name, own in model.named_parameters():
            if name in values:
                values[name] = values[name].to(own.dtype)
        positional, keywords = _copied(recorded.positional), _copied(recorded.keywords)
        return torch.func.functional_call(model, values, positional, keywords or None)

    @contextlib.contextmanager
    def _as_recorded(self, recorded: RecordedPass) -> Iterator[None]:
        """Random numbers and autocast as in the recorded pass; compiled code runs as it was written."""
        devices = [device for device in recorded.random if device is not None]
        kind, enabled, dtype = recorded.autocast
        with (
            unseen(),
            torch.random.fork_rng(devices),
            torch.autocast(kind, dtype=dtype, enabled=enabled),
            torch.compiler.set_stance("force_eager"),
        ):
            for device, state in recorded.random.items():
                if device is None:
                    torch.set_rng_state(state)
                else:
                    torch.cuda.set_rng_state(state, device)
            yield

    def _snapshot(self, positional: tuple[Any, ...], keywords: dict[str, Any]) -> RecordedPass:
        if not self.replays:
            return RecordedPass(self.model.training)
        devices = {value.device for value in self.model.parameters()}
        kind = next((device.type for device in devices), "cpu")
        random: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
        random |= {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        return RecordedPass(
            training=self.model.training,
            # Copied, as models may write their inputs.
            positional=_copied(positional),
            keywords=_copied(dict(keywords)),
            buffers={name: value.clone() for name, value in self.model.named_buffers()},
            random=random,
            autocast=(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        )

    def _laid(self, name: str, value: Tensor) -> Tensor:
        """Samples in rows, in a dtype to compute in."""
        if not value.is_floating_point():
            return value.reshape(-1, 1)
        weight = getattr(self.model.get_submodule(name), "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else value.dtype
        return rows(value, channels=self.has_channels[name]).to(_at_least_single(dtype))

    def _begin(self, _: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._running = None
        replicated = DistributedDataParallel._get_active_ddp_module()
        if replicated is not None:
            self.replicas = replicated.process_group
        # What torch.func's transforms hand through a model is gone when they end.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        unwanted = bool(_repetitions) or transformed or not torch.is_grad_enabled()
        if self.wanted and not unwanted and not self._recomputing():
            self._running = self._snapshot(positional, keywords)

    def _recomputing(self) -> bool:
        """Whether the backward pass of a pass that was recorded is under way: what runs now repeats it."""
        return _in_backward() and self._last is not None and self._last is self._backward_of()

    def _backward_of(self) -> RecordedPass | None:
        found = self._task
        return found[1]() if found is not None and found[0] == torch._C._current_graph_task_id() else None

    _task: tuple[int, weakref.ref[RecordedPass]] | None = None

    def _see(self, name: str, _: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        recorded = self._running
        if recorded is None:
            if self._awaiting and torch.is_grad_enabled() and not _repetitions and _in_backward():
                self._see_again(name, input_of(positional, keywords), output)
            return
        seen, put_out = input_of(positional, keywords), output_of(output)
        if seen is None:
            return
        without = not torch.is_grad_enabled()
        told = None if put_out is None else (put_out.shape, put_out.dtype)
        run = Run(seen.detach(), told, awaited=without)
        run.connected = seen.requires_grad
        # A module that runs again stands where it ran last.
        recorded.runs[name] = [*recorded.runs.pop(name, ()), run]
        if without and not any(each() is recorded for each in self._awaiting):
            self._awaiting.append(weakref.ref(recorded))
        self._catch(recorded, run, put_out)

    def _see_again(self, name: str, seen: Tensor | None, output: Any) -> None:
        """A run of a checkpointed block, made anew in the backward pass, this time with a graph."""
        passes = [each for each in (reference() for reference in self._awaiting) if each is not None]
        waiting = [(each, run) for each in passes for run in each.runs.get(name, ()) if run.awaited]
        if seen is None or not waiting:
            return
        alike = [pair for pair in waiting if len(waiting) > 1 and torch.equal(pair[1].input, seen)]
        recorded, run = (alike or waiting)[-1]
        run.awaited, run.connected = False, seen.requires_grad
        self._catch(recorded, run, output_of(output))

    def _catch(self, recorded: RecordedPass, run: Run, output: Tensor | None) -> None:
        if output is None or not output.requires_grad:
            return
        reach = self._reaching(recorded)

        def caught(gradient: Tensor) -> None:
            run.cotangent = gradient.detach() if run.cotangent is None else run.cotangent + gradient.detach()
            reach()

        output.register_hook(caught)

    def _end(self, _: nn.Module, _positional: Any, _keywords: Any, output: Any) -> None:
        recorded = self._running
        if recorded is None:
            return
        tensors = tensors_in(output)
        self._running = None
        self.passes += 1
        if self._last is None:
            self._newest = recorded
        reach = self._reaching(recorded)
        for place, tensor in enumerate(tensors):
            if self.replays:
                # Copied, as the caller may go on in place.
                recorded.outputs.append(tensor.detach().clone())
            if tensor.requires_grad:
                tensor.register_hook(_output_hook(recorded, place, reach, self.replays))

    def _reaching(self, recorded: RecordedPass) -> Callable[[], None]:
        """Says that a backward pass has come by a pass; it keeps the pass alive as long as its graph, no longer."""
        own, begun = weakref.ref(self), self._begun

        def reach() -> None:
            recorder = own()
            if recorder is None or recorder._begun != begun:
                return
            recorder._task = (torch._C._current_graph_task_id(), weakref.ref(recorded))
            recorder.reached += not recorded.reached
            recorded.reached = True
            recorder._last, recorder._newest = recorded, None

        return reach


class _Hook:
    """Calls a method of a recorder as long as it lives; copied and saved without it, compiled to nothing."""

    def __init__(self, recorder: PassRecorder | None, method: str, *first: Any) -> None:
        self.recorder = None if recorder is None else weakref.ref(recorder)
        self.method, self.first = method, first
        self.compiled = False

    def __call__(self, *arguments: Any) -> None:
        if torch.compiler.is_compiling():
            self.compiled = True
            return
        recorder = None if self.recorder is None else self.recorder()
        if recorder is not None:
            getattr(recorder, self.method)(*self.first, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, (None, self.method, *self.first))


def _output_hook(recorded: RecordedPass, place: int, reach: Callable[[], None], keep: bool) -> Callable[[Tensor], None]:
    def caught(gradient: Tensor) -> None:
        if keep:
            before = recorded.output_cotangents.get(place)
            recorded.output_cotangents[place] = gradient.detach() if before is None else before + gradient.detach()
        reach()

    return caught


@contextlib.contextmanager
def _record_runs(model: nn.Module, modules: Iterable[str]) -> Iterator[dict[str, list[Run]]]:
    """The runs of modules in one pass without gradients."""
    found: dict[str, list[Run]] = {}

    def hook(name: str) -> Callable[..., None]:
        def caught(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], _output: Any) -> None:
            seen = input_of(inputs, keywords)
            if seen is not None:
                found[name] = [*found.pop(name, ()), Run(seen.detach(), None)]

        return caught

    named = named_module(model, modules)
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in named.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _cotangent(run: Run) -> Tensor | None:
    if run.cotangent is not None or run.output is None:
        return run.cotangent
    shape, dtype = run.output
    return torch.zeros(shape, dtype=dtype, device=run.input.device)


def _copied(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda value: value.detach().clone(), inputs)


def _at_least_single(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
