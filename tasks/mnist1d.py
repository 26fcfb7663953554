"""MNIST-1D: signals of 40 samples in ten classes, made by the package mnist1d, told apart by a LeakyReLU classifier.

Source: Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", ICML 2024 (arXiv 2011.14439).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from metateleport.families import FamilyError
from metateleport.families.classification import PerceptronFamily
from metateleport.families.labelled import LabelledData, read_once, share_out, standardised


@read_once
def signals(make: Callable[[], dict[str, np.ndarray]]) -> LabelledData:
    """Signals by class, `(10, 390, 40)` to train on and `(10, 88, 40)` held out, out of the published two sets.

    The package makes them anew, with its published seed; nothing is downloaded.
    """
    # It seeds the global random numbers.
    before = random.getstate(), np.random.get_state()
    try:
        made = make()
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
    training = share_out(made["x"], made["y"], training=MNIST1D.training_each, held_out=0).training
    held_out = share_out(made["x_test"], made["y_test"], training=0, held_out=88).held_out
    return standardised(LabelledData(training, held_out))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MNIST1D(PerceptronFamily):
    """Classification of MNIST-1D's signals: another subset of classes, initialisation and batch order a task.

    The subsets of held-out tasks are never met in training, nor are the signals that accuracy is measured on, in any
    task. The rarest class has 394 signals in the published training set and 89 in the test set.

    Settings:
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        classes: that a task has to tell apart.
        samples: training signals a task, drawn from all signals of its classes but the held-out ones.
        batch: samples a minibatch; `all` for the whole set.
        slope: of LeakyReLU below zero.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
    """

    name: ClassVar[str] = "mnist1d"
    training_each: ClassVar[int] = 390

    samples: int = 1600

    def data(self) -> LabelledData:
        try:
            from mnist1d.data import make_dataset
        except ImportError as error:
            raise FamilyError(
                "these signals are made by mnist1d, which is not installed: pip install 'metateleport[data]'"
            ) from error
        return signals(make_dataset)
