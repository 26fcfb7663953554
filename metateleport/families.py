"""Task families: what a meta-optimizer is trained and tested on."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from metateleport.files import run_file, search_folders
from metateleport.stack import Batch, StackedModel
from metateleport.symmetries import Symmetry

__all__ = [
    "SPLITS",
    "TRAINING_LOSS",
    "FamilyError",
    "Measure",
    "Split",
    "Task",
    "TaskFamily",
    "TaskStack",
    "gallery",
    "load_family",
    "read_settings",
    "split_of",
    "task_seed",
]

Split = Literal["train", "validation", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held-out")


class FamilyError(ValueError):
    """A task family that is unknown, cannot be loaded or has settings that cannot work; the message says why."""


TRAINING_LOSS = "training loss"
"""What tasks are judged by, unless they name another measure."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a task is judged by, where that is not its training loss: smaller is better.

    Args:
        name: as tables call it.
        function: maps parameters by name and `data` to a scalar; the same for all tasks of a family.
        data: the task's own, such as the matrix that is sought.

    Example:
        >>> Measure("distance", lambda parameters, x: (parameters["x"] - x).norm(), (torch.zeros(3),)).name
        'distance'
    """

    name: str
    function: Callable[..., Tensor]
    data: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """One optimisation problem: a model at its start, data and a loss.

    Args:
        model: the model at its initial weights.
        loss: maps the model's outputs and the targets to a scalar; the same for all tasks of a family.
        inputs: the training data's inputs, samples in dimension 0.
        targets: the training data's targets, samples in dimension 0.
        symmetries: symmetries of the model, in the order of the data flow.
        batch_size: samples a minibatch; None for the whole training set at every evaluation.
        seed: seeds the order of the minibatches.
        held_out: inputs and targets that are never trained on.
        score: maps outputs and targets to an accuracy between 0 and 1, where the task has one.
        measure: what methods are tuned and judged by, where that is not the loss on all of the training data.
        rows: numbers of the samples of `inputs` and `targets` that are this task's; None for all. Tasks that draw on
            one set of data share it so, instead of holding a copy each.
    """

    model: nn.Module
    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    symmetries: Sequence[Symmetry] = ()
    batch_size: int | None = None
    seed: int = 0
    held_out: Batch | None = None
    score: Callable[..., Tensor] | None = None
    measure: Measure | None = None
    rows: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return len((self.inputs or self.targets)[0] if self.rows is None else self.rows)

    @property
    def training(self) -> Batch:
        """Inputs and targets of the whole training set."""
        return (self.inputs, self.targets) if self.rows is None else self._picked(self.rows)

    def batch(self, step: int) -> Batch:
        """The minibatch of one evaluation: shuffled epochs, a function of the task's seed and the step alone."""
        if self.batch_size is None:
            return self.training
        per_epoch = max(self.samples // self.batch_size, 1)
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        chosen = torch.from_numpy(order[place * self.batch_size : (place + 1) * self.batch_size])
        return self._picked(chosen if self.rows is None else self.rows[chosen])

    def _picked(self, rows: Tensor) -> Batch:
        return tuple(value[rows] for value in self.inputs), tuple(value[rows] for value in self.targets)


def task_seed(seed: int, split: Split, index: int) -> int:
    """The seed of one task of a family: tasks of different splits never share one.

    The last digit in base 4 is the split's, the rest a hash of `seed` and `index`.

    Args:
        seed: the run's seed.
        split: `train`, `validation` or `held-out`.
        index: number of the task in its split.

    Example:
        >>> {task_seed(0, split, 5) % 4 for split in SPLITS} == {0, 1, 2}
        True
    """
    if split not in SPLITS:
        raise ValueError(f"a split is one of {', '.join(SPLITS)}, not {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seeds and task numbers are not negative: got seed {seed}, task {index}")
    # As one list of words, a seed of more than 32 bits would meet another seed's task.
    drawn = int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0])
    # Torch's generator on the CPU reads the lower 32 bits only: the split's digit is among them.
    return (drawn >> 4) * 4 + SPLITS.index(split)


