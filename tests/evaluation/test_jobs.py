"""Evaluations cut into runs: kept when they are finished, gone on with, shared out over processes."""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_cases import evaluated, in_ranks

from metateleport import cli, load_family
from metateleport.evaluation import Bench, Evaluation, EvaluationError, FirstOrder, Plan, plan, run_plan, tune
from metateleport.evaluation.kept import KeptRun, KeptRuns
from metateleport.evaluation.methods.registry import RIVALS
from metateleport.evaluation.run import run_once
from metateleport.families import FamilyError
from metateleport.training import Ranks

PLAN = Plan("leaky_mlp", {"width": 4}, "leaky_mlp_stays", ("learned", "gd"), ("identity",), tasks=3, steps=5)

FAMILY = """
import dataclasses, multiprocessing, os
import torch
from torch import nn
from metateleport import Task, TaskFamily

@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(TaskFamily):
    width: int = 3

    def sample(self, seed):
        {first}
        x = torch.rand(4, self.width)
        model = nn.Sequential(nn.Linear(self.width, 4), nn.ReLU(), {between}nn.Linear(4, 1))
        return Task(model, nn.functional.mse_loss, (x,), (x.sum(1, keepdim=True),), seed=seed)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that are really run."""
    names: list[str] = []

    def noted(method: Any, *rest: Any) -> Any:
        names.append(method.name)
        return run_once(method, *rest)

    monkeypatch.setattr(plan, "run_once", noted)
    return names


def family_file(folder: Path, first: str = "pass", between: str = "") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(textwrap.dedent(FAMILY).format(first=first, between=between))
    return str(folder / "own.py")


def stop_at(text: str) -> Callable[[str], None]:
    def progress(said: str) -> None:
        if text in said:
            raise KeyboardInterrupt

    return progress


def figures(evaluation: Evaluation) -> dict[str, list[bytes]]:
    """Every number of an evaluation that is not a time, bit for bit."""

    def of(result: Any) -> list[bytes]:
        run = result.trajectory
        return [np.asarray(each).tobytes() for each in (run.loss, run.held_out_loss, run.drift_max) if each is not None]

    found = {name: of(result) for name, result in evaluation.results.items()}
    for seed in evaluation.meta_seeds:
        found.update({f"{name} {seed.seed} {seed.chosen}": of(result) for name, result in seed.results.items()})
    return found


