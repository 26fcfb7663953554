"""The experiment `quadratic`: teleport once to the steepest point of the orbit, then gradient descent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metateleport.evaluation.paired import PairedRatio, paired_ratio
from metateleport.evaluation.style import BLACK, BLUE, GREY, VERMILLION
from metateleport.families import Task, load_family
from metateleport.papers.experiments.base import Claim, Experiment, ExperimentError, Findings, Progress, finite
from metateleport.papers.experiments.descent import best_step, descend
from metateleport.papers.experiments.landscapes import Booth, ChartRotation, Landscape, Rosenbrock, level_set
from metateleport.teleporters import GradientAscentTeleporter, teleport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Quadratic"]

# What the source's code takes on its two functions.
STEP = {"booth": 0.08, "rosenbrock": 1e-3}
BOX = {"booth": 10.0, "rosenbrock": 2.0}
ANGLES = 721


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic(Experiment):
    """Teleport once on quadratics, Booth and Rosenbrock, then gradient descent: path and loss.

    Settings:
        functions: quadratics, and random starts on each of Booth and Rosenbrock.
        dimension: of the quadratics.
        condition: of their Hessians, log-spaced eigenvalues.
        steps: of gradient descent on the quadratics.
        ascent: steps of the gradient-ascent teleporter.
        booth: steps of gradient descent on Booth.
        rosenbrock: steps of gradient descent on Rosenbrock.
    """

    name: ClassVar[str] = "quadratic"
    size: ClassVar[tuple[float, float]] = (13.0, 7.5)

    functions: int = 24
    dimension: int = 10
    condition: float = 100.0
    steps: int = 60
    ascent: int = 300
    booth: int = 10
    rosenbrock: int = 1000

    def __post_init__(self) -> None:
        if self.functions < 2 or min(self.steps, self.ascent, self.booth, self.rosenbrock) < 1:
            raise ExperimentError(
                f"quadratic needs at least two functions, and one step of each kind; got functions={self.functions}, "
                f"steps={self.steps}, ascent={self.ascent}, booth={self.booth}, rosenbrock={self.rosenbrock}"
            )
        load_family("quadratic", {"dimension": self.dimension, "condition": self.condition})

    def findings(self, seed: int, progress: Progress) -> Findings:
        progress("teleporting on convex quadratics")
        results: dict[str, Any] = {"quadratics": self._quadratics(seed)}
        claims = _quadratic_claims(results["quadratics"], self.steps)
        for kind in (Booth, Rosenbrock):
            progress(f"teleporting on {kind.name}")
            results[kind.name] = self._landscape(kind, seed)
            claims += _landscape_claims(kind.name, results[kind.name])
        return Findings(results, claims)

    def _quadratics(self, seed: int) -> dict[str, Any]:
        family = load_family("quadratic", {"dimension": self.dimension, "condition": self.condition})
        entries: dict[str, Any] = {key: [] for key in ("gap", "drift", "newton_gap", "one_step")}
        curves: dict[str, Any] = {f"{who}_{size}": [] for who in ("gd", "teleported") for size in ("safe", "best")}
        for index in range(self.functions):
            task = family.task(index, "held-out", seed)
            matrix, start = task.inputs[0], _position(task)
            eigenvalues, axes = torch.linalg.eigh(matrix)
            report = teleport(task.model, self._teleporter(), task.inputs, task.loss, task.symmetries)
            there = _position(task)
            top = axes[:, -1] * (2 * report.loss_before / eigenvalues[-1]).sqrt()
            best = top * torch.sign(top @ there)
            entries["gap"].append(float((there - best).norm() / best.norm()))
            entries["drift"].append(abs(report.loss_after / report.loss_before - 1))
            # The Newton direction of a quadratic is x itself, the gradient A x.
            entries["newton_gap"].append(1 - float(torch.cosine_similarity(matrix @ there, there, dim=0)))
            sizes = {"safe": 1 / eigenvalues[-1], "best": 2 / (eigenvalues[-1] + eigenvalues[0])}

            def form(x: Tensor, matrix: Tensor = matrix) -> Tensor:
                return (x @ matrix @ x) / 2

            for size, step in sizes.items():
                values = descend(form, torch.stack([start, there]), step, self.steps)[1] / report.loss_before
                curves[f"gd_{size}"].append(values[:, 0].tolist())
                curves[f"teleported_{size}"].append(values[:, 1].tolist())
            entries["one_step"].append(curves["teleported_safe"][-1][1])
        return {**entries, "relative_loss": curves}

    def _landscape(self, kind: type[Landscape], seed: int) -> dict[str, Any]:
        """Random starts, the source's own first among them."""
        source = torch.Generator().manual_seed(seed)
        box = BOX[kind.name]
        drawn = (2 * torch.rand(self.functions - 1, 2, generator=source, dtype=torch.float64) - 1) * box
        starts = torch.cat([torch.tensor([kind.start], dtype=torch.float64), drawn])
        angles = torch.linspace(-torch.pi, torch.pi, ANGLES, dtype=torch.float64)
        arrived, norms, drifts, steepest = [], [], [], []
        for start in starts:
            landscape = kind(start)
            report = teleport(
                landscape, self._teleporter(), (), lambda value: value, symmetries=[ChartRotation(landscape)]
            )
            arrived.append(landscape.x.detach().clone())
            norms.append([report.gradient_norm_before, report.gradient_norm_after])
            drifts.append(abs(report.loss_after / report.loss_before - 1))
            steepest.append(float(level_set(kind, start, angles)[1].max()))
        there, step, steps = torch.stack(arrived), STEP[kind.name], getattr(self, kind.name)
        grid = 10.0 ** torch.linspace(-6, 0, 37, dtype=torch.float64)
        own = {who: best_step(kind.value, x, grid, steps) for who, x in (("gd", starts), ("teleported", there))}
        runs = {
            "gd": descend(kind.value, starts, step, steps),
            "teleported": descend(kind.value, there, step, steps),
            "gd_own_step": descend(kind.value, starts, own["gd"], steps),
            "teleported_own_step": descend(kind.value, there, own["teleported"], steps),
        }
        points, norms_around = level_set(kind, starts[0], angles)
        by_angle = descend(kind.value, points, step, steps)[1][-1]
        return {
            "gradient_norms": norms,
            "drift": drifts,
            "steepest": steepest,
            "own_steps": own,
            "final": {who: values[-1].tolist() for who, (_, values) in runs.items()},
            "first": {
                who: {"path": _inside(path[:, 0], 1e4), "loss": values[:, 0].tolist()}
                for who, (path, values) in runs.items()
            },
            "by_angle": {
                "angle": angles.tolist(),
                "gradient_norm": norms_around.tolist(),
                "final_loss": by_angle.tolist(),
                "untouched": float(runs["gd"][1][-1, 0]),
            },
        }

    def _teleporter(self) -> GradientAscentTeleporter:
        # A rotation by half a turn has a generator of norm sqrt(2) pi.
        return GradientAscentTeleporter(steps=self.ascent, step_size=0.1, cap=10.0)

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        axes = figure.subplots(2, 3)
        _draw_quadratics(axes[0, 0], results["quadratics"]["relative_loss"])
        _draw_path(axes[0, 1], Booth, results["booth"]["first"], ("gd", "teleported"))
        _draw_losses(axes[0, 2], results["booth"], "Booth, the source's start")
        _draw_path(axes[1, 0], Rosenbrock, results["rosenbrock"]["first"], ("gd", "teleported_own_step"))
        _draw_losses(axes[1, 1], results["rosenbrock"], "Rosenbrock, the source's start")
        _draw_angles(axes[1, 2], results["rosenbrock"]["by_angle"])


