"""Pre-trained weights that lie beside a task family, in half precision: written by a command, loaded without code."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metateleport.files import replacing

__all__ = ["Backbones"]


@dataclasses.dataclass(frozen=True)
class Backbones:
    """The pre-trained networks in one safetensors file, by name.

    Args:
        path: the file; without it there are none.

    Example:
        >>> import tempfile
        >>> kept = Backbones(Path(tempfile.mkdtemp()) / "own.safetensors")
        >>> kept.write({"small": {"0.weight": torch.ones(2, 3)}})
        >>> kept.weights("small")["0.weight"].dtype, kept.weights("large")
        (torch.float32, None)
    """

    path: Path

    def weights(self, name: str) -> dict[str, Tensor] | None:
        """The weights of a network in float32, by the names of its parameters; None where there is no such network."""
        start = f"{name}/"
        stored = _read(self.path) if self.path.is_file() else {}
        return {
            key.removeprefix(start): value.float() for key, value in stored.items() if key.startswith(start)
        } or None

    def write(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes networks, whole or not at all, in place of those that were there.

        Args:
            networks: for each name the parameters by their names.
        """
        tensors = {f"{name}/{key}": value for name, own in networks.items() for key, value in own.items()}
        halves = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in tensors.items()}
        with replacing(self.path) as temporary:
            save_file(halves, temporary)
        _read.cache_clear()


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> dict[str, Tensor]:
    return load_file(path)
