"""The passes of a training loop, recorded by hooks that stay on the model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metateleport.capture.layout import (
    at_least_single,
    channel_modules,
    copied,
    input_of,
    is_compiled,
    named_module,
    output_of,
    rows,
    tensors_in,
    unwrapped,
)
from metateleport.capture.once import is_repetition, record, unseen
from metateleport.capture.passes import RecordedPass, Run
from metateleport.point import Tensors, pullback_through

__all__ = ["PassRecorder"]


def _take_off(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


class PassRecorder:
    """Records, by hooks on a model, the forward pass that the gradients of its parameters came from.

    The hooks are set once. They hold the recorder by a weak reference, so the model does not keep it alive, and the
    hooks of a copied or saved model do nothing. Not recorded are passes without gradients and passes inside `unseen`;
    the recomputation under activation checkpointing does not count as a second pass.

    Args:
        model: the model, or what it was wrapped in (`torch.compile`, `nn.DataParallel`, `DistributedDataParallel`).
        modules: names of the modules whose inputs and output gradients are recorded, as in the given model or as in the
            one inside the wrappers.
        replays: whether a pass can be repeated later: its inputs, outputs, buffers and random numbers are kept too.

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
        # Hooks on the wrapper of a compiled model run; hooks inside it never do.
        model = model if is_compiled(model) else inner
        self.outer = model
        self._copies = len(given.device_ids) if isinstance(given, nn.DataParallel) else 1
        self.replicas: Any = None
        """Process group of the `DistributedDataParallel` that the model runs in; None if there is none."""
        self.has_channels = channel_modules(self.model, self.modules)
        self.wanted = True
        """Whether passes are recorded that begin from now on."""
        self.passes = 0
        """Number of forward passes with gradients since `clear`."""
        self.reached = 0
        """Number of those passes that have had a backward pass."""
        self._renewed = False
        self._begun = 0
        self._last: RecordedPass | None = None
        self._newest: RecordedPass | None = None
        self._running: RecordedPass | None = None
        self._awaiting: list[weakref.ref[RecordedPass]] = []
        # The autograd engine's number of the last backward pass through a recorded pass.
        self._reached_in = -1
        self._hooks = [_Hook(self, "_begin"), _Hook(self, "_end"), *(_Hook(self, "_see", name) for name in named)]
        self._handles = [model.register_forward_pre_hook(self._hooks[0], prepend=True, with_kwargs=True)]
        for hook, module in zip(self._hooks[2:], named.values(), strict=True):
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._hooks[1], with_kwargs=True))
        # Otherwise hooks of deleted recorders would slow the model down for ever.
        weakref.finalize(self, _take_off, self._handles)

    @property
    def last(self) -> RecordedPass | None:
        """The last pass that has had a backward pass; if none has, the last forward pass with gradients."""
        return self._newest if self._last is None else self._last

    @property
    def silent(self) -> str:
        """A sentence that says why modules cannot be recorded; empty if they can."""
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
            return "nn.DataParallel runs copies of the model, and the hooks of each see only a part of the batch"
        return ""

    def close(self) -> None:
        """Removes the hooks from the model."""
        self.clear()
        self.wanted = False
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forgets all passes; a later backward pass through one of them is ignored."""
        self._last = self._newest = self._running = None
        self.passes, self.reached = 0, 0
        self._begun += 1
        self._awaiting = []
        self._renewed = False

    def renew(self) -> None:
        """Forgets all passes as soon as the next one begins; a closure that does not run the model changes nothing.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> recorder = PassRecorder(model, [""], replays=False)
            >>> for _ in range(2):
            ...     recorder.renew()
            ...     _ = model(torch.ones(3, 2))
            >>> recorder.passes
            1
        """
        self._renewed = True

    def activations(self, recorded: RecordedPass) -> Tensors:
        """Inputs of the modules, samples in rows; those of several runs one below the other.

        They have the dtype of the module's weight, but float32 for half precision. Integers (inputs of embeddings) stay
        integers, in one column.
        """
        return {name: _joined([self._laid(name, run.input) for run in runs]) for name, runs in recorded.runs.items()}

    def cotangents(self, recorded: RecordedPass) -> Tensors:
        """Gradients on the outputs of the modules that a backward pass went through, in the rows of `activations`.

        A run that the loss does not depend on has zeros, so that cotangents times activations is the weight's gradient.
        """
        found = {}
        for name, runs in recorded.runs.items():
            if any(run.cotangent is not None for run in runs):
                each = [_cotangent(run) for run in runs]
                found[name] = _joined([self._laid(name, value) for value in each if value is not None])
        return found

    def evaluate(self, positional: tuple[Any, ...], keywords: dict[str, Any]) -> RecordedPass:
        """Runs a forward pass without gradients and records it; buffers and random numbers stay as they were."""
        recorded = self._snapshot(positional, keywords)
        recorded.outputs = self.complete(recorded)
        return recorded

    def complete(self, recorded: RecordedPass) -> list[Tensor]:
        """Repeats a pass to record the inputs of modules whose hooks could not run (`silent`); returns the outputs."""
        with _record_runs(self.model, self.modules) as runs:
            outputs = self.replay(recorded, dict(self.model.named_parameters()))
        recorded.runs = runs
        return outputs

    def replay(self, recorded: RecordedPass, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs at other parameters, all else as in the recorded pass; costs a third of a gradient evaluation."""
        recorded.replays += 1
        with torch.no_grad(), self._as_recorded(recorded):
            return tensors_in(self._call(recorded, parameters))

    def outputs_at(
        self, recorded: RecordedPass, parameters: Mapping[str, Tensor], read: Callable[[Any], Tensor]
    ) -> Tensor:
        """`read` applied to the outputs at other parameters, in the graph; all else is as in the recorded pass."""
        with self._as_recorded(recorded):
            return read(self._call(recorded, parameters))

    def pullback(
        self, recorded: RecordedPass, parameters: Mapping[str, Tensor], wanted: Iterable[str]
    ) -> Callable[[str, Tensor], tuple[Tensors, Tensors]]:
        """The pullback for a `Point`. The caller's graph is gone, so the pass is repeated when it is first called."""
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
        # The model goes on with a copy: an in-place activation would overwrite the recorded output.
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
        positional, keywords = copied(recorded.positional), copied(recorded.keywords)
        return torch.func.functional_call(model, values, positional, keywords or None)

    @contextlib.contextmanager
    def _as_recorded(self, recorded: RecordedPass) -> Iterator[None]:
        """Inside the block random numbers and autocast are as in the recorded pass, and `torch.compile` is off."""
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
            # Copied, because a model may overwrite its inputs.
            positional=copied(positional),
            keywords=copied(dict(keywords)),
            buffers={name: value.clone() for name, value in self.model.named_buffers()},
            random=random,
            autocast=(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        )

    def _laid(self, name: str, value: Tensor) -> Tensor:
        """A module's input or output with samples in rows, in the dtype to compute in."""
        if not value.is_floating_point():
            return value.reshape(-1, 1)
        weight = getattr(self.model.get_submodule(name), "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else value.dtype
        return rows(value, channels=self.has_channels[name]).to(at_least_single(dtype))

    def _begin(self, _: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._running = None
        replicated = DistributedDataParallel._get_active_ddp_module()
        if replicated is not None:
            self.replicas = replicated.process_group
        # Tensors of torch.func's transforms are invalid after the transform ends.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        unwanted = is_repetition() or transformed or not torch.is_grad_enabled()
        if self.wanted and not unwanted and not self._recomputing():
            if self._renewed:
                self.clear()
            self._running = self._snapshot(positional, keywords)

    def _recomputing(self) -> bool:
        """Whether a recorded pass's backward pass is running: the model then repeats that pass."""
        return _in_backward() and self._reached_in == torch._C._current_graph_task_id()

    def _see(self, name: str, _: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        recorded = self._running
        if recorded is None:
            if self._awaiting and torch.is_grad_enabled() and not is_repetition() and _in_backward():
                self._see_again(name, input_of(positional, keywords), output)
            return
        seen, put_out = input_of(positional, keywords), output_of(output)
        if seen is None:
            return
        without = not torch.is_grad_enabled()
        told = None if put_out is None else (put_out.shape, put_out.dtype)
        run = Run(seen.detach(), told, awaited=without)
        run.connected = seen.requires_grad
        # A module that runs again comes in the order of its last run.
        recorded.runs[name] = [*recorded.runs.pop(name, ()), run]
        if without and not any(each() is recorded for each in self._awaiting):
            self._awaiting.append(weakref.ref(recorded))
        self._catch(recorded, run, put_out)

    def _see_again(self, name: str, seen: Tensor | None, output: Any) -> None:
        """Notes the repeated run of a checkpointed block in the backward pass, which has a graph."""
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
                # Copied, because the caller may change the outputs in place.
                recorded.outputs.append(tensor.detach().clone())
            if tensor.requires_grad:
                tensor.register_hook(_output_hook(recorded, place, reach, self.replays))

    def _reaching(self, recorded: RecordedPass) -> Callable[[], None]:
        """A function that notes a pass's backward pass; it keeps the pass alive only as long as its graph."""
        own, begun = weakref.ref(self), self._begun

        def reach() -> None:
            recorder = own()
            if recorder is None or recorder._begun != begun:
                return
            recorder._reached_in = torch._C._current_graph_task_id()
            recorder.reached += not recorded.reached
            recorded.reached = True
            recorder._last, recorder._newest = recorded, None

        return reach


class _Hook:
    """Calls a method of a recorder while it lives. A copied or saved hook has none; compiled code skips it."""

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
    """The runs of modules during a pass without gradients."""
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


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows one below the other; of a single run as they are, as nobody overwrites them."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cotangent(run: Run) -> Tensor | None:
    if run.cotangent is not None or run.output is None:
        return run.cotangent
    shape, dtype = run.output
    return torch.zeros(shape, dtype=dtype, device=run.input.device)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
