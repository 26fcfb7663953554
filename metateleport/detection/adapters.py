"""Symmetries that the way a model is written tells, without an input: low-rank adapters and chains of layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from metateleport.detection.chain import symmetries_of
from metateleport.symmetries import LoRAPair, Symmetry, Unsuitable

__all__ = ["adapter_pairs", "told_symmetries"]

_PLAIN = ("lora_A", "lora_B")
"""Names of the factors in layers of PEFT, as modules, and in those of loralib, as parameters."""

_TABLES = ("lora_embedding_A", "lora_embedding_B")


def adapter_pairs(model: nn.Module, frozen: bool = False) -> tuple[LoRAPair, ...]:
    r"""The symmetries of the low-rank adapters in a model, by the names that PEFT and loralib give their factors.

    $B A$ is all that a layer makes of its factors, with dropout before $A$, with a learned magnitude behind (DoRA),
    with any scaling, in linear layers, convolutions and embeddings, for each adapter of several. Adapters with
    something of their own between the factors (AdaLoRA) are left out, and so is a factor that several layers share.

    Args:
        model: the model.
        frozen: with those whose factors are frozen.

    Returns:
        In the order of the modules.

    Example:
        >>> import torch
        >>> layer = nn.Linear(5, 3)
        >>> layer.lora_A, layer.lora_B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.zeros(3, 2))
        >>> adapter_pairs(nn.Sequential(layer))
        (LoRAPair(0.lora_A[0:2], 0.lora_B; GeneralLinear(2), exact),)
    """
    owners: dict[int, int] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for value in named.values():
        owners[id(value)] = owners.get(id(value), 0) + 1
    found = []
    for first, second in _factors(model):
        values = [named.get(first), named.get(second)]
        if any(value is None or owners[id(value)] > 1 or not value.is_floating_point() for value in values):
            continue
        if not frozen and not all(value.requires_grad for value in values if value is not None):
            continue
        try:
            found.append(LoRAPair.of(model, first, second))
        except Unsuitable:
            continue
    return tuple(found)


def told_symmetries(model: nn.Module, frozen: bool = False) -> tuple[Symmetry, ...]:
    """All symmetries that are known without an input: adapters, and layers that follow one another in a sequence.

    Args:
        model: the model.
        frozen: with those that move frozen parameters.

    Returns:
        Of other models than sequences those of adapters alone; `find_symmetries` looks into any module.

    Example:
        >>> [each.kind for each in told_symmetries(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4)))]
        ['linear pair']
    """
    try:
        chain = tuple(symmetries_of(model, frozen=frozen))
    except Unsuitable:
        chain = ()
    return (*adapter_pairs(model, frozen), *chain)


def _factors(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of the parameters that may be the factors A and B of one adapter."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if hasattr(module, "lora_E"):
            continue
        for first, second in (_PLAIN, _TABLES):
            one, other = getattr(module, first, None), getattr(module, second, None)
            if isinstance(one, nn.Parameter) and isinstance(other, nn.Parameter):
                yield f"{prefix}{first}", f"{prefix}{second}"
            elif isinstance(one, nn.ModuleDict | nn.ParameterDict) and isinstance(other, type(one)):
                end = ".weight" if isinstance(one, nn.ModuleDict) else ""
                yield from ((f"{prefix}{first}.{key}{end}", f"{prefix}{second}.{key}{end}") for key in one)
            elif isinstance(one, nn.Linear) and isinstance(other, nn.Linear):
                yield f"{prefix}{first}.weight", f"{prefix}{second}.weight"
