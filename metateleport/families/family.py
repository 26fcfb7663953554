"""Task families: distributions of tasks, loaded from one readable file each."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch

from metateleport.families.stack import TaskStack
from metateleport.families.task import SPLITS, TRAINING_LOSS, Measure, Split, Task, split_of, task_seed
from metateleport.families.trial import check_evaluation
from metateleport.files import run_file, search_folders
from metateleport.settings import as_float, shown

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


_TRIED: dict[Any, bool] = {}
"""Kinds of stacks that were evaluated once, and whether `vmap` batches them."""


class FamilyError(ValueError):
    """A task family that is unknown, cannot be loaded or has settings that cannot work; the message says why."""


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

        `split_of` gives the split of a seed, for families that divide classes or data between the splits. When
        `task` calls this, torch's global random numbers on the CPU are seeded with `seed` and restored afterwards.
        """

    def augmented(self, index: int, seed: int) -> TaskFamily:
        """The settings for one meta-batch of meta-training; a family may vary its own here. Fixed by default."""
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
        """Several tasks stacked in one graph.

        Raises:
            FamilyError: if they cannot be stacked or evaluated.
        """
        tasks = [self.task(index, split, seed, dtype) for index in indices]
        try:
            made = TaskStack(tasks, device)
            self._try_out(made)
        except ValueError as error:
            raise FamilyError(f"{self.name}: {error}") from error
        return made

    def _try_out(self, stack: TaskStack) -> None:
        """Checks the first stack of its kind in this process."""
        tensors = (*stack.named_parameters(), *stack.named_buffers())
        shapes = tuple((name, value.shape, value.dtype) for name, value in tensors)
        kind = (type(self), str(stack.template), shapes, str(stack.device))
        if kind not in _TRIED:
            check_evaluation(stack, stack.batch(0))
            _TRIED[kind] = stack.batched
        stack.batched = _TRIED[kind]

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return dataclasses.asdict(self)


def gallery() -> dict[str, Path]:
    """The family files that bare names resolve to, from any working directory.

    The folder that `METATELEPORT_TASKS` names comes first, then `tasks/` in the working directory, then the project's.
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
    """Converts settings to the types of a dataclass's fields, from text or from values.

    Args:
        kind: the dataclass whose fields are the settings.
        settings: by name, text as on the command line or values.
        owner: the name for error messages.

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
        raise FamilyError(f"{what} is one of {', '.join(map(str, get_args(wanted)))}, not {shown(value)}")
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if text is None or text.lower() not in ("true", "false"):
            raise FamilyError(f"{what} is true or false, not {shown(value)}")
        return text.lower() == "true"
    try:
        if text is not None:
            return wanted(text)
        # True is an integer to Python, and int() would round.
        numeric = {int: numbers.Integral, float: numbers.Real}.get(wanted)
        if numeric is not None and (isinstance(value, bool) or not isinstance(value, numeric)):
            raise TypeError
        made = as_float if wanted is float else wanted
        return value if numeric is None else made(value)
    except (TypeError, ValueError) as error:
        raise FamilyError(f"{what} takes {getattr(wanted, '__name__', wanted)}, not {shown(value)}") from error