def split_of(seed: int) -> Split:
    """The split that the seed of a task belongs to.

    Args:
        seed: as `task_seed` makes it.

    Raises:
        ValueError: if the seed belongs to none.

    Example:
        >>> split_of(task_seed(0, "held-out", 5))
        'held-out'
    """
    if seed % 4 >= len(SPLITS):
        raise ValueError(f"seed {seed} belongs to no split: its remainder by 4 has to be 0, 1 or 2")
    return SPLITS[seed % 4]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFamily(abc.ABC):
    """A distribution of tasks of one shape, with settings.

    A family is a frozen dataclass: its fields are its settings, each with a default, and `--set name=value` on the
    command line sets them. All tasks of one setting have equal shapes, so that they can be stacked.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Line(TaskFamily):
        ...     '''A line through the origin.'''
        ...     name: ClassVar[str] = "line"
        ...     noise: float = 0.0
        ...     def sample(self, seed):
        ...         x = torch.linspace(0, 1, 8).unsqueeze(1)
        ...         return Task(nn.Linear(1, 1), nn.functional.mse_loss, (x,), (2 * x,), seed=seed)
        >>> Line().task(0, "train").inputs[0].shape
        torch.Size([8, 1])
    """

    name: ClassVar[str] = ""
    dtype: ClassVar[torch.dtype] = torch.float32
    """The dtype that tasks are built in, unless another is asked for."""

    @abc.abstractmethod
    def sample(self, seed: int) -> Task:
        """The task of one seed, on the CPU, in torch's default dtype; equal seeds give equal tasks.

        `split_of` tells the split of a seed, for families that share out classes or data between the splits. When
        `task` calls this, torch's global random numbers on the CPU are seeded with `seed` and restored afterwards.
        """

    def augmented(self, index: int, seed: int) -> TaskFamily:
        """The settings to use for one meta-training batch; a family may vary its own here. By default fixed."""
        return self

    def task(self, index: int, split: Split = "train", seed: int = 0, dtype: torch.dtype | None = None) -> Task:
        """The task of a number in a split; training and held-out tasks never share a seed."""
        before = torch.get_default_dtype()
        own = task_seed(seed, split, index)
        try:
            torch.set_default_dtype(dtype or self.dtype)
            # Layers draw their initial weights from the global generator.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(own)
                return self.sample(own)
        finally:
            torch.set_default_dtype(before)

    def stack(
        self,
        indices: Sequence[int],
        split: Split = "train",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> TaskStack:
        """Several tasks stacked in one graph."""
        return TaskStack([self.task(index, split, seed, dtype) for index in indices], device)

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)


