"""Cost and gain of all teleporters on the same tasks, and the cost of gradient ascent in double backward passes.

Seconds are CPU seconds of one thread, medians over rounds in which all cases take turns.

Example:
    python -m benchmarks.teleporters
    python -m benchmarks.teleporters --tasks 4 --rounds 3 --budget 20 --json teleporters.json --markdown page.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metateleport as mt
from benchmarks._timing import conditions
from metateleport.evaluation.paired import paired_ratio
from metateleport.families import TaskStack
from metateleport.files import write_json, write_text
from metateleport.objectives import Curvature, Sharpness, SquaredGradientNorm
from metateleport.point import Point
from metateleport.teleporters import LevelSetTeleporter, Move, NullSpaceTeleporter, travel

__all__ = ["main"]

SCHEMA = 1
STEPS = 10
"""Number of steps of every teleporter that ascends or descends."""
BOUND = 1.3
"""The largest cost of an ascent that is allowed, in double backward passes."""

Maker = Callable[[Sequence[mt.Symmetry]], mt.Teleporter]

TELEPORTERS: dict[str, Maker] = {
    "none": lambda _: mt.NoTeleport(),
    "random": lambda _: mt.RandomTeleporter(size=1.0, seed=0),
    "gradient norm, ascent": lambda _: mt.GradientAscentTeleporter(steps=STEPS),
    "gradient norm, ascent, line search": lambda _: mt.GradientAscentTeleporter(steps=STEPS, line_search=True),
    "gradient norm, descent": lambda _: mt.GradientAscentTeleporter(
        steps=STEPS, step_size=0.02, direction="descent", line_search=True
    ),
    "sharpness, descent": lambda _: mt.GradientAscentTeleporter(
        Sharpness(radii=(0.1,), directions=3), steps=STEPS, step_size=0.05, direction="descent"
    ),
    "sharpness, ascent": lambda _: mt.GradientAscentTeleporter(
        Sharpness(radii=(0.1,), directions=3), steps=STEPS, step_size=0.05
    ),
    "curvature, descent": lambda symmetries: mt.GradientAscentTeleporter(
        Curvature(symmetries, curves=3), steps=STEPS, step_size=0.05, direction="descent"
    ),
    "curvature, ascent": lambda symmetries: mt.GradientAscentTeleporter(
        Curvature(symmetries, curves=3), steps=STEPS, step_size=0.05
    ),
    "whitening, features": lambda _: mt.WhiteningTeleporter("features"),
    "whitening, balanced": lambda _: mt.WhiteningTeleporter("balanced"),
    "null space": lambda _: NullSpaceTeleporter(steps=STEPS),
    "level set": lambda _: LevelSetTeleporter(steps=STEPS),
    "learned": lambda _: mt.load("leaky_mlp"),
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "leaky_mlp": ("leaky_mlp", {}),
    "leaky_mlp, half as many samples": ("leaky_mlp", {"samples": 10}),
    "matrix_factorisation": ("matrix_factorisation", {"batch": None}),
}

# With uniform weights every tanh would be saturated, and the features of all samples alike.
_TANH = {"activation": "tanh", "distribution": "normal"}
PRICED: dict[str, tuple[str, dict[str, Any], int]] = {
    "leaky_mlp, one task": ("leaky_mlp", {}, 1),
    "leaky_mlp, 16 tasks": ("leaky_mlp", {}, 16),
    "leaky_mlp, depth 3, 16 tasks": ("leaky_mlp", {"depth": 3}, 16),
    "leaky_mlp, width 100, 4 tasks": ("leaky_mlp", {"width": 100}, 4),
    "leaky_mlp with tanh, 16 tasks": ("leaky_mlp", _TANH, 16),
    "leaky_mlp with tanh, width 100, 4 tasks": ("leaky_mlp", {**_TANH, "width": 100}, 4),
    "leaky_mlp with tanh, width 100, 50 samples, 4 tasks": ("leaky_mlp", {**_TANH, "width": 100, "samples": 50}, 4),
    "matrix_factorisation, one task": ("matrix_factorisation", {}, 1),
    "matrix_factorisation, 16 tasks": ("matrix_factorisation", {}, 16),
    "digits, one task": ("digits", {}, 1),
}


def double_backward(stack: TaskStack, batch: Any) -> None:
    """The gradient of the squared gradient norm with respect to the weights, forward pass included."""
    weights = list(stack.parameters())
    gradients = torch.autograd.grad(stack(batch).sum(), weights, create_graph=True)
    torch.autograd.grad(sum(value.square().sum() for value in gradients), weights)  # type: ignore[arg-type]


def timed(work: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


class _Counted(SquaredGradientNorm):
    """The objective, which counts its evaluations."""

    made = 0

    def __call__(self, point: Point) -> Tensor:
        self.made += 1
        return super().__call__(point)


def price_of(name: str, rounds: int) -> dict[str, Any]:
    """Times gradient ascent and as many double backward passes, side by side in every round."""
    family, settings, tasks = PRICED[name]
    stack = mt.load_family(family, settings).stack(range(tasks), "held-out")
    batch, counted = stack.batch(0), _Counted()
    # The steps are so short that the cap ends no ascent before its last step.
    teleporter = mt.GradientAscentTeleporter(counted, steps=STEPS, step_size=1e-5, cap=10.0)
    steps = STEPS * len(stack.symmetries)
    point = stack.point_at(stack.tensors(), batch)

    def ascend() -> None:
        with torch.no_grad():
            for symmetry in stack.symmetries:
                teleporter.choose(symmetry, point, None)

    def whole() -> None:
        start = stack.point_at(stack.tensors(), batch)
        with torch.no_grad():
            travel(teleporter, start, stack.symmetries)

    def passes() -> None:
        for _ in range(steps):
            double_backward(stack, batch)

    works = {"ascent": ascend, "teleport": whole, "passes": passes}
    spent: dict[str, list[float]] = {kind: [] for kind in works}
    for number in range(rounds + 1):
        for kind, work in works.items():
            seconds = timed(work)
            # The first round is warm-up.
            if not number:
                assert kind != "ascent" or counted.made == steps, f"{name}: {counted.made} steps, not {steps}"
            else:
                spent[kind].append(seconds)
    ratios = {
        kind: [ours / theirs for ours, theirs in zip(spent[kind], spent["passes"], strict=True)]
        for kind in ("ascent", "teleport")
    }
    return {
        "task": name,
        "symmetries": [f"{each.kind}, {each.group}" for each in stack.symmetries],
        "steps": steps,
        "double_backward_ms": 1e3 * statistics.median(spent["passes"]) / steps,
        "ratios": {
            kind: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for kind, values in ratios.items()
        },
        "rounds": rounds,
    }


def gains_on(name: str, tasks: int, rounds: int, budget: int) -> list[dict[str, Any]]:
    """One teleport by every teleporter from the start of the same tasks, then gradient descent to the budget's end."""
    family, settings = FAMILIES[name]
    stack = mt.load_family(family, settings).stack(range(tasks), "held-out")
    batch = stack.full
    start = stack.point_at(stack.tensors(), batch)
    teleporters = {kind: make(stack.symmetries) for kind, make in TELEPORTERS.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in teleporters}
    arrivals: dict[str, tuple[Point, list[Move]]] = {}
    for number in range(rounds + 1):
        for kind, teleporter in teleporters.items():
            began = time.process_time()
            with torch.no_grad():
                arrived, moves, _ = travel(teleporter, start, stack.symmetries)
            if number:
                seconds[kind].append((time.process_time() - began) / tasks)
            else:
                arrivals[kind] = arrived, moves
    rows, reference = [], None
    for kind, (arrived, moves) in arrivals.items():
        spent = sum((move.evaluations for move in moves), torch.zeros(tasks, dtype=torch.float64))
        losses = descend(stack, batch, arrived, spent + 1, budget)
        reference = losses if reference is None else reference
        norms = (arrived.squared_gradient_norm() / start.squared_gradient_norm()).sqrt()
        assert arrived.loss is not None
        assert start.loss is not None
        ratio = paired_ratio(losses.tolist(), reference.tolist())
        rows.append(
            {
                "teleporter": kind,
                "evaluations": float(spent.mean()),
                "seconds": statistics.median(seconds[kind]),
                "moved": float((sum(move.size for move in moves) > 0).double().mean()) if moves else 0.0,  # type: ignore[union-attr]
                "gradient_norm": float(norms.median()),
                "loss_drift": float(((stack.losses_at(arrived.parameters, batch) / start.loss) - 1).abs().max()),
                "loss_ratio": ratio.ratio,
                "interval": [ratio.low, ratio.high],
                "failures": sorted({failure for move in moves for failure in move.failures}),
            }
        )
    return rows


