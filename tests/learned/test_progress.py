"""What is remembered of the course of a task: damping, and losses that are not told."""

from __future__ import annotations

import torch

from metateleport.learned.progress import Progress, Tolerance


def judged(progress: Progress, losses: list[float], tolerance: Tolerance | None = None) -> tuple[Progress, list[bool]]:
    verdicts = []
    for loss in losses:
        progress, accepted = progress.judge(torch.tensor([loss]), deterministic=False, tolerance=tolerance)
        verdicts.append(bool(accepted))
    return progress, verdicts


def begun() -> Progress:
    return judged(Progress.begin(torch.ones(1)), [1.0] * 5)[0]


def test_a_loss_that_stays_high_is_noise_that_was_underrated() -> None:
    """A lucky first batch must not stop a task for good, nor damp its steps to nothing."""
    progress, verdicts = judged(begun(), [5.0, 4.0, 5.0, 4.5, 5.0, 4.0, 4.4, 4.2, 4.6, 4.1] * 2)
    assert not any(verdicts[:3])
    assert all(verdicts[-5:])
    assert float(progress.damping) == 1.0


def test_neither_does_a_ceiling_over_a_lucky_start() -> None:
    tolerance = Tolerance(spreads=5.0, share=1.0, memory=0.9, start=0.5, ceiling=2.0)
    _, verdicts = judged(begun(), [5.0, 4.0] * 20, tolerance)
    assert all(verdicts[-5:])


def test_damping_has_a_floor() -> None:
    progress, _ = judged(begun(), [10.0 * 1.5**k for k in range(30)])
    assert float(progress.damping) > 0.02
    assert float(progress.rejected) == 30


def test_a_loss_that_rises_again_and_again_is_never_taken_for_noise() -> None:
    progress, verdicts = judged(begun(), [10.0 * 1.5**k for k in range(30)])
    assert not any(verdicts)
    assert float(progress.last) == 1.0


def test_losses_that_are_not_told_are_masked_and_accepted() -> None:
    progress, _ = judged(begun(), [0.5, 9.0])
    blind = progress.unjudged()
    assert bool(blind.accepted)
    assert blind.time == progress.time + 1
    assert blind.features()[0, 1:4].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(blind.last, progress.last)
    # What was damped recovers, and a loss that is told again is judged as before.
    assert float(blind.damping) > float(progress.damping)
    again, verdicts = judged(blind, [0.5])
    assert verdicts == [True]
    assert again.known


def test_whether_all_are_accepted_is_of_the_last_evaluation() -> None:
    progress, _ = Progress.begin(torch.ones(2)).judge(torch.ones(2), deterministic=True)
    assert progress.all_accepted
    progress, _ = progress.judge(torch.tensor([0.5, 2.0]), deterministic=True)
    assert not progress.all_accepted