def _position(task: Task) -> Tensor:
    return next(iter(task.model.parameters())).detach().clone()


def _inside(path: Tensor, box: float) -> list[list[float]]:
    """The path up to where it leaves the box that is drawn."""
    outside = ~(path.isfinite() & (path.abs() < box)).all(1)
    end = int(outside.nonzero()[0]) if bool(outside.any()) else len(path)
    return path[:end].tolist()


def _quadratic_claims(found: Mapping[str, Any], steps: int) -> list[Claim]:
    curves = {name: np.asarray(values) for name, values in found["relative_loss"].items()}
    at = min(10, steps)
    safe = paired_ratio(curves["teleported_safe"][:, at], curves["gd_safe"][:, at])
    best = paired_ratio(curves["teleported_best"][:, at], curves["gd_best"][:, at])
    place = "ICLR 2024, section 3"
    return [
        Claim(
            "on quadratics gradient ascent reaches the closed form of the steepest point on the orbit: largest "
            "relative gap between the two points",
            "NeurIPS 2022, algorithm 1",
            max(found["gap"]),
            None,
            max(found["gap"]) <= 1e-6,
        ),
        Claim(
            "the loss does not change in a teleport: largest relative change",
            "NeurIPS 2022, abstract: the actions leave the loss invariant",
            max(found["drift"]),
            None,
            max(found["drift"]) <= 1e-10,
        ),
        Claim(
            "at the steepest point of a quadratic's level set the gradient has Newton's direction: largest 1 - cosine",
            place,
            max(found["newton_gap"]),
            None,
            max(found["newton_gap"]) <= 1e-10,
        ),
        Claim(
            "there, one gradient step of 1 / (largest eigenvalue) reaches the minimum: largest share of the loss left",
            place,
            max(found["one_step"]),
            None,
            max(found["one_step"]) <= 1e-10,
        ),
        _faster(
            safe, f"quadratics, both at a step of 1 / (largest eigenvalue), after {at} steps", "NeurIPS 2022, abstract"
        ),
        _faster(
            best, f"quadratics, both at plain descent's best constant step, after {at} steps", "NeurIPS 2022, abstract"
        ),
    ]


