"""Letters: windows of text, and splits that read different modules."""

from __future__ import annotations

import torch
from gallery_cases import load


def test_targets_follow_their_windows() -> None:
    task = load("letters", {"samples": 50, "context": 3, "batch": 10}).task(0)
    (inputs,), (targets,) = task.training
    assert torch.equal(inputs[1:, -1], targets[:-1])
    assert torch.equal(inputs[1:, :-1], inputs[:-1, 1:])


def test_what_is_held_out_follows_what_is_trained_on() -> None:
    task = load("letters", {"samples": 50, "context": 3, "batch": 10}).task(0)
    assert task.held_out is not None
    (unseen,), _ = task.held_out
    assert torch.equal(unseen[0, -1], task.training[1][0][-1])


def test_splits_read_other_texts() -> None:
    family = load("letters", {"samples": 8000})
    texts = [family.task(0, split).training[0][0] for split in ("train", "validation", "held-out")]
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])
