"""The models that the contract is tried on: small, seeded, all of them classifiers of three classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import networks

__all__ = ["CLASSES", "PROBLEMS", "Batch", "Problem"]

CLASSES = 3
TOKENS = 12
Batch = tuple[Tensor, ...]
"""The inputs of the model and, last, the labels; the first dimension of each is the sample."""


def _vectors(rows: int, draw: torch.Generator) -> Tensor:
    return torch.randn(rows, 8, generator=draw, dtype=torch.float64)


def _sequences(rows: int, draw: torch.Generator) -> Tensor:
    return torch.randn(rows, 5, 4, generator=draw, dtype=torch.float64)


def _images(rows: int, draw: torch.Generator) -> Tensor:
    return torch.randn(rows, 1, 6, 6, generator=draw, dtype=torch.float64)


def _tokens(rows: int, draw: torch.Generator) -> Tensor:
    return torch.randint(TOKENS, (rows, 5), generator=draw)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and data that it can learn.

    Args:
        name: the column of the table.
        network: makes the model; it is given the probability of dropout.
        inputs: draws the inputs of so many samples.
        last: the name of the module that makes the outputs; None where it is frozen, or has no
            gradient when it is zero.
        example: whether symmetries are looked for with an example input.
        coupled: whether a sample's loss depends on the other samples of its batch.
        sparse: whether gradients are sparse.
        sorted_by: orders the samples, so that some batches leave parts of the model unused.
    """

    name: str
    network: Callable[[float], nn.Module]
    inputs: Callable[[int, torch.Generator], Tensor]
    last: str | None
    example: bool = False
    coupled: bool = False
    sparse: bool = False
    sorted_by: Callable[[Tensor], Tensor] | None = None

    def model(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Module:
        """The model, the same one each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.network(dropout).to(device=device, dtype=dtype)

    def data(self, rows: int, seed: int = 1, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Batch:
        """Samples whose labels a random linear map of their features says."""
        draw = torch.Generator().manual_seed(seed)
        inputs = self.inputs(rows, draw)
        if self.sorted_by is not None:
            inputs = inputs[self.sorted_by(inputs).argsort()]
        features = inputs.flatten(1)
        if not inputs.is_floating_point():
            features = nn.functional.one_hot(inputs, TOKENS).double().mean(1)
        teacher = torch.randn(features.shape[1], CLASSES, generator=torch.Generator().manual_seed(7)).double()
        labels = (features @ teacher).argmax(1)
        moved = inputs.to(device=device, dtype=dtype if inputs.is_floating_point() else None)
        return moved, labels.to(device)

    @property
    def floats(self) -> bool:
        """Whether the inputs are real numbers."""
        return self.inputs is not _tokens

    def loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The mean cross-entropy, at least in float32; models may return a dict."""
        *inputs, labels = batch
        outputs = model(*inputs)
        outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs = outputs.float()
        return nn.functional.cross_entropy(outputs, labels)


def _every(*problems: Problem) -> dict[str, Problem]:
    return {problem.name: problem for problem in problems}


PROBLEMS = _every(
    Problem("mlp", networks.mlp, _vectors, "4"),
    Problem("cnn", networks.cnn, _images, "7", coupled=True),
    Problem("transformer", networks.Transformer, _sequences, "head", example=True),
    Problem("encoder layer", networks.Encoder, _sequences, "head"),
    Problem("lora, peft", networks.peft_lora, _vectors, None),
    Problem("lora, by hand", networks.Lora, _vectors, None, example=True),
    Problem("embedding", networks.Embedded, _tokens, "b"),
    Problem("embedding, sparse", networks.SparselyEmbedded, _tokens, "b", sparse=True),
    Problem("lstm", networks.lstm, _sequences, "head"),
    Problem("gru", networks.gru, _sequences, "head"),
    Problem("siamese", networks.Siamese, _vectors, None),
    Problem("experts", networks.Experts, _vectors, "head", sorted_by=lambda x: x[:, 0]),
)
"""The columns of the table."""