def _landscape_claims(name: str, found: Mapping[str, Any]) -> list[Claim]:
    final = found["final"]
    steps = len(found["first"]["gd"]["loss"]) - 1
    reached = np.array([after for _, after in found["gradient_norms"]])
    gaps = 1 - reached / np.asarray(found["steepest"])
    better = float(np.mean(np.asarray(found["by_angle"]["final_loss"]) < found["by_angle"]["untouched"]))
    return [
        Claim(
            f"on {name} gradient ascent finds the steepest point of the orbit: share of starts where it falls short by "
            "more than 1e-3",
            "NeurIPS 2022, algorithm 1",
            float((gaps > 1e-3).mean()),
            None,
            bool((gaps <= 1e-3).all()),
        ),
        _faster(
            paired_ratio(final["teleported"], final["gd"]),
            f"{name}, both at the source's step of {STEP[name]:g}, after {steps} steps",
            "NeurIPS 2022, abstract",
        ),
        _faster(
            paired_ratio(final["teleported_own_step"], final["gd_own_step"]),
            f"{name}, each at its own best constant step ({found['own_steps']['teleported']:.2g} and "
            f"{found['own_steps']['gd']:.2g}), after {steps} steps",
            "NeurIPS 2022, abstract",
        ),
        Claim(
            f"{name} from the source's start, at the source's step: share of all points of the orbit from which "
            "gradient descent ends lower than without a teleport; it is at least half",
            "here",
            better,
            None,
            better >= 0.5,
        ),
    ]


def _faster(ratio: PairedRatio, where: str, source: str) -> Claim:
    """The claim that teleporting once and then descending ends lower than descending alone."""
    holds = True if ratio.high < 1 else False if ratio.low > 1 else None
    return Claim(
        f"one teleport to the steepest point, then gradient descent, ends lower than gradient descent alone ({where}): "
        "median ratio of the losses",
        source,
        finite(ratio.ratio),
        (finite(ratio.low), finite(ratio.high)),
        holds,
    )


