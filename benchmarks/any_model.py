"""A learned optimizer at its defaults on eight real tasks, beside AdamW at its defaults, tuned AdamW and tuned Muon.

Nothing is tuned for the learned one; like the rivals' schedules it knows the number of steps (`total_steps`). Each
rival has the same number of trials: six learning rates, each constant and with warm-up and a cosine to zero, chosen by
the training loss at the end of a run of another seed. Losses are means over the whole training set and over what was
held out, in evaluation mode. The attribution runs the learned optimizer with constants in the place of its networks
(their last layers keep their biases only), with the constants that its training started from (a mixture made by hand),
with Adam's direction alone and with polar factors alone, where there are any, and without its safeguard. At equal
seconds the learned optimizer is told as many steps as take the seconds of a whole run of tuned AdamW.

Finished runs are kept in the JSON file, and a run that was interrupted goes on from there.

Example:
    python -m benchmarks.any_model --json any_model.json --page docs/any-model.md
    python -m benchmarks.any_model --development --parts learned rivals --json chosen_by.json
    python -m benchmarks.any_model --checkpoint digits --tasks perceptron gpt --seeds 1 --json some.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import metateleport as mt
from benchmarks._any_models import TASKS, AnyTask, Data
from benchmarks._any_report import IN_TIME, findings, page_of, table_of
from benchmarks._development_tasks import DEVELOPMENT
from benchmarks._timing import conditions
from metateleport.checkpoint import update_card
from metateleport.files import write_json, write_text
from metateleport.learned import MetaOptimizer
from metateleport.learned.rules.adaptive import AdaptiveRule
from metateleport.training.search import constants

__all__ = ["main"]

SCHEMA = 1
TUNING_SEED = 1000
RATES = {"adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "muon": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
DIRECTIONS = {"adam": 3, "polar": 4}
"""Where the logits of the directions' shares are among the outputs."""
_ALONE = 60.0
Make = Callable[[nn.Module, int], tuple[torch.optim.Optimizer, Callable[[int], float]]]
"""An optimizer, and the factor on its learning rate at each step."""


