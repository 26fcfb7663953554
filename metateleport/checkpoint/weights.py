"""The weights of a checkpoint: held against what its card describes before anything is made of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from metateleport.checkpoint.card import CheckpointError
from metateleport.files import FileError, read_regular
from metateleport.learned.config import MetaOptimizerConfig
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.settings import SettingsError
from metateleport.version import VERSION

__all__ = ["WEIGHTS", "load_weights", "save_weights"]

WEIGHTS = "weights.safetensors"
_PREFIXES = {"meta_optimizer": "learned.", "step_only": "step-only."}
_HEADER = 1 << 20
"""Bytes beside those of the tensors themselves that the file may have."""

_MOST = 1 << 30
"""Bytes of the largest networks that are built."""


def save_weights(learned: MetaOptimizer, step_only: MetaOptimizer | None) -> bytes:
    """The content of the file with the weights of a checkpoint's networks.

    Raises:
        CheckpointError: if they are not finite, or not of the dtype that the networks are built with.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, meta in zip(_PREFIXES.values(), (learned, step_only), strict=True):
        if meta is not None:
            own = {prefix + name: value.detach().cpu().contiguous() for name, value in meta.state_dict().items()}
            said = _misfit({prefix + name: value for name, value in _asked(meta.config).items()}, own)
            if said is not None:
                raise CheckpointError(f"these weights make no checkpoint: {said}")
            tensors.update(own)
    return save(tensors)


def load_weights(path: Path, card: Mapping[str, Any]) -> tuple[MetaOptimizer, MetaOptimizer | None]:
    """The networks that a card describes, with the weights that lie beside it.

    Args:
        path: the checkpoint's folder.
        card: its card, checked.

    Raises:
        CheckpointError: if the weights are missing, damaged, not those of the card, or do not fit it.
    """
    configs = {key: MetaOptimizerConfig.read(card[key]) for key in _PREFIXES if card.get(key) is not None}
    try:
        asked = {
            _PREFIXES[key] + name: value for key, config in configs.items() for name, value in _asked(config).items()
        }
    except (SettingsError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the card of {path} does not describe a meta-optimizer that is known here: {error}"
        ) from error
    size = sum(value.numel() * value.element_size() for value in asked.values())
    if size > _MOST:
        raise CheckpointError(
            f"the card of {path} does not describe a meta-optimizer that is built here: meta_optimizer asks for "
            f"{size / 2**30:.3g} GiB of weights, and {_MOST / 2**30:g} are built at most"
        )
    tensors = _read(path, card, size + _HEADER)
    said = _misfit(asked, tensors)
    if said is not None:
        key = "step_only" if said.partition(_PREFIXES["step_only"])[1] else "meta_optimizer"
        wrote = card.get("versions", {}).get("metateleport", VERSION)
        by = "" if wrote == VERSION else f". It was written by metateleport {wrote}, which reads it if this was meant"
        raise CheckpointError(f"the weights of {path} do not fit its card's {key}: {said}{by}")
    networks = []
    for key, prefix in _PREFIXES.items():
        if key not in configs:
            continue
        # The initial weights are overwritten: drawing them should not change the caller's random numbers.
        with torch.random.fork_rng(devices=[]), _in_float32():
            meta = MetaOptimizer(configs[key])
        meta.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        networks.append(meta.eval())
    return networks[0], networks[1] if len(networks) > 1 else None


def _read(path: Path, card: Mapping[str, Any], most: int) -> dict[str, Tensor]:
    file = path / WEIGHTS
    try:
        weights = read_regular(file, most)
    except (OSError, FileError) as error:
        raise CheckpointError(f"{path} has no readable {WEIGHTS}: copy the whole folder again ({error})") from error
    if hashlib.sha256(weights).hexdigest() != card["weights_sha256"]:
        raise CheckpointError(
            f"{file} is truncated or changed (its hash is not weights_sha256 of the card): copy it again"
        )
    try:
        return load(weights)
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error}): copy it again") from error


def _asked(config: MetaOptimizerConfig) -> dict[str, Tensor]:
    """The tensors that a meta-optimizer of this shape has, without memory where the rule allows it."""
    # Rules that read numbers while they are made cannot be made without memory.
    with _in_float32():
        with contextlib.suppress(NotImplementedError), torch.device("meta"):
            return dict(MetaOptimizer(config).state_dict())
        with torch.random.fork_rng(devices=[]):
            return dict(MetaOptimizer(config).state_dict())


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    """Networks are in float32, whatever torch makes by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _misfit(asked: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """A sentence on the first tensor that is missing, unknown, of another shape or dtype, or not finite."""
    for name in (*asked, *found):
        if name not in found:
            return f"of {name} there is nothing, and the card asks for {tuple(asked[name].shape)}"
        if name not in asked:
            return f"of {name} there is {tuple(found[name].shape)}, and the card asks for nothing"
        has, wants = tuple(found[name].shape), tuple(asked[name].shape)
        if has != wants:
            return f"of {name} there is {has}, and the card asks for {wants}"
        if found[name].dtype != asked[name].dtype:
            return f"{name} is of {found[name].dtype}, and the card asks for {asked[name].dtype}"
        if not bool(found[name].isfinite().all()):
            return f"{name} has numbers that are not finite"
    return None
