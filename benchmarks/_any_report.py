"""Tables of `benchmarks.any_model`, from its JSON alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks._any_models import RIVALS, SCHEDULES, TASKS, AnyTask

__all__ = ["IN_TIME", "findings", "page_of", "table_of"]


def _of(report: Mapping[str, Any], task: str, method: str) -> list[dict[str, Any]]:
    """The runs of a method on a task, by seed."""
    found = []
    for key, run in report["runs"].items():
        own_task, own_method, seed, _ = key.split(" | ")
        if (own_task, own_method) == (task, method):
            found.append((int(seed.removeprefix("seed ")), run))
    return [run for _, run in sorted(found, key=lambda each: each[0])]


def _end(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["losses"][-1] for run in runs)


def _steps(report: Mapping[str, Any], task: str, method: str) -> int:
    """How many steps the runs of a method on a task have."""
    keys = (key.split(" | ") for key in report["runs"])
    return next(int(steps.removesuffix(" steps")) for own, which, _, steps in keys if (own, which) == (task, method))


def _last(run: Mapping[str, Any]) -> float:
    return float(run["losses"][-1])


def _unseen(run: Mapping[str, Any]) -> float:
    return float(run["unseen"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _tasks(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key.split(" | ")[0] for key in report["runs"]))


def table_of(report: Mapping[str, Any]) -> str:
    """All methods on all tasks, medians over seeds: training loss, held-out loss and accuracy, seconds."""
    rows = ["| task | method | training loss | over AdamW's, tuned | held-out loss | accuracy | CPU s | finite |"]
    rows.append("|---|---|--:|--:|--:|--:|--:|---|")
    names = dict.fromkeys(key.split(" | ")[1] for key in report["runs"] if "seed 1000" not in key)
    for task in _tasks(report):
        rival = _of(report, task, "adamw, tuned")
        for name in names:
            runs = _of(report, task, name)
            if not runs:
                continue
            known = [run["accuracy"] for run in runs if run["accuracy"] is not None]
            cells = [
                task,
                name,
                _number(_end(runs)),
                f"{_end(runs) / _end(rival):.2f}" if rival else "",
                _number(statistics.median(run["unseen"] for run in runs)),
                f"{statistics.median(known):.1%}" if known else "",
                _number(statistics.median(run["seconds"][-1] for run in runs)),
                "yes" if all(run["finite"] for run in runs) else "no",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


_FEWEST = 3
"""Seeds that an interval over seeds needs."""
_QUANTILES = (4.303, 3.182, 2.776, 2.571)
"""97.5 % quantiles of Student's t for so many seeds and more."""

IN_TIME = ", as long as AdamW"
"""A run told as many steps as take the seconds of tuned AdamW's."""

PARTS = {
    "constants": "constants in the place of the networks",
    "by hand": "the constants that training started from, a mixture made by hand",
    "adam alone": "Adam's direction alone",
    "polar alone": "polar factors alone, where there are any",
    "without safeguard": "without the safeguard",
}
"""Runs of the attribution, in words."""


