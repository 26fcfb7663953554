"""Golden trajectories: what every shipped checkpoint does on a few held-out tasks, in float64.

    python tests/golden/record.py                 # all entries
    python tests/golden/record.py digits          # those of one checkpoint

A change that keeps the behaviour keeps these numbers to 1e-10 (`test_golden.py` beside it); one that changes it on
purpose says so in its commit and records them anew. The networks are in float64 too: in float32 another processor's
exponential is 1e-8 away after one step.

Some trajectories amplify rounding: those of `leaky_mlp` and `leaky_mlp_stays` on uniform data, whose covariances are
badly conditioned, and all of them at a loss that is down to rounding. So each entry is also run from starts that are
moved by a rounding error. Where that changes a value by more than a tenth of the tolerance, the value's own tolerance,
`slack` in the file, is ten times the change; where rounding decides whether a step is accepted, or more than a
thousandth of a value, the recording of the task ends: `steps` and `window_steps` say how long it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metateleport.checkpoint import load_checkpoint
from metateleport.families import TaskStack, load_family
from metateleport.gauges import Gauge
from metateleport.training.unroll import Unroll

FOLDER = Path(__file__).resolve().parent
TASKS, STEPS, WINDOW = 4, 30, 10
_STARTS = 4
_LARGEST = 1e-3
_EXACT = ("accepted", "refused", "evaluations")
TOLERANCE = 1e-10
LOSS_FLOOR = 1e-24
"""Share of a task's first loss below which losses are rounding."""

_SQUARE = ("leaky_mlp", {"distribution": "normal"})
_NORMAL = ("leaky_mlp", {"samples": 30, "distribution": "normal"})
_TEACHER = (
    "leaky_mlp",
    {"samples": 2000, "distribution": "normal", "batch": 50, "labels": "teacher", "noise": 1.0},
)
ENTRIES: dict[str, tuple[str, tuple[str, dict[str, Any]]]] = {
    "bottleneck_digits": ("bottleneck_digits", ("bottleneck_digits", {})),
    "default": ("default", ("digits", {})),
    "default-residual": ("default", ("residual_digits", {})),
    "digits": ("digits", ("digits", {})),
    "leaky_mlp": ("leaky_mlp", ("leaky_mlp", {})),
    "leaky_mlp-normal": ("leaky_mlp", _SQUARE),
    "leaky_mlp_mixture-normal": ("leaky_mlp_mixture", _NORMAL),
    "leaky_mlp_mixture-teacher": ("leaky_mlp_mixture", _TEACHER),
    "leaky_mlp_stays": ("leaky_mlp_stays", ("leaky_mlp", {})),
    "leaky_mlp_stays-normal": ("leaky_mlp_stays", _SQUARE),
    "lora": ("lora", ("lora_digits", {"samples": 100, "batch": 20})),
    "matrix_factorisation": ("matrix_factorisation", ("matrix_factorisation", {})),
}
"""By the name of the file: the checkpoint, and the family with what is set beside the defaults."""

Recorded = dict[str, Any]


def stack_of(entry: str, perturbed: int = 0) -> TaskStack:
    """The tasks of an entry; `perturbed` is the number of a start that is a rounding error away."""
    name, settings = ENTRIES[entry][1]
    stack = load_family(name, settings).stack(range(TASKS), "held-out", dtype=torch.float64)
    if perturbed:
        source = torch.Generator().manual_seed(perturbed)
        with torch.no_grad():
            for value in stack.parameters():
                signs = torch.randint(-1, 2, value.shape, generator=source)
                value.mul_(1 + signs.double() * torch.finfo(torch.float64).eps)
    return stack


