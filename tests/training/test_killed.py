"""A training that is killed, at whatever moment and between renames too, goes on to the same weights."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_cases import family_of, small, tiny

from metateleport import files
from metateleport.cli.commands import run
from metateleport.files import FileError
from metateleport.training import TrainingError, check_start, held, train
from metateleport.training.state import resume_folder

COMMAND = [sys.executable, "-m", "metateleport.cli", "train", "leaky_mlp", "--no-track", "--device", "cpu"]
SETTINGS = ["family.width=3", "rule.hidden=3", "teleport.hidden=3", "validation.every=1", "validation.tasks=2"]
OUTER = ["outer.tasks=2", "outer.unroll=2", "outer.horizon=4"]


def command(out: Path, meta_steps: int, *more: str) -> list[str]:
    return [*COMMAND, "--set", *SETTINGS, *OUTER, f"outer.meta_steps={meta_steps}", "--out", str(out), *more]


def started(out: Path, meta_steps: int, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(out, meta_steps, *more), stderr=subprocess.PIPE, text=True)


def weights(path: Path) -> bytes:
    return (path / "weights.safetensors").read_bytes()


def saves(out: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a training has taken steps and saved them."""
    state, first = resume_folder(out) / "state.safetensors", None
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if state.exists():
            first = first or state.stat().st_mtime_ns
            if state.stat().st_mtime_ns != first:
                return
        time.sleep(0.02)
    raise AssertionError(f"it did not save: {process.communicate(timeout=5)}")


def forked(work: Callable[[], object]) -> int:
    """What becomes of a process that does some work: its exit code, or the negative signal that ended it."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(place: int) -> Callable[[str], None]:
    """Ends this process without a word at the so manieth time that it is called."""
    seen = []

    def reached(_: str) -> None:
        seen.append(0)
        if len(seen) == place:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def with_kills(place: int, out: Path, resume: bool, starts: int = 1) -> None:
    """A training in which each rename, exchange, write and removal, and each meta-step, is a place to be killed at."""
    reached = killed_at(place)

    for name in ("replace", "rename", "write_bytes", "write_text", "unlink"):
        own = getattr(Path, name)

        def watched(self: Path, *rest: object, _own: Callable[..., object] = own, **named: object) -> object:
            reached("before")
            done = _own(self, *rest, **named)
            reached("after")
            return done

        setattr(Path, name, watched)
    exchanged = files._exchanged

    def exchange(one: Path, other: Path) -> bool:
        reached("before")
        done = exchanged(one, other)
        reached("after")
        return done

    files._exchanged = exchange
    train(tiny(starts=starts), out, resume=resume, report=lambda *_: reached("step"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(), tmp_path_factory.mktemp("whole") / "whole")


def run_to_the_end(draw: random.Random, out: Path, most: int) -> int:
    """Kills a training again and again at random places, until it ends; the number of kills."""
    kills = 0
    while kills < 100:
        resume = (resume_folder(out) / "state.safetensors").exists()
        if not resume and (out / "card.json").exists():
            return kills
        place = draw.randrange(1, most)
        code = forked(lambda: with_kills(place, out, resume))  # noqa: B023
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
    raise AssertionError("it never came to an end")


def test_killed_at_random_places_it_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    kills = 0
    for number in range(3):
        out = tmp_path / str(number)
        kills += run_to_the_end(random.Random(number), out, most=40)
        assert weights(out) == weights(whole)
    assert kills >= 3


@pytest.mark.slow(seconds=60)
def test_killed_at_every_place_of_a_training(whole: Path, tmp_path: Path) -> None:
    """Where a checkpoint is there already, which is replaced in the end, there is always the old one or the new one."""
    old = train(tiny(seed=9), tmp_path / "old")
    for place in range(1, 300):
        out = tmp_path / str(place)
        shutil.copytree(old, out)
        if not forked(lambda: with_kills(place, out, False)):  # noqa: B023
            assert place > 50
            return
        assert weights(out) in (weights(whole), weights(old))
        if (resume_folder(out) / "state.safetensors").exists():
            train(tiny(), out, resume=True)
            assert weights(out) == weights(whole)
        shutil.rmtree(out)
    raise AssertionError("there are more places than these")


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """What the command makes where nobody kills it, and the seconds that it takes."""
    out, began = tmp_path_factory.mktemp("commanded") / "whole", time.monotonic()
    subprocess.run(command(out, 40), check=True, capture_output=True)
    return out, time.monotonic() - began


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("moment", range(50))
def test_the_command_killed_at_a_random_moment(moment: int, commanded: tuple[Path, float], tmp_path: Path) -> None:
    """Until it has been killed at least once, as some moments are too late; every tenth time it is tracked."""
    (whole, took), draw, tracked = commanded, random.Random(moment), moment % 10 == 0
    out, kills, number = tmp_path / "0", 0, 0
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/store.db", "METATELEPORT_CACHE": str(tmp_path / "cache")}
    while not (out / "card.json").exists() or not kills:
        if (out / "card.json").exists():
            number += 1
            out = tmp_path / str(number)
        resumes = (resume_folder(out) / "state.safetensors").exists()
        line = command(out, 40, *["--resume"] * resumes)
        if tracked:
            line.remove("--no-track")
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, **store})
        try:
            process.wait(None if kills else took * draw.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        said = process.communicate()[1]
        assert process.returncode in (0, -signal.SIGKILL), said
        if tracked and resumes:
            assert statuses(store["MLFLOW_TRACKING_URI"]) == ["FINISHED"] * (number + 1)
    assert weights(out) == weights(whole)


def statuses(store: str) -> list[str]:
    from metateleport.tracking.store import connect

    client = connect(store)
    return [
        each.info.status for each in client.search_runs([each.experiment_id for each in client.search_experiments()])
    ]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow(seconds=15))],
)
def test_a_signal_saves_and_says_how_to_go_on(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    process = started(out, 100_000)
    saves(out, process)
    assert run(command(out, 5)[3:]) == 2
    assert f"another training writes to {out} (process {process.pid} on " in capsys.readouterr().err
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"metateleport: interrupted; the state is in {out}.unfinished, and the same command with")
    assert "Traceback" not in said
    assert run(command(out, 99_999, "--resume")[3:]) == 2
    assert "was started with outer.meta_steps = 100000, not 99999" in capsys.readouterr().err


def test_a_second_signal_ends_at_once() -> None:
    """While the first one is still being answered, as by a disk that does not write."""
    code = (
        "import os, signal, time\n"
        "from metateleport.interruption import Stopped, stoppable\n"
        "with stoppable():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except Stopped:\n"
        "        print('saving', flush=True)\n"
        "        time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    assert time.monotonic() - began < 10
    process.stdout.close()


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize("after", [0.15, 0.6])
def test_ctrl_c_in_the_first_second_is_no_traceback(after: float, tmp_path: Path) -> None:
    """Python's own start, some hundredths of a second, is not ours: the signal comes once the package is imported."""
    code = "import metateleport.cli, sys; print('here', flush=True); sys.exit(metateleport.cli.main(sys.argv[1:]))"
    words = command(tmp_path / "a", 100_000)[3:]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("metateleport: interrupted")