def _interval(ratios: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Lower end, geometric mean and upper end of ratios over tasks, each the mean over seeds; 95 %, by resampling."""
    logs = torch.tensor([statistics.fmean(math.log(max(each, 1e-300)) for each in task) for task in ratios])
    source = torch.Generator().manual_seed(0)
    means = logs[torch.randint(len(logs), (2000, len(logs)), generator=source)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return math.exp(low), math.exp(float(logs.mean())), math.exp(high)


def _factors_together(report: Mapping[str, Any], known: Sequence[str], factors: Sequence[str]) -> list[str]:
    """The loss with each factor lr over that at one, over all tasks on which all factors were run."""
    name = report["checkpoint"]
    tasks = [task for task in known if all(_of(report, task, each) for each in factors)]
    if not tasks:
        return []
    said = []
    for each in factors:
        if each != name:
            pairs = [(_of(report, task, each), _of(report, task, name)) for task in tasks]
            ratios = [[_last(one) / _last(other) for one, other in zip(*pair, strict=False)] for pair in pairs]
            low, middle, high = _interval(ratios)
            said.append(f"{each.removeprefix(f'{name}, lr=')} {middle:.2f} [{low:.2f}, {high:.2f}]")
    return [f"loss with a factor lr over that at 1, geometric means over {len(tasks)} tasks: {', '.join(said)}"]


def _behind(report: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """On which tasks the held-out loss is above tuned AdamW's by more than chance, from pairs of runs of one seed."""
    said: dict[str, str] = {}
    above = []
    for task in known:
        pairs = zip(_of(report, task, report["checkpoint"]), _of(report, task, "adamw, tuned"), strict=False)
        logs = torch.tensor([math.log(_unseen(own) / _unseen(rival)) for own, rival in pairs])
        if len(logs) >= _FEWEST:
            middle = float(logs.mean())
            # Of Student's t distribution.
            width = (
                _QUANTILES[min(len(logs), len(_QUANTILES) + _FEWEST - 1) - _FEWEST]
                * float(logs.std())
                / len(logs) ** 0.5
            )
            said[task] = f"{math.exp(middle):.2f} [{math.exp(middle - width):.2f}, {math.exp(middle + width):.2f}]"
            if middle - width > 0:
                above.append(task)
    if not said:
        return []
    listed = ", ".join(f"{task} {ratio}" for task, ratio in said.items())
    return [
        f"held-out loss not above tuned AdamW's by more than the 95 % interval over seeds: {len(said) - len(above)} of "
        f"{len(said)}"
        + (f"; not on {', '.join(above)}" if above else "")
        + f". Its ratio, in geometric means: {listed}"
    ]


def findings(report: Mapping[str, Any]) -> list[str]:
    """What the runs say of the learned optimizer, a sentence each."""
    name, sentences = report["checkpoint"], []
    known = [task for task in _tasks(report) if _of(report, task, name)]

    def count(what: str, rival: str, within: float, value: Any = _end) -> None:
        both = [task for task in known if _of(report, task, rival)]
        if both:
            held = [task for task in both if value(_of(report, task, name)) <= within * value(_of(report, task, rival))]
            rest = [task for task in both if task not in held]
            sentences.append(f"{what}: {len(held)} of {len(both)}" + (f"; not on {', '.join(rest)}" if rest else ""))

    def unseen(runs: list[dict[str, Any]]) -> float:
        return statistics.median(run["unseen"] for run in runs)

    count("training loss at the end ahead of AdamW at its defaults", "adamw, defaults", 1.0)
    count("within 10 % of tuned AdamW", "adamw, tuned", 1.1)
    count("ahead of tuned AdamW", "adamw, tuned", 1.0)
    count("ahead of tuned Muon", "muon, tuned", 1.0)

    count("held-out loss within 10 % of tuned AdamW's", "adamw, tuned", 1.1, unseen)
    sentences += _behind(report, known)
    sentences += _in_time(report, known)
    factors = sorted(
        {key.split(" | ")[1] for key in report["runs"] if key.split(" | ")[1].startswith(f"{name}, lr=")} | {name}
    )
    best = []
    for task in known:
        runs_of = {each: runs for each in factors if (runs := _of(report, task, each))}
        alike = min(map(len, runs_of.values()))
        ends = {each: _end(runs[:alike]) for each, runs in runs_of.items()}
        if len(ends) > 1:
            chosen = min(ends, key=lambda each: ends[each])
            best.append(
                f"{task} {chosen.removeprefix(f'{name}, lr=') if chosen != name else '1'} "
                f"(loss at 1 over the best {ends[name] / ends[chosen]:.2f})"
            )
    if best:
        sentences.append(f"the best factor lr: {'; '.join(best)}")
        sentences += _factors_together(report, known, factors)
    for part, words in PARTS.items():
        there = [task for task in known if _of(report, task, f"{name}, {part}")]
        if there:
            said = []
            for what, value in (("training", _last), ("held-out", _unseen)):
                pairs = [(_of(report, task, f"{name}, {part}"), _of(report, task, name)) for task in there]
                ratios = [
                    [value(one) / value(other) for one, other in zip(own, learned, strict=False)]
                    for own, learned in pairs
                ]
                low, middle, high = _interval(ratios)
                said.append(f"{what} {middle:.2f} [{low:.2f}, {high:.2f}]")
            sentences.append(
                f"{words}: loss over the learned one's, {' and '.join(said)}, geometric means over {len(there)} tasks"
            )
    alone, by_hand = (
        [task for task in known if _of(report, task, f"{name}, {part}")] for part in ("adam alone", "by hand")
    )
    if alone and not by_hand:
        sentences.append(_NOTHING)
    long = [(task, run) for task in known for run in _of(report, task, f"{name}, long")]
    if long:
        risen = [
            task
            for task, run in long
            if not run["finite"] or max(run["losses"][len(run["losses"]) // 2 :]) > run["losses"][0]
        ]
        times = ", ".join(f"{task} {run['losses'][-1]:.2g}" for task, run in long)
        sentences.append(
            f"runs of ten times the length{_other_times()} whose second half stays below their start: "
            f"{len(long) - len(risen)} of {len(long)}"
            + (f"; not on {', '.join(risen)}" if risen else "")
            + f"; loss at the end: {times}"
        )
    return sentences


_NOTHING = (
    "the constants that training started from, a mixture made by hand, are the checkpoint itself: training found none "
    "that did better on the families left out, so what learning brings is nothing"
)


def _in_time(report: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """What it does in the seconds of tuned AdamW's run; nothing if that was not run."""
    name, found = report["checkpoint"], []
    for task in known:
        own, rival = _of(report, task, f"{name}{IN_TIME}"), _of(report, task, "adamw, tuned")
        if own and rival:
            spent = statistics.median(run["seconds"][-1] for run in own)
            share = spent / statistics.median(run["seconds"][-1] for run in rival)
            found.append((task, _steps(report, task, f"{name}{IN_TIME}"), share, _end(own) / _end(rival)))
    if not found:
        return []
    ahead = sum(ratio < 1 for *_, ratio in found)
    listed = ", ".join(f"{task} {steps} steps, {share:.2f}, {ratio:.2f}" for task, steps, share, ratio in found)
    return [
        f"at the seconds of tuned AdamW's run, ahead on {ahead} of {len(found)}, told as many steps as fit into them; "
        f"steps, seconds over its seconds, loss over its loss: {listed}"
    ]


def _other_times() -> str:
    """Which tasks are followed for another multiple of their length."""
    said = [f"{task.times} times on {task.name}" for task in TASKS.values() if task.times != AnyTask.times]
    return f" ({', '.join(said)})" if said else ""


def _trials() -> str:
    """How many trials the rivals have, and who has none."""
    usual = len(SCHEDULES) * AnyTask.rates
    said = [f"Rivals have {usual} trials each, learning rates and schedules, for the training loss at the end"]
    for task in TASKS.values():
        trials = len(task.schedules) * task.rates
        if trials != usual:
            said.append(f"on {task.name} {trials}, all with the schedule {' and '.join(task.schedules)}")
        without = [kind for kind in RIVALS if kind not in task.rivals]
        if without:
            said.append(
                f"there {' and '.join(without)} is not run, whose products in bfloat16 take most of a minute a step on "
                "processors that have no such operation"
            )
    return "; ".join(said) + "."


def _left_out(report: Mapping[str, Any]) -> list[str]:
    """What there are no runs of, and how many seeds the others have."""
    name = report["checkpoint"]
    missing = [task for task in TASKS if not _of(report, task, name)]
    said = [f"not run, as its trials take hours on one core: {', '.join(missing)}"] if missing else []
    methods = dict.fromkeys(key.split(" | ")[1] for key in report["runs"] if "seed 1000" not in key)
    counts: dict[int, list[str]] = {}
    for method in methods:
        counts.setdefault(max(len(_of(report, task, method)) for task in TASKS), []).append(method)
    for count, which in sorted(counts.items(), reverse=True):
        said.append(f"{count} seed{'s' if count > 1 else ''}: {', '.join(f'`{method}`' for method in which)}")
    most = max(len(_of(report, task, name)) for task in TASKS)
    fewer = [f"{len(runs)} on {task}" for task in TASKS if 0 < len(runs := _of(report, task, name)) < most]
    if fewer:
        said.append(f"seeds are fewer on some tasks: {', '.join(fewer)}")
    for method in methods:
        there = [task for task in TASKS if _of(report, task, method)]
        if len(there) < len(TASKS) - len(missing):
            said.append(f"`{method}` was run on {', '.join(there)}")
    return said


def page_of(report: Mapping[str, Any]) -> str:
    """The page of the docs."""
    known, name = report["conditions"], report["checkpoint"]
    never = ", ".join(task.name for task in TASKS.values() if not task.met)
    lines = [
        f"# `{name}` on any model",
        "",
        "`python -m benchmarks.any_model --json any_model.json --page docs/any-model.md` writes this page: "
        f"`mt.LearnedOptimizer(model)` at its defaults, told its length, on real tasks. Families of these were "
        f"never trained on: {never}. {_trials()}",
        "",
        "Losses are means over all training data and over what was held out, medians over seeds. "
        f"CPU time on one thread; {known['cpu']}, torch {known['torch']}, Python {known['python']}.",
        "",
        *(f"- {sentence}." for sentence in (*_left_out(report), *findings(report))),
        "",
        table_of(report),
    ]
    return "\n".join(lines) + "\n"
