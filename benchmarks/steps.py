"""What a step costs in use: learned optimizers beside AdamW, Muon and SOAP, forward and backward pass included.

Perceptrons of 0.1, 1 and 10 million parameters on batches of 128, and a small causal transformer. All optimizers of a
model take their steps in turn, and CPU time on one thread is counted, which a busy machine hardly spoils. Beside the
times stand counts that depend on no machine: operations, waits for the device, factorisations of matrices, and bytes
that an optimizer keeps for each parameter.

Example:
    python -m benchmarks.steps --json steps.json --page docs/step-costs.md
    python -m benchmarks.steps --models mlp-1M gpt --methods adamw muon digits --rounds 9
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metateleport as mt
from benchmarks._counting import Counting, most_bytes
from benchmarks._step_models import MODELS, Problem
from benchmarks._timing import Summary, conditions, publish
from metateleport.learned.refresh import Refresh
from metateleport.linalg import multiplies_halves

__all__ = ["METHODS", "main"]

SCHEMA = 1
_WARM_UP = 12
"""Steps before any is timed: by then most symmetries rest that are going to."""


def _zeroth_power(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """What torch's Muon makes of a gradient, in the gradient's own precision instead of bfloat16."""
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    found = gradient.T if tall else gradient
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


@contextlib.contextmanager
def _muon_at_its_best() -> Iterator[bool]:
    """Gives Muon float32 on a CPU without products in bfloat16, where torch's takes many times as long in bfloat16.

    Yields whether it is in bfloat16.
    """
    halves = multiplies_halves(torch.device("cpu"))
    place: Any = importlib.import_module("torch.optim._muon")
    before = place._zeropower_via_newtonschulz
    if not halves:
        place._zeropower_via_newtonschulz = _zeroth_power
    try:
        yield halves
    finally:
        place._zeropower_via_newtonschulz = before


class _Both(torch.optim.Optimizer):
    """Muon on hidden matrices and AdamW on the others, as Muon's authors advise."""

    def __init__(self, problem: Problem) -> None:
        hidden = [value for name, value in problem.model.named_parameters() if name in problem.hidden]
        others = [value for name, value in problem.model.named_parameters() if name not in problem.hidden]
        self.parts = [torch.optim.Muon(hidden, lr=1e-3), torch.optim.AdamW(others)]
        super().__init__([*hidden, *others], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    @property
    def kept(self) -> list[Any]:
        return [part.state for part in self.parts]


def _soap(problem: Problem) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(problem.model.parameters(), lr=1e-3)


def _learned(checkpoint: str, **settings: Any) -> Callable[[Problem], torch.optim.Optimizer]:
    def make(problem: Problem) -> torch.optim.Optimizer:
        known = settings or {"example_input": problem.inputs}
        return mt.LearnedOptimizer(problem.model, checkpoint, **known)

    return make


def _teleporting(problem: Problem) -> torch.optim.Optimizer:
    inner = torch.optim.AdamW(problem.model.parameters())
    found = problem.inputs
    return mt.TeleportingOptimizer(inner, problem.model, mt.load("digits"), every=10, example_input=found)


METHODS: dict[str, Callable[[Problem], torch.optim.Optimizer]] = {
    "adamw": lambda problem: torch.optim.AdamW(problem.model.parameters()),
    "adamw-fused": lambda problem: torch.optim.AdamW(problem.model.parameters(), fused=True),
    "muon": _Both,
    "soap": _soap,
    "digits": _learned("digits"),
    "digits-without-symmetries": _learned("digits", symmetries=()),
    "teleporting-adamw": _teleporting,
    "leaky_mlp_mixture": _learned("leaky_mlp_mixture"),
}
"""Optimizers by name, each of a problem."""

DEFAULT = tuple(name for name in METHODS if name not in ("soap", "leaky_mlp_mixture"))
_MUON = {"mlp-0.1M": 2.0, "mlp-1M": 1.3, "mlp-10M": 1.3, "gpt": 1.3}
"""How many times Muon's the learned step may take, by model."""

_TELEPORTING = {"mlp-1M": 1.15, "mlp-10M": 1.15}
"""How many times AdamW's a step may take with a teleport every ten, on average, by model."""

_PEAK = {"mlp-10M": 1.5}
"""How many times AdamW's the peak of memory may be, by model."""

_GAUGES = {"mlp-1M": 25.0}
"""How many times AdamW's a step with gauges may take, by model; on others it is not timed unless asked for."""

_EVERY = {"teleporting-adamw": 10, "leaky_mlp_mixture": 16}
"""Steps that are timed together, where some cost more than others."""


class _Case:
    """One optimizer on a model of its own, always on the same batch."""

    def __init__(self, name: str, model: str) -> None:
        torch.manual_seed(0)
        self.name, self.problem = name, MODELS[model]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = METHODS[name](self.problem)
        self.steps = _EVERY.get(name, 1)
        self.times: list[float] = []
        self.peak = 0

    def step(self) -> None:
        self.problem.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """Steps that are not timed; in the second, which knows its state and may teleport, the memory is looked at."""
        self.step()
        most = most_bytes(self.step)
        own = sum(value.nbytes for value in self.problem.model.parameters())
        self.peak = own + _bytes(self.optimizer, self.problem.model) + most
        for _ in range(_WARM_UP - 2):
            self.step()

    def time(self) -> None:
        began = time.process_time()
        for _ in range(self.steps):
            self.step()
        self.times.append((time.process_time() - began) / self.steps)

    def counts(self) -> dict[str, float]:
        """Of the optimizer's own step, without the passes, as a mean over the steps that are timed together."""
        counting = Counting()
        for _ in range(max(self.steps, 2)):
            self.problem.loss().backward()
            with counting:
                self.optimizer.step()
            self.optimizer.zero_grad()
        done = max(self.steps, 2)
        return {
            "operations": counting.operations / done,
            "waits": counting.waits / done,
            "factorisations": counting.factorisations / done,
            "bytes_per_parameter": _bytes(self.optimizer, self.problem.model) / self.problem.parameters,
        }


def _bytes(optimizer: Any, model: nn.Module) -> int:
    """Bytes of tensors that an optimizer keeps, without the model's own."""
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                walk(each)
        elif isinstance(value, tuple | list):
            for each in value:
                walk(each)
        elif type(value).__module__.startswith("metateleport.learned") and not isinstance(value, nn.Module):
            walk(vars(value))

    walk(getattr(optimizer, "kept", None) or dict(optimizer.state))
    walk(vars(optimizer.loop) if hasattr(optimizer, "loop") else {})
    return sum(size for place, size in found.items() if place not in own)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed steps of each (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the docs")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds is at least 1")
    if "soap" in given.methods and importlib.util.find_spec("pytorch_optimizer") is None:
        parser.error("soap needs pytorch_optimizer: pip install 'metateleport[second-order]'")
    methods = list(dict.fromkeys(("adamw", *given.methods)))
    torch.set_num_threads(1)
    with _muon_at_its_best() as halves:
        report = {
            "schema": SCHEMA,
            "rounds": given.rounds,
            "conditions": {**conditions(torch.device("cpu")), "bfloat16": halves},
            "models": {model: _measured(model, _methods_on(model, methods), given.rounds) for model in given.models},
        }
    publish(report, _table, _page, given)
    return 0


def _methods_on(model: str, methods: Sequence[str]) -> list[str]:
    """The methods that were asked for; of all by default, steps with gauges on the model that has a target for them."""
    return [*methods, "leaky_mlp_mixture"] if methods == list(DEFAULT) and model in _GAUGES else list(methods)


def _measured(model: str, methods: Sequence[str], rounds: int) -> dict[str, Any]:
    cases = [_Case(name, model) for name in methods]
    for case in cases:
        case.warm_up()
    order = random.Random(0)
    for _ in range(rounds):
        for case in order.sample(cases, len(cases)):
            case.time()
    adamw = cases[0].times
    return {
        "parameters": cases[0].problem.parameters,
        "cases": {
            case.name: {
                "seconds": Summary.of(case.times)._asdict(),
                "over_adamw": Summary.of([own / base for own, base in zip(case.times, adamw, strict=True)])._asdict(),
                "peak_over_adamw": case.peak / cases[0].peak,
                **case.counts(),
            }
            for case in cases
        },
    }


def _page(report: dict[str, Any]) -> str:
    known = report["conditions"]
    lines = [
        "# What a step costs",
        "",
        "`python -m benchmarks.steps --page docs/step-costs.md` writes this page. A row is a whole step in use, "
        "forward and backward pass included, on batches of 128 (8 x 64 tokens for the transformer). `digits` is "
        '`mt.LearnedOptimizer(model, "digits", example_input=x)`; `teleporting-adamw` is `mt.TeleportingOptimizer('
        'AdamW, model, mt.load("digits"), every=10)`, a mean over ten steps; Muon has AdamW for what is no hidden '
        "matrix. Operations, waits for the device, factorisations and bytes kept for each parameter are the "
        "optimizer's own, "
        "without the passes; they do not depend on the machine. The peak is that of all tensors during the second "
        "step, pass included, over AdamW's: in that step the learned optimizer teleports.",
        "",
        f"Medians and ranges of {report['rounds']} rounds after {_WARM_UP} steps, all optimizers of a model in turn, "
        f"in CPU time on {known['threads']} thread; {known['cpu']}, torch {known['torch']}, Python {known['python']}. "
        + (
            "Polar factors, the learned step's and Muon's, are made in bfloat16."
            if known["bfloat16"]
            else "This CPU has no products in bfloat16, so polar factors, the learned step's and Muon's, are made in "
            "float32; torch's own Muon, which knows bfloat16 only, would take many times as long here."
        ),
        "",
        _table(report),
        "",
    ]
    for model, measured in report["models"].items():
        cases = measured["cases"]
        if {"muon", "digits", "digits-without-symmetries"} <= set(cases):
            own, muon, bare = (
                cases[name]["seconds"]["median"] for name in ("digits", "muon", "digits-without-symmetries")
            )
            lines.append(
                f"- {model}: the learned step takes {own / muon:.2f} times Muon's ({_said(own / muon, _MUON[model])}), "
                f"and with symmetries {own / bare:.2f} times what it takes without ({_said(own / bare, 1.3)})."
            )
        if "teleporting-adamw" in cases and model in _TELEPORTING:
            ratio = cases["teleporting-adamw"]["over_adamw"]["median"]
            lines.append(
                f"- {model}: AdamW with a teleport every ten steps takes {ratio:.2f} times AdamW's "
                f"({_said(ratio, _TELEPORTING[model])})."
            )
        if "digits" in cases and model in _PEAK:
            ratio, most = cases["digits"]["peak_over_adamw"], _PEAK[model]
            lines.append(
                f"- {model}: the memory of a step that teleports is {ratio:.2f} times AdamW's at its peak "
                f"({_said(ratio, most)})."
            )
        if "leaky_mlp_mixture" in cases and model in _GAUGES:
            ratio = cases["leaky_mlp_mixture"]["over_adamw"]["median"]
            lines.append(
                f"- {model}: a step with gauges, which are held for up to {Refresh.longest} steps each, takes "
                f"{ratio:.1f} times AdamW's ({_said(ratio, _GAUGES[model])})."
            )
    return "\n".join(lines) + "\n"


def _said(found: float, target: float) -> str:
    return f"target {target:g}, {'met' if found <= target else 'not met'}"


def _table(report: dict[str, Any]) -> str:
    rows = [
        "| model | optimizer | CPU ms a step | over AdamW's (range) | operations | waits | factorisations | bytes "
        "| peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, measured in report["models"].items():
        for name, case in measured["cases"].items():
            over = case["over_adamw"]
            rows.append(
                f"| {model} | {name} | {1e3 * case['seconds']['median']:.1f} | "
                f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f}) | {case['operations']:.0f} | "
                f"{case['waits']:.0f} | {case['factorisations']:.1f} | {case['bytes_per_parameter']:.1f} | "
                f"{case['peak_over_adamw']:.2f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
