"""The outer loop: meta-training of a few-shot learner over a task family."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metateleport.families import TaskFamily, TaskStack
from metateleport.fewshot.adaptation import adapt, on_stack
from metateleport.fewshot.learners import TeleportingLearner
from metateleport.files import replacing_folder, write_json
from metateleport.optim.saved import sources_of

__all__ = ["MetaProgress", "MetaTraining", "MetaTrainingConfig", "MetaTrainingError"]


class MetaTrainingError(ValueError):
    """Settings that cannot work, or a state that cannot be resumed; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTrainingConfig:
    """How a learner is meta-trained.

    Args:
        meta_steps: steps of Adam on the learner's parameters.
        tasks: number of tasks in a meta-batch.
        inner_steps: steps of the inner loop per task.
        meta_lr: Adam's learning rate.
        clip: largest norm of the meta-gradient.
        seed: of the tasks.
        validation_every: meta-steps between validations.
        validation_tasks: tasks of the validation split that choose the best weights.

    Raises:
        MetaTrainingError: if a number is not positive.
    """

    meta_steps: int = 300
    tasks: int = 8
    inner_steps: int = 5
    meta_lr: float = 3e-3
    clip: float = 10.0
    seed: int = 0
    validation_every: int = 25
    validation_tasks: int = 64

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and not (0 < value < math.inf):
                raise MetaTrainingError(f"{field.name} has to be positive, it is {value!r}")
        if self.seed < 0:
            raise MetaTrainingError(f"seed is not negative; it is {self.seed}")


@dataclasses.dataclass
class MetaProgress:
    """The progress of a meta-training.

    Args:
        meta_step: meta-steps taken.
        losses: mean query loss of every meta-batch after adapting.
        validations: pairs of the meta-step and the mean query loss of the validation tasks after adapting.
        best: the lowest of these; infinite before the first.
        best_step: the meta-step it was found at.
        skipped: meta-steps whose gradient was not finite.
        evaluations: gradient evaluations of the inner loops of all tasks, without validation.
        seconds: spent, validation included.
    """

    meta_step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    validations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    skipped: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0


