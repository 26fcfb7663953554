"""Small real tasks that constants are chosen by: none of their models and data together is in `_any_models`."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor, nn

from benchmarks._any_models import AnyTask, Data, in_order, mlp, mnist, normalised, parted
from benchmarks._in_use_models import Block, Transformer, digits, letters, rows

__all__ = ["DEVELOPMENT"]

_NOISE = 0.15


def _noisy() -> Data:
    """The digits, with every seventh label of those that are trained on drawn anew."""
    data = parted(*digits())
    draw = torch.Generator().manual_seed(5)
    wrong = torch.rand(len(data.targets), generator=draw) < _NOISE
    drawn = torch.randint(10, (len(data.targets),), generator=draw)
    return dataclasses.replace(data, targets=torch.where(wrong, drawn, data.targets))


@functools.cache
def _mnist1d() -> Data:
    from metateleport.families.classification import data_of

    data, labels = data_of("mnist1d"), torch.arange(10)
    training, unseen = (part.flatten(0, 1).float() for part in (data.training, data.held_out))
    return Data(
        training,
        labels.repeat_interleave(len(training) // 10),
        unseen,
        labels.repeat_interleave(len(unseen) // 10),
    )


@functools.cache
def _wine() -> Data:
    from sklearn.datasets import load_wine

    bunch = load_wine()
    return normalised(bunch.data, torch.tensor(bunch.target))


@functools.cache
def _diabetes() -> Data:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    progression = torch.tensor(bunch.target, dtype=torch.float32)
    return normalised(bunch.data, ((progression - progression.mean()) / progression.std()).unsqueeze(1))


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class _Convolutions(nn.Module):
    """Three convolutions along one dimension, without norms."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, wide in ((1, 12, 5), (12, 24, 3), (24, 24, 3)):
            layers += [nn.Conv1d(before, after, wide, 2, padding=wide // 2), nn.GELU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(24 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.unsqueeze(1)).flatten(1))


class _Letters(nn.Module):
    """The next letter, from the embeddings of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(41, 16), mlp(16 * 16, 96, 41)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.table(x).flatten(1))


DEVELOPMENT = {
    task.name: task
    for task in (
        AnyTask("noisy digits", True, lambda: mlp(64, 96, 48, 10), _noisy),
        AnyTask("mnist1d perceptron", True, lambda: mlp(40, 100, 50, 10), _mnist1d),
        AnyTask("mnist1d convolutions", True, _Convolutions, _mnist1d),
        AnyTask("gru", True, _Gated, lambda: parted(*rows())),
        # One hidden layer, of other units than those of the perceptron on the same images in `_any_models`.
        AnyTask(
            "mnist, one hidden layer",
            True,
            lambda: nn.Sequential(nn.Linear(784, 48), nn.Tanh(), nn.Linear(48, 10)),
            mnist,
        ),
        AnyTask("wine", True, lambda: mlp(13, 32, 16, 3), _wine),
        AnyTask("diabetes", True, lambda: mlp(10, 40, 20, 1), _diabetes, nn.functional.mse_loss, classifies=False),
        AnyTask("next letter", True, _Letters, lambda: in_order(*letters())),
        AnyTask(
            "row transformer", True, lambda: Transformer(lambda width: Block(width, 4, False)), lambda: parted(*rows())
        ),
    )
}
"""By name."""
