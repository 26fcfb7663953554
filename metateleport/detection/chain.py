"""Symmetries of a plain chain of layers, by its layers' types alone: no input is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from metateleport.detection.found import Refused, Symmetries
from metateleport.detection.given import check_model
from metateleport.symmetries import HOMOGENEOUS, LinearPair, Rescaling, Symmetry, Unsuitable

__all__ = ["symmetries_of"]

_FEATURES: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
"""Number of dimensions after the feature dimension in a layer's output."""
_POOLS: dict[type[nn.Module], int] = {
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
}
_PASSED = frozenset((*HOMOGENEOUS, nn.Dropout, nn.Flatten))
_PLAIN = (nn.Parameter, type(None))
_CALLED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__iter__", "__getattr__")
_CURES = (
    "give example_input= (to an optimizer; or call metateleport.find_symmetries(model, example_input)) to have the "
    "symmetries of any module found, or name them with symmetries=[metateleport.Rescaling(model, first, second), ...]"
)


def symmetries_of(model: nn.Module, frozen: bool = False) -> Symmetries:
    """The exact symmetries of a chain of layers: linear pairs, and rescaling through homogeneous activations.

    Understands `nn.Sequential` of torch's own layers, nested ones included. Across anything else in the chain (a
    subclass with its own forward, a hook, a computed weight, a reordering of features) no symmetry is claimed, as
    there is no input to certify it on. `find_symmetries` looks into any module.

    Args:
        model: the model.
        frozen: whether parameters that are frozen (`requires_grad=False`) move too.

    Returns:
        Symmetries in the order of the data flow; `refused` lists what was passed over.

    Raises:
        Unsuitable: if the model is not such a chain, or has no symmetry of these kinds.

    Example:
        >>> found = symmetries_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 1)))
        >>> [(each.kind, each.where) for each in found]
        [('rescaling', '0.weight, 0.bias, 2.weight'), ('linear pair', '2.weight, 2.bias, 3.weight')]
    """
    check_model(model)
    if not _is_plain_chain(model):
        own = " with a forward of its own" if isinstance(model, nn.Sequential) else ""
        raise Unsuitable(
            f"symmetries are found by themselves only in nn.Sequential, and this is a {type(model).__name__}{own}: "
            f"{_CURES}"
        )
    if _has_hook({**torch_module._global_forward_pre_hooks, **torch_module._global_forward_hooks}):
        raise Unsuitable(f"a global forward hook is set, which may change what any layer computes: {_CURES}")
    found: list[Symmetry] = []
    refused: list[Refused] = []
    last: _Last | None = None
    for name, module in _chain(model, ""):
        kind, reason = type(module), _not_understood(module)
        if not reason and kind in _FEATURES:
            dims = _FEATURES[kind]
            if last is not None and last.dims == dims:
                pair = LinearPair if last.linear and dims == 0 else Rescaling
                try:
                    found.append(pair(model, last.name, name, frozen=frozen))
                except Unsuitable as error:
                    refused.append(Refused(str(error), (), name))
            elif last is not None:
                refused.append(
                    Refused(f"its input features are not in the order in which {last.name!r} outputs them", (), name)
                )
            last = _Last(name, dims, linear=True)
            continue
        if not reason and last is not None and kind in _POOLS and _POOLS[kind] != last.dims:
            reason = f"it does not pool the positions that {last.name!r} puts its channels out at"
        if reason:
            refused.append(Refused(reason, (), name))
            last = None
        elif last is not None and kind is nn.Flatten:
            last = _Last(last.name, 0, linear=False)
        elif last is not None and kind is not nn.Identity:
            last = dataclasses.replace(last, linear=False)
    if not found:
        raise Unsuitable(
            "this chain has no two layers with nothing or a homogeneous activation between them; "
            + "; ".join([*(f"{each.module}: {each.reason}" for each in refused[:4]), _CURES])
        )
    return Symmetries(found, refused)


@dataclasses.dataclass(frozen=True)
class _Last:
    """The last layer whose output features still are in their own order.

    Args:
        name: of the layer.
        dims: how many dimensions stand behind its features; none once a convolution was flattened.
        linear: whether nothing at all has happened to them since.
    """

    name: str
    dims: int
    linear: bool


def _chain(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module | str]]:
    """The modules of a chain in the order of the data flow, one that stands in it twice too; or why there is a gap."""
    for key, child in module._modules.items():
        name = f"{prefix}{key}"
        if child is None or not _is_plain_chain(child):
            yield name, child if child is not None else "it is None"
            continue
        if _has_hook(child._forward_pre_hooks):
            yield name, "a forward pre-hook may change its inputs"
        yield from _chain(child, f"{name}.")
        if _has_hook(child._forward_hooks):
            yield name, "a forward hook may change its outputs"


def _is_plain_chain(module: nn.Module) -> bool:
    """Whether a module does what nn.Sequential does and no more, whatever its class is called."""
    kind = type(module)
    if not isinstance(module, nn.Sequential) or "forward" in vars(module):
        return False
    return all(getattr(kind, name) is getattr(nn.Sequential, name) for name in _CALLED)


def _not_understood(module: nn.Module | str) -> str:
    """Why a module may not act as the torch module whose class it has; empty if it does."""
    if isinstance(module, str):
        return module
    kind = type(module)
    name = kind.__name__
    if kind not in _FEATURES and kind not in _POOLS and kind not in _PASSED:
        return f"a {name} is not looked into"
    weights = [type(module._parameters.get(each, 0)) for each in ("weight", "bias")] if kind in _FEATURES else []
    reasons = {
        "has a forward of its own": "forward" in vars(module),
        "has a forward hook": _has_hook({**module._forward_pre_hooks, **module._forward_hooks}),
        "does not flatten all but the samples": isinstance(module, nn.Flatten)
        and (module.start_dim, module.end_dim) != (1, -1),
        "outputs indices too": bool(getattr(module, "return_indices", False)),
        "has a weight that is no plain parameter (parametrised, pruned or computed)": any(
            each not in _PLAIN for each in weights
        ),
    }
    return next((f"this {name} {reason}" for reason, holds in reasons.items() if holds), "")


def _has_hook(hooks: Mapping[int, Any]) -> bool:
    """Whether there is a hook that may change something; this library's own hooks only record."""
    functions = (getattr(hook, "func", hook) for hook in hooks.values())
    return any(str(getattr(each, "__module__", "")).split(".")[0] != __name__.split(".")[0] for each in functions)
