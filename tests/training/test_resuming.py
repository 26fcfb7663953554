"""A training that was interrupted, killed or damaged goes on to the same weights, or says why not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from training_cases import names, tiny
from training_cases import small as config

import metateleport as mt
from metateleport.training import (
    Interrupted,
    Progression,
    TrainingError,
    tracking_run_of,
    train,
    train_meta_seeds,
)


def weights(path: Path) -> bytes:
    return (path / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training that nobody interrupted."""
    return train(config(), tmp_path_factory.mktemp("whole") / "whole")


def test_equal_seeds_give_equal_checkpoints(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    assert weights(train(config(), tmp_path / "a")) == weights(whole)
    assert weights(train(config(seed=1), tmp_path / "b")) != weights(whole)


def interrupting(at: int) -> Callable[[str, Progression, float], None]:
    """Ctrl-C after so many meta-steps, of both networks together."""
    seen: list[int] = []

    def report(_: str, progression: Progression, __: float) -> None:
        seen.append(progression.meta_step)
        if len(seen) == at:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("at", [1, 5, 6, 10])
def test_an_interrupted_training_ends_as_if_it_had_not_been(at: int, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="--resume") as caught:
        train(config(), tmp_path / "part", report=interrupting(at))
    assert str(tmp_path / "part.unfinished") in str(caught.value)
    assert names(tmp_path) == ["part.unfinished"]
    path = train(config(), tmp_path / "part", resume=True)
    assert weights(path) == weights(whole)
    assert names(tmp_path) == ["part"]
    runs, expected = (mt.load_checkpoint(each).card["training"]["runs"] for each in (path, whole))
    for name in expected:
        assert {**runs[name], "seconds": 0} == {**expected[name], "seconds": 0}


def test_it_may_be_interrupted_again_and_again(whole: Path, tmp_path: Path) -> None:
    resume = False
    for _ in range(30):
        try:
            # A stack of tasks is at most two meta-steps: after three one boundary at least is passed.
            path = train(config(), tmp_path / "part", resume=resume, report=interrupting(3))
            break
        except Interrupted:
            resume = True
    assert weights(path) == weights(whole)


def test_a_killed_training_can_be_resumed(whole: Path, tmp_path: Path) -> None:
    """Nobody catches a SIGKILL: the state is written at every validation."""

    def killed(_: str, progression: Progression, __: float) -> None:
        if progression.meta_step == 5:
            raise SystemError

    with pytest.raises(SystemError):
        train(config(), tmp_path / "part", report=killed)
    path = train(config(), tmp_path / "part", resume=True)
    assert weights(path) == weights(whole)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("at", [2, 3, 5, 8])
def test_a_training_with_several_starts_can_be_resumed(at: int, tmp_path: Path) -> None:
    several = config(starts=2, mode="lr", meta_steps=6, validation_every=1)
    expected = weights(train(several, tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(several, tmp_path / "part", report=interrupting(at))
    path = train(several, tmp_path / "part", resume=True)
    assert weights(path) == expected
    run = mt.load_checkpoint(path).card["training"]["runs"]["learned"]
    assert len(run["starts"]) == 2


def unfinished(tmp_path: Path) -> Path:
    with pytest.raises(Interrupted):
        train(config(), tmp_path / "a", report=interrupting(3))
    return tmp_path / "a.unfinished"


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The state with other entries beside its tensors."""
    content = path.read_bytes()
    known = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["state"])
    change(known)
    path.write_bytes(save(load(content), metadata={"state": json.dumps(known)}))


def test_a_setting_that_an_earlier_version_did_not_know_had_its_defaults_effect(whole: Path, tmp_path: Path) -> None:
    state = unfinished(tmp_path) / "state.safetensors"
    rewritten(state, lambda known: known["recipe"]["outer"].pop("search"))
    with pytest.raises(TrainingError, match=r"was started with outer\.search = 0, not 1"):
        train(config(search=1), tmp_path / "a", resume=True)
    assert weights(train(config(), tmp_path / "a", resume=True)) == weights(whole)


def test_an_unfinished_training_is_not_overwritten(tmp_path: Path) -> None:
    folder = unfinished(tmp_path)
    with pytest.raises(TrainingError, match=r"a\.unfinished holds an unfinished training: add --resume"):
        train(config(), tmp_path / "a")
    assert folder.is_dir()


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nothing to resume.*without --resume"):
        train(config(), tmp_path / "a", resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 1.0}, r"outer\.lr = 0\.005, not 1\.0"),
        ({"meta_steps": 7}, r"outer\.meta_steps = 6, not 7"),
        ({"settings": {"width": 5, "activation": "identity"}}, r"family\.width = 4, not 5"),
        ({"seed": 9}, r"outer\.seed = 0, not 9"),
        ({"mode": "lr"}, r"teleport\.hidden = 4, not None"),
        ({"update": "adaptive", "mode": "update+tele"}, "rule.kind = 'lr', not 'adaptive'"),
    ],
)
def test_resuming_with_other_settings(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = unfinished(tmp_path)
    with pytest.raises(TrainingError, match=f"started with {words}"):
        train(config(**changes), tmp_path / "a", resume=True)
    assert folder.is_dir()


DAMAGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda known: known.pop("recipe"), "not the state of a training"),
    (lambda known: known.update(progressions={}), "not the state of a training"),
    (lambda known: known.update(progressions=[]), "not the state of a training"),
    (lambda known: known["progressions"]["learned"].update(own=3), "not the state of a training.*own"),
    (lambda known: known.update(tracking_run=3), "tracking_run is a text, not 3"),
    (lambda known: known.update(tensors_sha256="0"), "its tensors are not those that were written"),
    (lambda known: known["recipe"]["outer"].update(lr=-1), r"outer\.lr has to be a positive number"),
    (lambda known: known.update(format=9), "a state of format 9, and this version reads 1"),
    (lambda known: known.clear(), "a state of format None"),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_resuming_from_a_damaged_state(number: int, tmp_path: Path) -> None:
    change, words = DAMAGES[number]
    rewritten(unfinished(tmp_path) / "state.safetensors", change)
    with pytest.raises(TrainingError, match=words):
        train(config(), tmp_path / "a", resume=True)


def test_resuming_from_a_state_that_is_not_whole(tmp_path: Path) -> None:
    folder = unfinished(tmp_path)
    state = folder / "state.safetensors"
    content = state.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 1
    for damaged in (content[:-8], content[:100], b"", bytes(flipped), save({})):
        state.write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"state of a training|cannot be read"):
            train(config(), tmp_path / "a", resume=True)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(TrainingError, match="not a regular file"):
        train(config(), tmp_path / "a", resume=True)
    state.unlink()
    (folder / "state.json").write_text("{}")
    with pytest.raises(TrainingError, match="begun by an earlier version"):
        train(config(), tmp_path / "a", resume=True)


@pytest.mark.parametrize("again", [None, "f00d"])
def test_the_tracked_run_is_kept_with_the_state(again: str | None, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(Interrupted):
        train(config(), out, report=interrupting(3), tracking_run="f00d")
    assert tracking_run_of(out) == "f00d"
    path = train(config(), out, resume=True, tracking_run=again)
    assert weights(path) == weights(whole)
    assert mt.load_checkpoint(path).card["training"]["tracking_run"] == "f00d"
    assert tracking_run_of(out) is None


@pytest.mark.parametrize("at", [1, 8])
def test_the_tracked_run_is_kept_with_the_state_of_several_seeds(at: int, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(Interrupted):
        train_meta_seeds(tiny(), out, 3, report=interrupting(at), tracking_run="f00d")
    assert tracking_run_of(out) == "f00d"
    loaded = mt.load_checkpoint(train_meta_seeds(tiny(), out, 3, resume=True))
    cards = [mt.load_checkpoint(each.path).card for each in loaded.meta_seeds]
    assert [card["training"]["tracking_run"] for card in cards] == ["f00d"] * 3
