"""The experiment `generalisation`: sharpness, curvature and the held-out loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metateleport.evaluation.paired import paired_ratio
from metateleport.evaluation.style import BLACK, BLUE, GREY, VERMILLION
from metateleport.families import Batch, FamilyError, TaskStack, load_family
from metateleport.objectives import Curvature, Objective, Sharpness
from metateleport.papers.experiments.base import LARGEST, Claim, Experiment, ExperimentError, Findings, Progress, finite
from metateleport.papers.experiments.intervals import bootstrap, share_interval
from metateleport.point import Point
from metateleport.teleporters import GradientAscentTeleporter, RandomTeleporter, Teleporter, travel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Generalisation", "correlation", "partial_correlation"]

# As far apart as the source's code on MNIST: 0.001 to 0.191.
RADII = (0.05, 0.1, 0.2)
STEPS = 10
DRIFT = 1e-4
VARIANTS = ("sharpness down", "sharpness up", "curvature up", "curvature down")
# As the authors' repository numbers them.
_TABLE, _FIGURE = "ICLR 2024, table 1", "ICLR 2024, figure 4"
Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generalisation(Experiment):
    """Sharpness and curvature against held-out loss on real digits, and teleports that raise or lower either.

    Settings:
        networks: number of networks, trained from different starts on the same data in the same order.
        hidden: units of both hidden layers.
        samples: training images.
        batch: images per minibatch.
        rate: step size of SGD.
        epochs: of training.
        teleport: the epoch after which the teleports take place.
        reach: largest norm of a teleport's generator, for each of the two symmetries.
        directions: random directions of sharpness, random curves of curvature.
    """

    name: ClassVar[str] = "generalisation"
    size: ClassVar[tuple[float, float]] = (13.5, 4.4)

    networks: int = 60
    hidden: int = 16
    samples: int = 450
    batch: int = 30
    rate: float = 0.1
    epochs: int = 40
    teleport: int = 20
    reach: float = 2.0
    directions: int = 20

    def __post_init__(self) -> None:
        if self.networks < 4 or self.directions < 1 or not self.rate > 0 or not self.reach > 0:
            raise ExperimentError(
                f"generalisation needs four networks, one direction, and a positive rate and reach; got networks="
                f"{self.networks}, directions={self.directions}, rate={self.rate}, reach={self.reach}"
            )
        if not 1 <= self.teleport < self.epochs:
            raise ExperimentError(
                f"generalisation: the teleport has to come after an epoch of at least 1 and before the last of "
                f"epochs={self.epochs}, not after epoch {self.teleport}"
            )
        if not 1 <= self.batch <= self.samples:
            raise ExperimentError(f"generalisation: batch={self.batch} has to lie between 1 and samples={self.samples}")
        try:
            self._family()
        except FamilyError as error:
            raise ExperimentError(f"generalisation: {error}") from error

    def _family(self) -> Any:
        settings = {"hidden": self.hidden, "depth": 3, "classes": 9, "samples": self.samples, "batch": self.batch}
        return load_family("digits", settings)

    def findings(self, seed: int, progress: Progress) -> Findings:
        family = self._family()
        tasks = [family.task(index, "held-out", seed) for index in range(self.networks)]
        # The starts are those of different tasks, the data those of the first.
        first = tasks[0]
        stack = TaskStack([dataclasses.replace(first, model=task.model) for task in tasks])
        data, held_out = stack.full, stack.held_out
        assert held_out is not None
        half = self._train(stack, data, held_out, 0, self.teleport, seed, progress, "plain training")
        middle = {name: value.detach().clone() for name, value in stack.tensors().items()}
        rest = self._train(stack, data, held_out, self.teleport, self.epochs, seed, progress, "plain training")
        objectives: dict[str, Objective] = {
            "sharpness": Sharpness(RADII, self.directions, seed),
            "curvature": Curvature(first.symmetries, self.directions, seed),
        }
        progress("sharpness and curvature of the trained networks")
        trained = _measured(objectives, stack.point_at(stack.tensors(), data))
        trained["held_out"] = rest[-1].tolist()
        trained["accuracy"] = _accuracy(stack, held_out, first.score)
        curves = {"none": [*half, *rest]}
        moves: dict[str, Any] = {}
        for variant in (*VARIANTS, "random"):
            progress(f"teleport: {variant}")
            stack.load(middle)
            moves[variant] = self._teleport(stack, data, objectives, variant, seed)
            after = self._train(stack, data, held_out, self.teleport, self.epochs, seed, progress, variant)
            curves[variant] = [*half, *after]
        final = {variant: [finite(value) for value in curve[-1]] for variant, curve in curves.items()}
        results = {
            "trained": trained,
            "teleports": moves,
            "held_out_final": final,
            "held_out_mean": {name: [finite(each.mean()) for each in curve] for name, curve in curves.items()},
            "train_images": self.samples,
            "held_out_images": int(held_out[1][0].shape[1]),
            "teleport_epoch": self.teleport,
        }
        return Findings(results, _claims(results, seed))

    def _train(
        self,
        stack: TaskStack,
        data: Batch,
        held_out: Batch,
        start: int,
        end: int,
        seed: int,
        progress: Progress,
        label: str,
    ) -> list[Array]:
        """SGD from one epoch to another; the held-out losses after each. The order is the same for all networks."""
        optimizer = torch.optim.SGD(stack.parameters(), lr=self.rate)
        losses = []
        for epoch in range(start, end):
            progress(f"{label}, epoch {epoch + 1} of {self.epochs}")
            order = np.random.default_rng([seed, epoch]).permutation(self.samples)
            for place in range(0, self.samples - self.batch + 1, self.batch):
                rows = torch.from_numpy(order[place : place + self.batch])
                optimizer.zero_grad()
                stack(tuple(tuple(value[:, rows] for value in part) for part in data)).sum().backward()
                optimizer.step()
            found = stack.losses_at(stack.tensors(), held_out).double().numpy()
            losses.append(np.where(np.isfinite(found), found, LARGEST))
        return losses

    def _teleport(
        self, stack: TaskStack, data: Batch, objectives: Mapping[str, Objective], variant: str, seed: int
    ) -> dict[str, Any]:
        point = stack.point_at(stack.tensors(), data)
        teleporter: Teleporter
        if variant == "random":
            teleporter = RandomTeleporter(self.reach, seed)
        else:
            sought, way = variant.split()
            direction: Literal["ascent", "descent"] = "ascent" if way == "up" else "descent"
            teleporter = GradientAscentTeleporter(
                objectives[sought], STEPS, 2 * self.reach / STEPS, self.reach, direction=direction
            )
        before = _measured(objectives, point)
        arrived, moves, _ = travel(teleporter, point, stack.symmetries)
        stack.load(arrived.parameters)
        there = stack.point_at(stack.tensors(), data)
        after = _measured(objectives, there)
        assert point.loss is not None
        assert there.loss is not None
        return {
            "before": {name: before[name] for name in objectives},
            "after": {name: after[name] for name in objectives},
            "drift": float(((there.loss - point.loss).abs() / point.loss).max()),
            "size": torch.stack([move.size for move in moves]).square().sum(0).sqrt().tolist(),
        }

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        first, second, third = figure.subplots(1, 3)
        trained = results["trained"]
        for axes, name, colour in ((first, "sharpness", VERMILLION), (second, "curvature", BLUE)):
            axes.plot(trained[name], trained["held_out"], ".", color=colour)
            r = correlation(np.stack([trained[name], trained["held_out"]], 1))
            axes.set(xlabel=name, ylabel="held-out loss", title=f"correlation {r:.2f}")
        styles = {
            "none": (BLACK, "-"),
            "sharpness down": (VERMILLION, "-"),
            "sharpness up": (VERMILLION, "--"),
            "curvature up": (BLUE, "-"),
            "curvature down": (BLUE, "--"),
            "random": (GREY, ":"),
        }
        epoch = results["teleport_epoch"]
        for variant, (colour, style) in styles.items():
            curve = results["held_out_mean"][variant]
            begin = epoch - 1
            third.plot(
                range(begin + 1, len(curve) + 1), curve[begin:], style, color=colour, label=variant, linewidth=1.3
            )
        third.axvline(epoch, color="#CCCCCC", linewidth=0.8)
        third.set(
            xlabel="epoch",
            yscale="log",
            ylabel="held-out loss, mean over networks",
            title=f"teleport after epoch {epoch}",
        )
        third.legend(fontsize=7)


def correlation(pairs: Array) -> float:
    """Pearson's correlation of the first two columns; 0 where one of them is constant.

    Example:
        >>> round(correlation(np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])), 6)
        1.0
    """
    # Few networks drawn again can be one network alone.
    if not np.ptp(pairs[:, :2], axis=0).all():
        return 0.0
    return float(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1])


def partial_correlation(triples: Array) -> float:
    """Pearson's partial correlation of the first two columns, given the third."""
    x, y, z = (triples[:, place] - triples[:, place].mean() for place in range(3))
    x, y = (each - (each @ z) / max(z @ z, 1e-300) * z for each in (x, y))
    return correlation(np.stack([x, y], 1))


