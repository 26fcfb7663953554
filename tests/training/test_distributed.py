"""Any number of processes with the same tasks gives the same run, and errors reach all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_cases import in_ranks, left, meta_gradient, networks, refused, told, validation

from metateleport.training import Ranks, TrainingError, joined
from metateleport.training.distributed import ALONE

# On leaky_mlp's data covariances are so badly conditioned that a teleport amplifies rounding.
TELEPORTS = {
    "family": "matrix_factorisation",
    "settings": {"width": 5, "rank": 2, "batch": 20},
    "mode": "lr+tele",
    "teleport_cost": 0.1,
}
SEARCHED = {"mode": "lr", "search": 1, "blind": 0.0}
ROUNDING = 1e-10


def apart(one: Any, other: Any) -> float:
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (one, other))
    return float((one - other).abs().max())


@pytest.mark.parametrize("count", [2, 4])
def test_meta_gradients_are_those_of_one_process(count: int) -> None:
    expected, loss = meta_gradient(ALONE, TELEPORTS)
    assert torch.tensor(expected).abs().max() > 1e-3
    for gradient, own in in_ranks(count, meta_gradient, TELEPORTS):
        assert apart(gradient, expected) < ROUNDING
        assert abs(own - loss) < ROUNDING


@pytest.mark.parametrize(("count", "changes"), [(2, TELEPORTS), (4, SEARCHED)])
def test_networks_are_those_of_one_process(count: int, changes: dict[str, Any]) -> None:
    expected, course = networks(ALONE, changes)
    every = in_ranks(count, networks, changes)
    for weights, own in every:
        assert apart(weights, expected) < ROUNDING
        for name in ("losses", "validations", "openness", "searched"):
            assert len(own[name]) == len(course[name])
            assert not course[name] or apart(own[name], course[name]) < ROUNDING
        # The time may end a training, so all processes count the same.
        assert (weights, own) == every[0]


def test_more_processes_than_stacks_share_the_validation_tasks() -> None:
    changes = {"mode": "lr", "validation_tasks": 3}
    expected = validation(ALONE, changes)
    assert all(abs(each - expected) < ROUNDING for each in in_ranks(4, validation, changes))


def test_shares_are_a_partition() -> None:
    for size in range(1, 6):
        for count in range(8):
            parts = [list(Ranks(rank, size).share(count)) for rank in range(size)]
            assert [piece for part in parts for piece in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_error_of_the_first_process_reaches_all() -> None:
    assert in_ranks(2, told) == [["ValueError", "there is no such file"], ["ToldByFirstError", "there is no such file"]]


def test_a_process_that_is_gone_is_named() -> None:
    said, nothing = in_ranks(2, left)
    assert said.startswith("2: rank 1 (process "), said
    assert "was lost: it ended, hangs or cannot be reached (" in said
    assert nothing == ""


def test_fewer_tasks_than_processes_are_refused() -> None:
    assert all("outer.tasks = 1 is fewer than the 2 processes" in each for each in in_ranks(2, refused))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE has to be a whole number, not 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set: start them with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR"),
    ],
)
def test_an_environment_that_is_not_torchruns(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=words), joined():
        pass