class MetaTraining:
    r"""Meta-trains a learner by Adam on the mean query loss after adapting.

    $$\min_\theta\; \mathbb{E}_\tau\, L^{\text{query}}_\tau\!\left(w_K\right), \qquad w_0 = \theta, \quad
      w_{k+1} = \text{adapt}(w_k, L^{\text{support}}_\tau),$$

    with all tasks of a meta-batch in one stack. The weights that are best on validation tasks are kept.

    Args:
        learner: one of learn2learn's, or a `TeleportingLearner`; trained in place.
        family: tasks of its model, with held-out data, which are the queries.
        config: the settings.
        stacks: gives the meta-batch of a meta-step, so that several learners can share it; drawn from the family if
            not given.

    Example:
        >>> from metateleport import Task
        >>> from metateleport.fewshot import maml
        >>> from torch import nn
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Line(TaskFamily):
        ...     '''A line through the origin.'''
        ...     def sample(self, seed):
        ...         x, slope = torch.linspace(-1, 1, 8).unsqueeze(1), 1 + torch.rand(())
        ...         data = (x,), (slope * x,)
        ...         return Task(nn.Linear(1, 1), nn.functional.mse_loss, *data, seed=seed, held_out=data)
        >>> config = MetaTrainingConfig(meta_steps=50, meta_lr=0.05)
        >>> training = MetaTraining(maml(nn.Linear(1, 1), lr=0.1), Line(), config)
        >>> training.run()
        >>> training.progress.losses[0] > 3 * training.progress.best
        True

    Source: Finn, Abbeel and Levine, ICML 2017 (arXiv 1703.03400), algorithm 2.
    """

    def __init__(
        self,
        learner: Any,
        family: TaskFamily,
        config: MetaTrainingConfig,
        stacks: Callable[[int], TaskStack] | None = None,
    ) -> None:
        self.learner, self.family, self.config = learner, family, config
        self.stacks = stacks or self._drawn
        self.parameters = [value for value in learner.parameters() if value.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.meta_lr)
        self.progress = MetaProgress()
        self.best: dict[str, Tensor] = copy.deepcopy(learner.state_dict())
        self._validation = family.stack(range(config.validation_tasks), "validation", config.seed)
        if self._validation.held_out is None:
            raise MetaTrainingError(f"tasks of {family.name or type(family).__name__} have no held-out data to query")

    def run(self, report: Callable[[MetaProgress], None] | None = None) -> None:
        """Takes the remaining meta-steps, and leaves the learner with its best weights.

        Args:
            report: called after every meta-step.
        """
        done = self.progress
        while done.meta_step < self.config.meta_steps:
            started = time.perf_counter()
            self._meta_step(self.stacks(done.meta_step))
            done.meta_step += 1
            if done.meta_step % self.config.validation_every == 0 or done.meta_step == self.config.meta_steps:
                self._validate()
            done.seconds += time.perf_counter() - started
            if report is not None:
                report(done)
        self.learner.load_state_dict(self.best)

    def _meta_step(self, stack: TaskStack) -> None:
        assert stack.held_out is not None
        clone = on_stack(self.learner, stack)
        for _ in range(self.config.inner_steps):
            clone.adapt(clone(stack.full).sum())
        loss = clone(stack.held_out).mean()
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        spent = clone.evaluations if isinstance(clone, TeleportingLearner) else float(self.config.inner_steps)
        self.progress.evaluations += float((torch.as_tensor(spent) * torch.ones(len(stack))).sum())
        self.progress.losses.append(min(float(loss.detach()), 1e300))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if bool(norm.isfinite()):
            self.optimizer.step()
        else:
            self.progress.skipped += 1

    def _validate(self) -> None:
        query = adapt(self.learner, self._validation, self.config.inner_steps).query[:, -1]
        score = float(query.mean())
        score = score if math.isfinite(score) else 1e300
        self.progress.validations.append((self.progress.meta_step, score))
        if score < self.progress.best:
            self.progress.best, self.progress.best_step = score, self.progress.meta_step
            self.best = copy.deepcopy(self.learner.state_dict())

    def _drawn(self, meta_step: int) -> TaskStack:
        first = meta_step * self.config.tasks
        return self.family.stack(range(first, first + self.config.tasks), "train", self.config.seed)

    def save(self, folder: str | Path) -> None:
        """Writes everything that `restore` needs, in one piece; a folder that exists is replaced."""
        tensors = {f"learner/{name}": value for name, value in self.learner.state_dict().items()}
        tensors.update({f"best/{name}": value for name, value in self.best.items()})
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"adam/{index}/{name}": value for name, value in state.items()})
        tensors.update({f"source/{name}": source.get_state() for name, source in self._sources()})
        progress = dataclasses.asdict(self.progress)
        progress["best"] = min(progress["best"], 1e300)
        with replacing_folder(folder) as temporary:
            save_file({n: v.detach().clone().contiguous() for n, v in tensors.items()}, temporary / "state.safetensors")
            write_json(temporary / "state.json", {"config": dataclasses.asdict(self.config), "progress": progress})

    def restore(self, folder: str | Path) -> None:
        """Resumes from what `save` wrote, as if the run had not stopped.

        Raises:
            MetaTrainingError: if there is no such state, or it is damaged, or of another learner or other settings.
        """
        folder = Path(folder)
        try:
            saved = json.loads((folder / "state.json").read_text())
            tensors = load_file(folder / "state.safetensors")
            changed = [
                name
                for name, value in dataclasses.asdict(self.config).items()
                if name != "meta_steps" and saved["config"].get(name) != value
            ]
            if not changed:
                self._load(tensors, saved["progress"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise MetaTrainingError(
                f"the state in {folder} cannot be resumed ({type(error).__name__}: {error}): it is missing, "
                "damaged or another learner's"
            ) from error
        if changed:
            raise MetaTrainingError(
                f"the meta-training in {folder} was started with {changed[0]}={saved['config'].get(changed[0])!r}, not "
                f"{getattr(self.config, changed[0])!r}: go on with the same settings"
            )

    def _load(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"learner": {}, "best": {}, "adam": {}, "source": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        self.learner.load_state_dict(parts["learner"])
        self.best = parts["best"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["adam"].items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for name, source in self._sources():
            source.set_state(parts["source"][name])
        progress["validations"] = [tuple(each) for each in progress["validations"]]
        self.progress = MetaProgress(**progress)

    def _sources(self) -> list[tuple[str, torch.Generator]]:
        """Where a random teleporter draws from."""
        return sources_of(self.learner.teleporter) if isinstance(self.learner, TeleportingLearner) else []
