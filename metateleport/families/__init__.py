"""Tasks, families of them, and stacks of tasks: what a meta-optimizer is trained and tested on."""

from metateleport.families.family import FamilyError, TaskFamily, gallery, load_family, read_settings
from metateleport.families.probed import ProbedLosses
from metateleport.families.stack import Batch, StackedModel
from metateleport.families.task import SPLITS, TRAINING_LOSS, Measure, Split, Task, TaskStack, split_of, task_seed
from metateleport.families.trial import StackError, try_out, try_twice

__all__ = [
    "SPLITS",
    "TRAINING_LOSS",
    "Batch",
    "FamilyError",
    "Measure",
    "ProbedLosses",
    "Split",
    "StackError",
    "StackedModel",
    "Task",
    "TaskFamily",
    "TaskStack",
    "gallery",
    "load_family",
    "read_settings",
    "split_of",
    "task_seed",
    "try_out",
    "try_twice",
]