class TaskStack:
    """Tasks of one shape side by side: a stacked model and stacked data.

    Args:
        tasks: tasks of one family and setting.
        device: where the stack lives.

    Raises:
        ValueError: if there is no task, or their shapes differ.
    """

    def __init__(self, tasks: Sequence[Task], device: torch.device | str = "cpu") -> None:
        if not tasks:
            raise ValueError("a stack needs at least one task")
        self.model = StackedModel([task.model for task in tasks], tasks[0].loss, tasks[0].symmetries).to(device)
        self.tasks = tuple(tasks)
        self.symmetries = tuple(tasks[0].symmetries)
        self.device = torch.device(device)
        if any(_shapes(task) != _shapes(tasks[0]) for task in tasks):
            raise ValueError("only tasks of one shape can be stacked: their data differ in number or shape")
        self.score = tasks[0].score
        self.measure = tasks[0].measure
        self._sought: tuple[Tensor, ...] = ()
        if self.measure is not None:
            self._sought = self._stack([(task.measure.data, ()) for task in tasks if task.measure is not None])[0]

    def __len__(self) -> int:
        return len(self.tasks)

    @functools.cached_property
    def full(self) -> Batch:
        """Every task's training data, stacked when they are first asked for: on minibatches they may never be."""
        return self._stack([task.training for task in self.tasks])

    @functools.cached_property
    def held_out(self) -> Batch | None:
        """Every task's held-out data, stacked when they are first asked for; None where a task has none."""
        parts = [task.held_out for task in self.tasks if task.held_out is not None]
        return self._stack(parts) if len(parts) == len(self.tasks) else None

    @property
    def deterministic(self) -> bool:
        """Whether every evaluation sees the whole training set."""
        return self.tasks[0].batch_size is None

    def batch(self, step: int) -> Batch:
        """Every task's minibatch of one evaluation, stacked."""
        return self.full if self.deterministic else self._stack([task.batch(step) for task in self.tasks])

    def measured(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What every task is judged by at some parameters: its measure, or its full training loss, `(tasks,)`."""
        if self.measure is None:
            return self.model.losses_at(parameters, self.full)
        with torch.no_grad():
            return torch.func.vmap(self.measure.function)(dict(parameters), *self._sought)

    def _stack(self, batches: Sequence[Batch]) -> Batch:
        inputs, targets = (
            tuple(self._side_by_side(values) for values in zip(*part, strict=True))
            for part in zip(*batches, strict=True)
        )
        return inputs, targets

    def _side_by_side(self, values: Sequence[Tensor]) -> Tensor:
        """The tasks' tensors stacked; one that they share is not copied."""
        if all(value is values[0] for value in values):
            return values[0].to(self.device).expand(len(values), *values[0].shape)
        return torch.stack(tuple(values)).to(self.device)


def _shapes(task: Task) -> list[Any]:
    """What has to be equal in all tasks of a stack."""
    count = () if task.rows is None else (len(task.rows),)
    own = [[(*count, *value.shape[len(count) :]) for value in part] for part in (task.inputs, task.targets)]
    held_out = None if task.held_out is None else [[value.shape for value in part] for part in task.held_out]
    return [own, held_out, None if task.measure is None else [value.shape for value in task.measure.data]]


def gallery() -> dict[str, Path]:
    """The family files that bare names resolve to, wherever the process runs.

    `METATELEPORT_TASKS` names a further folder; then come the working folder's `tasks/` and the project's own.
    """
    found: dict[str, Path] = {}
    for folder in search_folders("tasks", "_gallery", "METATELEPORT_TASKS"):
        for path in sorted(folder.glob("*.py")) if folder.is_dir() else ():
            if not path.name.startswith("_"):
                found.setdefault(path.stem, path)
    return found


def load_family(name_or_path: str | Path, settings: Mapping[str, Any] | None = None) -> TaskFamily:
    """Loads a task family from a file or by bare name.

    Args:
        name_or_path: a Python file with one `TaskFamily`, or the name of one in the gallery. The file is run.
        settings: values for the family's settings; strings are read in the setting's type.

    Returns:
        The family.

    Raises:
        FamilyError: if there is no such family, the file has none, or a setting is unknown or cannot work.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        known = gallery()
        if str(name_or_path) not in known:
            raise FamilyError(
                f"there is no task family {str(name_or_path)!r}: the gallery has {', '.join(known) or 'none'}; "
                "a file of your own is given by its path, ending in .py"
            )
        path = known[str(name_or_path)]
    if not path.is_file():
        raise FamilyError(f"there is no file {path}: give the path of a Python file with a TaskFamily, or a bare name")
    kind = _family_in(path)
    parsed = read_settings(kind, settings or {}, path.stem)
    try:
        return kind(**parsed)
    except FamilyError:
        raise
    except Exception as error:
        raise FamilyError(f"{path.stem}: these settings cannot work: {type(error).__name__}: {error}") from error


def _family_in(path: Path) -> type[TaskFamily]:
    try:
        module = run_file(path, "metateleport_family_")
    except ImportError as error:
        raise FamilyError(str(error)) from error.__cause__
    kinds = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, TaskFamily)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        names = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise FamilyError(f"{path} has to define one TaskFamily; it defines {names}")
    if not dataclasses.is_dataclass(kinds[0]) or "__dataclass_params__" not in vars(kinds[0]):
        raise FamilyError(f"{path}: {kinds[0].__name__} has to be a frozen dataclass: its fields are its settings")
    for field in dataclasses.fields(kinds[0]):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FamilyError(f"{path}: the setting {field.name!r} of {kinds[0].__name__} needs a default")
    if not kinds[0].name:
        kinds[0].name = path.stem
    return kinds[0]


def read_settings(kind: type[Any], settings: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Reads settings in the types of a dataclass's fields, from text or from values.

    Args:
        kind: the dataclass; its fields are the settings there are.
        settings: by name, text as on the command line or values.
        owner: what has these settings, as messages call it.

    Returns:
        The settings by name, in their types.

    Raises:
        FamilyError: if there is no such setting, or a value cannot be read in its type.
    """
    types = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    parsed = {}
    for name, value in settings.items():
        if name not in fields:
            raise FamilyError(f"{owner} has no setting {name!r}; it has {', '.join(sorted(fields)) or 'none'}")
        parsed[name] = _read(f"{owner}: {name}", types[name], value)
    return parsed


def _read(what: str, wanted: Any, value: Any) -> Any:
    """Reads a setting in the type of its field, from text or from a value."""
    text = value if isinstance(value, str) else None
    arguments = get_args(wanted)
    if type(None) in arguments:
        if value is None or (text is not None and text.lower() in ("none", "all")):
            return None
        wanted = next(argument for argument in arguments if argument is not type(None))
    if get_origin(wanted) is Literal:
        for choice in get_args(wanted):
            if value == choice or text == str(choice):
                return choice
        raise FamilyError(f"{what} is one of {', '.join(map(str, get_args(wanted)))}, not {value!r}")
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if text is None or text.lower() not in ("true", "false"):
            raise FamilyError(f"{what} is true or false, not {value!r}")
        return text.lower() == "true"
    try:
        if text is not None:
            return wanted(text)
        # True is an integer to Python, and int() would round.
        numeric = {int: numbers.Integral, float: numbers.Real}.get(wanted)
        if numeric is not None and (isinstance(value, bool) or not isinstance(value, numeric)):
            raise TypeError
        return value if numeric is None else wanted(value)
    except (TypeError, ValueError) as error:
        raise FamilyError(f"{what} takes {getattr(wanted, '__name__', wanted)}, not {value!r}") from error
