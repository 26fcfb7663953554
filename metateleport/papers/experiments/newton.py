"""The experiment `newton`: Newton's step as the sum of a gradient and a symmetry component."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metateleport.evaluation.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION
from metateleport.families import load_family
from metateleport.papers.experiments.base import Claim, Experiment, ExperimentError, Findings, Progress
from metateleport.papers.experiments.descent import Function
from metateleport.papers.experiments.intervals import bootstrap, share_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Newton", "Split", "split"]

CONVEX = ("convex quadratics", "log-sum-exp", "quartics")
SHARES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Split:
    r"""Newton's step $v = -H^{-1}\nabla$ at a point, split into $v_\parallel$ along the gradient and $v_\perp$, which
    is tangent to the level set.

    Args:
        gradient: $\nabla$, `(n,)`.
        hessian: $H$, `(n, n)`.
        along: $v_\parallel$, `(n,)`.
        across: $v_\perp$, the symmetry component, `(n,)`.
    """

    gradient: Tensor
    hessian: Tensor
    along: Tensor
    across: Tensor

    @property
    def ascent(self) -> Tensor:
        r"""$P H \nabla$, the steepest way up for $\tfrac12|\nabla|^2$ within the tangent space, `(n,)`."""
        return self.tangent(self.hessian @ self.gradient)

    def tangent(self, vector: Tensor) -> Tensor:
        """The part of a vector that is tangent to the level set."""
        normal = self.gradient / self.gradient.norm()
        return vector - (normal @ vector) * normal

    def rise(self) -> float:
        r"""Cosine of $v_\perp$ and the steepest way up: positive where the symmetry component raises
        $|\nabla|^2$."""
        return float(torch.cosine_similarity(self.across, self.ascent, dim=0))

    def rise_for_length(self, direction: Tensor) -> float:
        r"""Slope of $\tfrac12|\nabla|^2$ along a direction $d$, for its length $\sqrt{d^\top H d}$."""
        return float((self.ascent @ direction) / (direction @ self.hessian @ direction).sqrt())

    def basis(self) -> Tensor:
        """An orthonormal basis of the tangent space, `(n, n - 1)`."""
        return torch.linalg.qr(self.gradient.unsqueeze(1), mode="complete").Q[:, 1:]

    def model(self, step: Tensor) -> float:
        """The second-order model's change in a step."""
        return float(self.gradient @ step + step @ self.hessian @ step / 2)


def split(function: Function, x: Tensor) -> Split:
    r"""Splits Newton's step at a point.

    $$v_\parallel = \frac{v^\top \nabla}{|\nabla|^2}\nabla, \qquad v_\perp = v - v_\parallel.$$

    Args:
        function: maps `(n,)` to a scalar.
        x: where, `(n,)`.

    Example:
        >>> weights = torch.tensor([1.0, 4.0], dtype=torch.float64)
        >>> found = split(lambda x: (weights * x.square()).sum() / 2, torch.ones(2, dtype=torch.float64))
        >>> found.along + found.across
        tensor([-1., -1.], dtype=torch.float64)

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), appendix B.
    """
    gradient, hessian = torch.func.grad(function)(x), torch.func.hessian(function)(x)
    step = -torch.linalg.solve(hessian, gradient)
    along = (step @ gradient) / gradient.square().sum() * gradient
    return Split(gradient, hessian, along, step - along)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Newton(Experiment):
    """Newton's step split into its gradient and symmetry component, on convex and other functions.

    Settings:
        functions: random functions of each kind.
        dimension: of their argument.
    """

    name: ClassVar[str] = "newton"
    size: ClassVar[tuple[float, float]] = (13.5, 4.2)

    functions: int = 200
    dimension: int = 8

    def __post_init__(self) -> None:
        if self.functions < 2 or self.dimension < 3:
            raise ExperimentError(
                f"newton needs at least two functions and a dimension of 3 (in 2 there is one tangent only, and that "
                f"case is always looked at too); got functions={self.functions}, dimension={self.dimension}"
            )

    def findings(self, seed: int, progress: Progress) -> Findings:
        results: dict[str, Any] = {}
        for kind in (*CONVEX, "saddles", "cubics", "tanh networks"):
            progress(kind)
            results[kind] = _measured(self._functions(kind, self.dimension, seed), kind in CONVEX)
        progress("two dimensions")
        plane = _measured(self._functions("quartics", 2, seed), True)
        results["quartics in the plane"] = {name: plane[name] for name in ("rise",)}
        return Findings(results, _claims(results, seed))

    def _functions(self, kind: str, dimension: int, seed: int) -> Iterator[tuple[Function, Tensor]]:
        if kind == "tanh networks":
            yield from _networks(self.functions, seed)
            return
        source = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source, dtype=torch.float64)

        for _ in range(self.functions):
            yield _KINDS[kind](dimension, draw), draw(dimension)

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        first, second, third = figure.subplots(1, 3)
        colours = dict(zip(results, (BLUE, GREEN, SKY, VERMILLION, ORANGE, PURPLE, BLACK), strict=True))
        for kind, found in results.items():
            if kind != "quartics in the plane":
                values = np.sort(found["rise"])
                first.plot(values, np.linspace(0, 1, len(values)), color=colours[kind], label=kind)
        first.axvline(0, color="#999999", linewidth=0.8)
        first.set(xlabel="cosine of the symmetry component and\nthe steepest way up for the gradient norm")
        first.set(ylabel="share of the functions below")
        first.legend(fontsize=7)
        for kind in CONVEX:
            ratios = np.asarray(results[kind]["norm_ratio"])
            second.plot(SHARES, np.median(ratios, 0), color=colours[kind], label=kind)
            second.fill_between(
                SHARES, *np.quantile(ratios, [0.05, 0.95], 0), color=colours[kind], alpha=0.15, linewidth=0
            )
        second.axhline(1, color="#999999", linewidth=0.8)
        second.set(yscale="log", xlabel="share of the symmetry component gone, back on the level set")
        second.set(ylabel="gradient norm / gradient norm before\n(median, 5 to 95 %)")
        second.legend(fontsize=7)
        for kind in CONVEX:
            third.plot(
                results[kind]["condition"], results[kind]["rise"], ".", color=colours[kind], markersize=4, label=kind
            )
        third.set(xscale="log", xlabel="condition number of the Hessian", ylabel="the same cosine")
        third.legend(fontsize=7)