def _schedule(schedule: str, steps: int) -> Callable[[int], float]:
    warm = max(steps // 20, 1)

    def factor(step: int) -> float:
        if schedule == "constant":
            return 1.0
        return min((step + 1) / warm, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return factor


class _Muon(torch.optim.Optimizer):
    """Muon on hidden matrices, and AdamW at a tenth of its rate on what is none, the first and the last layer's too."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        trained = [value for value in model.parameters() if value.requires_grad]
        matrices = [value for value in trained if value.ndim == 2]
        hidden = matrices[1:-1]
        kept = {id(value) for value in hidden}
        rest = [value for value in trained if id(value) not in kept]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=0.1 * rate)]
        if hidden:
            self.parts.append(torch.optim.Muon(hidden, lr=rate))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def _rival(kind: str, rate: float, schedule: str) -> Make:
    def make(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
        optimizer = _Muon(model, rate) if kind == "muon" else torch.optim.AdamW(model.parameters(), lr=rate)
        return optimizer, _schedule(schedule, steps)

    return make


def _learned(checkpoint: Any, factor: float = 1.0) -> Make:
    def make(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mt.LearnedOptimizer(model, checkpoint, lr=factor, total_steps=steps), lambda _: 1.0

    return make


def _constant(meta: MetaOptimizer) -> MetaOptimizer:
    """Networks with nothing but the biases of their last layers."""
    meta = copy.deepcopy(meta)
    biases = {id(each) for each in constants(meta)}
    with torch.no_grad():
        for layer in meta.modules():
            if isinstance(layer, nn.Linear) and id(layer.bias) in biases:
                layer.weight.zero_()
    return meta


def _same(one: MetaOptimizer, other: MetaOptimizer) -> bool:
    values = other.state_dict()
    return all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


def _parts_of(checkpoint: str) -> dict[str, MetaOptimizer]:
    """The checkpoint with one part of it exchanged, by what is said of it."""
    learned = mt.load_checkpoint(checkpoint).learned
    found = {"constants": _constant(learned), "by hand": _constant(MetaOptimizer(learned.config))}
    # Where training has found nothing better than its start, these are the checkpoint itself.
    found = {name: own for name, own in found.items() if not _same(own, learned)}
    rule = learned.rule
    if isinstance(rule, AdaptiveRule):
        for name, place in DIRECTIONS.items():
            own = copy.deepcopy(learned)
            assert isinstance(own.rule, AdaptiveRule)
            with torch.no_grad():
                own.rule.head.bias[place] += _ALONE
            found[f"{name} alone"] = own
        if rule.guarded:
            settings = dataclasses.replace(learned.config.rule, guarded=False)  # type: ignore[call-arg]
            own = MetaOptimizer(dataclasses.replace(learned.config, rule=settings))
            own.load_state_dict(learned.state_dict())
            found["without safeguard"] = own
    return found


def _evaluated(task: AnyTask, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Mean loss, and the share of right answers or NaN."""
    training = model.training
    model.eval()
    losses, right, count = 0.0, 0.0, 0
    with torch.no_grad():
        for x, y in zip(inputs.split(256), targets.split(256), strict=True):
            outputs = model(x)
            losses += float(task.loss(outputs, y)) * len(x)
            if task.classifies:
                right += float((outputs.argmax(-1) == y).float().mean()) * len(x)
            count += len(x)
    model.train(training)
    return losses / count, right / count if task.classifies else math.nan


def _run(task: AnyTask, data: Data, make: Make, seed: int, steps: int, marks: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = task.build()
    optimizer, factor = make(model, steps)
    first = [group["lr"] for group in optimizer.param_groups]
    draw = torch.Generator().manual_seed(seed)
    every = max(steps // marks, 1)
    start, _ = _evaluated(task, model, data.inputs, data.targets)
    spent, losses, seconds = 0.0, [start], [0.0]
    for step in range(steps):
        taken = torch.randint(len(data.inputs), (task.batch,), generator=draw)
        x, y = data.inputs[taken], data.targets[taken]
        began = time.process_time()
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * factor(step)
        loss = task.loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent += time.process_time() - began
        if (step + 1) % every == 0 or step + 1 == steps:
            losses.append(_evaluated(task, model, data.inputs, data.targets)[0])
            seconds.append(spent)
    unseen, accuracy = _evaluated(task, model, data.unseen_inputs, data.unseen_targets)
    finite = all(bool(value.isfinite().all()) for value in model.parameters()) and math.isfinite(losses[-1])
    return {
        "losses": [_plain(value) for value in losses],
        "seconds": seconds,
        "unseen": _plain(unseen),
        "accuracy": None if math.isnan(accuracy) else accuracy,
        "finite": finite,
    }


def _plain(value: float) -> float:
    return value if math.isfinite(value) else 1e300


class _Kept:
    """Finished runs, in a JSON file."""

    def __init__(self, path: Path | None, checkpoint: str, settings: dict[str, Any]) -> None:
        self.path, self.checkpoint, self.settings = path, checkpoint, settings
        self.runs: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.get("settings") != settings:
                raise SystemExit(f"{path} has runs of other settings, {known.get('settings')}: give another file")
            self.runs = known["runs"]

    def run(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.runs:
            self.runs[key] = work()
            print(f"{key}: {self.runs[key]['losses'][-1]:.4g}", flush=True)
            self.write()
        return self.runs[key]

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.report())

    def report(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "checkpoint": self.checkpoint,
            "settings": self.settings,
            "conditions": conditions(torch.device("cpu")),
            "runs": self.runs,
        }


def _tuned(task: AnyTask, data: Data, kind: str, kept: _Kept) -> tuple[float, str]:
    """The rate and schedule with the lowest training loss at the end, of all trials."""
    found: dict[tuple[float, str], float] = {}
    for schedule in task.schedules:
        for rate in RATES[kind][: task.rates]:
            key = f"{task.name} | {kind} {rate:g} {schedule} | seed {TUNING_SEED} | {task.steps} steps"
            run = kept.run(
                key,
                lambda rate=rate, schedule=schedule: _run(  # type: ignore[misc]
                    task, data, _rival(kind, rate, schedule), TUNING_SEED, task.steps, marks=1
                ),
            )
            found[rate, schedule] = run["losses"][-1] if run["finite"] else math.inf
    return min(found, key=lambda each: found[each])


def _steps_in_time(task: AnyTask, checkpoint: str, kept: _Kept) -> int:
    """How many learned steps take the seconds of a run of tuned AdamW; zero where one of the two was not run."""
    spent: dict[str, list[float]] = {checkpoint: [], "adamw, tuned": []}
    for key, run in kept.runs.items():
        own, method, _, _ = key.split(" | ")
        if own == task.name and method in spent:
            spent[method].append(run["seconds"][-1])
    if not all(spent.values()):
        return 0
    return max(int(task.steps * statistics.median(spent["adamw, tuned"]) / statistics.median(spent[checkpoint])), 1)


def _compare(
    task: AnyTask, checkpoint: str, seeds: int, parts: Sequence[str], factors: Sequence[float], kept: _Kept
) -> None:
    data = task.data()
    methods: dict[str, tuple[Make, int]] = {"adamw, defaults": (_rival("adamw", 1e-3, "constant"), task.steps)}
    if "learned" in parts:
        methods[checkpoint] = (_learned(checkpoint), task.steps)
    if "rivals" in parts:
        for kind in task.rivals:
            rate, schedule = _tuned(task, data, kind, kept)
            methods[f"{kind}, tuned"] = (_rival(kind, rate, schedule), task.steps)
    if "factors" in parts:
        methods |= {
            f"{checkpoint}, lr={factor:g}": (_learned(checkpoint, factor), task.steps)
            for factor in factors
            if factor != 1.0
        }
    if "attribution" in parts:
        methods |= {
            f"{checkpoint}, {name}": (_learned(meta), task.steps) for name, meta in _parts_of(checkpoint).items()
        }
    if "long" in parts:
        methods[f"{checkpoint}, long"] = (_learned(checkpoint), task.steps * task.times)

    def run(name: str, make: Make, steps: int, seed: int) -> None:
        key = f"{task.name} | {name} | seed {seed} | {steps} steps"
        kept.run(key, lambda: _run(task, data, make, seed, steps, task.marks))

    for seed in range(seeds):
        for name, (make, steps) in methods.items():
            if not (name.endswith(", long") and seed):
                run(name, make, steps, seed)
    # Known only now.
    if "seconds" in parts and (steps := _steps_in_time(task, checkpoint, kept)):
        for seed in range(seeds):
            run(f"{checkpoint}{IN_TIME}", _learned(checkpoint), steps, seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; prints each run, and a table in Markdown at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="default", metavar="NAME", help="default %(default)s")
    parser.add_argument("--tasks", nargs="+", choices={**TASKS, **DEVELOPMENT}, metavar="NAME")
    parser.add_argument(
        "--development", action="store_true", help="the tasks that constants are chosen by, in the place of the eight"
    )
    every = ["learned", "rivals", "factors", "attribution", "seconds", "long"]
    parser.add_argument("--parts", nargs="*", choices=every, default=every, metavar="PART", help=", ".join(every))
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, metavar="LR", help="lr beside one")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep finished runs, and the result, in this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the docs")
    parser.add_argument("--card", action="store_true", help="write what was found into the notes of the card")
    given = parser.parse_args(arguments)
    if given.development and (given.page or given.card):
        parser.error("pages and cards tell of tasks that nothing was chosen by: leave out --development")
    if given.seeds < 1:
        parser.error("give at least one seed")
    torch.set_num_threads(1)
    kept = _Kept(given.json, given.checkpoint, {"rates": {kind: list(rates) for kind, rates in RATES.items()}})
    known = DEVELOPMENT if given.development else TASKS
    for name in given.tasks or known:
        _compare({**TASKS, **DEVELOPMENT}[name], given.checkpoint, given.seeds, given.parts, given.factors, kept)
    print(table_of(kept.report()))
    if given.page is not None:
        write_text(given.page, page_of(kept.report()))
    if given.card:
        found = [f"Real tasks (docs/any-model.md), {each}." for each in findings(kept.report())]
        update_card(mt.load_checkpoint(given.checkpoint).path, {"notes": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
