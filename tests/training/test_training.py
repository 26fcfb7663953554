"""Meta-training: it learns, skips what is not finite, keeps the best, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from torch import Tensor
from training_cases import family_of
from training_cases import small as config

import metateleport as mt
from metateleport.families import FamilyError, TaskStack, split_of
from metateleport.learned import MetaOptimizer
from metateleport.settings import SettingsError
from metateleport.training import (
    Interrupted,
    MetaTrainer,
    Progression,
    Recipe,
    TrainingError,
    Unroll,
    device_for,
    log_losses,
    train,
)


def trainer(settings: Recipe) -> MetaTrainer:
    torch.manual_seed(0)
    return MetaTrainer(settings, family_of(settings), MetaOptimizer(settings.networks(("GL",))))


def weights(path: Path) -> bytes:
    return (path / "weights.safetensors").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))


@pytest.mark.parametrize("mode", ["lr", "lr+tele"])
def test_a_few_meta_steps_lower_the_validation_score(mode: str) -> None:
    learning = trainer(config(mode=mode, meta_steps=16, unroll=4, horizon=4, lr=4e-2, validation_every=8))
    before = learning.validation_score()
    learning.run()
    done = learning.progression
    assert done.meta_step == 16
    assert done.skipped == 0
    assert done.best < before - 0.1


@pytest.mark.parametrize("mode", ["update", "update+tele", "tele"])
def test_every_mode_trains_and_loads(mode: str, tmp_path: Path) -> None:
    path = train(config(mode=mode, meta_steps=2), tmp_path / "a")
    loaded = mt.load_checkpoint(path)
    assert loaded.mode == mode
    assert (loaded.step_only is not None) == (mode == "update+tele")
    initial = MetaOptimizer(loaded.learned.config)
    assert initial.config.groups == ("GL",)


def test_equal_seeds_give_equal_checkpoints(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    assert weights(train(config(), tmp_path / "a")) == weights(whole)
    assert weights(train(config(seed=1), tmp_path / "b")) != weights(whole)


def test_training_leaves_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    train(config(meta_steps=1), tmp_path / "a")
    assert torch.equal(torch.rand(2), expected)


def interrupting(at: int) -> Callable[[str, Progression, float], None]:
    """Ctrl-C after so many meta-steps, of both networks together."""
    seen: list[int] = []

    def report(_: str, progression: Progression, __: float) -> None:
        seen.append(progression.meta_step)
        if len(seen) == at:
            raise KeyboardInterrupt

    return report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training that nobody interrupted."""
    return train(config(), tmp_path_factory.mktemp("whole") / "whole")


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


def test_the_best_of_several_starts_goes_on() -> None:
    settings = config(starts=3, meta_steps=9, validation_every=1, settings={"width": 4, "activation": "identity"})
    learning = trainer(settings)
    begun: dict[int, list[bytes]] = {}

    def seen(done: Progression) -> None:
        weight = learning.meta.rule.head.weight.detach().clone()
        begun.setdefault(done.start, []).append(weight.numpy().tobytes())

    learning.run(seen)
    done = learning.progression
    assert len(done.starts) == 3
    assert len(set(done.starts)) == 3
    assert [len(begun[start]) for start in range(3)] == [3, 3, 3]
    assert len(begun[3]) == 6
    assert done.meta_step == 9
    # What goes on has the course of the best one behind it.
    assert min(score for step, score in done.validations if step <= 3) == min(done.starts)
    alone = trainer(dataclasses.replace(settings, outer=dataclasses.replace(settings.outer, starts=1)))
    alone.run()
    first = [score for step, score in alone.progression.validations if step <= 3]
    assert min(first) == done.starts[0]


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


def test_a_setting_that_an_earlier_version_did_not_know_had_its_defaults_effect(whole: Path, tmp_path: Path) -> None:
    state = unfinished(tmp_path) / "state.json"
    known = json.loads(state.read_text())
    del known["recipe"]["outer"]["search"]
    state.write_text(json.dumps(known))
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


