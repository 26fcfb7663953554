"""Real handwritten digits (scikit-learn's 1797 images of 8x8 pixels), told apart by a LeakyReLU classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from metateleport.families import FamilyError
from metateleport.families.classification import PerceptronFamily
from metateleport.families.labelled import LabelledData, read_once, share_out, standardised


@read_once
def images(load: Callable[..., Any]) -> LabelledData:
    """Images by digit, `(10, 140, 64)` to train on and `(10, 34, 64)` held out: the rarest digit has 174."""
    bunch = load()
    return standardised(share_out(bunch.data / 16, bunch.target, training=Digits.training_each, held_out=34))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(PerceptronFamily):
    """Classification of handwritten digits: another subset of classes, initialisation and batch order a task.

    The subsets of held-out tasks are never met in training, nor are the images that accuracy is measured on, in any
    task.

    Settings:
        hidden: units of each hidden layer.
        depth: number of weight matrices.
        classes: digits that a task has to tell apart.
        samples: training images a task, drawn from all images of its classes but the held-out ones.
        batch: samples a minibatch; `all` for the whole set.
        slope: of LeakyReLU below zero.
        scale: factor on the initial weights.
        label_noise: share of the training labels that are drawn anew.
    """

    name: ClassVar[str] = "digits"
    training_each: ClassVar[int] = 140

    def data(self) -> LabelledData:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise FamilyError(
                "the digits come with scikit-learn, which is not installed: pip install 'metateleport[tasks]'"
            ) from error
        return images(load_digits)