_FACTORS = (4.0, 1.0, 0.25)


def descend(stack: TaskStack, batch: Any, point: Point, spent: Tensor, budget: int) -> Tensor:
    """Gradient descent with a line search in every step, until each task has spent its budget.

    Args:
        stack: the tasks.
        batch: all data of the tasks.
        point: where to start, with gradients.
        spent: gradient evaluations spent so far, `(tasks,)`.
        budget: gradient evaluations that a task may spend.

    Returns:
        The losses, `(tasks,)`.
    """
    tasks = len(stack)
    parameters, gradients = dict(point.parameters), dict(point.gradients)
    losses = stack.losses_at(parameters, batch)
    # The first step would halve a linear loss.
    size = losses / (2 * point.squared_gradient_norm())
    while True:
        # Three forward passes, and the gradient at the best point.
        spent = spent + 2.0
        going = spent <= budget
        if not bool(going.any()):
            return losses
        best, best_size = dict(parameters), size * _FACTORS[-1] / 2
        best_losses = losses
        for factor in _FACTORS:
            trial = {
                name: value - _wide(factor * size, value) * gradients[name] if name in gradients else value
                for name, value in parameters.items()
            }
            found = stack.losses_at(trial, batch)
            better = going & (found < best_losses)
            best = {name: torch.where(_wide(better, value), value, best[name]) for name, value in trial.items()}
            best_losses = torch.where(better, found, best_losses)
            best_size = torch.where(better, factor * size, best_size)
        parameters, losses, size = best, best_losses, best_size
        gradients = stack.point_at(parameters, batch).gradients
        assert losses.shape == (tasks,)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _largest(report: dict[str, Any], kind: str) -> float:
    return max(float(row["ratios"][kind]["median"]) for row in report["prices"])