_LABELS = {
    "gd": "GD",
    "teleported": "teleport once, then GD",
    "gd_own_step": "GD, own best step",
    "teleported_own_step": "teleported, own best step",
}
_COLOURS = {"gd": GREY, "teleported": VERMILLION, "gd_own_step": BLACK, "teleported_own_step": BLUE}


def _draw_quadratics(axes: Any, curves: Mapping[str, Any]) -> None:
    for who, values in curves.items():
        median = np.median(np.asarray(values), axis=0).clip(1e-20)
        base, _, size = who.partition("_")
        words = "step 1/λmax" if size == "safe" else "step 2/(λmax+λmin)"
        style = "-" if size == "safe" else "--"
        axes.plot(median, style, color=_COLOURS[base], label=f"{_LABELS[base]}, {words}")
    axes.set(yscale="log", xlabel="gradient descent steps", ylabel="loss / first loss, median")
    axes.set_title("convex quadratics", fontsize=10)
    axes.legend(fontsize=7)


def _draw_path(axes: Any, kind: type[Landscape], first: Mapping[str, Any], who: tuple[str, str]) -> None:
    paths = [np.asarray(first[name]["path"]) for name in who]
    corners = np.concatenate([*paths, [[1.0, 3.0 if kind is Booth else 1.0]]])
    low, high = corners.min(0), corners.max(0)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    x, y = np.meshgrid(np.linspace(low[0], high[0], 200), np.linspace(low[1], high[1], 200))
    values = torch.func.vmap(kind.value)(torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1))).reshape(x.shape).numpy()
    axes.contour(x, y, np.log10(values + 1e-6), 12, colors="#BBBBBB", linewidths=0.7)
    for name, path in zip(who, paths, strict=True):
        axes.plot(*path.T, ".-", color=_COLOURS[name], label=_LABELS[name], markersize=4, linewidth=1)
    axes.plot([paths[0][0, 0], paths[1][0, 0]], [paths[0][0, 1], paths[1][0, 1]], ":", color=_COLOURS[who[1]])
    axes.set_title(f"{kind.name.capitalize()}: paths (dotted: the teleport)", fontsize=10)
    axes.legend(fontsize=7)


def _draw_losses(axes: Any, found: Mapping[str, Any], title: str) -> None:
    start = found["first"]["gd"]["loss"][0]
    for who, run in found["first"].items():
        loss = np.asarray(run["loss"])
        label = f"{_LABELS[who]} (diverges)" if loss[-1] > 1e6 * start else _LABELS[who]
        axes.plot(np.where(loss > 1e6 * start, np.nan, loss).clip(1e-16), color=_COLOURS[who], label=label)
    axes.set(yscale="log", xlabel="gradient descent steps", ylabel="loss")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)


def _draw_angles(axes: Any, found: Mapping[str, Any]) -> None:
    angle, final = np.asarray(found["angle"]), np.asarray(found["final_loss"])
    converged = final < 1e6
    axes.plot(angle[converged], final[converged].clip(1e-16), ".", color=_COLOURS["teleported"], markersize=3)
    axes.plot(angle[~converged], np.full((~converged).sum(), 1e3), "x", color=BLACK, markersize=3, label="diverges")
    axes.axhline(found["untouched"], color=_COLOURS["gd"], label="no teleport")
    axes.set(yscale="log", xlabel="angle of the teleport", ylabel="final loss at the source's step")
    axes.legend(fontsize=7, loc="lower left")
    beside = axes.twinx()
    beside.plot(angle, found["gradient_norm"], color=_COLOURS["teleported_own_step"], linewidth=1)
    beside.set(yscale="log", ylabel="gradient norm (line)")
    axes.set_title("Rosenbrock: every point of the orbit", fontsize=10)
