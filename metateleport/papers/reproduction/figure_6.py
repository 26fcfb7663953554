r"""Figure 6 of the source paper: LSTMs over flattened gradients that learn to teleport, on the paper's regression.

Task: $L = \tfrac12 |Y - W_2 \sigma(W_1 X)|^2$, all 20x20 and uniform on [0, 1], LeakyReLU. Gradient descent with 3e-4
stands against LSTM(update), LSTM(lr, tele) and LSTM(update, tele), each meta-trained on 700 runs of 100 steps, unrolled
by ten, with Adam at 1e-4 on the network that steps and at 1e-3 on the one that teleports, and generators of norm 0.01.

Beside the paper's curves: several meta-seeds, the same networks with the teleport off or random, the step meta-trained
without teleports, and the same networks with harmful steps taken back.

Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 5, figure 6 and appendix E.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metateleport.evaluation import Evaluation, FirstOrder, Seed, evaluate, report_of
from metateleport.evaluation.methods.learned import Learned
from metateleport.evaluation.trajectory import Method
from metateleport.families import TaskFamily, TaskStack
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig, TeleportSettings
from metateleport.papers.flat import FlatSettings
from metateleport.papers.reproduction.seeds import stack_seeds, unstack_seeds
from metateleport.papers.reproduction.unguarded import Unguarded
from metateleport.training import TrainingError, Unroll

__all__ = ["NETWORKS", "SCHEMA", "Figure6", "figure_6"]

SCHEMA = 1
NETWORKS = {
    "LSTM(update)": "update",
    "LSTM(update,tele)": "update+tele",
    "LSTM(lr,tele)": "lr+tele",
}
"""The paper's three, by its names."""

_ALONE = {"lr+tele": "lr", "update+tele": "update"}


@dataclasses.dataclass(frozen=True)
class Figure6:
    """Settings of the reproduction; the defaults are the paper's, but for the stack and the seeds.

    Args:
        seeds: meta-seeds of every network, trained side by side.
        runs: training runs for each, one task each.
        stack: runs in one meta-step; the paper's code takes one.
        steps: inner steps of a training run.
        unroll: inner steps of one meta-step.
        hidden: units of the LSTMs.
        step_lr: Adam's step size on the network that steps.
        teleport_lr: that on the network that teleports.
        gd_lr: step size of gradient descent, the paper's baseline.
        tasks: held-out tasks.
        evaluations: gradient evaluations that each method may spend on each of them.
        seed: the first meta-seed.

    Raises:
        TrainingError: if a value cannot work.
    """

    seeds: int = 3
    runs: int = 700
    stack: int = 20
    steps: int = 100
    unroll: int = 10
    hidden: int = 300
    step_lr: float = 1e-4
    teleport_lr: float = 1e-3
    gd_lr: float = 3e-4
    tasks: int = 64
    evaluations: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("runs", "stack", "steps", "unroll", "hidden", "tasks", "evaluations"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} has to be at least 1, not {getattr(self, name)}")
        if self.seeds < 2:
            raise TrainingError(f"results differ between meta-seeds: give at least 2 seeds, not {self.seeds}")
        if self.steps % self.unroll or self.runs % self.stack:
            raise TrainingError(
                f"runs are made of whole windows and stacks: {self.steps} steps by {self.unroll}, {self.runs} runs by "
                f"{self.stack}"
            )
        if not min(self.step_lr, self.teleport_lr, self.gd_lr) > 0 or self.seed < 0:
            raise TrainingError("step sizes have to be positive, and the seed not negative")


@dataclasses.dataclass(frozen=True)
class _Trained:
    """Networks of every seed, their validation scores, the mean loss of each training stack, and seconds."""

    metas: list[MetaOptimizer]
    scores: list[float]
    losses: list[list[float]]
    seconds: float


