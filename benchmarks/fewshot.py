"""Teleportation in the inner loop of MAML and Meta-SGD on few-shot digits, and Meta-Curvature beside it.

Every method is meta-trained on the same meta-batches, from the same starts and for the same number of gradient
evaluations. Its inner learning rate is tuned on validation tasks by short meta-trainings. Results are on held-out
tasks, with digits that no other task has.

Example:
    python -m benchmarks.fewshot --markdown docs/fewshot.md --json docs/fewshot.json
    python -m benchmarks.fewshot --methods maml maml+ascent --seeds 1 --meta-steps 40
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._fewshot_methods import METHODS, Meta, base_of, build, standing, switched_off
from benchmarks._fewshot_report import compare, page_of, words_of
from metateleport import TaskFamily, load_family
from metateleport.checkpoint import shipped_checkpoints
from metateleport.families import TaskStack
from metateleport.fewshot import Adaptation, MetaTraining, MetaTrainingConfig, TeleportingLearner, adapt
from metateleport.files import write_json, write_text

__all__ = ["main", "run"]

SCHEMA = 1
RATES = (0.1, 0.25, 0.625)
"""Inner learning rates to try first; the grid is extended by the same factor while the best is at its end."""
FACTOR = 2.5
FURTHER = 4
TUNING_SHARE = 0.25
"""Share of the meta-steps that a trial of tuning takes."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a comparison."""

    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 3
    meta_steps: int = 60
    inner_steps: int = 5
    tasks: int = 100
    ways: int = 4
    shots: int = 1
    bottleneck: int | None = 8


def run(settings: Settings, keep: Callable[[dict[str, Any]], None], quiet: bool = False) -> dict[str, Any]:
    """Tunes, meta-trains and evaluates every method.

    Args:
        settings: the comparison's settings.
        keep: called with the report after every meta-seed, so that an interrupted run leaves its results.
        quiet: print no progress.

    Returns:
        The report, as the JSON file has it.
    """
    started = time.perf_counter()
    family = load_family(
        Path(__file__).resolve().parents[1] / "tasks" / "fewshot_digits.py",
        {"ways": settings.ways, "shots": settings.shots, "bottleneck": settings.bottleneck},
    )
    held_out = family.stack(range(settings.tasks), "held-out")

    def say(text: str) -> None:
        if not quiet:
            print(f"{time.perf_counter() - started:6.0f} s  {text}", file=sys.stderr, flush=True)

    methods: dict[str, Any] = {}
    size = 1.0
    for name in settings.methods:
        methods[name] = {**tuned(name, family, settings, size), "seeds": []}
        if name == "maml+ascent":
            size = methods[name]["size"]
        say(f"{name}: inner learning rate {methods[name]['lr']:g}")
    report: dict[str, Any] = {}
    # Seed by seed, so that other load on the machine affects the seconds of all methods alike.
    for seed in range(settings.seeds):
        for name in settings.methods:
            found = one_seed(Meta(name, methods[name]["lr"], seed, size), family, settings, held_out)
            methods[name]["seeds"].append(found)
            say(f"{name}, meta-seed {seed}: held-out loss {found['loss']:.3f}, accuracy {found['accuracy']:.3f}")
        for name in settings.methods:
            methods[name]["against"] = {
                other: compare(methods[name]["seeds"], methods[other]["seeds"])
                for other in dict.fromkeys((base_of(name), "maml"))
                if other in methods and other != name
            }
        report = {
            "schema": SCHEMA,
            "benchmark": "fewshot",
            "settings": {**dataclasses.asdict(settings), "seeds": seed + 1},
            "family": {"name": family.name, "settings": family.settings()},
            "conditions": {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
            },
            "checkpoint": checkpoint_of(settings.methods),
            "seconds": time.perf_counter() - started,
            "random_size": size,
            "methods": methods,
            "in_words": words_of(methods),
        }
        keep(report)
    return report


def tuned(name: str, family: TaskFamily, settings: Settings, size: float) -> dict[str, Any]:
    """The inner learning rate of a method, by the validation loss of short meta-trainings.

    Returns:
        `lr`; `tuning`, the trials; `size`, the mean norm of each symmetry's generators at that rate.
    """
    steps = max(1, round(TUNING_SHARE * settings.meta_steps))
    tried: dict[float, tuple[float, float]] = {}

    def score(lr: float) -> float:
        if lr not in tried:
            training, _ = trained(Meta(name, lr, 0, size), family, settings, steps)
            validation = family.stack(range(32), "validation")
            found = adapt(training.learner, validation, settings.inner_steps)
            tried[lr] = (training.progress.best, _mean_size(found, training.learner))
        return tried[lr][0]

    rates = list(RATES)
    for _ in range(FURTHER + 1):
        best = min(rates, key=score)
        if best not in (rates[0], rates[-1]):
            break
        rates = [rates[0] / FACTOR, *rates] if best == rates[0] else [*rates, rates[-1] * FACTOR]
    best = min(tried, key=lambda lr: tried[lr][0])
    return {
        "lr": best,
        "tuning": [{"lr": lr, "validation": score} for lr, (score, _) in sorted(tried.items())],
        "size": tried[best][1],
    }


