"""The experiment `one-teleport`: when does one teleport suffice for the whole gradient flow?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metateleport.capture import point_of
from metateleport.evaluation.style import BLUE, GREEN, SKY, VERMILLION
from metateleport.families import load_family
from metateleport.papers.experiments.actions import fields, flatten, unflatten
from metateleport.papers.experiments.base import Claim, Experiment, ExperimentError, Findings, Progress
from metateleport.papers.experiments.bracket import Action, Bracket, bracket, gradient_flow
from metateleport.papers.experiments.descent import Function
from metateleport.papers.experiments.landscapes import Booth, ChartRotation, Landscape, Rosenbrock, level_set, valley
from metateleport.point import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OneTeleport"]

MET = 1e-6
"""Below this a drift counts as zero; those that are not are larger by orders of magnitude."""
LEVEL = {"booth": 30.0, "rosenbrock": 1.0, "valley": 1.0}
LINEAR = (1, 2, 3)
"""Widths of the linear networks."""
FAR = 20.0
"""A multiple of the identity, as a group element that is far away."""
STRIDE = 5
DRAWN = ("Rosenbrock", "mirrored valley")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneTeleport(Experiment):
    """When does one teleport suffice for the whole gradient flow? The Lie-bracket condition and its limits.

    Settings:
        functions: random quadratics, and random slanted valleys.
        dimension: of the quadratics.
        folds: the flow is followed until the loss has fallen by so many factors of e.
        steps: points of the flow.
    """

    name: ClassVar[str] = "one-teleport"
    size: ClassVar[tuple[float, float]] = (13.5, 4.4)

    functions: int = 6
    dimension: int = 5
    folds: float = 3.0
    steps: int = 60

    def __post_init__(self) -> None:
        if self.functions < 1 or self.dimension < 2 or self.steps < 10 or not self.folds > 0:
            raise ExperimentError(
                f"one-teleport needs a function, a dimension of 2, ten steps and a positive number of folds; got "
                f"functions={self.functions}, dimension={self.dimension}, steps={self.steps}, folds={self.folds}"
            )

    def findings(self, seed: int, progress: Progress) -> Findings:
        draws = np.random.default_rng(seed)
        slanted = [
            valley(float(draws.uniform(0.1, 0.3)), float(draws.uniform(0.2, 1.0))) for _ in range(self.functions)
        ]
        progress("quadratics")
        examples: dict[str, list[dict[str, Any]]] = {"quadratics": self._quadratics(seed)}
        for label, kinds in (
            ("Booth", [Booth]),
            ("Rosenbrock", [Rosenbrock]),
            ("mirrored valley", [valley(0.2, 0.0)]),
            ("slanted valleys", slanted),
        ):
            progress(label)
            examples[label] = [self._landscape(kind) for kind in kinds]
            if label in DRAWN:
                examples[label][0]["ridge"] = self._ridge(kinds[0])
        progress("linear networks")
        linear = [_linear_network(width, seed) for width in LINEAR]
        return Findings({"examples": examples, "linear networks": linear}, _claims(examples, linear))

    def _quadratics(self, seed: int) -> list[dict[str, Any]]:
        family = load_family("quadratic", {"dimension": self.dimension})
        found = []
        for index in range(self.functions):
            task = family.task(index, "held-out", seed)
            function, action, start = _of_task(task)
            matrix = task.inputs[0]
            level = function(start)
            eigenvalues, axes = torch.linalg.eigh(matrix)
            critical = [axes[:, i] * (2 * level / eigenvalues[i]).sqrt() for i in range(self.dimension)]
            path = gradient_flow(function, critical[-1], self.folds, self.steps)
            values, norms = _along(function, path)
            # No point of a level set of 1/2 x'Ax is steeper than 2 L (largest eigenvalue).
            ratio = norms.square() / (2 * values * eigenvalues[-1])
            found.append(_entry([bracket(function, action, x) for x in [start, *critical]], values, ratio))
        return found

    def _landscape(self, kind: type[Landscape]) -> dict[str, Any]:
        symmetry = ChartRotation(kind())

        def action(x: Tensor) -> Tensor:
            return fields([symmetry], Point({"x": x}), ["x"])

        ordinary = _ordinary(kind)
        critical = _critical(kind, ordinary)
        steepest = max(critical, key=lambda x: float(torch.func.grad(kind.value)(x).norm()))
        path = gradient_flow(kind.value, steepest, self.folds, self.steps)[::STRIDE]
        values, norms = _along(kind.value, path)
        largest = torch.tensor([_steepest_norm(kind, x) for x in path], dtype=torch.float64)
        entry = _entry(
            [bracket(kind.value, action, x) for x in [ordinary, *critical]], values, (norms / largest).square()
        )
        return {**entry, "path": path.tolist()}

    def _ridge(self, kind: type[Landscape]) -> list[list[float]]:
        """The steepest and flattest points of level sets on the way down, for the figure."""
        points = []
        for fold in torch.linspace(0, self.folds, 10):
            points += _critical(kind, _ordinary(kind, float((-fold / 2).exp())))
        return [point.tolist() for point in points]

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        first, second, third = figure.subplots(1, 3)
        colours = {
            "quadratics": BLUE,
            "Booth": SKY,
            "Rosenbrock": VERMILLION,
            "mirrored valley": GREEN,
            "slanted valleys": "#BBBBBB",
        }
        for label, entries in results["examples"].items():
            drift = max(entry["drift"] for entry in entries)
            for place, entry in enumerate(entries):
                words = f"{label} (condition off by {drift:.0e})" if place == 0 else None
                loss = np.asarray(entry["loss"])
                first.plot(loss[0] / loss, entry["ratio"], color=colours[label], label=words)
        first.set(xscale="log", yscale="log", xlabel="first loss / loss along the gradient flow")
        first.set(ylabel="squared gradient norm\n/ largest on the level set")
        first.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
        kinds: tuple[type[Landscape], ...] = (Rosenbrock, valley(0.2, 0.0))
        for axes, label, kind in zip((second, third), DRAWN, kinds, strict=True):
            _draw_chart(axes, results["examples"][label][0], kind, label)


def _of_task(task: Any) -> tuple[Function, Action, Tensor]:
    """A task's loss and its symmetries' velocities as functions of all parameters in one vector, and the start."""
    point, _ = point_of(task.model, task.symmetries, task.inputs, None, lambda out: task.loss(out, *task.targets))
    names = list(dict(task.model.named_parameters()))
    like = point.detach()

    def function(x: Tensor) -> Tensor:
        outputs = torch.func.functional_call(task.model, unflatten(x, like.parameters, names), task.inputs)
        return task.loss(outputs, *task.targets)

    def action(x: Tensor) -> Tensor:
        return fields(task.symmetries, like.update(unflatten(x, like.parameters, names)), names)

    return function, action, flatten(like.parameters, names)


def _along(function: Function, path: Tensor) -> tuple[Tensor, Tensor]:
    gradients, values = torch.func.vmap(torch.func.grad_and_value(function))(path)
    return values, gradients.norm(dim=1)


def _entry(brackets: Sequence[Bracket], values: Tensor, ratio: Tensor) -> dict[str, Any]:
    """The first bracket is at an ordinary point, the others at the critical ones."""
    critical = brackets[1:]
    gap = max(float((each.value - each.by_norm).abs().max()) / _size(brackets) for each in brackets)
    return {
        "identity_gap": gap,
        "slope_ordinary": brackets[0].slope,
        "slope": max(each.slope for each in critical),
        "drift": max(each.drift for each in critical),
        "critical_points": len(critical),
        "loss": values.tolist(),
        "ratio": ratio.tolist(),
    }


def _size(brackets: Sequence[Bracket]) -> float:
    return max(float(each.value.abs().max()) for each in brackets)


def _critical(kind: type[Landscape], start: Tensor) -> list[Tensor]:
    """All points of the level set where the gradient norm is critical: signs of its slope, then bisection."""

    def squared_norm(angle: Tensor) -> Tensor:
        u = kind.chart(start)
        turned = torch.stack([angle.cos() * u[0] - angle.sin() * u[1], angle.sin() * u[0] + angle.cos() * u[1]])
        return torch.func.grad(kind.value)(kind.inverse(turned)).square().sum()

    slope = torch.func.vmap(torch.func.grad(squared_norm))
    # An odd number, so that no angle of the grid is a symmetric one.
    angles = torch.linspace(-torch.pi, torch.pi, 1000, dtype=start.dtype) + 1e-3
    signs = slope(angles).sign()
    low, high = angles[:-1][signs[1:] != signs[:-1]], angles[1:][signs[1:] != signs[:-1]]
    left = slope(low).sign()
    for _ in range(45):
        middle = (low + high) / 2
        same = slope(middle).sign() == left
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return list(level_set(kind, start, (low + high) / 2)[0])


def _steepest_norm(kind: type[Landscape], x: Tensor) -> float:
    """The largest gradient norm on the level set of `x`: a coarse search, and a fine one around its best."""
    centre, width = 0.0, torch.pi
    for _ in range(3):
        angles = torch.linspace(centre - width, centre + width, 401, dtype=x.dtype)
        norms = level_set(kind, x, angles)[1]
        centre, width = float(angles[norms.argmax()]), width / 100
    return float(norms.max())


def _ordinary(kind: type[Landscape], factor: float = 1.0) -> Tensor:
    """A generic point of a level set."""
    radius = factor * LEVEL[kind.name] ** 0.5
    return kind.inverse(torch.tensor([radius * 0.8, radius * 0.6], dtype=torch.float64))


def _linear_network(width: int, seed: int) -> dict[str, Any]:
    r"""On $U V$ the gradient norm has a least value on the orbit under GL, and no largest.

    With $S = g^\top g$, $P = G_V G_V^\top$ and $Q = G_U^\top G_U$ it is $\mathrm{tr}(S^{-1} P) + \mathrm{tr}(S Q)$,
    least where $S Q S = P$: the geometric mean of $Q^{-1}$ and $P$.
    """
    family = load_family("leaky_mlp", {"width": width, "activation": "identity", "distribution": "normal"})
    task = family.task(0, "held-out", seed)
    function, action, start = _of_task(task)
    symmetry, names = task.symmetries[0], list(dict(task.model.named_parameters()))
    like = dict(task.model.named_parameters())
    lower, upper = unflatten(torch.func.grad(function)(start), like, names).values()
    root = _power(upper.mT @ upper, 0.5)
    inverse_root = torch.linalg.inv(root)
    mean = inverse_root @ _power(root @ (lower @ lower.mT) @ root, 0.5) @ inverse_root

    def moved(element: Tensor, x: Tensor) -> Tensor:
        return flatten(symmetry.act(element, Point(unflatten(x, like, names))).parameters, names)

    flattest = moved(_power(mean, 0.5), start)
    far = moved(FAR * torch.eye(width, dtype=start.dtype), flattest)
    found = bracket(function, action, flattest)
    norms = [float(torch.func.grad(function)(x).norm()) for x in (start, flattest, far)]
    return {
        "width": width,
        "slope": found.slope,
        "drift": found.drift,
        "gradient_norm": dict(zip(("start", "flattest", "far"), norms, strict=True)),
    }


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, axes = torch.linalg.eigh(matrix)
    return (axes * values.clamp_min(torch.finfo(values.dtype).tiny) ** exponent) @ axes.mT


def _draw_chart(axes: Any, entry: Mapping[str, Any], kind: type[Landscape], label: str) -> None:
    """In the chart's coordinates, where all level sets are circles."""
    path, ridge = (
        torch.func.vmap(kind.chart)(torch.tensor(entry[name], dtype=torch.float64)).numpy()
        for name in ("path", "ridge")
    )
    angles = np.linspace(0, 2 * np.pi, 200)
    for loss in np.geomspace(entry["loss"][-1], entry["loss"][0], 6):
        axes.plot(loss**0.5 * np.cos(angles), loss**0.5 * np.sin(angles), color="#DDDDDD", linewidth=0.7)
    axes.plot(*ridge.T, ".", color=SKY, markersize=4, label="steepest and flattest points of level sets")
    axes.plot(*path.T, color=VERMILLION, label="gradient flow from the steepest")
    axes.set(aspect="equal", xlabel="first coordinate of the chart", ylabel="second")
    axes.set_title(f"{label}, where level sets are circles", fontsize=10)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)


