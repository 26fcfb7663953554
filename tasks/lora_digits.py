"""Low-rank adapters of a classifier of real digits that is turned to other digits: GL(r) is exact on every minibatch.

`python tasks/lora_digits.py` makes the backbones that lie in `tasks/backbones` anew.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from metateleport import Task, TaskFamily, load_family
from metateleport.families import FamilyError, Split, split_of
from metateleport.families.adapters import adapted, pairs_of
from metateleport.families.backbones import Backbones
from metateleport.families.classification import SHARES, ClassificationFamily, accuracy, linear
from metateleport.families.labelled import LabelledData, read_once

SIDE = 14
LABELS = 10
EACH = 200
"""Training images of each digit that are there for the tasks of a split."""
BACKBONES: dict[Split, tuple[int, ...]] = {"train": (0, 1), "validation": (2,), "held-out": (3, 4)}
"""Numbers of the backbones that the tasks of a split adapt."""
SLICES = 40
"""Parts that the angles are cut into, shared out between the splits as subsets of classes are."""
SHIPPED = Backbones(Path(__file__).with_name("backbones") / "lora_digits.safetensors")

Activation = Literal["relu", "leaky_relu", "gelu", "tanh"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


@functools.cache
def images() -> LabelledData:
    """The images of `mnist_digits` at 14x14 pixels: `(10, 400, 196)` to train on and `(10, 100, 196)` held out."""
    family = load_family(Path(__file__).with_name("mnist_digits.py"), {"side": SIDE})
    assert isinstance(family, ClassificationFamily)
    return family.data()


def pool(split: Split) -> Tensor:
    """Training images for the tasks of a split, `(10, 200, 196)`: those of held-out tasks are in no other."""
    halves = images().training.split(EACH, dim=1)
    return halves[split == "held-out"]


def turned(pixels: Tensor, degrees: float) -> Tensor:
    """Images turned about their middle, `(..., 196)`; what comes in at the corners is background."""
    flat = pixels.reshape(-1, 1, SIDE, SIDE)
    background = flat.min()
    radians = math.radians(degrees)
    cosine, sine = math.cos(radians), math.sin(radians)
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], dtype=flat.dtype)
    grid = nn.functional.affine_grid(matrix.expand(1, 2, 3), [1, 1, SIDE, SIDE], align_corners=False)
    moved = nn.functional.grid_sample(flat - background, grid.expand(len(flat), -1, -1, -1), align_corners=False)
    return (moved + background).reshape(pixels.shape)


def perceptron(width: int, depth: int, activation: Activation, source: torch.Generator) -> nn.Sequential:
    """The backbone at its start."""
    sizes = [SIDE * SIDE, *[width] * (depth - 1), LABELS]
    layers: list[nn.Module] = []
    for incoming, outgoing in itertools.pairwise(sizes):
        layers += [linear(incoming, outgoing, source), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


@read_once
def pretrained(width: int, depth: int, activation: Activation, number: int) -> dict[str, Tensor]:
    """The weights of one backbone: those that are shipped, or pre-trained here, which takes a second.

    A backbone sees upright digits with their own labels, out of the training images of its split, for 20 epochs.
    """
    name = f"{activation}-{width}-{depth}-{number}"
    return SHIPPED.weights(name) or _pretrained(width, depth, activation, number)


def _pretrained(width: int, depth: int, activation: Activation, number: int) -> dict[str, Tensor]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        source = torch.Generator().manual_seed(number)
        model = perceptron(width, depth, activation, source)
        split = next(split for split, numbers in BACKBONES.items() if number in numbers)
        inputs = pool(split).flatten(0, 1)
        labels = torch.arange(LABELS).repeat_interleave(EACH)
        epochs, batch = 20, 50
        steps = epochs * len(inputs) // batch
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=source).split(batch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        return {name: value.detach() for name, value in model.named_parameters()}
    finally:
        torch.set_default_dtype(before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRADigits(TaskFamily):
    """Adaptation of a digit classifier, by LoRA on every layer, to digits that are turned and named otherwise.

    The backbone is a perceptron that was pre-trained on upright digits (MNIST's, 14x14 pixels); a task has an angle, a
    permutation of the labels, a start of the adapters and an order of the batches of its own. Held-out tasks share no
    backbone, training image or angle with training tasks, and no task trains on the images that accuracy is measured
    on.

    Settings:
        rank: of the adapters.
        width: units of each hidden layer of the backbone.
        depth: number of its weight matrices.
        activation: relu, leaky_relu, gelu or tanh.
        classes: digits that a task has to tell apart, which are given as many of the ten outputs.
        samples: training images a task.
        batch: samples a minibatch; `all` for the whole set.
        turn: the largest angle, in degrees, to either side.
        scale: size of the random element of GL(r) that the factors are split by at the start; 1 with split=1 is the
            usual start.
        split: condition number of that element.
    """

    name: ClassVar[str] = "lora_digits"

    rank: int = 4
    width: int = 96
    depth: int = 4
    activation: Activation = "relu"
    classes: int = 10
    samples: int = 2000
    batch: int | None = 64
    turn: float = 180.0
    scale: float = 1.0
    split: float = 1.0

    def __post_init__(self) -> None:
        for what, value, least in (("rank", self.rank, 1), ("width", self.width, 1), ("depth", self.depth, 2)):
            if value < least:
                raise FamilyError(f"lora_digits: {what}={value} has to be at least {least}")
        if not 2 <= self.classes <= LABELS:
            raise FamilyError(f"lora_digits: classes has to lie between 2 and {LABELS}, it is {self.classes}")
        largest = EACH * self.classes
        if not self.classes <= self.samples <= largest:
            raise FamilyError(
                f"lora_digits: samples={self.samples} has to lie between {self.classes} and {largest}, the training "
                f"images of {self.classes} classes"
            )
        if self.batch is not None and not 1 <= self.batch <= self.samples:
            raise FamilyError(f"lora_digits: batch={self.batch} has to lie between 1 and samples={self.samples}")
        if not 0 <= self.turn <= 180:
            raise FamilyError(f"lora_digits: turn is an angle between 0 and 180 degrees, not {self.turn}")
        if not 0 < self.scale < math.inf:
            raise FamilyError(f"lora_digits: scale is a positive factor, not {self.scale}")
        if not 1 <= self.split < math.inf:
            raise FamilyError(f"lora_digits: split is a condition number of at least 1, not {self.split}")

    def augmented(self, index: int, seed: int) -> LoRADigits:
        """Ranks from a quarter to four times the setting, widths from half, depths one more or less, every
        activation, two classes or more, batches from half to twice; two stacks of three are split by an element of a
        size from 1e-2 to 1e2 and a condition number up to 100."""
        source = np.random.default_rng([seed, index])
        classes = int(source.integers(max(self.classes // 2, 2), self.classes + 1))
        samples = min(max(round(self.samples * 2 ** source.uniform(-1, 0)), classes), EACH * classes)
        split = source.random() < 2 / 3
        activations: list[Activation] = list(ACTIVATIONS)
        return dataclasses.replace(
            self,
            rank=max(round(self.rank * 4 ** source.uniform(-1, 1)), 1),
            # Few widths: each backbone is pre-trained once.
            width=max(round(self.width * float(source.choice([0.5, 0.75, 1.0]))), 1),
            depth=max(self.depth + int(source.integers(-1, 2)), 2),
            activation=activations[int(source.integers(len(activations)))],
            classes=classes,
            samples=samples,
            batch=self.batch and min(max(round(self.batch * 2 ** source.uniform(-1, 1)), 1), samples),
            scale=self.scale * float(100 ** source.uniform(-1, 1)) if split else self.scale,
            split=self.split * float(100 ** source.uniform()) if split else self.split,
        )

    def sample(self, seed: int) -> Task:
        source = torch.Generator().manual_seed(seed)
        split, dtype = split_of(seed), torch.get_default_dtype()
        numbers = BACKBONES[split]
        number = numbers[int(torch.randint(len(numbers), (), generator=source))]
        slices = [place for place in range(SLICES) if place % 5 in SHARES[split]]
        place = slices[int(torch.randint(len(slices), (), generator=source))]
        degrees = self.turn * (2 * (place + float(torch.rand((), generator=source))) / SLICES - 1)
        digits = torch.randperm(LABELS, generator=source)[: self.classes]
        outputs = torch.randperm(LABELS, generator=source)[: self.classes]
        rows = torch.randperm(EACH * self.classes, generator=source)[: self.samples]
        held_out = images().held_out.to(dtype)[digits]
        model = perceptron(self.width, self.depth, self.activation, torch.Generator())
        model.load_state_dict(pretrained(self.width, self.depth, self.activation, number))
        # Last: tasks of other ranks or splits have the same data.
        adapted(model.to(dtype), self.rank, source, self.scale, self.split)
        return Task(
            model=model,
            loss=nn.functional.cross_entropy,
            inputs=(turned(pool(split).to(dtype)[digits].flatten(0, 1)[rows], degrees),),
            targets=(outputs.repeat_interleave(EACH)[rows],),
            symmetries=pairs_of(model),
            batch_size=self.batch,
            seed=seed,
            held_out=(
                (turned(held_out.flatten(0, 1), degrees),),
                (outputs.repeat_interleave(held_out.shape[1]),),
            ),
            score=accuracy,
        )


def main() -> None:
    """Pre-trains the backbones that are shipped, of the settings' width, depth and activation, and writes them."""
    own = LoRADigits()
    made = {
        f"{own.activation}-{own.width}-{own.depth}-{number}": _pretrained(own.width, own.depth, own.activation, number)
        for number in itertools.chain(*BACKBONES.values())
    }
    SHIPPED.write(made)
    right, all_held_out = torch.arange(LABELS).repeat_interleave(100), images().held_out.flatten(0, 1)
    model = perceptron(own.width, own.depth, own.activation, torch.Generator())
    for name, weights in made.items():
        model.load_state_dict(weights)
        print(f"{name}: {float(accuracy(model(all_held_out), right)):.1%} of the held-out images")


if __name__ == "__main__":
    main()