def trained(meta: Meta, family: TaskFamily, settings: Settings, steps: int) -> tuple[MetaTraining, float]:
    """Meta-trains a method; returns the training and its seconds without those of drawing tasks."""
    config = MetaTrainingConfig(
        meta_steps=steps,
        inner_steps=settings.inner_steps,
        seed=meta.seed,
        validation_every=max(1, min(20, steps // 2)),
        validation_tasks=32,
    )
    # The start and the meta-batches of a meta-seed are the same for all methods.
    example = family.task(0, "train", meta.seed)
    learner = build(meta, example.model, example.symmetries)
    drawing = [0.0]

    def stacks(meta_step: int) -> TaskStack:
        begun = time.perf_counter()
        stack = _drawn(family, meta.seed, meta_step, config.tasks)
        drawing[0] += time.perf_counter() - begun
        return stack

    training = MetaTraining(learner, family, config, stacks)
    training.run()
    return training, training.progress.seconds - drawing[0]


@functools.lru_cache(maxsize=2048)
def _drawn(family: TaskFamily, seed: int, meta_step: int, tasks: int) -> TaskStack:
    return family.stack(range(meta_step * tasks, (meta_step + 1) * tasks), "train", seed)


def one_seed(meta: Meta, family: TaskFamily, settings: Settings, held_out: TaskStack) -> dict[str, Any]:
    """Meta-trains from one seed, adapts to the held-out tasks, and returns the results."""
    training, seconds = trained(meta, family, settings, settings.meta_steps)
    begun = time.perf_counter()
    found = adapt(training.learner, held_out, settings.inner_steps)
    adapting = time.perf_counter() - begun
    losses, accuracies = (at_budget(each, found, settings.inner_steps) for each in (found.query, found.accuracy))
    off = None
    if isinstance(training.learner, TeleportingLearner):
        without = adapt(switched_off(training.learner), held_out, settings.inner_steps)
        off = at_budget(without.query, without, settings.inner_steps).tolist()
    done = training.progress
    return {
        "seed": meta.seed,
        "loss": _finite(losses.median()),
        "accuracy": float(accuracies.mean()),
        "losses": [_finite(each) for each in losses],
        "accuracies": accuracies.tolist(),
        "losses_teleport_off": None if off is None else [min(each, 1e300) for each in off],
        "curve": [_finite(each) for each in found.query.median(0).values],
        "size": _mean_size(found, training.learner),
        "refused": found.refused,
        "drift": drift_of(training.learner, held_out),
        "chosen_at": done.best_step,
        "validation": done.best,
        "skipped": done.skipped,
        "evaluations": done.evaluations,
        "meta_seconds": seconds,
        "adapt_seconds": adapting,
    }


def checkpoint_of(methods: Sequence[str]) -> dict[str, str]:
    """The command and the weights' hash of the shipped teleporter; empty if no method uses it."""
    if "maml+learned" not in methods:
        return {}
    card = json.loads((shipped_checkpoints()["digits"] / "card.json").read_text(encoding="utf-8"))
    return {"command": card["training"]["command"], "weights_sha256": card["weights_sha256"]}


def at_budget(values: torch.Tensor | None, found: Adaptation, budget: float) -> torch.Tensor:
    """For every task the value after the last step within the budget of gradient evaluations."""
    assert values is not None
    allowed = (found.evaluations <= budget + 1e-6).sum(1) - 1
    return values.gather(1, allowed.unsqueeze(1)).squeeze(1).double()


def drift_of(learner: Any, stack: TaskStack) -> float | None:
    """Largest relative change of a held-out loss by a teleport alone; None without a teleport."""
    if not isinstance(learner, TeleportingLearner):
        return None
    query = adapt(standing(learner), stack, 1).query.double()
    return _finite(((query[:, 1] - query[:, 0]).abs() / query[:, 0]).max())


def _mean_size(found: Adaptation, learner: Any) -> float:
    count = len(learner.symmetries) if isinstance(learner, TeleportingLearner) else 1
    return float(found.size.mean()) / math.sqrt(max(count, 1))


def _finite(value: torch.Tensor) -> float:
    number = float(value)
    return min(number, 1e300) if not math.isnan(number) else 1e300


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command-line arguments; those of the process if not given.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fewshot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    for field in ("seeds", "meta_steps", "inner_steps", "tasks", "ways", "shots", "bottleneck"):
        option = "--" + field.replace("_", "-")
        parser.add_argument(option, type=_positive, default=getattr(defaults, field), help="(default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables as a page")
    parsed = vars(parser.parse_args(arguments))
    json_file, markdown = parsed.pop("json"), parsed.pop("markdown")
    torch.set_num_threads(1)

    def keep(report: dict[str, Any]) -> None:
        if json_file is not None:
            write_json(json_file, report)
        if markdown is not None:
            write_text(markdown, page_of(report))

    print(page_of(run(Settings(**{**parsed, "methods": tuple(parsed["methods"])}), keep)), end="")
    return 0


def _positive(text: str) -> int:
    number = int(text) if text.strip().isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, not {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
