"""Methods of teleporting in a training run: teleporter, symmetries, and at which steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from torch import nn

from metateleport.optim.schedules import AtSteps, Every, Schedule
from metateleport.symmetries import BatchPair2024, Rescaling, Symmetry
from metateleport.teleporters import (
    GradientAscentTeleporter,
    LevelSetTeleporter,
    NullSpaceTeleporter,
    RandomTeleporter,
    Teleporter,
    WhiteningTeleporter,
)

__all__ = ["ONCE", "PLAIN", "THRICE", "WHEN", "Method", "batch_pairs", "methods", "rescalings"]

PLAIN = "no teleport"
WHEN = ("early", "late", "often")
THRICE = ("ascent, batch form", "ascent, rescaling", "random, batch form")
"""Methods that teleport early, late and often."""
ONCE = ("descent, batch form", "whitening, batch form", "null space", "level set")
"""Methods that teleport early only."""

# The source's code goes no further where the squared norm of the gradient is above it.
_SQUARED_NORM_CAP = 100.0


@dataclasses.dataclass(frozen=True)
class Method:
    """How and when to teleport.

    Args:
        teleporter: makes the teleporter from a seed; None for the optimizer alone.
        symmetries: of a model, in the order of the data flow.
        schedule: before which steps.
        state: what becomes of the optimizer's state.
    """

    teleporter: Callable[[int], Teleporter] | None = None
    symmetries: Callable[[nn.Module], Sequence[Symmetry]] = lambda _: ()
    schedule: Schedule | None = None
    state: str = "transport"


def rescalings(model: nn.Module) -> list[Symmetry]:
    """The rescalings of a perceptron, exact on every batch."""
    return [Rescaling(model, first, second) for first, second in itertools.pairwise(_layers(model))]


def batch_pairs(model: nn.Module) -> list[Symmetry]:
    """GL between the layers of a perceptron in the form of 2024, exact on the minibatch it is taken on."""
    activation = next(module for module in model.modules() if isinstance(module, nn.LeakyReLU))
    return [BatchPair2024(model, first, second, activation) for first, second in itertools.pairwise(_layers(model))]


def methods(steps: int, reach: float, ascent: int, often: int) -> dict[str, Method]:
    """The methods that are compared, by name.

    Args:
        steps: of training.
        reach: largest norm of a generator, and the norm of the random ones. A tenth of it is the reach of null space
            and level set, relative to the norm of the weights.
        ascent: steps of gradient ascent.
        often: number of teleports in a run that teleports often.
    """
    schedules: dict[str, Schedule] = {
        "early": AtSteps([0]),
        "late": AtSteps([steps // 2]),
        "often": Every(steps // often),
    }

    def climbing(direction: str) -> Callable[[int], Teleporter]:
        return lambda _: GradientAscentTeleporter(
            steps=ascent,
            step_size=reach / ascent,
            cap=reach,
            value_cap=_SQUARED_NORM_CAP,
            direction=direction,  # type: ignore[arg-type]
        )

    # The inner optimizer starts anew after a batch form, as in the source's code; a rescaling carries its state along.
    ways: dict[str, Method] = {
        "ascent, batch form": Method(climbing("ascent"), batch_pairs, state="reset"),
        "ascent, rescaling": Method(climbing("ascent"), rescalings, state="transport"),
        "random, batch form": Method(lambda seed: RandomTeleporter(reach, seed=seed), batch_pairs, state="reset"),
        "descent, batch form": Method(climbing("descent"), batch_pairs, state="reset"),
        "whitening, batch form": Method(lambda _: WhiteningTeleporter(), batch_pairs, state="reset"),
        "null space": Method(
            lambda _: NullSpaceTeleporter(
                steps=ascent, step_size=reach / 10 / ascent, cap=reach / 10, value_cap=_SQUARED_NORM_CAP
            ),
            state="reset",
        ),
        "level set": Method(lambda _: LevelSetTeleporter(steps=ascent, step_size=reach / 10 / ascent), state="reset"),
    }
    found = {PLAIN: Method()}
    for way, when in [*itertools.product(THRICE, WHEN), *((way, "early") for way in ONCE)]:
        found[f"{way}, {when}"] = dataclasses.replace(ways[way], schedule=schedules[when])
    return found


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
