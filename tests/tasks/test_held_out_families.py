"""The families that `default` is never trained on: what their data and models are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gallery_cases import load
from torch import nn

from metateleport.checkpoint import shipped_checkpoints

HELD_OUT = ("cnn_digits", "tabular", "bags")


def test_no_training_is_on_them() -> None:
    recipe = (shipped_checkpoints()["default"] / "recipe.toml").read_text(encoding="utf-8")
    told = [line for line in recipe.splitlines() if line.startswith("#")]
    trained = [line for line in recipe.splitlines() if line.startswith(("members", "left_out"))]
    assert len(trained) == 2
    for name in HELD_OUT:
        assert any(name in line for line in told), "families that are never trained on are named in the recipe"
        assert not any(name in line for line in trained)


@pytest.mark.parametrize("name", HELD_OUT)
def test_augmented_settings_vary_and_can_be_stacked(name: str) -> None:
    drawn = [load(name).augmented(index, 0) for index in range(8)]
    assert len({str(each.settings()) for each in drawn}) == 8
    assert {each.settings()["depth"] for each in drawn} != {drawn[0].settings()["depth"]}
    for each in drawn[:3]:
        stack = each.stack(range(2))
        assert stack.batched
        assert bool(stack(stack.batch(0)).isfinite().all())


def test_batchnorm_s_statistics_are_the_batch_s() -> None:
    task = load("cnn_digits", {"batch": 16}).task(0)
    (x,), _ = task.batch(0)
    alone, beside = task.model(x[:8]), task.model(x)[:8]
    assert not torch.allclose(alone, beside, atol=1e-3)
    assert sum(isinstance(each, nn.BatchNorm2d) for each in task.model.modules()) == 2
    assert not list(task.model.buffers()), "a running mean is no part of a task"


@pytest.mark.parametrize(
    ("table", "rows", "outputs"), [("breast_cancer", 427, 2), ("wine", 134, 3), ("diabetes", 332, 1)]
)
def test_tables_are_scaled_by_their_training_rows(table: str, rows: int, outputs: int) -> None:
    task = load("tabular", {"table": table}).task(0)
    inputs, targets = task.inputs[0], task.targets[0]
    assert inputs.shape[0] == rows
    torch.testing.assert_close(inputs.mean(0), torch.zeros(inputs.shape[1]), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(inputs.std(0, correction=0), torch.ones(inputs.shape[1]), atol=1e-5, rtol=0.0)
    assert task.model(inputs).shape == (rows, outputs)
    assert (task.score is None) == (table == "diabetes")
    if table == "diabetes":
        torch.testing.assert_close(targets.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0.0)
    assert task.held_out is not None
    unseen = task.held_out[0][0]
    # No row is in both.
    assert float(torch.cdist(unseen, inputs).min()) > 0


def test_words_have_an_index_by_how_frequent_they_are() -> None:
    family = load("bags", {"label_noise": 0.0})
    words = family.data().training
    assert words.shape == (10, 80, 16)
    counts = Counter(words.long().flatten().tolist())
    assert min(counts) >= 0
    assert max(counts) < 400
    assert counts[1] > counts[50] > 0, "an index is the rank of a word"


def test_the_order_of_words_does_not_matter() -> None:
    task = load("bags").task(0)
    (words,), _ = task.batch(0)
    torch.testing.assert_close(task.model(words), task.model(words.flip(-1)))