class TestUnderTorchrun:
    def test_the_figures_are_those_of_one_process_bit_for_bit(self, tmp_path: Path) -> None:
        whole = run_plan(Bench(PLAN))
        (shared, threads), *others = in_ranks(3, evaluated, PLAN, str(tmp_path / "other"))
        assert [each for each, _ in others] == [None, None]
        assert threads == 1
        assert figures(shared) == figures(whole)
        assert list(shared.results) == list(whole.results)
        assert (shared.jobs, shared.threads, shared.kept) == (3, 1, ())
        (again, _), *_ = in_ranks(2, evaluated, PLAN, str(tmp_path / "other"))
        assert len(again.kept) == len(Bench(PLAN).units)
        assert figures(again) == figures(whole)

    def test_its_processes_are_not_multiplied(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        @contextlib.contextmanager
        def two(_: str) -> Iterator[Ranks]:
            yield Ranks(0, 2)

        monkeypatch.setattr("metateleport.training.joined", two)
        assert cli.main(["evaluate", "none", "leaky_mlp", "--methods", "gd", "--jobs", "2", "--no-track"]) == 2
        assert "--jobs 2 under torchrun, which has its own processes" in capsys.readouterr().err


class TestGoingOn:
    def test_after_an_interruption_the_same_plan_gives_what_it_would_have_given(
        self, made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with pytest.raises(KeyboardInterrupt, match=r"^interrupted; 4 of 11 runs are finished and kept: the same"):
            run_plan(Bench(PLAN), progress=stop_at("learned/without identity of meta-seed 1 on"))
        before = len(made)
        assert before == 4
        said: list[str] = []
        again = run_plan(Bench(PLAN), progress=said.append)
        assert len(made) == 11, "what was finished is not run again"
        assert len(again.kept) == 4
        assert any("(4 from an earlier call)" in each for each in said)
        monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path / "other"))
        whole = run_plan(Bench(PLAN))
        assert not whole.kept
        assert figures(again) == figures(whole)
        assert list(again.results) == list(whole.results) == ["learned", "learned/without identity", "gd"]
        assert [seed.seed for seed in again.meta_seeds] == [0, 1, 2, 3, 4]
        kept = again.results["gd"].trajectory
        assert kept.seconds > 0
        assert len(kept.seconds_along) == 6

    def test_a_finished_evaluation_runs_nothing_and_a_fresh_one_everything(self, made: list[str]) -> None:
        alone = Plan("leaky_mlp", {"width": 4}, methods=("gd", "adam"), tasks=2, steps=3)
        first, second = run_plan(Bench(alone)), run_plan(Bench(alone))
        assert made == ["gd", "adam"]
        assert second.kept == ("gd", "adam")
        assert second.results["gd"].trajectory.seconds == first.results["gd"].trajectory.seconds
        fresh = run_plan(Bench(Plan("leaky_mlp", {"width": 4}, methods=("gd",), tasks=2, steps=3, fresh=True)))
        assert made == ["gd", "adam", "gd"]
        assert not fresh.kept
        tuning = fresh.results["gd"].tuning
        assert tuning is not None
        assert not tuning["cached"]

    def test_a_search_for_a_step_size_goes_on_at_its_next_trial(self) -> None:
        family, trials = load_family("leaky_mlp", {"width": 3}), []

        def stop(said: str) -> None:
            trials.append(said)
            if len(trials) == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tune(RIVALS["gd"], family, 4, progress=stop)
        runs: list[float] = []

        def counted(**settings: Any) -> FirstOrder:
            runs.append(settings["lr"])
            return FirstOrder("gd", **settings)

        rival = RIVALS["gd"]
        watched = type(rival)(rival.name, counted)
        resumed = tune(watched, family, 4)
        assert resumed.tuning is not None
        tried = [each["lr"] for each in resumed.tuning["tried"]]
        # The last of what was counted is the chosen method itself.
        assert runs[:-1] == tried[3:]
        whole = tune(watched, family, 4, fresh=True)
        assert whole.tuning == resumed.tuning

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_to_the_command_line_says_how_to_go_on(
        self,
        number: signal.Signals,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        made: list[str],
    ) -> None:
        noted, command = plan.run_once, "evaluate none leaky_mlp --set width=3 --tasks 2 --steps 3 --methods gd,adam"

        def stopped(method: Any, *rest: Any) -> Any:
            if made:
                os.kill(os.getpid(), number)
            return noted(method, *rest)

        monkeypatch.setattr(plan, "run_once", stopped)
        assert cli.main([*command.split(), "--no-track"]) == 128 + number
        assert "1 of 2 runs are finished and kept: the same command goes on" in capsys.readouterr().err
        monkeypatch.setattr(plan, "run_once", noted)
        assert cli.main([*command.split(), "--no-track"]) == 0
        assert made == ["gd", "adam"]
        assert "1 of 2 runs are from an earlier call" in capsys.readouterr().err

    def test_random_numbers_of_a_model_are_its_runs_own(self, tmp_path: Path) -> None:
        stack = load_family(family_file(tmp_path, between="nn.Dropout(), ")).stack(range(2), "held-out")
        first = run_once(FirstOrder("gd", lr=0.1), stack, 6).loss
        torch.rand(5)
        assert (run_once(FirstOrder("gd", lr=0.1), stack, 6).loss == first).all()


