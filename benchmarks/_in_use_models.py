"""Models of many kinds with real data: scikit-learn's digits, and docstrings of the standard library."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "MODELS",
    "WINDOWS",
    "Block",
    "InUse",
    "LanguageModel",
    "Transformer",
    "digits",
    "images",
    "letters",
    "rows",
    "sequences",
]

CONTEXT, WINDOWS = 16, 2000
_LETTERS = " \nabcdefghijklmnopqrstuvwxyz.,()'\"-_:=`*0"
_SOURCES = ["argparse", "asyncio/base_events", "collections/__init__", "configparser", "ctypes/__init__", "datetime"]
_SOURCES += ["decimal", "difflib", "functools", "inspect", "logging/__init__", "random", "statistics", "subprocess"]


@dataclasses.dataclass(frozen=True)
class InUse:
    """A model and its training set.

    Args:
        name: of the model.
        build: makes the model, with torch's global random numbers.
        data: inputs and labels.
        perceptron: whether it is a plain multi-layer perceptron.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    perceptron: bool = False


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images of 8 x 8 pixels, flattened, and their digits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)


def rows() -> tuple[Tensor, Tensor]:
    """The digits as sequences of eight rows."""
    x, y = digits()
    return x.unflatten(1, (8, 8)), y


def images() -> tuple[Tensor, Tensor]:
    """The digits with a channel."""
    x, y = digits()
    return x.reshape(-1, 1, 8, 8), y


def later_digits() -> tuple[Tensor, Tensor]:
    """The digits from five on."""
    x, y = digits()
    return x[y >= 5], y[y >= 5]


@functools.cache
def _text() -> Tensor:
    """Docstrings of the standard library as one sequence of indices; all other characters share the last index."""
    folder, found = Path(os.__file__).parent, []
    for name in _SOURCES:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    letters = " ".join(found).lower()
    return torch.tensor([index if (index := _LETTERS.find(each)) >= 0 else len(_LETTERS) - 1 for each in letters])


def letters() -> tuple[Tensor, Tensor]:
    """Pieces of text and the letter that follows each."""
    text = _text()
    starts = torch.arange(WINDOWS) * ((len(text) - CONTEXT - 1) // WINDOWS)
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, -1]


def sequences() -> tuple[Tensor, Tensor]:
    """Pieces of text, and the same shifted by one letter."""
    x, last = letters()
    return x, torch.cat([x[:, 1:], last[:, None]], 1)


class Block(nn.Module):
    """Attention and a perceptron, each after a norm, without torch's own layers."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (each(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """A transformer over the rows of an image."""

    def __init__(self, layers: Callable[[int], nn.Module], width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        self.layers, self.head = nn.Sequential(*(layers(width) for _ in range(2))), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x) + self.place).mean(1))


class LanguageModel(nn.Module):
    """Two causal blocks over letters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(len(_LETTERS), width), nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(_LETTERS), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.layers(h)))


class _Embedded(nn.Module):
    """The next letter from the embeddings of the last ones."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(len(_LETTERS), 16, sparse=sparse), None
        if sparse:
            self.bag = nn.EmbeddingBag(len(_LETTERS), 64, sparse=True)
        self.a, self.b = nn.Linear(4 * 16, 64), nn.Linear(64, len(_LETTERS))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.table(x[:, -4:]).flatten(1))
        if self.bag is not None:
            h = h + self.bag(x)
        return self.b(torch.relu(h))


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cells: nn.Module = kind(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class _Siamese(nn.Module):
    """An encoder of images and of one example of each digit."""

    examples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 16)
        x, y = digits()
        self.register_buffer("examples", torch.stack([x[y == digit][0] for digit in range(10)]))

    def _encoded(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self._encoded(x) @ self._encoded(self.examples).T


class _Experts(nn.Module):
    """Every image goes to one of four perceptrons."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = torch.softmax(self.gate(x), -1).max(-1)
        out = x.new_zeros(len(x), 10)
        for number, expert in enumerate(self.experts):
            held = (chosen == number).nonzero().squeeze(1)
            if len(held):
                out = out.index_add(0, held, expert(x[held]) * share[held, None])
        return out


class _LoraLinear(nn.Module):
    """A frozen layer and two factors, the second of which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * (x @ self.a.T @ self.b.T)


class _Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(64, 64)
        self.second: nn.Module = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def _pretrained() -> _Perceptron:
    """Trained on the digits below five."""
    model, (x, y) = _Perceptron(), digits()
    x, y = x[y < 5], y[y < 5]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        taken = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[taken]), y[taken]).backward()
        optimizer.step()
    return model


def _lora() -> nn.Module:
    model = _pretrained()
    for name in ("first", "second"):
        layer = getattr(model, name)
        assert isinstance(layer, nn.Linear)
        setattr(model, name, _LoraLinear(layer))
    return model


def _peft() -> nn.Module:
    import peft

    adapted: Any = peft.get_peft_model(
        _pretrained(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"])
    )
    return adapted


def _mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def _cnn() -> nn.Module:
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * 16, 10))


def _encoder(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True)


MODELS = {
    model.name: model
    for model in (
        InUse("mlp", lambda: _mlp(64, 64, 64, 10), digits, perceptron=True),
        InUse("leaky mlp", lambda: _mlp(64, 64, 10, activation=nn.LeakyReLU), digits, perceptron=True),
        InUse("cnn", _cnn, images),
        InUse("transformer", lambda: Transformer(lambda width: Block(width, 4, causal=False)), rows),
        InUse("encoder layers", lambda: Transformer(_encoder), rows),
        InUse("language model", LanguageModel, sequences),
        InUse("embedding", _Embedded, letters),
        InUse("embedding, sparse", lambda: _Embedded(sparse=True), letters),
        InUse("lstm", lambda: _Recurrent(nn.LSTM), rows),
        InUse("gru", lambda: _Recurrent(nn.GRU), rows),
        InUse("siamese", _Siamese, digits),
        InUse("experts", _Experts, digits),
        InUse("lora", _lora, later_digits),
        InUse("lora, peft", _peft, later_digits),
    )
}
"""By name."""
