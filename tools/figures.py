"""The figures of docs/concepts.md: orbits, a teleport that stays, a gauge, in two dimensions.

    python -m tools.figures

Everything that is drawn is computed by the library, on problems of two weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.evaluation.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, bare, new_figure, save
from metateleport.point import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FIGURES", "gauge", "main", "orbits", "teleport"]

FOLDER = Path("docs/concepts")


class Product(nn.Module):
    """Two weights in a row: y = u v x."""

    def __init__(self, u: float, v: float) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.v.weight.fill_(v)
            self.u.weight.fill_(u)

    def forward(self, x: Tensor) -> Tensor:
        return self.u(self.v(x))

    def place(self) -> tuple[float, float]:
        return float(self.u.weight.detach()), float(self.v.weight.detach())


def _loss(model: nn.Module) -> Tensor:
    """Half the squared error to y = x, at x = 1."""
    return (model(torch.ones(1, 1)) - 1).square().sum() / 2


def _point(model: Product) -> Point:
    """Weights and gradients."""
    named = dict(model.named_parameters())
    loss = _loss(model)
    gradients = torch.autograd.grad(loss, list(named.values()))
    weights = {name: value.detach() for name, value in named.items()}
    return Point(parameters=weights, loss=loss.detach(), gradients=dict(zip(named, gradients, strict=True)))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, **more: Any) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0, **more}
    axes.annotate("", end, start, arrowprops=style)


def _say(axes: Axes, x: float, y: float, words: str, colour: str, **more: Any) -> None:
    """A label in the colour of what it names, on a white ground."""
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9}
    axes.text(x, y, words, color=colour, fontsize=9, bbox=ground, **more)


def _contours(axes: Axes, u: Any, v: Any, loss: Any, levels: Sequence[float]) -> None:
    axes.contour(u, v, loss, levels=levels, colors=GREY, linewidths=0.8, alpha=0.6)


def orbits(path: Path) -> None:
    """Level sets and one orbit of u v: on it the loss is the same and the gradient is not."""
    figure = new_figure(6.2, 5.2)
    axes = figure.subplots()
    u, v = np.meshgrid(np.linspace(0.02, 3.2, 300), np.linspace(0.02, 2.6, 300))
    _contours(axes, u, v, (u * v - 1) ** 2 / 2, [0.005, 0.03, 0.09, 0.18, 0.3, 0.42, 0.7, 1.4, 2.8, 5.6])
    along = np.linspace(0.05, 3.2, 300)
    axes.plot(along, 1 / along, color=GREEN, linewidth=1.5)
    _say(axes, 1.5, 0.74, "minima: u v = 1", GREEN)
    model = Product(0.55, 0.55)
    pair, start = mt.LinearPair(model, "v", "u"), _point(model)
    places = []
    for log_element in (-1.5, -0.75, 0.0, 0.75, 1.5):
        moved = pair.act(torch.tensor([[log_element]]).exp(), start)
        here = float(moved.parameters["u.weight"]), float(moved.parameters["v.weight"])
        slope = tuple(float(moved.gradients[f"{name}.weight"]) for name in "uv")
        places.append(here)
        _arrow(axes, here, (here[0] - 0.55 * slope[0], here[1] - 0.55 * slope[1]), VERMILLION)
    axes.plot(along, 0.55**2 / along, color=BLUE, linewidth=2.2)
    axes.plot(*zip(*places, strict=True), "o", color=BLUE, markersize=6)
    _say(axes, 0.33, 0.1, "one orbit: the loss is equal", BLUE)
    _say(axes, 1.15, 2.36, "the step of gradient descent\nfrom five of its points", VERMILLION)
    _say(axes, 2.1, 1.75, "level sets of the loss", "#555555")
    axes.set(xlabel="u", ylabel="v", xlim=(0, 3.2), ylim=(0, 2.6))
    bare(axes, grid=False)
    save(figure, path)


def _descent(model: Product, steps: int, rate: float) -> tuple[list[tuple[float, float]], list[float]]:
    """Gradient descent: places and losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    places, losses = [model.place()], [float(_loss(model).detach())]
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()
        places.append(model.place())
        losses.append(float(_loss(model).detach()))
    return places, losses