def _claims(examples: Mapping[str, Sequence[Mapping[str, Any]]], linear: Sequence[Mapping[str, Any]]) -> list[Claim]:
    place = "ICLR 2024, section 3.3"

    def worst(label: str, name: str, of: Callable[[Any], float] = max) -> float:
        return float(of(entry[name] for entry in examples[label]))

    def kept(entry: Mapping[str, Any]) -> float:
        return float(min(entry["ratio"]))

    every = [entry for entries in examples.values() for entry in entries]
    identity = max(entry["identity_gap"] for entry in every)
    convex = max(worst("quadratics", "drift"), worst("Booth", "drift"))
    stays = min(kept(entry) for label in ("quadratics", "Booth") for entry in examples[label])
    rosenbrock, mirrored = examples["Rosenbrock"][0], examples["mirrored valley"][0]
    broken = sum(entry["drift"] <= MET and kept(entry) < 1 - MET for entry in every)
    slanted = examples["slanted valleys"]
    lost = sum(kept(entry) < 1 - MET for entry in slanted)
    growth = min(entry["gradient_norm"]["far"] / entry["gradient_norm"]["flattest"] for entry in linear)
    return [
        Claim(
            "[A, R]L = -A|grad L|^2 for infinitesimal symmetries A: largest gap, relative to the bracket",
            place,
            identity,
            None,
            identity <= MET,
        ),
        Claim(
            "convex quadratics and Booth meet the condition: largest drift at critical points",
            place,
            convex,
            None,
            convex <= MET,
        ),
        Claim(
            "and one teleport suffices there: smallest share of the level set's largest squared gradient norm along "
            "the gradient flow",
            place,
            stays,
            None,
            stays >= 1 - MET,
        ),
        Claim(
            "Rosenbrock does not meet it: largest drift at critical points",
            place,
            rosenbrock["drift"],
            None,
            rosenbrock["drift"] > MET,
        ),
        Claim(
            "and one teleport does not suffice there: smallest such share along the gradient flow",
            place,
            kept(rosenbrock),
            None,
            kept(rosenbrock) < 1 - MET,
        ),
        Claim(
            "the condition suffices: functions that meet it and lose the steepest point",
            place,
            float(broken),
            None,
            broken == 0,
        ),
        Claim(
            "it is not necessary: the mirrored valley keeps the steepest point along the flow; smallest such share, "
            f"while the condition is off by {mirrored['drift']:.2g}",
            "here",
            kept(mirrored),
            None,
            kept(mirrored) >= 1 - MET and mirrored["drift"] > MET,
        ),
        Claim(
            "without the mirror the valleys lose it: share of random slanted valleys",
            "here",
            lost / len(slanted),
            None,
            lost == len(slanted),
        ),
        Claim(
            f"a network of two linear layers has no steepest point on its orbit under GL: least growth of the gradient "
            f"norm by {FAR:g} times the identity, from the flattest point",
            "here",
            growth,
            None,
            growth > FAR / 2,
        ),
        Claim(
            "a linear network of width 1 meets the condition at the flattest point of its orbit: drift there",
            "here",
            linear[0]["drift"],
            None,
            linear[0]["drift"] <= MET,
        ),
        Claim(
            "wider linear networks do not: least drift at the flattest point",
            "here",
            min(entry["drift"] for entry in linear[1:]),
            None,
            all(entry["drift"] > MET for entry in linear[1:]),
        ),
    ]