class TestWhatIsKept:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> Callable[..., KeptRuns]:
        def made(steps: int = 4, seed: int = 0, dtype: torch.dtype | None = None, **settings: Any) -> KeptRuns:
            family = load_family("leaky_mlp", {"width": 3, **settings})
            return KeptRuns(family, family.stack(range(2), "held-out", seed, dtype), steps, tmp_path)

        return made

    def kept(self, runs: KeptRuns) -> FirstOrder:
        method = FirstOrder("gd", lr=1e-3)
        family = load_family("leaky_mlp", {"width": 3})
        runs.put(method, KeptRun(method.run(family.stack(range(2), "held-out"), 4), 3))
        return method

    def test_it_comes_back_bit_for_bit(self, runs: Callable[..., KeptRuns]) -> None:
        method = FirstOrder("gd", lr=1e30)
        family = load_family("digits", {"hidden": 3, "samples": 8, "batch": 4})
        stack = family.stack(range(2), "held-out")
        run, own = method.run(stack, 4), KeptRuns(family, stack, 4, runs().folder)
        own.put(method, KeptRun(run, 3))
        found = own.get(method)
        assert found is not None
        assert found.jobs == 3
        for name in ("loss", "seconds_along", "held_out_loss", "held_out_accuracy"):
            assert getattr(found.trajectory, name).tobytes() == getattr(run, name).tobytes()
        assert not np.isfinite(run.loss).all(), "what is not finite comes back too"
        assert found.trajectory.seconds == run.seconds
        assert found.trajectory.drift_max is None

    @pytest.mark.parametrize(
        "other", [{"steps": 5}, {"seed": 1}, {"dtype": torch.float32}, {"samples": 5}, {"distribution": "normal"}]
    )
    def test_another_setting_is_another_run(self, runs: Callable[..., KeptRuns], other: dict[str, Any]) -> None:
        method = self.kept(runs())
        assert runs().get(method) is not None
        assert runs(**other).get(method) is None
        assert runs().get(FirstOrder("gd", lr=2e-3)) is None
        assert runs().get(FirstOrder("gd", torch.optim.Adam, lr=1e-3)) is None

    def test_other_weights_are_another_method(self) -> None:
        chosen, other = (Bench(PLAN)._method(unit, print).identity() for unit in Bench(PLAN).units[1:4:2])
        assert chosen["name"] == other["name"] == "learned"
        assert chosen != other

    def test_an_edited_family_and_what_it_imports_make_another_run(self, tmp_path: Path) -> None:
        def path() -> Path:
            family = load_family(name)
            return KeptRuns(family, family.stack([0], "held-out"), 3)._path(FirstOrder("gd", lr=1.0))

        name = family_file(tmp_path / "mine")
        first = path()
        assert path() == first
        (tmp_path / "mine" / "helper.py").write_text("x = 1")
        second = path()
        family_file(tmp_path / "mine", first="assert True")
        assert len({first, second, path()}) == 3

    def test_a_damaged_file_is_run_anew_and_an_old_one_goes(
        self, runs: Callable[..., KeptRuns], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = self.kept(runs())
        (file,) = runs().folder.iterdir()
        file.write_bytes(file.read_bytes()[:-9])
        assert runs().get(method) is None
        monkeypatch.setattr("time.time", lambda: file.stat().st_mtime + 31 * 86400)
        runs()
        assert not file.exists()


class TestSharedOut:
    @pytest.mark.slow(seconds=12)
    def test_figures_are_those_of_one_process(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            alone = run_plan(Bench(PLAN))
        finally:
            torch.set_num_threads(threads)
        monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path / "other"))
        said: list[str] = []
        shared = run_plan(Bench(PLAN), 2, said.append)
        assert not shared.kept
        assert (shared.jobs, shared.threads) == (2, 1)
        assert figures(shared) == figures(alone)
        assert list(shared.results) == list(alone.results)
        assert any(each.startswith("10 of 11 runs finished; now ") for each in said)
        again = run_plan(Bench(PLAN), 2)
        assert len(again.kept) == 11

    def test_a_process_that_dies_is_one_clear_error(self, tmp_path: Path) -> None:
        name = family_file(tmp_path / "mine", "multiprocessing.parent_process() and os._exit(7)")
        with pytest.raises(EvaluationError, match=r"ran gd ended by itself \(exit code 7\).*fewer --jobs; 0 of 1 runs"):
            run_plan(Bench(Plan(name, methods=("gd",), tasks=2, steps=2)), 2)

    @pytest.mark.slow(seconds=2)
    def test_an_error_in_a_process_is_raised_here(self, tmp_path: Path) -> None:
        wrong = "if multiprocessing.parent_process(): x = {}['there is none']"
        name = family_file(tmp_path / "mine", wrong)
        with pytest.raises(KeyError, match="there is none") as caught:
            run_plan(Bench(Plan(name, methods=("gd",), tasks=2, steps=2)), 2)
        assert "in the process that ran gd" in str(caught.value.__cause__)


class TestNames:
    def test_an_unknown_method_is_told_the_nearest(self) -> None:
        with pytest.raises(EvaluationError, match=r"no method 'adm'.*did you mean 'adam'"):
            Bench(Plan("leaky_mlp", methods=("adm",)))
        with pytest.raises(EvaluationError, match="no method 'learned/step-onl' for leaky_mlp: there are learned"):
            Bench(Plan("leaky_mlp", checkpoint="leaky_mlp", methods=("learned/step-onl",)))

    def test_what_is_wrong_is_said_before_anything_runs(self) -> None:
        with pytest.raises(FamilyError, match="no setting 'size'"):
            Bench(Plan("leaky_mlp", {"size": 3}))
        with pytest.raises(EvaluationError, match="name a checkpoint"):
            Bench(Plan("leaky_mlp", without=("identity",)))
        with pytest.raises(EvaluationError, match="add learned to the methods"):
            Bench(Plan("leaky_mlp", checkpoint="leaky_mlp_stays", methods=("gd",), without=("identity",)))

    def test_every_rival_names_itself(self) -> None:
        for name, rival in RIVALS.items():
            if not rival.missing():
                assert rival.make(lr=0.1).name == name