def _measured(objectives: Mapping[str, Objective], point: Point) -> dict[str, list[float]]:
    assert point.loss is not None
    with torch.no_grad():
        found = {name: objective(point).double().tolist() for name, objective in objectives.items()}
    return {**found, "train": point.loss.double().tolist()}


def _accuracy(stack: TaskStack, held_out: Batch, score: Callable[..., Tensor] | None) -> list[float]:
    assert score is not None
    found: list[float] = score(stack.outputs(stack.tensors(), held_out[0]), held_out[1][0]).double().tolist()
    return found


def _claims(results: Mapping[str, Any], seed: int) -> list[Claim]:
    trained, moves, final = results["trained"], results["teleports"], results["held_out_final"]
    held_out, train = trained["held_out"], trained["train"]

    def correlated(words: str, source: str, sign: int, statistic: Callable[[Array], float], *columns: Any) -> Claim:
        rows = np.stack([np.asarray(column) for column in columns], 1)
        low, high = bootstrap(rows, statistic, seed)
        holds = True if min(sign * low, sign * high) > 0 else False if max(sign * low, sign * high) < 0 else None
        return Claim(words, source, statistic(rows), (low, high), holds)

    sharp, bent = trained["sharpness"], trained["curvature"]
    claims = [
        correlated(
            "sharper networks have a larger held-out loss: correlation", _TABLE, 1, correlation, sharp, held_out
        ),
        correlated(
            "networks with a larger curvature have a smaller held-out loss: correlation",
            _TABLE,
            -1,
            correlation,
            bent,
            held_out,
        ),
        correlated(
            "sharpness says more than the training loss that it contains: correlation with the held-out loss, the "
            "training loss taken out of both",
            "here",
            1,
            partial_correlation,
            sharp,
            held_out,
            train,
        ),
        correlated(
            "the training loss alone says as much: correlation with the held-out loss",
            "here",
            1,
            correlation,
            train,
            held_out,
        ),
    ]
    expected = {"sharpness down": -1, "sharpness up": 1, "curvature up": -1, "curvature down": 1}
    for variant, sign in (*expected.items(), ("random", 0)):
        ratio = paired_ratio(final[variant], final["none"], seed=seed)
        below, above = ratio.high < 1, ratio.low > 1
        # That nothing changes can be refuted, and never be shown.
        expectation = {-1: below, 0: False, 1: above}[sign]
        holds = expectation if below or above else None
        words = {-1: "lowers", 0: "leaves alone", 1: "raises"}[sign]
        source = _FIGURE if sign else "here"
        claims.append(
            Claim(
                f"a teleport after epoch {results['teleport_epoch']} ({variant}) {words} the held-out loss at the end: "
                "median ratio to no teleport",
                source,
                finite(ratio.ratio),
                (finite(ratio.low), finite(ratio.high)),
                holds,
            )
        )
    reached = sum(_reached(moves[variant], variant) for variant in VARIANTS)
    trials = len(VARIANTS) * len(held_out)
    drift = max(entry["drift"] for entry in moves.values())
    return [
        *claims,
        Claim(
            "the teleports move what they seek the way they are told: share of networks and teleports",
            "here",
            reached / trials,
            share_interval(reached, trials),
            reached == trials,
        ),
        Claim(
            "the training loss does not change in a teleport: largest relative change",
            "ICLR 2024, abstract: symmetries leave the loss invariant",
            drift,
            None,
            drift <= DRIFT,
        ),
    ]


def _reached(entry: Mapping[str, Any], variant: str) -> int:
    sought, way = variant.split()
    change = np.asarray(entry["after"][sought]) - np.asarray(entry["before"][sought])
    return int((change > 0 if way == "up" else change < 0).sum())