def trajectory(entry: str, perturbed: int = 0) -> Recorded:
    """Steps as an evaluation takes them; by quantity `(steps, tasks)`, and by place for teleports and gauges."""
    stack, meta = stack_of(entry, perturbed), load_checkpoint(ENTRIES[entry][0]).learned.double()
    parameters = {name: value.detach() for name, value in stack.tensors().items()}
    state: Any = None
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for number in range(STEPS):
            point = stack.point_at(parameters, stack.batch(number))
            if state is None:
                state = meta.initial_state(point, stack.symmetries, stack.deterministic)
            taken = meta.step(point, stack.symmetries, state)
            state, parameters = taken.state, taken.parameters
            squares = sum(value.flatten(1).square().sum(1) for value in parameters.values())
            values = {"loss": point.loss, "norm": squares.sqrt(), "accepted": taken.accepted}
            values["evaluations"] = taken.evaluations
            if meta.teleporter is not None:
                values["refused"] = taken.refused
            sizes = {move.symmetry.key: move.size for move in taken.moves}
            for place, symmetry in enumerate(reversed(stack.symmetries)):
                size = sizes.get(symmetry.key, torch.zeros_like(taken.size))
                values[f"teleport {place} {' '.join(symmetry.modules)}"] = size
            for place, gauge in enumerate(taken.gauges):
                values[f"gauge {place} {_label(gauge)}"] = gauge.size
            for name, value in values.items():
                found.setdefault(name, []).append(value.double())
    return {name: torch.stack(values) for name, values in found.items()}


def window(entry: str, perturbed: int = 0) -> Recorded:
    """One window of meta-training through `higher`: log losses, and the norm of the gradient of one of them a step."""
    stack, meta = stack_of(entry, perturbed), load_checkpoint(ENTRIES[entry][0]).learned.double()
    losses = Unroll(stack, meta).window(WINDOW)
    norms = torch.zeros_like(losses.detach())
    for step in range(WINDOW):
        # One task a step: all of them would cost more than the window itself.
        task = step % TASKS
        found = torch.autograd.grad(losses[step, task], list(meta.parameters()), retain_graph=True, allow_unused=True)
        norms[step, task] = sum(each.square().sum() for each in found if each is not None).sqrt()
    return {"log loss": losses.detach(), "meta-gradient": norms}


def _label(gauge: Gauge) -> str:
    return f"{gauge.side} {' '.join(gauge.names)}"


def apart(name: str, mine: Tensor, other: Tensor, first: Tensor) -> Tensor:
    """How far two recordings of a quantity are apart, relative, `(steps, tasks)`; `first` is the loss at the start."""
    if name in _EXACT:
        return torch.where(mine == other, 0.0, torch.inf)
    floor = torch.ones_like(mine) if name == "log loss" else torch.full_like(mine, 1e-3)
    if name == "loss":
        floor = (LOSS_FLOOR / TOLERANCE * first.abs()).expand_as(mine)
    return (mine - other).abs() / mine.abs().maximum(floor)


def record(entry: str) -> Recorded:
    """What a file holds."""
    name, settings = ENTRIES[entry][1]
    found: Recorded = {"checkpoint": ENTRIES[entry][0], "family": name, "settings": settings}
    for run, counted in ((trajectory, "steps"), (window, "window_steps")):
        runs = [run(entry, number) for number in range(_STARTS)]
        values, first = runs[0], runs[0].get("loss", torch.zeros(1, TASKS, dtype=torch.float64))[:1]
        moved = {
            name: torch.stack([apart(name, value, other[name], first) for other in runs[1:]]).amax(0)
            for name, value in values.items()
        }
        # A change at one step of any quantity is one of all that come after it.
        lost = torch.stack([(10 * far).cummax(0).values > _LARGEST for far in moved.values()]).any(0)
        steps = [int((~lost[:, task]).sum()) for task in range(TASKS)]
        found[counted] = steps
        found[run.__name__] = {name: _columns(value, steps) for name, value in values.items()}
        slack = {name: torch.where(far > TOLERANCE / 10, 10 * far, 0.0) for name, far in moved.items()}
        found[f"{run.__name__} slack"] = {
            name: [[float(f"{each:.1e}") for each in column] for column in _columns(far, steps)]
            for name, far in slack.items()
            if bool((far > 0).any()) and any(steps)
        }
    return found


def _columns(value: Tensor, steps: list[int]) -> list[list[float]]:
    return [value[:count, task].tolist() for task, count in enumerate(steps)]


def main() -> None:
    wanted = [entry for entry in ENTRIES if not sys.argv[1:] or ENTRIES[entry][0] in sys.argv[1:]]
    for entry in wanted:
        found = record(entry)
        (FOLDER / f"{entry}.json").write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")
        print(f"{entry}: {found['steps']} steps of {STEPS}, {found['window_steps']} of a window of {WINDOW}")


if __name__ == "__main__":
    main()
