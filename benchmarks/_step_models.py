"""Models that the price of a step is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Problem", "Transformer"]


@dataclasses.dataclass
class Problem:
    """A model, one batch, and which of its parameters are hidden matrices."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    hidden: frozenset[str]

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.model.parameters())

    def loss(self) -> Tensor:
        outputs = self.model(self.inputs)
        return nn.functional.cross_entropy(outputs.flatten(0, -2), self.targets.flatten())


def perceptron(width: int, depth: int) -> Problem:
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    hidden = frozenset(name for name, value in model.named_parameters() if value.ndim == 2)
    return Problem(model, torch.randn(128, 64), torch.randint(10, (128,)), hidden)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.first(x)

        def parts(layer: nn.Module) -> Tensor:
            return layer(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = nn.functional.scaled_dot_product_attention(
            parts(self.query), parts(self.key), parts(self.value), is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A causal transformer on tokens."""

    def __init__(self, tokens: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position[: tokens.shape[1]])))


def transformer() -> Problem:
    model = Transformer(tokens=1000, width=256, layers=6, heads=4, length=64)
    hidden = frozenset(
        name for name, value in model.named_parameters() if value.ndim == 2 and name.startswith("blocks")
    )
    text = torch.randint(1000, (8, 65))
    return Problem(model, text[:, :-1], text[:, 1:], hidden)


MODELS: dict[str, Callable[[], Problem]] = {
    "mlp-0.1M": lambda: perceptron(128, 6),
    "mlp-1M": lambda: perceptron(480, 5),
    "mlp-10M": lambda: perceptron(1800, 4),
    "gpt": transformer,
}
"""Problems by name."""
