"""A learned optimizer beside AdamW: equal starts and batches, and words that say who is ahead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from metateleport.evaluation import beside as room
from metateleport.evaluation.beside import ADAMW, Contest, beside
from metateleport.evaluation.beside_result import Beside, Line


def _contest() -> Contest:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(1))).argmax(1)
    model = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    return Contest(model, (x[:150], y[:150]), (x[150:], y[150:]), "a small one")


@pytest.fixture(scope="module")
def result() -> Beside:
    return beside(_contest(), "digits", steps=20, seeds=2, rates=[1e-5, 1e-2])


def test_all_start_alike_and_the_best_rate_is_shown(result: Beside) -> None:
    assert len({line.loss[0] for line in result.lines}) == 1
    assert result.rate == 1e-2
    assert result.tuned.at(20) < result.default.at(20) < result.default.loss[0]
    assert result.learned.steps == (0, 10, 20)
    for line in result.lines:
        assert line.seconds[0] == 0
        assert list(line.seconds) == sorted(line.seconds)
        assert all(0 <= share <= 1 for share in line.accuracy)


def test_adamw_is_given_the_learned_optimizer_s_seconds(result: Beside) -> None:
    assert result.tuned.steps[-1] >= 20
    within = result.tuned.seconds[-1] >= 0.5 * result.learned.seconds[-1]
    assert within or result.tuned.steps[-1] == 20 * room.LONGEST
    assert result.default.steps[-1] == 20


def test_the_default_rate_is_among_those_that_are_tried() -> None:
    result = beside(_contest(), "digits", steps=10, seeds=1, rates=[1e-7])
    assert result.rate == ADAMW


def test_the_runs_are_the_plain_loop_s() -> None:
    contest = _contest()
    torch.manual_seed(1)
    model, draws = contest.model(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        drawn = torch.randint(150, (room.BATCH,), generator=draws)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(contest.train[0][drawn]), contest.train[1][drawn]).backward()
        optimizer.step()
    with torch.no_grad():
        theirs = float(nn.functional.cross_entropy(model(contest.train[0]), contest.train[1]))
    alone = room._Run(contest, 1, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2))
    alone.advance()
    alone.advance()
    assert alone.looked["loss"][-1] == pytest.approx(theirs, rel=1e-6)


def _line(name: str, seconds: float, *losses: float) -> Line:
    steps = tuple(10 * number for number in range(len(losses)))
    return Line(name, steps, tuple(seconds * step for step in steps), losses, (0.5,) * len(losses))


def _beside(learned: Line, tuned: Line) -> Beside:
    return Beside("a contest", "digits", learned, _line("AdamW, default", 0.1, 2.0, 1.9, 1.8), tuned, 0.01, 1, ())


def test_the_words_say_who_is_ahead() -> None:
    ahead = _beside(_line("learned", 0.2, 2.0, 0.5, 0.1), _line("tuned", 0.1, 2.0, 1.0, 0.6, 0.4, 0.3)).words()
    assert "is at step 10 where AdamW, tuned, is at 20" in ahead
    assert "takes 2.0 times as long" in ahead
    assert "after 4.0 s of each the learned one is ahead: training loss 0.1 against 0.3" in ahead
    behind = _beside(_line("learned", 0.2, 2.0, 0.5, 0.1), _line("tuned", 0.1, 2.0, 0.3, 0.05, 0.01, 0.001)).words()
    assert "AdamW, tuned, is ahead at step 20: 0.05 against 0.1" in behind
    assert "AdamW, tuned, is ahead: training loss 0.001 against 0.1" in behind


def test_it_is_written_and_drawn(result: Beside, tmp_path: Path) -> None:
    report = json.loads(json.dumps(result.as_json()))
    assert report["learned"]["loss"] == list(result.learned.loss)
    assert report["in_words"] == result.words()
    result.draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert result.table().row_count == 3


def test_labels_do_not_lie_on_each_other() -> None:
    from metateleport.evaluation.beside_result import _apart

    low, middle, high = _apart([1.0, 1.001, 0.999], (0.01, 100.0))
    assert high < low < middle
    assert middle / low > 1.5


@pytest.mark.parametrize("steps", [0, 5, 15])
def test_steps_that_are_not_looked_at_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="multiple of 10"):
        beside(_contest(), "digits", steps=steps)


def test_what_the_optimizer_warned_of_is_kept() -> None:
    result = beside(_contest(), "leaky_mlp", steps=10, seeds=2, rates=[ADAMW])
    assert len(result.warned) == 1
    assert "is not made for this" in result.warned[0]
    assert dataclasses.asdict(result)["checkpoint"] == "leaky_mlp"