def test_resuming_from_a_damaged_state(tmp_path: Path) -> None:
    folder = unfinished(tmp_path)
    state = (folder / "state.json").read_text()
    tensors = (folder / "learned.safetensors").read_bytes()
    for content, words in (
        (state[:-20], "cannot be read"),
        ("[]", "not the state of a training"),
        (json.dumps({"config": {"mode": "lr"}}), "begun by metateleport 0.2 or earlier"),
        (json.dumps({**json.loads(state), "progressions": {}}), "damaged"),
    ):
        (folder / "state.json").write_text(content)
        with pytest.raises(TrainingError, match=words):
            train(config(), tmp_path / "a", resume=True)
    (folder / "state.json").write_text(state)
    for damaged in (tensors[:-8], b""):
        (folder / "learned.safetensors").write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"state of learned.*damaged"):
            train(config(), tmp_path / "a", resume=True)
    (folder / "learned.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"state of learned.*damaged"):
        train(config(), tmp_path / "a", resume=True)


NOT_FINITE = '''
import dataclasses
from typing import ClassVar
import torch
from torch import nn
from metateleport import LinearPair, Task, TaskFamily

@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoilt(TaskFamily):
    """Some tasks have no finite loss."""
    name: ClassVar[str] = "spoilt"
    every: int = 1

    def sample(self, seed):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        x, y = torch.randn(5, 3), torch.randn(5, 3)
        if (seed // 4) % self.every == 0:
            y = y * float("nan")
        return Task(model, nn.functional.mse_loss, (x,), (y,), symmetries=[LinearPair(model, "0", "1")], seed=seed)
'''


@pytest.mark.parametrize("mode", ["lr+tele", "update+tele"])
def test_meta_steps_that_are_not_finite_are_skipped_and_counted(mode: str, tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(NOT_FINITE)
    settings = config(family=str(tmp_path / "spoilt.py"), settings={}, mode=mode, meta_steps=3)
    spoilt = trainer(settings)
    before = [value.clone() for value in spoilt.meta.parameters()]
    spoilt.run()
    assert spoilt.progression.skipped == 3
    assert all(torch.equal(value, old) for value, old in zip(spoilt.meta.parameters(), before, strict=True))
    assert math.isfinite(spoilt.progression.best)
    path = train(settings, tmp_path / "a")
    card = json.loads((path / "card.json").read_text(), parse_constant=pytest.fail)
    assert card["training"]["runs"]["learned"]["skipped"] == 3


@pytest.mark.parametrize("mode", ["lr", "lr+tele", "update+tele", "tele"])
def test_a_spoilt_task_spoils_no_other(mode: str, tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(NOT_FINITE)
    settings = config(family=str(tmp_path / "spoilt.py"), settings={"every": 3}, mode=mode)
    spoilt = trainer(settings)
    family = family_of(settings)
    stack = family.stack(range(9))
    broken = [bool(target.isnan().any()) for target in stack.full[1][0]]
    assert 0 < sum(broken) < 9
    good = family.stack([index for index, bad in enumerate(broken) if not bad])

    def gradient(tasks: TaskStack) -> Tensor:
        losses = Unroll(tasks, spoilt.meta).window(4)
        finite = losses.isfinite()
        assert int(finite.sum()) == 4 * len(good)
        found = torch.autograd.grad(
            torch.where(finite, losses, 0.0).sum(), list(spoilt.meta.parameters()), allow_unused=True
        )
        return torch.cat([each.flatten() for each in found if each is not None])

    alone = gradient(good)
    assert bool(alone.any())
    assert torch.allclose(gradient(stack), alone, rtol=1e-3, atol=1e-5 * float(alone.norm()))
    spoilt.run()
    assert spoilt.progression.skipped == 0


def test_a_task_that_diverges_on_its_way_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation after the second step is not finite for the first task."""
    family = mt.load_family("leaky_mlp", {"width": 4, "activation": "identity"})
    meta, stack = MetaOptimizer(shape_of(hidden=4)), family.stack(range(3))
    own, steps = TaskStack.batch, []

    def batch(self: TaskStack, step: int) -> Any:
        inputs, targets = own(self, step)
        steps.append(step)
        if step == 2:
            spoilt = targets[0].clone()
            spoilt[0] = float("nan")
            targets = (spoilt,)
        return inputs, targets

    monkeypatch.setattr(TaskStack, "batch", batch)
    losses = Unroll(stack, meta).window(4)
    assert (~losses.isfinite()).nonzero().tolist() == [[1, 0]]
    torch.where(losses.isfinite(), losses, 0.0).sum().backward()
    for name, value in meta.named_parameters():
        assert value.grad is None or bool(value.grad.isfinite().all()), name
    assert steps == [0, 1, 2, 3, 4]


def test_the_best_on_validation_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([3.0, 1.0, 2.0])
    kept: list[dict[str, Tensor]] = []

    def scored(self: MetaTrainer) -> float:
        kept.append({name: value.clone() for name, value in self.meta.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(MetaTrainer, "validation_score", scored)
    learning = trainer(config())
    learning.run()
    assert learning.progression.validations == [[2, 3.0], [4, 1.0], [6, 2.0]]
    assert (learning.progression.best, learning.progression.best_step) == (1.0, 4)
    best = learning.best_meta().state_dict()
    assert all(torch.equal(value, best[name]) for name, value in kept[1].items())
    assert not all(torch.equal(value, best[name]) for name, value in kept[2].items())


def test_training_that_has_wandered_off_goes_back_with_a_smaller_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([-10.0, -9.5, -4.0, -9.8])
    seen: list[dict[str, Tensor]] = []

    def scored(self: MetaTrainer) -> float:
        seen.append({name: value.clone() for name, value in self.meta.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(MetaTrainer, "validation_score", scored)
    learning = trainer(config(meta_steps=4, validation_every=1))
    rates: list[float] = []
    weights_after: list[dict[str, Tensor]] = []

    def report(_: Any) -> None:
        rates.append(learning.optimizer.param_groups[0]["lr"])
        weights_after.append({name: value.clone() for name, value in learning.meta.state_dict().items()})

    learning.run(report)
    # Half a nat is not far off; six are.
    assert learning.progression.returns == 1
    assert all(torch.equal(value, seen[1][name]) for name, value in weights_after[1].items())
    assert all(torch.equal(value, seen[0][name]) for name, value in weights_after[2].items())
    assert any(not torch.equal(value, seen[0][name]) for name, value in seen[2].items())
    full = [0.55 + 0.45 * math.cos(math.pi * step / 4) for step in range(4)]
    assert rates[1] == pytest.approx(learning.outer.lr * full[1])
    assert rates[3] == pytest.approx(0.7 * learning.outer.lr * full[3])
    # What Adam had gathered on the way off is gone: one step since.
    assert {float(state["step"]) for state in learning.optimizer.state.values()} == {1.0}


def test_the_end_is_validated_too() -> None:
    learning = trainer(config(meta_steps=3, validation_every=2))
    learning.run()
    assert [step for step, _ in learning.progression.validations] == [2, 3]


def test_training_and_validation_never_share_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}
    own = mt.TaskFamily.stack

    def stack(self: mt.TaskFamily, indices: Any, split: str = "train", *rest: Any) -> TaskStack:
        made = own(self, indices, split, *rest)  # type: ignore[arg-type]
        seen.setdefault(split, set()).update(task.seed for task in made.tasks)
        return made

    monkeypatch.setattr(mt.TaskFamily, "stack", stack)
    learning = trainer(config())
    learning.run()
    assert set(seen) == {"train", "validation"}
    assert not seen["train"] & seen["validation"]
    for split, seeds in seen.items():
        assert {split_of(seed) for seed in seeds} == {split}
    # Every stack is of new tasks.
    assert len(seen["train"]) == 3 * learning.progression.stack
    assert len(seen["validation"]) == 4


def test_the_horizon_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    own = Unroll.window

    def window(self: Unroll, length: int, track: bool = True, loss_known: bool = True) -> Tensor:
        losses = own(self, length, track, loss_known)
        if track:
            if self.steps == length:
                lengths.append(0)
            lengths[-1] = self.steps
        return losses

    monkeypatch.setattr(Unroll, "window", window)
    trainer(config(mode="lr", meta_steps=24, unroll=2, horizon=8, validation_every=24)).run()
    assert lengths[0] == 2
    assert max(lengths) == 8
    assert lengths[:-1] == sorted(lengths[:-1])
    # The full horizon from the middle of the run on.
    assert lengths.count(8) >= 3


def test_memory_does_not_grow_over_windows() -> None:
    family = mt.load_family("leaky_mlp", {"width": 4, "activation": "identity"})
    meta = MetaOptimizer(shape_of(hidden=4))

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    for track in (True, False):
        unroll = Unroll(family.stack(range(2)), meta)
        counts = []
        for _ in range(4):
            losses = unroll.window(2, track)
            if track:
                losses.mean().backward()
            del losses
            counts.append(alive())
        assert counts[1] == counts[-1], track


def test_an_untracked_unroll_keeps_no_graph() -> None:
    family = mt.load_family("leaky_mlp", {"width": 4, "activation": "identity"})
    meta = MetaOptimizer(shape_of(mode="update+tele", hidden=4))
    tracked, untracked = Unroll(family.stack(range(2)), meta), Unroll(family.stack(range(2)), meta)
    expected, found = tracked.window(4), untracked.window(4, track=False)
    assert torch.equal(expected.detach(), found.detach())
    (gradient,) = torch.autograd.grad(expected.mean(), [next(meta.parameters())])
    assert bool(gradient.any())
    assert not found.requires_grad


def test_windows_go_on_where_the_last_one_ended() -> None:
    family = mt.load_family("leaky_mlp", {"width": 4})
    meta = MetaOptimizer(shape_of(mode="update+tele", hidden=4))
    whole, parts = Unroll(family.stack(range(2)), meta), Unroll(family.stack(range(2)), meta)
    expected = whole.window(6).detach()
    found = torch.cat((parts.window(2).detach(), parts.window(4).detach()))
    assert torch.allclose(found, expected, rtol=1e-9)
    assert parts.steps == 6


def test_log_losses_know_no_scale_and_level_off() -> None:
    start = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
    shares = torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64)
    found = log_losses(shares * start, start)
    assert torch.allclose(found[0], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(found[1], torch.full((3,), math.log(0.5), dtype=torch.float64))
    assert torch.allclose(found[2], torch.full((3,), math.log(1e-26), dtype=torch.float64))
    assert bool(log_losses(torch.zeros(1, 1), torch.zeros(1)).isfinite().all())


def test_a_run_may_be_limited_in_time(tmp_path: Path) -> None:
    path = train(config(meta_steps=100000, seconds=0.4), tmp_path / "a")
    runs = mt.load_checkpoint(path).card["training"]["runs"]
    assert set(runs) == {"learned", "step-only"}
    for run in runs.values():
        assert 0 < run["meta_steps"] < 1000


def test_what_the_card_says(tmp_path: Path) -> None:
    path = train(config(), tmp_path / "a", command="metateleport train leaky_mlp")
    card = mt.load_checkpoint(path).card
    assert card["mode"] == "lr+tele"
    assert card["family"]["name"] == "leaky_mlp"
    assert card["family"]["settings"]["width"] == 4
    assert card["training"]["command"] == "metateleport train leaky_mlp"
    assert card["training"]["recipe"]["outer"]["horizon"] == 6
    assert card["training"]["runs"]["learned"]["meta_steps"] == 6


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[tuple[str, int, float]] = []

    def report(name: str, progression: Progression, share: float) -> None:
        seen.append((name, progression.meta_step, share))

    train(config(meta_steps=3), tmp_path / "a", report=report)
    steps = [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]
    assert seen == [(name, step, share) for name in ("learned", "step-only") for step, share in steps]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": 0}, "outer.tasks has to be at least 1"),
        ({"horizon": 2}, "outer.horizon = 2 is shorter than one window, outer.unroll = 3"),
        ({"lr": 0.0}, "outer.lr has to be a positive number, not 0.0"),
        ({"lr": math.nan}, "outer.lr has to be a positive number, not nan"),
        ({"seconds": 0}, "outer.seconds has to be a positive number, not 0.0"),
        ({"seed": -1}, "outer.seed has to be a number that is not negative"),
        ({"device": "tpu"}, "outer.device is one of auto, cpu, cuda; not 'tpu'"),
        ({"dtype": "float16"}, "outer.dtype is one of float32, float64; not 'float16'"),
        ({"base": "rmsprop", "mode": "tele"}, "rule.optimizer is one of sgd, momentum, adam; not 'rmsprop'"),
        ({"settings": {"width": 4, "activation": "tanh", "samples": 9}}, "names no symmetries"),
        ({"family": "nowhere"}, "no task family"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((TrainingError, SettingsError, FamilyError), match=words):
        train(config(**changes), tmp_path / "a")
    assert names(tmp_path) == []


def test_devices() -> None:
    assert device_for("auto").type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="no CUDA device here"):
            device_for("cuda")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_of_the_tasks(dtype: str) -> None:
    learning = trainer(config(dtype=dtype, meta_steps=2))
    learning.run()
    assert learning.progression.skipped == 0
    assert dataclasses.asdict(learning.progression)["meta_step"] == 2
