"""The checkpoint that is given when nothing is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import nn

from metateleport.checkpoint import shipped_checkpoints
from metateleport.detection.adapters import adapter_pairs

__all__ = ["DEFAULT", "LORA", "Choice", "choose"]

DEFAULT, LORA = "default", "lora"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A checkpoint for a model.

    Args:
        checkpoint: its name.
        why: the reason, as a part of a sentence.
    """

    checkpoint: str
    why: str


def choose(model: nn.Module | None, known: Collection[str] | None = None) -> Choice:
    """The checkpoint that `LearnedOptimizer` takes where none is given.

    Where low-rank adapters are trained, by the names that PEFT and loralib give their factors, it is `lora`, if that
    is there, which steps factors in gauges and all other tensors too. Otherwise it is `default`.

    Args:
        model: the model; None where only parameters are given.
        known: names of the checkpoints that are there; the shipped ones if not given.

    Returns:
        The choice.

    Example:
        >>> choose(nn.Linear(3, 2)).checkpoint
        'default'
        >>> layer = nn.Linear(5, 3)
        >>> layer.lora_A, layer.lora_B = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)
        >>> choose(layer, known=["default", "lora"])
        Choice(checkpoint='lora', why='1 low-rank adapter is trained')
    """
    there = shipped_checkpoints() if known is None else known
    pairs = () if model is None else adapter_pairs(model)
    if pairs and LORA in there:
        return Choice(LORA, f"{len(pairs)} low-rank adapter{'s are' if len(pairs) > 1 else ' is'} trained")
    if model is None:
        return Choice(DEFAULT, "parameters alone do not tell what model they are of")
    return Choice(DEFAULT, "it serves any model")