Draw = Callable[..., Tensor]


def _spectrum(dimension: int, draw: Draw) -> Tensor:
    """Positive numbers over up to three decades."""
    return 10.0 ** (3 * torch.sigmoid(draw(dimension)) - 1.5)


def _form(dimension: int, draw: Draw, signs: Tensor | float = 1.0) -> Tensor:
    axes = torch.linalg.qr(draw(dimension, dimension)).Q
    return (axes * (_spectrum(dimension, draw) * signs)) @ axes.mT


def _quadratic(dimension: int, draw: Draw) -> Function:
    matrix = _form(dimension, draw)
    return lambda x: x @ matrix @ x / 2


def _saddle(dimension: int, draw: Draw) -> Function:
    signs = torch.where(draw(dimension) > 0, 1.0, -1.0).to(torch.float64)
    signs[0], signs[1] = 1.0, -1.0
    matrix = _form(dimension, draw, signs)
    return lambda x: x @ matrix @ x / 2


def _log_sum_exp(dimension: int, draw: Draw) -> Function:
    slopes, offsets = draw(3 * dimension, dimension), draw(3 * dimension)
    return lambda x: torch.logsumexp(slopes @ x + offsets, 0) + 0.05 * x.square().sum()


def _quartic(dimension: int, draw: Draw) -> Function:
    slopes, offsets = draw(dimension, dimension), draw(dimension)
    return lambda x: (slopes @ x - offsets).pow(4).sum() / 4 + 0.05 * x.square().sum()


def _cubic(dimension: int, draw: Draw) -> Function:
    matrix, cube = _form(dimension, draw), draw(dimension, dimension, dimension)
    return lambda x: x @ matrix @ x / 2 + torch.einsum("ijk,i,j,k->", cube, x, x, x) / 6


_KINDS: dict[str, Callable[[int, Draw], Function]] = {
    "convex quadratics": _quadratic,
    "log-sum-exp": _log_sum_exp,
    "quartics": _quartic,
    "saddles": _saddle,
    "cubics": _cubic,
}