@pytest.mark.slow(seconds=2)
def test_a_lock_of_a_process_that_is_gone_holds_nobody_up(tmp_path: Path) -> None:
    out = tmp_path / "a"

    def hold() -> None:
        with held(out):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(hold) == -signal.SIGKILL
    lock = resume_folder(out) / "lock"
    assert lock.read_text().startswith("process ")
    with held(out):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")
        # The same process may ask again, as a training of several seeds does.
        with held(out):
            pass
        assert forked(lambda: held(out).__enter__()) == 0  # a fork has its parent's lock
    assert not lock.exists()
    with held(out):
        code = "import sys\nfrom metateleport.training import held\nwith held(sys.argv[1]): pass"
        done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
        assert "FileError: another training writes to" in done.stderr


def test_a_full_disk_leaves_the_last_whole_state(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    out, own, count = tmp_path / "a", Path.write_bytes, [0]

    def full(self: Path, content: bytes) -> int:
        count[0] += "state" in self.name
        if count[0] > 2:
            own(self, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return own(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match=r"No space left on device\): the last whole state, after 0 meta-steps, is"):
        train(tiny(), out)
    monkeypatch.undo()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.unfinished"]
    assert [each.name for each in resume_folder(out).iterdir()] == ["state.safetensors"]
    assert weights(train(tiny(), out, resume=True)) == weights(whole)


def test_a_checkpoint_that_cannot_be_written_leaves_the_state(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    out, own = tmp_path / "a", Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.name == "weights.safetensors":
            raise OSError(28, "No space left on device")
        return own(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match=rf"the checkpoint {out} cannot be written .*after \d meta-steps.*--resume"):
        train(tiny(), out)
    monkeypatch.undo()
    assert weights(train(tiny(), out, resume=True)) == weights(whole)


def test_a_vanished_folder_is_made_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "there" / "a"

    def vanish(*_: object) -> None:
        for each in sorted(out.parent.rglob("*"), reverse=True):
            each.rmdir() if each.is_dir() else each.unlink()
        if out.parent.is_dir():
            out.parent.rmdir()

    assert weights(train(tiny(), out, report=vanish)) == weights(whole)


def limited(size: int, work: Callable[[], object]) -> int:
    """Some work in a process whose files may have so many bytes."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return forked(run)


def test_no_room_is_found_before_any_work(tmp_path: Path) -> None:

    recipe = small(hidden=200)
    whole_recipe = recipe.of_family(family_of(recipe))

    def refused() -> None:
        with pytest.raises(FileError, match=r"a cannot be written \(File too large\): choose another place"):
            check_start(whole_recipe, tmp_path / "a")

    assert limited(2 << 20, refused) == 0
    check_start(whole_recipe, tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_what_would_be_lost_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for out, said in (
        (tmp_path / "mine", "something else than a checkpoint in it, which would be lost"),
        (Path(), "has no name of its own"),
        (Path("/proc/mine"), "cannot be written"),
    ):
        with pytest.raises(FileError, match=said):
            train(tiny(), out)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
