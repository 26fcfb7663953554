"""Loading task families, their settings, seeds, minibatches and stacks."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import metateleport as mt
from metateleport.families import SPLITS, FamilyError, Split, TaskStack, gallery, split_of, task_seed

TASKS = Path(__file__).resolve().parents[2] / "tasks"
LINE = '''
"""A line through the origin."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import nn

from metateleport import Rescaling, Task, TaskFamily


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(TaskFamily):
    samples: int = 8
    noise: float = 0.0
    bias: bool = True
    kind: Literal["steep", "flat"] = "steep"
    level: Literal[1, 2] = 1
    batch: int | None = 4
    label: str = "a"

    def __post_init__(self):
        if self.samples > 1000:
            raise RuntimeError("too many")

    def sample(self, seed):
        model = nn.Sequential(nn.Linear(1, 3, bias=self.bias), nn.ReLU(), nn.Linear(3, 1))
        x = torch.rand(self.samples, 1)
        y = 2 * x + self.noise * torch.randn(self.samples, 1)
        symmetries = [Rescaling(model, "0", "2")]
        return Task(model, nn.functional.mse_loss, (x,), (y,), symmetries, batch_size=self.batch, seed=seed)
'''


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """A user's own file, which draws from the global random numbers as ordinary code does."""
    path = tmp_path / "line.py"
    path.write_text(LINE)
    return path


def write(folder: Path, text: str) -> Path:
    path = folder / "own.py"
    path.write_text(textwrap.dedent(text))
    return path


# Loading


def test_a_users_file_works_like_the_gallery(line: Path) -> None:
    family = mt.load_family(line, {"samples": "6", "batch": "all"})
    assert (family.name, family.settings()["samples"], family.settings()["batch"]) == ("line", 6, None)
    stack = family.stack([0, 1, 2], dtype=torch.float64)
    point = stack.point_at(stack.tensors(), stack.batch(0))
    assert point.loss is not None
    assert point.loss.shape == (3,)
    moved = stack.symmetries[0].act(stack.symmetries[0].group.random(3, size=1.0, seed=0, dtype=torch.float64), point)
    torch.testing.assert_close(stack.losses_at(moved.parameters, stack.batch(0)), point.loss)


@pytest.mark.parametrize("name", ["leaky_mlp", "digits", "quadratic"])
def test_bare_names_and_paths_work_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mt.load_family(name).name == name
    assert mt.load_family(TASKS / f"{name}.py").name == name
    assert mt.load_family(str(TASKS / f"{name}.py")).settings() == mt.load_family(name).settings()
    assert gallery()[name] == TASKS / f"{name}.py"


def test_own_folders_come_before_the_gallery(line: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, named = line.parent / "tasks", line.parent / "more"
    folder.mkdir()
    named.mkdir()
    (folder / "quadratic.py").write_text(LINE)
    (folder / "_helper.py").write_text("raise ValueError")
    monkeypatch.chdir(line.parent)
    assert type(mt.load_family("quadratic")).__name__ == "Line"
    assert mt.load_family("line.py").name == "line"
    assert "_helper" not in gallery()
    assert "leaky_mlp" in gallery()
    (named / "quadratic.py").write_text(LINE.replace("class Line", "class Named"))
    monkeypatch.setenv("METATELEPORT_TASKS", str(named))
    assert type(mt.load_family("quadratic")).__name__ == "Named"


def test_an_unknown_name_lists_the_gallery() -> None:
    with pytest.raises(FamilyError, match=r"'nothing'.*leaky_mlp.*ending in \.py"):
        mt.load_family("nothing")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"there is no file .*absent\.py"):
        mt.load_family(tmp_path / "absent.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines none"),
        # An abstract family is none.
        ("from metateleport import TaskFamily\nclass Base(TaskFamily):\n    pass", "defines none"),
        (LINE + LINE.replace("class Line", "class Other"), "defines Line, Other"),
        ("raise KeyError('oh')", "cannot be run: KeyError: 'oh'"),
        ("import sys\nsys.exit(3)", "cannot be run: SystemExit: 3"),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("def f(:", "cannot be run: SyntaxError"),
        (LINE.replace("@dataclasses", "# @dataclasses"), "Line has to be a frozen dataclass"),
        (LINE.replace("samples: int = 8", "samples: int"), "'samples' of Line needs a default"),
    ],
)
def test_files_that_cannot_be_loaded(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text.replace("from __future__ import annotations", ""))
    with pytest.raises(FamilyError, match=message) as caught:
        mt.load_family(path)
    assert "own.py" in str(caught.value)


def test_a_family_that_is_only_imported_is_not_the_files_own(line: Path, tmp_path: Path) -> None:
    line.rename(tmp_path / "elsewhere_line.py")
    with pytest.raises(FamilyError, match="defines none"):
        mt.load_family(write(tmp_path, "from elsewhere_line import Line"))
    wider = "from elsewhere_line import Line\n" + LINE.replace("Line(TaskFamily)", "Wider(Line)")
    assert mt.load_family(write(tmp_path, wider.replace("from __future__ import annotations", ""))).name == "own"


def test_a_file_that_raises_leaves_no_module_behind(tmp_path: Path) -> None:
    with pytest.raises(FamilyError):
        mt.load_family(write(tmp_path, "raise ValueError"))
    assert "metateleport_family_own" not in sys.modules


# Settings


@pytest.mark.parametrize(
    ("setting", "given", "wanted"),
    [
        ("samples", "12", 12),
        ("samples", np.int64(12), 12),
        ("noise", "1e-3", 1e-3),
        ("noise", 1, 1.0),
        ("noise", 10**400, math.inf),
        ("bias", "False", False),
        ("bias", "true", True),
        ("bias", False, False),
        ("kind", "flat", "flat"),
        ("level", "2", 2),
        ("level", 2, 2),
        ("batch", "all", None),
        ("batch", "None", None),
        ("batch", None, None),
        ("batch", "2", 2),
        ("label", "12", "12"),
    ],
)
def test_settings_are_read_in_their_type(setting: str, given: object, wanted: object, line: Path) -> None:
    value = mt.load_family(line, {setting: given}).settings()[setting]
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("setting", "given", "message"),
    [
        ("samples", "many", "samples takes int, not 'many'"),
        ("samples", "2.5", "samples takes int, not '2.5'"),
        ("samples", 2.5, r"samples takes int, not 2\.5"),
        ("samples", True, "samples takes int, not True"),
        ("samples", None, "samples takes int, not None"),
        ("samples", "all", "samples takes int, not 'all'"),
        ("noise", "loud", "noise takes float, not 'loud'"),
        ("noise", [1.0], "noise takes float"),
        ("bias", "yes", "bias is true or false, not 'yes'"),
        ("bias", 1, "bias is true or false, not 1"),
        ("kind", "round", "kind is one of steep, flat, not 'round'"),
        ("level", "3", "level is one of 1, 2, not '3'"),
        ("batch", "some", "batch takes int, not 'some'"),
        ("samples", 2000, "these settings cannot work: RuntimeError: too many"),
        ("sample", "1", "no setting 'sample'; it has batch, bias, kind, label, level, noise, samples"),
    ],
)
def test_settings_that_cannot_be_read(setting: str, given: object, message: str, line: Path) -> None:
    with pytest.raises(FamilyError, match=f"line.*{message}"):
        mt.load_family(line, {setting: given})


# Seeds

seeds = st.integers(0, 2**40)
splits = st.sampled_from(SPLITS)


@given(seeds, seeds, splits, seeds, seeds, splits)
def test_splits_never_share_a_seed(a: int, i: int, one: Split, b: int, j: int, other: Split) -> None:
    first, second = task_seed(a, one, i), task_seed(b, other, j)
    assert split_of(first) == one
    assert 0 <= first < 2**63
    assert (first == second) == ((a, i, one) == (b, j, other))
    if one != other:
        assert first % 2**32 != second % 2**32, "torch's generator reads 32 bits"


def test_seeds_of_more_than_32_bits_keep_to_themselves() -> None:
    assert task_seed(2**32, "train", 0) != task_seed(0, "train", 1)


def test_seeds_out_of_range() -> None:
    with pytest.raises(ValueError, match="train, validation, held-out, not 'test'"):
        task_seed(0, "test", 0)  # type: ignore[arg-type]
    for seed, index in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="not negative"):
            task_seed(seed, "train", index)
    with pytest.raises(ValueError, match="seed 7 belongs to no split"):
        split_of(7)


def test_equal_seeds_give_equal_tasks_though_the_file_draws_globally(line: Path) -> None:
    family = mt.load_family(line, {"noise": 0.1})
    first = family.task(3, seed=5)
    torch.rand(7)
    second, other = family.task(3, seed=5), family.task(4, seed=5)
    assert torch.equal(first.targets[0], second.targets[0])
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))
    assert not torch.equal(first.targets[0], family.task(3, "held-out", seed=5).targets[0])


def test_tasks_leave_global_random_numbers_alone(line: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    mt.load_family(line).stack([0, 1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]
    assert random.getstate() == before[2]


def test_dtype_is_asked_for_and_the_default_restored(line: Path) -> None:
    family = mt.load_family(line)
    assert family.task(0).inputs[0].dtype == torch.float32
    task = family.task(0, dtype=torch.float64)
    assert {task.inputs[0].dtype, task.targets[0].dtype, weights(task).dtype} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(RuntimeError):
        mt.load_family(line, {"samples": -1}).task(0, dtype=torch.float64)
    assert torch.get_default_dtype() == torch.float32


def weights(task: mt.Task) -> Tensor:
    return torch.cat([value.flatten() for value in task.model.parameters()])


# Minibatches


def counting(samples: int, batch: int | None, seed: int = 0) -> mt.Task:
    """A task whose samples are their own numbers."""
    values = torch.arange(samples, dtype=torch.float64)
    return mt.Task(nn.Linear(1, 1), nn.functional.mse_loss, (values,), (-values,), batch_size=batch, seed=seed)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**62), st.integers(0, 3))
def test_minibatches_are_shuffled_epochs(samples: int, size: int, seed: int, epoch: int) -> None:
    size = min(size, samples)
    task, per_epoch = counting(samples, size, seed), samples // size
    batches = [task.batch(step) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
    seen = torch.cat([inputs[0] for inputs, _ in batches])
    assert all(len(inputs[0]) == size for inputs, _ in batches)
    assert all(torch.equal(inputs[0], -targets[0]) for inputs, targets in batches)
    assert len(seen.unique()) == len(seen) == per_epoch * size
    if samples % size == 0:
        assert torch.equal(seen.sort().values, torch.arange(samples, dtype=torch.float64))


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    def order(seed: int, epoch: int) -> Tensor:
        task = counting(20, 5, seed)
        return torch.cat([task.batch(4 * epoch + step)[0][0] for step in range(4)])

    orders = [order(seed, epoch) for seed in (0, 4) for epoch in range(3)]
    assert len({tuple(each.tolist()) for each in orders}) == 6
    assert torch.equal(order(4, 2), order(4, 2))
    assert not any(torch.equal(each, torch.arange(20.0, dtype=torch.float64)) for each in orders)


def test_a_remainder_left_out_of_one_epoch_comes_in_another() -> None:
    task = counting(10, 4)
    seen = torch.cat([task.batch(step)[0][0] for step in range(40)])
    assert len(seen.unique()) == 10


def test_without_a_batch_size_every_evaluation_sees_all() -> None:
    assert all(torch.equal(counting(6, None).batch(step)[0][0], counting(6, None).inputs[0]) for step in range(3))


# Stacks


def test_a_stack_holds_every_tasks_minibatch(line: Path) -> None:
    stack = mt.load_family(line).stack([0, 1, 5], seed=2)
    assert len(stack) == 3
    assert not stack.deterministic
    for step in (0, 1, 9):
        inputs, targets = stack.batch(step)
        for place, task in enumerate(stack.tasks):
            assert torch.equal(inputs[0][place], task.batch(step)[0][0])
            assert torch.equal(targets[0][place], task.batch(step)[1][0])
    assert mt.load_family(line, {"batch": None}).stack([0]).deterministic


def test_minibatches_picked_together_are_those_of_the_tasks_in_any_order() -> None:
    stack = mt.TaskStack([counting(103, 2, seed) for seed in (0, 7)])
    for step in (0, 15, 16, 50, 51, 3, 17, 102):
        inputs, targets = stack.batch(step)
        for place, task in enumerate(stack.tasks):
            assert torch.equal(inputs[0][place], task.batch(step)[0][0])
            assert torch.equal(targets[0][place], task.batch(step)[1][0])


def sharing(batch_size: int | None, rows: list[Tensor | None]) -> list[mt.Task]:
    """Tasks on one set of data, of which each has the rows given."""
    inputs, targets = torch.arange(24.0).reshape(12, 2), torch.arange(12.0).reshape(12, 1)
    models = [nn.Linear(2, 1) for _ in rows]
    shared = {"loss": nn.functional.mse_loss, "inputs": (inputs,), "targets": (targets,), "batch_size": batch_size}
    return [mt.Task(model, rows=each, seed=3, **shared) for model, each in zip(models, rows, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [None, 2, 5])
def test_rows_of_shared_data_equal_a_copy_of_them(batch_size: int | None) -> None:
    rows = [torch.tensor([3, 1, 8, 7, 2]), torch.tensor([0, 11, 4, 5, 9])]
    tasks = sharing(batch_size, list(rows))
    copies = [
        dataclasses.replace(task, inputs=(task.inputs[0][row],), targets=(task.targets[0][row],), rows=None)
        for task, row in zip(tasks, rows, strict=True)
    ]
    stack, alone = TaskStack(tasks), TaskStack(copies)
    assert torch.equal(stack.full[0][0], alone.full[0][0])
    assert torch.equal(stack.full[1][0], alone.full[1][0])
    assert [task.samples for task in tasks] == [5, 5]
    for step in range(6):
        for one, other in zip(stack.batch(step), alone.batch(step), strict=True):
            assert torch.equal(one[0], other[0])
    assert torch.equal(stack.measured(stack.tensors()), alone.measured(alone.tensors()))
    with pytest.raises(ValueError, match="only tasks of one shape"):
        TaskStack([tasks[0], dataclasses.replace(tasks[1], rows=torch.tensor([1]))])


def test_data_that_all_tasks_have_are_not_copied() -> None:
    stack = TaskStack(sharing(None, [None] * 16))
    assert stack.full[0][0].shape == (16, 12, 2)
    assert stack.full[0][0].untyped_storage().nbytes() == 12 * 2 * 4
    batch = tuple(tuple(value.clone() for value in part) for part in stack.full)
    assert torch.equal(stack(stack.full), stack((batch[0], batch[1])))
    assert stack.held_out is None


def test_stacks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        TaskStack([])
    with pytest.raises(ValueError, match="only tasks of one shape"):
        TaskStack([counting(5, None), counting(6, None)])
    wide = mt.Task(nn.Linear(2, 1), nn.functional.mse_loss, (), ())
    with pytest.raises(ValueError, match="only models of one architecture"):
        TaskStack([counting(5, None), wide])