def _networks(count: int, seed: int) -> Iterator[tuple[Function, Tensor]]:
    """Losses of small networks at their start: few enough parameters for a whole Hessian."""
    settings = {"width": 4, "samples": 12, "activation": "tanh", "distribution": "normal"}
    family = load_family("leaky_mlp", settings)
    for index in range(count):
        task = family.task(index, "held-out", seed)
        shapes = {name: value.shape for name, value in task.model.named_parameters()}

        def function(x: Tensor, task: Any = task, shapes: Mapping[str, Any] = shapes) -> Tensor:
            pieces = x.split([shape.numel() for shape in shapes.values()])
            values = {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
            outputs = torch.func.functional_call(task.model, values, task.inputs)
            return task.loss(outputs, *task.targets)

        yield function, torch.cat([value.detach().flatten() for value in task.model.parameters()])


def _measured(functions: Iterator[tuple[Function, Tensor]], convex: bool) -> dict[str, Any]:
    found: dict[str, Any] = {name: [] for name in ("rise", "definite")}
    if convex:
        found.update({name: [] for name in ("condition", "hessian_gap", "model_gap", "norm_ratio")})
    for function, x in functions:
        here = split(function, x)
        eigenvalues = torch.linalg.eigvalsh(here.hessian)
        found["rise"].append(here.rise())
        found["definite"].append(int((eigenvalues > 0).all()) - int((eigenvalues < 0).all()))
        if convex:
            found["condition"].append(float(eigenvalues[-1] / eigenvalues[0]))
            found["hessian_gap"].append(_hessian_gap(here))
            found["model_gap"].append(_model_gap(here))
            found["norm_ratio"].append(_along_the_level_set(function, x, here))
    return found


def _hessian_gap(here: Split) -> float:
    """How much worse the symmetry component is than the best tangent direction of its length in the Hessian's norm."""
    basis = here.basis()
    best = basis @ torch.linalg.solve(basis.mT @ here.hessian @ basis, basis.mT @ here.ascent)
    return 1 - here.rise_for_length(here.across) / here.rise_for_length(best)


def _model_gap(here: Split) -> float:
    """How much lower the second-order model could get after the gradient component, by the best tangent move."""
    basis = here.basis()
    slope = basis.mT @ (here.gradient + here.hessian @ here.along)
    best = -basis @ torch.linalg.solve(basis.mT @ here.hessian @ basis, slope)
    reached, lowest = here.model(here.along + here.across), here.model(here.along + best)
    return abs(reached - lowest) / abs(lowest)


def _along_the_level_set(function: Function, x: Tensor, here: Split) -> list[float]:
    """Gradient norm over that at `x`, after shares of the symmetry component and back onto the level set."""
    both = torch.func.grad_and_value(function)
    level, norm = function(x), float(here.gradient.norm())
    ratios = []
    for share in SHARES:
        moved = x + share * here.across
        for _ in range(200):
            gradient, value = both(moved)
            if abs(float(value - level)) <= 1e-12 * (1 + abs(float(level))):
                break
            moved = moved - (value - level) / gradient.square().sum() * gradient
        ratios.append(float(gradient.norm()) / norm)
    return ratios


def _claims(results: Mapping[str, Any], seed: int) -> list[Claim]:
    convex = [results[kind] for kind in CONVEX]
    rises = np.concatenate([found["rise"] for found in convex])
    ratios = np.concatenate([found["norm_ratio"] for found in convex])
    first, whole = int((ratios[:, 0] >= 1).sum()), int((ratios[:, -1] >= 1).sum())
    hessian = max(max(found["hessian_gap"]) for found in convex)
    model = max(max(found["model_gap"]) for found in convex)
    plane = float(np.min(results["quartics in the plane"]["rise"]))
    trials = len(rises)
    claims = [
        Claim(
            "on convex functions the symmetry component of Newton's step raises the gradient norm: smallest cosine "
            "with the steepest way up",
            "ICLR 2024, Proposition B.2",
            float(rises.min()),
            None,
            bool(rises.min() >= -ROUNDING),
        ),
        Claim(
            "so does a hundredth of it, gone for real and back onto the level set: share of convex functions",
            "ICLR 2024, Proposition B.2",
            first / trials,
            share_interval(first, trials),
            first == trials,
        ),
        Claim(
            "the whole symmetry component, gone for real and back onto the level set, raises it still: share of convex "
            "functions",
            "here: what is proved is about small moves",
            whole / trials,
            share_interval(whole, trials),
            whole == trials,
        ),
        Claim(
            "on convex functions it is the best direction in the tangent space, by the rise for its length in the "
            "Hessian's norm: largest gap to the best",
            "ICLR 2024, Proposition B.3",
            hessian,
            None,
            hessian <= ROUNDING,
        ),
        Claim(
            "on convex functions it is the best move in the tangent space beside the gradient component, by the "
            "second-order model: largest gap to the lowest value",
            "ICLR 2024, Proposition B.3",
            model,
            None,
            model <= ROUNDING,
        ),
        Claim(
            "in two dimensions it is the best direction by the rise for its Euclidean length: smallest cosine with the "
            "steepest way up",
            "ICLR 2024, Proposition B.3",
            plane,
            None,
            plane >= 1 - ROUNDING,
        ),
        Claim(
            "so it is in more dimensions: median cosine with the steepest way up",
            "here: Proposition B.3 read with the Euclidean length",
            float(np.median(rises)),
            bootstrap(rises, np.median, seed),
            bool(rises.min() >= 1 - ROUNDING),
        ),
    ]
    for kind in ("saddles", "cubics", "tanh networks"):
        rise, definite = np.asarray(results[kind]["rise"]), np.asarray(results[kind]["definite"])
        indefinite = rise[definite == 0]
        if len(indefinite):
            up = int((indefinite > 0).sum())
            claims.append(
                Claim(
                    f"it raises the gradient norm without convexity too ({kind}, where the Hessian is indefinite): "
                    "share of the functions",
                    "here: Proposition B.2 without its condition",
                    up / len(indefinite),
                    share_interval(up, len(indefinite)),
                    up == len(indefinite),
                )
            )
    return claims