def teleport(path: Path) -> None:
    """Gradient descent, and gradient descent after one teleport to where the gradient is longer."""
    figure = new_figure(10.0, 4.4)
    plane, curves = figure.subplots(1, 2)
    u, v = np.meshgrid(np.linspace(0.0, 2.4, 300), np.linspace(0.0, 1.5, 300))
    _contours(plane, u, v, (u * v - 1) ** 2 / 2, [0.005, 0.03, 0.09, 0.18, 0.3, 0.42, 0.7, 1.4])
    along = np.linspace(0.3, 2.4, 200)
    plane.plot(along, 1 / along, color=GREEN, linewidth=1.5)
    _say(plane, 1.75, 0.62, "minima", GREEN)
    steps, rate = 24, 0.12
    stays = Product(0.2, 0.32)
    begun = stays.place()
    places, losses = _descent(stays, steps, rate)
    plane.plot(*zip(*places, strict=True), ".-", color=BLUE, linewidth=1.2, markersize=4)
    curves.plot(losses, color=BLUE, linewidth=1.8)
    moved = Product(0.2, 0.32)
    teleporter = mt.GradientAscentTeleporter(steps=40, step_size=0.3)
    pair = mt.LinearPair(moved, "v", "u")
    mt.teleport(moved, teleporter, torch.ones(1, 1), lambda y: (y - 1).square().sum() / 2, symmetries=[pair])
    arrived = moved.place()
    places, losses = _descent(moved, steps, rate)
    plane.plot(*zip(*places, strict=True), ".-", color=VERMILLION, linewidth=1.2, markersize=4)
    curves.plot(losses, color=VERMILLION, linewidth=1.8)
    orbit = np.linspace(min(begun[0], arrived[0]), max(begun[0], arrived[0]), 100)
    plane.plot(orbit, begun[0] * begun[1] / orbit, color=ORANGE, linewidth=2.4)
    plane.plot(*begun, "o", color=BLUE)
    plane.plot(*arrived, "o", color=VERMILLION)
    _say(plane, 0.5, 0.34, "gradient descent", BLUE)
    _say(plane, 0.2, 1.3, "gradient descent\nafter a teleport", VERMILLION)
    _say(plane, 0.1, 0.12, "the teleport,\nalong the orbit", ORANGE)
    _say(curves, 8.2, 0.28, "gradient descent", BLUE)
    _say(curves, 2.0, 3e-3, "after a teleport", VERMILLION)
    plane.set(xlabel="u", ylabel="v", xlim=(0, 2.4), ylim=(0, 1.5))
    curves.set(xlabel="step", ylabel="loss", yscale="log", xlim=(0, steps))
    for axes in (plane, curves):
        bare(axes, grid=axes is curves)
    save(figure, path)


class Readout(nn.Module):
    """A row of two weights that reads features of unequal size: y = w (V h)."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.v.weight.copy_(torch.eye(2))
            self.w.weight.copy_(torch.tensor([[-1.2, 0.9]]))

    def forward(self, h: Tensor) -> Tensor:
        return self.w(self.v(h))


def gauge(path: Path) -> None:
    """A step on a long bowl, and the same weights moved to where the bowl is round, stepped there and moved back."""
    figure = new_figure(10.0, 4.6)
    model, generator = Readout(), torch.Generator().manual_seed(0)
    h = torch.randn(400, 2, generator=generator) @ torch.tensor([[1.6, 0.9], [0.0, 0.35]])
    targets = h @ torch.tensor([[1.0], [-0.4]])
    covariance = h.T @ h / len(h)
    values, vectors = torch.linalg.eigh(covariance)
    element = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    pair = mt.LinearPair(model, "v", "w")
    named = dict(model.named_parameters())
    loss = (model(h) - targets).square().mean() / 2
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    here = Point(parameters={name: value.detach() for name, value in named.items()}, gradients=gradients)
    there = pair.act(element, here)
    back = torch.linalg.inv(element)
    # A step of length one in the round bowl; the plain one is as long as the long bowl allows.
    stepped = there.parameters["w.weight"] - there.gradients["w.weight"]
    undone = stepped @ element
    plain = here.parameters["w.weight"] - here.gradients["w.weight"] / values.max()
    left, right = figure.subplots(1, 2)
    for axes, metric, moved in ((left, covariance, torch.eye(2)), (right, element @ covariance @ element.T, back)):
        best = torch.tensor([[1.0, -0.4]]) @ moved
        start, with_gauge, without = (each @ moved for each in (here.parameters["w.weight"], undone, plain))
        spread = 1.35 * float((start - best).abs().max())
        middle = ((start + best) / 2).flatten()
        first = np.linspace(float(middle[0]) - spread, float(middle[0]) + spread, 200)
        second = np.linspace(float(middle[1]) - spread, float(middle[1]) + spread, 200)
        grid = torch.tensor(np.stack(np.meshgrid(first, second), -1), dtype=torch.float32) - best
        heights = torch.einsum("...i,ij,...j->...", grid, metric, grid) / 2
        top = float(heights[100, 100]) + 1e-9
        axes.contour(
            first,
            second,
            heights,
            levels=[top * f for f in (0.02, 0.1, 0.3, 0.7, 1.5, 3, 6)],
            colors=GREY,
            linewidths=0.8,
            alpha=0.6,
        )
        places = [(float(each[0, 0]), float(each[0, 1])) for each in (start, with_gauge, without, best)]
        axes.plot(*places[3], "*", color=GREEN, markersize=13)
        _arrow(axes, places[0], places[2], BLUE)
        _arrow(axes, places[0], places[1], VERMILLION)
        axes.plot(*places[0], "o", color="black", markersize=5)
        far = {"textcoords": "offset points", "fontsize": 9}
        axes.annotate("gradient step", places[2], (4, 6), color=BLUE, **far)
        axes.annotate("step in the gauge", places[1], (-92, -34), color=VERMILLION, **far)
        axes.annotate("minimum", places[3], (9, -4), color=GREEN, **far)
        axes.set_aspect("equal")
        bare(axes, grid=False)
    left.set(xlabel="w, first weight", ylabel="w, second weight", title="where the model is")
    right.set(xlabel="w g⁻¹, first weight", ylabel="w g⁻¹, second weight", title="in the gauge g")
    save(figure, path)


FIGURES: dict[str, Callable[[Path], None]] = {"orbits": orbits, "teleport": teleport, "gauge": gauge}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the figures."""
    parser = argparse.ArgumentParser(prog="python -m tools.figures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default %(default)s)")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(given.out / f"{name}.png")
        print(given.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
