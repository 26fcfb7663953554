"""Plain chains of linear layers and activations, run on a stack of tasks without `vmap`.

Small perceptrons are what most tasks are made of, and on them `vmap` and the exchange of a model's parameters cost more
than the products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from metateleport.point import Tensors

__all__ = ["Chain", "chain_of", "losses_of", "through"]

Chain = tuple[tuple[str, nn.Module], ...]
"""Layers by name, in the order of the data flow."""

_ELEMENTWISE: frozenset[type[nn.Module]] = frozenset(
    (nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)
)
"""Activations without parameters or random numbers; of a subclass nothing is known."""

_IGNORED = -100
"""The class that torch's cross entropy leaves out of its mean, unless it is told another."""


def chain_of(model: nn.Module) -> Chain | None:
    """The layers of a model that is nothing but a chain; None of any other.

    Args:
        model: a chain is an `nn.Sequential` itself, of linear layers and elementwise activations, each once and without
            hooks or parametrisations.

    Example:
        >>> chain = chain_of(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
        >>> [name for name, _ in chain]
        ['0', '1']
        >>> chain_of(nn.Sequential(nn.Linear(3, 2), nn.Dropout())) is None
        True
    """
    if type(model) is not nn.Sequential or _hooked(model):
        return None
    chain = tuple(model.named_children())
    # A layer that stands twice, or a weight that two share, goes by one name only.
    once = len(chain) == len(model)
    once = once and len(list(model.parameters())) == sum(len(list(layer.parameters())) for _, layer in chain)
    return chain if once and all(_plain(layer) for _, layer in chain) else None


def through(
    chain: Chain, values: Mapping[str, Tensor], inputs: Tensor, watched: Collection[str] = ()
) -> tuple[Tensor, Tensors, Tensors]:
    """Runs a chain on all tasks of a stack.

    Args:
        chain: its layers.
        values: parameters by name, `(tasks, ...)`.
        inputs: `(tasks, samples, features)`.
        watched: names of layers whose inputs and outputs are recorded.

    Returns:
        The outputs; by the layers' names the recorded inputs, and the recorded outputs, which all require a gradient.

    Example:
        >>> weights = {"0.weight": torch.ones(5, 2, 3), "0.bias": torch.ones(5, 2)}
        >>> outputs, seen, made = through((("0", nn.Linear(3, 2)),), weights, torch.ones(5, 4, 3), ["0"])
        >>> outputs.shape, float(outputs[0, 0, 0]), seen["0"].shape, made["0"].requires_grad
        (torch.Size([5, 4, 2]), 4.0, torch.Size([5, 4, 3]), True)
    """
    found, seen, made = inputs, {}, {}
    for name, layer in chain:
        if name in watched:
            seen[name] = found
        if isinstance(layer, nn.Linear):
            weight, bias = values[f"{name}.weight"], values.get(f"{name}.bias")
            product = torch.bmm(found, weight.mT)
            found = product if bias is None else product + bias.unsqueeze(1)
        else:
            found = layer(found)
        if name in watched:
            # Below a frozen layer nothing may require one.
            found = made[name] = found if found.requires_grad else found.detach().requires_grad_()
    return found, seen, made


def losses_of(loss: Callable[..., Tensor], outputs: Tensor, targets: Sequence[Tensor]) -> Tensor | None:
    """Torch's cross entropy of every task, `(tasks,)`, from one call; None of any other loss.

    Under `vmap` a cross entropy falls apart into twenty operations, and its second derivative into many more.

    Args:
        loss: of one task.
        outputs: `(tasks, samples, features)`.
        targets: of every task.

    Example:
        >>> outputs, targets = torch.zeros(3, 5, 2), torch.zeros(3, 5, dtype=torch.long)
        >>> losses_of(functional.cross_entropy, outputs, (targets,))
        tensor([0.6931, 0.6931, 0.6931])
    """
    if len(targets) != 1 or outputs.ndim != 3:
        return None
    (wanted,) = targets
    if loss is functional.cross_entropy and wanted.dtype == torch.long and wanted.shape == outputs.shape[:2]:
        each = functional.cross_entropy(outputs.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        return each.sum(1) / (wanted != _IGNORED).sum(1)
    return None


def _plain(layer: nn.Module) -> bool:
    if _hooked(layer):
        return False
    # What works in place would overwrite what is recorded.
    return type(layer) is nn.Linear or (type(layer) in _ELEMENTWISE and not getattr(layer, "inplace", False))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
