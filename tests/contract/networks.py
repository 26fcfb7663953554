"""The networks themselves: what people write, at the smallest size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "Embedded",
    "Encoder",
    "Experts",
    "Lora",
    "Siamese",
    "SparselyEmbedded",
    "Transformer",
    "cnn",
    "gru",
    "lstm",
    "mlp",
    "peft_lora",
]


def _dropout(p: float) -> list[nn.Module]:
    return [nn.Dropout(p)] if p else []


def mlp(dropout: float = 0.0) -> nn.Module:
    first, second = nn.Linear(8, 12), nn.Linear(12, 12)
    return nn.Sequential(first, nn.LeakyReLU(0.1), second, nn.ReLU(), *_dropout(dropout), nn.Linear(12, 3))


def cnn(dropout: float = 0.0) -> nn.Module:
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    second = [nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), *_dropout(dropout), nn.Linear(6 * 4, 3))


class Transformer(nn.Module):
    """One block written out: attention and a perceptron, each behind a norm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.before, self.between = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(8, 3)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 4)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.before(x)
        mixed = nn.functional.scaled_dot_product_attention(*(self._heads(each(h)) for each in (self.q, self.k, self.v)))
        x = x + self.drop(self.o(mixed.transpose(1, 2).flatten(2)))
        x = x + self.drop(self.down(torch.relu(self.up(self.between(x)))))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own layer, whose evaluation without gradients takes another path than its training."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class _LoraLinear(nn.Module):
    """A frozen layer and two factors, the second of which starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b)


class Lora(nn.Module):
    """A frozen perceptron whose layers have low-rank factors beside them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = _LoraLinear(8, 12), _LoraLinear(12, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.relu(self.first(x))))


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def peft_lora(dropout: float = 0.0) -> nn.Module:
    """The same by the PEFT library."""
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["first", "second"])
    return peft.get_peft_model(_Base(), config)


class Embedded(nn.Module):
    """A bag of embeddings before a perceptron."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(12, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.a(self.table(x).mean(1)))))


class SparselyEmbedded(nn.Module):
    """Embeddings with sparse gradients, one by one and in bags."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8, sparse=True)
        self.bag = nn.EmbeddingBag(12, 8, sparse=True, mode="mean")
        self.a, self.b, self.drop = nn.Linear(8, 12), nn.Linear(12, 3), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.a(self.table(x[:, :2]).mean(1) + self.bag(x[:, 2:])))))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], dropout: float) -> None:
        super().__init__()
        self.cells, self.drop, self.head = kind(4, 8, batch_first=True), nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.cells(x)[0].mean(1)))


def lstm(dropout: float = 0.0) -> nn.Module:
    return _Recurrent(nn.LSTM, dropout)


def gru(dropout: float = 0.0) -> nn.Module:
    return _Recurrent(nn.GRU, dropout)


class Siamese(nn.Module):
    """One encoder for the samples and for a prototype of each class: two batches of different sizes in a pass."""

    prototypes: Tensor

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 12), nn.Linear(12, 6), nn.Dropout(dropout)
        self.register_buffer("prototypes", torch.randn(3, 8))

    def _encoded(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self._encoded(x) @ self._encoded(self.prototypes).T


class Experts(nn.Module):
    """A mixture of experts: each sample goes to one of them, and an expert without samples is not run."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 6) for _ in range(4))
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(6, 3)
        with torch.no_grad():
            self.gate.weight[:, 0] = torch.tensor([-4.0, -1.0, 1.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = torch.softmax(self.gate(x), -1).max(-1)
        mixed = x.new_zeros(len(x), 6)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                weighted = torch.relu(expert(x[rows])) * share[rows, None]
                mixed = mixed.index_add(0, rows, weighted.to(mixed.dtype))
        return self.head(self.drop(mixed))
