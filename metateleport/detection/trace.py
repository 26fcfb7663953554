"""From a module to a graph of operations by torch.export, child by child where the whole cannot be traced."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.detection.draws import seeded
from metateleport.detection.given import copied, mapped

__all__ = ["Graph", "Observed", "observables", "split", "trace"]

_PREFIX = "observed."


@dataclasses.dataclass(frozen=True)
class Graph:
    """Operations of a module in the order of its data flow.

    Args:
        nodes: of the exported graph.
        parameters: names of parameters by placeholder name.
        tensors: names of buffers and constants by placeholder name.
        constants: the tensors that the trace took as constants.
        prefix: the path of the traced module in the model.
        calls: how often that module is called in one pass.
    """

    nodes: tuple[torch.fx.Node, ...]
    parameters: dict[str, str]
    tensors: dict[str, str]
    constants: tuple[Tensor, ...]
    prefix: str = ""
    calls: int = 1


def split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of a model from a tensor, a tuple or a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def observables(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors of a model's outputs, nested ones included; caches of keys and values are not outputs.

    Raises:
        TypeError: if there are none, or something among the outputs may hide some.
    """
    found = tuple(_tensors_of(outputs))
    if not found:
        raise TypeError(f"the model's output is no tensor, but a {type(outputs).__name__}")
    return found


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key not in ("past_key_values", "cache_params"):
                yield from _tensors_of(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors_of(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors_of(getattr(value, field.name))
    elif not (value is None or isinstance(value, bool | int | float | str) or _is_cache(value)):
        raise TypeError(f"outputs of type {type(value).__name__} are not followed")


def _is_cache(value: Any) -> bool:
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


class Observed(nn.Module):
    """A model whose outputs are a tuple of tensors, or the loss of its outputs.

    Args:
        model: the model.
        loss: maps its outputs to what is observed of them.
        frame: positional and keyword inputs, whose tensors are exchanged for those that `forward` is given, where a
            trace does not know their containers; none where it does.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor] | None = None,
        frame: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.observed = model
        self.loss = loss
        # In a list its tensors are none of the module's own.
        self.frame = [frame]

    def forward(self, *inputs: Any, **keywords: Any) -> tuple[Tensor, ...]:
        (frame,) = self.frame
        if frame is not None:
            rest = iter(inputs)
            inputs, keywords = mapped(frame, lambda _: next(rest))
        outputs = self.observed(*inputs, **keywords)
        return observables(outputs if self.loss is None else self.loss(outputs))


def trace(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    loss: Callable[[Any], Tensor] | None = None,
) -> tuple[list[Graph], list[tuple[str, str]]]:
    """Traces a model, or those of its children that can be traced where the whole cannot.

    A child is a function of its inputs alone, so a symmetry inside it does not depend on the rest of the model.

    Returns:
        The graphs, and the modules that could not be followed, each with the reason.
    """
    try:
        with seeded(model):
            # What is imported on the way may draw once.
            for _ in range(2):
                before = _drawn()
                graph = _export(Observed(model, loss), inputs, keywords, "")
                if _drawn() == before:
                    return [graph], []
        raise RuntimeError("it draws Python's or numpy's random numbers, so another pass may run other operations")
    except Exception as error:
        return _children(model, inputs, keywords, _first_line(error))


def _drawn() -> tuple[Any, ...]:
    """The state of the random numbers that a trace cannot follow."""
    name, numbers, *rest = np.random.get_state()
    return random.getstate(), name, bytes(np.asarray(numbers)), *rest


def _children(
    model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], reason: str
) -> tuple[list[Graph], list[tuple[str, str]]]:
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append((args, kwargs))

        return hook

    # A scripted module takes no hooks, and its operations are not torch's.
    modules = {
        name: each for name, each in model.named_modules() if name and not isinstance(each, torch.jit.ScriptModule)
    }
    handles = [module.register_forward_pre_hook(catch(name), with_kwargs=True) for name, module in modules.items()]
    # A model may write its own parameters as it runs (a bound on their norms), and what it is given.
    own = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    try:
        with torch.enable_grad(), _restored(model), seeded(model):
            torch.func.functional_call(model, own, *copied((inputs, keywords)))
    finally:
        for handle in handles:
            handle.remove()
    graphs: list[Graph] = []
    unfollowed = [("", reason)]
    covered: list[str] = []
    for name, module in modules.items():
        if any(name.startswith(f"{path}.") for path in covered) or not any(True for _ in module.parameters()):
            continue
        seen = calls.get(name, [])
        if seen:
            try:
                with seeded(model):
                    graph = _export(Observed(module), *seen[0], f"{name}.")
                graphs.append(dataclasses.replace(graph, calls=len(seen)))
                covered.append(name)
            except Exception as error:
                unfollowed.append((name, _first_line(error)))
    return graphs, unfollowed


def _export(observed: Observed, inputs: tuple[Any, ...], keywords: dict[str, Any], prefix: str) -> Graph:
    inputs, keywords = copied((inputs, keywords))
    leaves = torch.utils._pytree.tree_leaves((inputs, keywords))
    if any(dataclasses.is_dataclass(leaf) for leaf in leaves):
        tensors: list[Tensor] = []

        def seen(value: Tensor) -> Tensor:
            tensors.append(value)
            return value

        mapped((inputs, keywords), seen)
        observed = Observed(observed.observed, observed.loss, (inputs, keywords))
        inputs, keywords = tuple(tensors), {}
    with warnings.catch_warnings(), torch.enable_grad(), _quiet(), _restored(observed), _without_stacks():
        warnings.simplefilter("ignore")
        program = torch.export.export(observed, inputs, keywords, strict=False)
    if any(_is_open(node.meta.get("val")) for node in program.graph.nodes):
        raise RuntimeError("the shape of a tensor depends on the entries of another")
    signature = program.graph_signature
    named = {
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return Graph(
        nodes=tuple(program.graph.nodes),
        parameters={key: prefix + name.removeprefix(_PREFIX) for key, name in signature.inputs_to_parameters.items()},
        tensors={key: prefix + name.removeprefix(_PREFIX) for key, name in named.items()},
        constants=tuple(value for value in program.constants.values() if isinstance(value, Tensor)),
        prefix=prefix,
    )


def _is_open(value: Any) -> bool:
    """Whether a tensor, or one of several, has a size that is not a number."""
    if isinstance(value, Tensor):
        return not all(isinstance(size, int) for size in value.shape)
    return isinstance(value, tuple | list) and any(_is_open(each) for each in value)


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Gives modules back the attributes that they had: a forward pass may keep tensors, and a trace's are of no use."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    contents: list[tuple[Any, Any]] = []
    for _, values in attributes:
        for name, value in values.items():
            if type(value) in (list, dict) and name not in ("_modules", "_parameters"):
                contents.append((value, value.copy()))
    try:
        yield
    finally:
        for module, values in attributes:
            vars(module).clear()
            vars(module).update(values)
        for value, before in contents:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what torch.export logs and prints of a model that it cannot trace."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _without_stacks() -> Iterator[None]:
    """Leaves out the lines of code that each operation came from: nobody reads them, and they take a quarter of it."""
    settings: Any = torch.fx.config
    before = getattr(settings, "do_not_emit_stack_traces", None)
    if before is None:
        # Older versions of torch have no such setting.
        yield
        return
    settings.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        settings.do_not_emit_stack_traces = before


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"could not be traced: {type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