def page_of(report: dict[str, Any]) -> str:
    """The report as a page in Markdown."""
    settings, found = report["settings"], report["conditions"]
    lines = [
        "# Teleporters by cost and by gain",
        "",
        "What each hand-designed teleporter costs, and what it gains for gradient descent. Made by "
        f"`python -m benchmarks.teleporters`: {settings['tasks']} held-out tasks of each family, {settings['rounds']} "
        f"rounds in which all cases take turns, CPU time, float64, {found['threads']} thread(s) of {found['cpu']}, "
        f"torch {found['torch']}.",
        "",
        "## The cost of an ascent",
        "",
        f"Gradient ascent on the squared gradient norm takes {STEPS} steps for every symmetry. Its time is divided by "
        "that of as many double backward passes on the same tasks (forward, backward, and the gradient of the squared "
        "gradient norm with respect to the weights): median and range over rounds. The whole teleport adds the "
        "evaluation of the point, the checks of the trust region and the move itself.",
        "",
        "| tasks | symmetries | one double backward pass | ascent alone | whole teleport |",
        "|---|---|---|---|---|",
    ]
    for row in report["prices"]:
        ratios = [f"{each['median']:.2f} ({each['min']:.2f} to {each['max']:.2f})" for each in row["ratios"].values()]
        kinds = "; ".join(dict.fromkeys(row["symmetries"]))
        lines.append(f"| {row['task']} | {kinds} | {row['double_backward_ms']:.1f} ms | {ratios[0]} | {ratios[1]} |")
    lines += [
        "",
        f"The largest median is {_largest(report, 'ascent'):.2f} for the ascent and "
        f"{_largest(report, 'teleport'):.2f} for the whole teleport; the bound on the ascent is {BOUND}. Under exact "
        "symmetries a step is algebra on small matrices. A batch pair rebuilds part of the backward pass in every "
        "step; with two layers that is all of it. In addition the 2022 form inverts the group element, and the 2024 "
        "form the features or their Gram matrix.",
        "",
        "## The gain of each teleporter",
        "",
        "Each teleporter moves once, at the start of each task; gradient descent follows, with a line search in every "
        "step (2 evaluations each). Columns:",
        "",
        "- **evaluations, ms**: the cost of choosing and moving, for one task.",
        "- **gradient norm**: after the teleport over before, median over tasks. A larger gradient alone is no gain.",
        "- **drift**: largest relative change of the loss in the teleport.",
        f"- **loss at equal evaluations**: the loss when {settings['budget']} gradient evaluations are spent, those of "
        "the teleporter included, over the loss without a teleport. Median of the ratios over tasks, with its 95 % "
        "interval; below 1 the teleport helps.",
    ]
    for name, rows in report["gains"].items():
        better = [row["teleporter"] for row in rows if row["interval"][1] < 1]
        worse = [row["teleporter"] for row in rows if row["interval"][0] > 1]
        lines += [
            "",
            f"### {name}",
            "",
            f"Better than no teleport (the whole interval is below 1): {'; '.join(better) or 'none'}. Worse (the whole "
            f"interval is above 1): {'; '.join(worse) or 'none'}.",
            "",
            "| teleporter | evaluations | ms | gradient norm | drift | loss at equal evaluations | failures named |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            low, high = row["interval"]
            failures = ", ".join(row["failures"]) or ("" if row["moved"] else "stays")
            lines.append(
                f"| {row['teleporter']} | {row['evaluations']:.1f} | {1e3 * row['seconds']:.2f} "
                f"| {row['gradient_norm']:.3g} | {row['loss_drift']:.0e} "
                f"| {row['loss_ratio']:.2g} [{low:.2g}, {high:.2g}] | {failures} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command-line arguments; those of the process if not given.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.teleporters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, default=8, help="held-out tasks of each family")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing, after one of warm-up")
    parser.add_argument("--budget", type=int, default=80, help="gradient evaluations of a task, all in all")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--priced", nargs="+", choices=list(PRICED), default=list(PRICED), metavar="CASE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", default=Path("docs/teleporters.md"))
    parsed = parser.parse_args(arguments)
    if min(parsed.tasks, parsed.rounds, parsed.budget) < 1:
        parser.error("--tasks, --rounds and --budget are above zero")
    settings = {name: getattr(parsed, name) for name in ("tasks", "rounds", "budget")}
    report: dict[str, Any] = {"schema": SCHEMA, "settings": settings, "conditions": conditions(torch.device("cpu"))}
    report["prices"] = [_told(name, price_of(name, parsed.rounds)) for name in parsed.priced]
    report["gains"] = {
        name: _told(name, gains_on(name, parsed.tasks, parsed.rounds, parsed.budget)) for name in parsed.families
    }
    page = page_of(report)
    print(page, end="")
    write_text(parsed.markdown, page)
    if parsed.json is not None:
        write_json(parsed.json, report)
    return 0


def _told(name: str, found: Any) -> Any:
    print(f"{name}: done", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
