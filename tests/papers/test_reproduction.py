"""The reproduction of the source's figure: stacked seeds are the seeds alone, and all that it reports is there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from torch import Tensor, nn

import metateleport as mt
from metateleport import cli
from metateleport.evaluation.methods.learned import Learned
from metateleport.families import TaskStack
from metateleport.learned import MetaOptimizer
from metateleport.learned.copies import Copies
from metateleport.papers.flat import FlatRule
from metateleport.papers.reproduction import NETWORKS, Figure6, draw, figure_6, sentences_of, tables_of
from metateleport.papers.reproduction.seeds import stack_seeds, unstack_seeds
from metateleport.papers.reproduction.unguarded import Unguarded
from metateleport.point import Point
from metateleport.training import TrainingError, Unroll

pytestmark = pytest.mark.slow(seconds=3)

SMALL: dict[str, Any] = {
    "seeds": 2, "runs": 4, "stack": 2, "steps": 4, "unroll": 2, "hidden": 5, "tasks": 3, "evaluations": 14,
}  # fmt: skip
WIDTH = {"width": 4}


def metas(mode: str, count: int = 2, kind: type[MetaOptimizer] = Unguarded) -> list[MetaOptimizer]:
    shapes = (("0.weight", (4, 4)), ("2.weight", (4, 4)))
    config = shape_of(mode=mode, hidden=5, groups=("GL",), shapes=shapes)
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(kind(config))
    return made


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return figure_6(mt.load_family("leaky_mlp", WIDTH), Figure6(**SMALL))


@pytest.mark.parametrize("module", [nn.Linear(3, 2), nn.LSTMCell(3, 2)])
def test_a_stack_of_seeds_gives_what_each_gives(module: nn.Module) -> None:
    copies = [type(module)(3, 2).double() for _ in range(3)]  # type: ignore[call-arg, operator]
    stack, x = Copies(copies), torch.randn(12, 3, dtype=torch.float64)
    state = (torch.randn(12, 2, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64))
    cell = isinstance(module, nn.LSTMCell)
    found = stack(x, state) if cell else (stack(x),)
    for number, each in enumerate(copies):
        part = slice(4 * number, 4 * number + 4)
        alone = each(x[part], (state[0][part], state[1][part])) if cell else (each(x[part]),)
        for one, whole in zip(alone, found, strict=True):
            torch.testing.assert_close(whole[part], one)


@pytest.mark.parametrize("mode", ["update+tele", "lr+tele"])
def test_seeds_trained_side_by_side_get_the_gradients_they_get_alone(mode: str) -> None:
    family, alone = mt.load_family("leaky_mlp", WIDTH), metas(mode)
    whole = stack_seeds(alone)
    tasks = [[family.task(index, "train", seed) for index in range(3)] for seed in range(2)]
    together = Unroll(TaskStack(tasks[0] + tasks[1]), whole).window(3)
    together.sum().backward()
    for number, meta in enumerate(alone):
        losses = Unroll(TaskStack(tasks[number]), meta).window(3)
        torch.testing.assert_close(together[:, 3 * number : 3 * number + 3], losses, rtol=1e-4, atol=1e-5)
        losses.sum().backward()
        for name, parameter in meta.named_parameters():
            stacked = whole.get_parameter(name).grad
            assert stacked is not None
            assert parameter.grad is not None
            assert bool(parameter.grad.any())
            torch.testing.assert_close(
                stacked[number], parameter.grad, rtol=1e-2, atol=1e-4 * float(parameter.grad.abs().max())
            )
    for before, after in zip(alone, unstack_seeds(whole), strict=True):
        assert after.state_dict().keys() == before.state_dict().keys()
        for name, value in before.state_dict().items():
            assert torch.equal(after.state_dict()[name], value)


def test_unguarded_goes_on_from_worse_points() -> None:
    stack = mt.load_family("leaky_mlp", WIDTH).stack(range(2))
    ends = {}
    for kind in (Unguarded, MetaOptimizer):
        (meta,) = metas("update", 1, kind)
        with torch.no_grad():
            for parameter in meta.rule.parameters():  # type: ignore[attr-defined]
                parameter.mul_(30)
        loss = Learned("learned", meta).run(stack, 12).loss
        ends[kind] = loss[:, -1] / loss[:, 0]
    assert (ends[Unguarded] > 2).all()
    assert (ends[MetaOptimizer] <= 1).all()


def test_learning_rates_lie_where_the_sources_do() -> None:
    rule = FlatRule((("w", (2, 2)),), hidden=3)
    for bias, expected in ((-1e3, 1e-7), (1e3, 5e-3), (math.log(1e-4), 1e-4)):
        with torch.no_grad():
            rule.head.weight.zero_()
            rule.head.bias.fill_(bias)
        gradient = torch.ones(1, 2, 2)
        point = Point({"w": torch.zeros(1, 2, 2)}, gradients={"w": gradient}, loss=torch.ones(1))
        state = rule.initial_state(point)
        progress = mt.learned.progress.Progress.begin(torch.ones(1))
        moved, _ = rule.step(point, [], progress, state)
        assert float(moved["w"].detach().abs().max()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow(seconds=2)
def test_everything_is_reported(result: dict[str, Any], tmp_path: Path) -> None:
    back = json.loads(json.dumps(result, allow_nan=False))
    assert back == result
    assert list(result["networks"]) == list(NETWORKS)
    assert result["training"].keys() == {"update", "update+tele", "lr+tele", "lr"}
    for each in result["training"].values():
        assert [seed["seed"] for seed in each["meta_seeds"]] == [0, 1]
        assert all(len(seed["losses"]) == 2 for seed in each["meta_seeds"])
    for name, report in result["networks"].items():
        methods = {"learned", "learned/guarded", "gd"}
        if "tele" in name:
            methods |= {"learned/teleport-off", "learned/random-teleport", "learned/step-only"}
        assert report["methods"].keys() == methods
        assert report["methods"]["gd"]["settings"]["lr"] == 3e-4
        scores = {each["seed"]: each["validation"] for each in report["meta_seeds"]["seeds"]}
        (chosen,) = (each["seed"] for each in report["meta_seeds"]["seeds"] if each["chosen"])
        assert scores[chosen] == min(scores.values())
        assert set(result["collapsed"][name]) <= {0, 1}
    assert [table.row_count for table in tables_of(result)] == [1 + 2 * 2, 1 + 5 * 2, 1 + 5 * 2]
    sentences = sentences_of(result)
    assert sum("meta-seeds end above gradient descent" in each for each in sentences) == 3
    assert any("all gain is the step's" in each for each in sentences)
    draw(result, tmp_path / "a.svg")
    assert "LSTM(lr,tele) and its attribution" in (tmp_path / "a.svg").read_text()


def test_teleports_are_of_the_papers_size_and_exact(result: dict[str, Any]) -> None:
    for name in ("LSTM(lr,tele)", "LSTM(update,tele)"):
        assert 0 < result["networks"][name]["methods"]["learned"]["drift_max"] < 1e-6


def test_training_moves_every_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    own = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *rest: Any) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        before = [group["params"][0].detach().clone() for group in self.param_groups]
        done = own(self, *rest)
        after = [group["params"][0].detach() for group in self.param_groups]
        seen[str(rates)] = [(new - old).abs().max() for new, old in zip(after, before, strict=True)]
        return done

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    figure_6(mt.load_family("leaky_mlp", WIDTH), Figure6(**{**SMALL, "runs": 2, "tasks": 1, "evaluations": 2}))
    assert seen.keys() == {"[0.0001]", "[0.0001, 0.001]"}
    for moved in seen.values():
        assert all(float(each) > 0 for each in moved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seeds": 1}, "at least 2 seeds"), ({"steps": 5}, "whole windows"), ({"runs": 3}, "whole windows"),
     ({"hidden": 0}, "hidden has to be at least 1"), ({"gd_lr": 0.0}, "positive")],
)  # fmt: skip
def test_settings_that_cannot_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        Figure6(**{**SMALL, **changes})


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    assert cli.main(["reproduce", "figure-6", *numbers, "--set", "width=3", "--json", "a.json", "--png", "a.png"]) == 0
    assert "meta-seeds end above gradient descent" in capsys.readouterr().out
    assert json.loads(Path("a.json").read_text())["settings"]["runs"] == 4
    assert Path("a.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["reproduce", "figure-6", "--read", "a.json", "--page", "a.md"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] in Path("a.md").read_text()
    assert cli.main(["reproduce", "figure-6", "--png", "a.svg"]) == 2
    assert "ends in .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--read none.json", "No such file"),
        ("--read list.json", "not the results"),
        ("--read list.json --runs 3", "no settings"),
    ],
)
def test_reading_what_is_no_result(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.json").write_text("[]")
    assert cli.main(["reproduce", "figure-6", *options.split()]) == 2
    assert words in capsys.readouterr().err
