"""Tasks, task families and stacks of tasks: what a meta-optimizer is trained and evaluated on."""

from metateleport.families.family import FamilyError, TaskFamily, gallery, load_family, read_settings
from metateleport.families.probed import ProbedLosses
from metateleport.families.stack import TaskStack, stacked_name
from metateleport.families.task import SPLITS, TRAINING_LOSS, Batch, Measure, Split, Task, split_of, task_seed
from metateleport.families.trial import StackError, check_evaluation, check_second_order

__all__ = [
    "SPLITS",
    "TRAINING_LOSS",
    "Batch",
    "FamilyError",
    "Measure",
    "ProbedLosses",
    "Split",
    "StackError",
    "Task",
    "TaskFamily",
    "TaskStack",
    "check_evaluation",
    "check_second_order",
    "gallery",
    "load_family",
    "read_settings",
    "split_of",
    "stacked_name",
    "task_seed",
]