def figure_6(
    family: TaskFamily, settings: Figure6 | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Meta-trains the paper's networks and evaluates them on held-out tasks, with their attribution.

    Args:
        family: the tasks; the paper's are `leaky_mlp` with its own settings.
        settings: of the reproduction.
        progress: receives messages on what is being done.

    Returns:
        Plain values for JSON: `schema`, `settings`; `training`, by network the `meta_seeds`, each with its mean
        `losses` by training stack and its `validation` score (mean log loss over the start's at the end of a run), and
        `seconds`; `networks`, by network what `metateleport.evaluation.report_of` gives, with `learned` the seed that
        is best on validation tasks; and `collapsed`, by network the seeds that end above gradient descent.
    """
    settings = settings or Figure6()
    told = progress or (lambda _: None)
    trained: dict[str, _Trained] = {}
    for mode in dict.fromkeys((*NETWORKS.values(), *_ALONE.values())):
        trained[mode] = _train(family, mode, settings, told)
    reports = {name: report_of(_evaluated(family, mode, trained, settings, told)) for name, mode in NETWORKS.items()}
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return {
        "schema": SCHEMA,
        "settings": dataclasses.asdict(settings),
        "training": {
            mode: {
                "seconds": each.seconds,
                "meta_seeds": [
                    {"seed": seed, "validation": score, "losses": losses}
                    for seed, score, losses in zip(seeds, each.scores, each.losses, strict=True)
                ],
            }
            for mode, each in trained.items()
        },
        "networks": reports,
        "collapsed": {name: _collapsed(report) for name, report in reports.items()},
    }


def _train(family: TaskFamily, mode: str, settings: Figure6, told: Callable[[str], None]) -> _Trained:
    began = time.perf_counter()
    example = family.stack([0], "train", settings.seed)
    config = MetaOptimizerConfig(
        FlatSettings(
            shapes=tuple((name, tuple(value.shape[1:])) for name, value in example.tensors().items()),
            hidden=settings.hidden,
            per_coordinate=mode.startswith("update"),
        ),
        teleport=TeleportSettings(settings.hidden) if mode in _ALONE else None,
        groups=tuple(dict.fromkeys(symmetry.group.name for symmetry in example.symmetries)),
    )
    seeds = range(settings.seed, settings.seed + settings.seeds)
    metas = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            metas.append(Unguarded(config))
    whole = stack_seeds(metas)
    groups = [{"params": list(whole.rule.parameters()), "lr": settings.step_lr}]  # type: ignore[attr-defined]
    if whole.teleporter is not None:
        groups.append({"params": list(whole.teleporter.parameters()), "lr": settings.teleport_lr})  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(groups)
    losses: list[list[float]] = [[] for _ in seeds]
    for number in range(settings.runs // settings.stack):
        told(f"meta-training {mode}: {number * settings.stack} of {settings.runs} runs, {settings.seeds} seeds at once")
        indices = range(number * settings.stack, (number + 1) * settings.stack)
        unroll = Unroll(_stack(family, indices, "train", seeds), whole, first_order=True)
        means = torch.zeros(len(seeds))
        for _ in range(settings.steps // settings.unroll):
            window = _raw(unroll.window(settings.unroll), unroll).reshape(settings.unroll, len(seeds), -1)
            finite = window.isfinite()
            mean = torch.where(finite, window, 0.0).sum((0, 2)) / finite.sum((0, 2)).clamp_min(1)
            optimizer.zero_grad()
            mean.sum().backward()
            for parameter in whole.parameters():
                if parameter.grad is not None:
                    # A seed whose gradient is not finite stays as it is, and the others go on.
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
            means += mean.detach().float().cpu() * settings.unroll / settings.steps
        for kept, value in zip(losses, means.tolist(), strict=True):
            kept.append(value)
    scores = _scores(family, whole, settings)
    return _Trained([each.eval() for each in unstack_seeds(whole)], scores, losses, time.perf_counter() - began)


def _stack(family: TaskFamily, indices: range, split: Any, seeds: range) -> TaskStack:
    return TaskStack([family.task(index, split, seed) for seed in seeds for index in indices])


def _raw(logs: Tensor, unroll: Unroll) -> Tensor:
    """The sum of the losses, the source's meta-loss, in which early steps with large losses weigh most."""
    assert unroll.start is not None
    return logs.exp() * unroll.start


def _scores(family: TaskFamily, whole: MetaOptimizer, settings: Figure6) -> list[float]:
    # The same tasks for every seed.
    tasks = [family.task(index, "validation", 0) for index in range(settings.stack)]
    unroll = Unroll(TaskStack(tasks * settings.seeds), whole)
    last = unroll.window(settings.steps, track=False)[-1].detach().reshape(settings.seeds, -1)
    return torch.nan_to_num(last, 100.0, 100.0, -100.0).clamp_max(100.0).mean(1).tolist()


def _evaluated(
    family: TaskFamily, mode: str, trained: dict[str, _Trained], settings: Figure6, told: Callable[[str], None]
) -> Evaluation:
    own = trained[mode]
    best = min(range(settings.seeds), key=lambda number: own.scores[number])

    def methods(number: int) -> list[Method]:
        meta = own.metas[number]
        made: list[Method] = [Learned("learned", meta)]
        if mode in _ALONE:
            made.append(Learned("learned/teleport-off", meta, "off"))
            made.append(Learned("learned/random-teleport", meta, "random"))
            made.append(Learned("learned/step-only", trained[_ALONE[mode]].metas[number]))
        # The initial weights are overwritten: they shall take no random numbers of the caller's.
        with torch.random.fork_rng(devices=[]):
            guarded = MetaOptimizer(meta.config)
        guarded.load_state_dict(meta.state_dict())
        return [*made, Learned("learned/guarded", guarded.eval())]

    gd = FirstOrder("gd", lr=settings.gd_lr)
    return evaluate(
        family,
        [*methods(best), gd],
        settings.tasks,
        settings.evaluations,
        checkpoint=f"flat {mode}",
        progress=lambda name: told(f"running {name} of {mode} on {settings.tasks} held-out tasks"),
        meta_seeds=[
            Seed(settings.seed + number, own.scores[number], () if number == best else methods(number))
            for number in range(settings.seeds)
        ],
    )


def _collapsed(report: dict[str, Any]) -> list[int]:
    """Meta-seeds whose median loss at the end is above that of gradient descent."""
    end, bound = str(report["steps"]), report["methods"]["gd"]["median"][-1]
    seeds = report["meta_seeds"].get("seeds", [])
    ends = {each["seed"]: each["methods"]["learned"]["median_loss"][end] for each in seeds}
    return [seed for seed, median in ends.items() if not median <= bound]
