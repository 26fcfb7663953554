"""Leaving parts of the basis out: what it does to a run, how it is reported, and what a user may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learned_cases import shape_of

import metateleport as mt
from metateleport import cli
from metateleport.checkpoint import load_checkpoint, save_checkpoint
from metateleport.checkpoint.seeds import combine_meta_seeds
from metateleport.evaluation import (
    BASELINES,
    EvaluationError,
    Method,
    ablated_methods,
    basis_of,
    evaluate,
    parts_of,
    plot,
    ratios_table_of,
    record_result,
    report_of,
    table_of,
    without,
    words_of,
)
from metateleport.evaluation.methods.learned import Learned
from metateleport.learned import MetaOptimizer
from metateleport.training import FamilySettings, Recipe, TruncatedSettings

KINDS: dict[str, dict[str, Any]] = {
    "stays": {},
    "gauge": {"stays": False, "gauge": "exact"},
    "both": {"gauge": "exact"},
}
FAMILY = mt.load_family("leaky_mlp", {"width": 4, "activation": "identity"})
STEPS = 8


def optimizer(kind: str = "stays", seed: int = 0) -> MetaOptimizer:
    """One whose coefficients differ and are far from zero."""
    torch.manual_seed(seed)
    meta = MetaOptimizer(shape_of(groups=("GL",), hidden=4, **KINDS[kind])).double()
    with torch.no_grad():
        for part in (meta.teleporter, meta.gauge):
            if part is not None:
                head = part.networks["GL"].head
                head.bias.copy_(torch.linspace(-0.5, 0.5, len(head.bias)))
    return meta.eval()


def losses(meta: MetaOptimizer, teleport: Any = "learned") -> np.ndarray:
    method = Learned("learned", meta, teleport)
    return method.run(FAMILY.stack(range(6), "held-out"), STEPS).loss


@pytest.mark.parametrize("kind", KINDS)
def test_without_all_of_the_basis_is_the_teleport_off(kind: str) -> None:
    meta = optimizer(kind)
    none, off = losses(without(meta, basis_of(meta))), losses(meta, "off")
    assert np.allclose(none, off, rtol=1e-9, atol=0)
    assert not np.allclose(none, losses(meta), rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_without_nothing_is_the_learned_one(kind: str) -> None:
    meta = optimizer(kind)
    assert np.array_equal(losses(without(meta, ())), losses(meta))


@pytest.mark.parametrize("name", basis_of(optimizer()))
def test_leaving_an_element_out_is_putting_its_coefficient_to_zero(name: str) -> None:
    meta = optimizer()
    masked = without(meta, [name])
    place = basis_of(meta).index(name)
    with torch.no_grad():
        head = meta.teleporter.networks["GL"].head
        head.weight[place], head.bias[place] = 0.0, 0.0
    assert np.array_equal(losses(masked), losses(meta))
    # Of an element without a coefficient there is nothing to leave out.
    assert np.array_equal(losses(without(meta, [name])), losses(meta))


@pytest.mark.parametrize("name", basis_of(optimizer("gauge")))
def test_leaving_an_element_of_no_weight_out_of_a_gauge_changes_nothing(name: str) -> None:
    meta = optimizer("gauge")
    assert not np.allclose(losses(without(meta, [name])), losses(meta), rtol=1e-6)
    other = {"log metric": 1e4, "log gradient covariance": -1e4}
    with torch.no_grad():
        # The share of the gradients' covariance, the rest being the metric's.
        meta.gauge.networks["GL"].head.bias[1] = other[name]
    assert np.array_equal(losses(without(meta, [name])), losses(meta))


def test_the_optimizer_itself_is_left_as_it_is() -> None:
    meta = optimizer("both")
    before = losses(meta)
    for names in (basis_of(meta), basis_of(meta)[:1]):
        without(without(meta, names), names)
    assert np.array_equal(losses(meta), before)


def test_what_is_left_out_twice_is_left_out_together() -> None:
    meta = optimizer("both")
    first, *_, last = basis_of(meta)
    assert np.array_equal(losses(without(without(meta, [first]), [last])), losses(without(meta, [first, last])))


def test_parts() -> None:
    meta = optimizer("both")
    names = basis_of(meta)
    assert len(set(names)) == len(names)
    alone = {name: (name,) for name in names}
    assert parts_of(["each"], meta) == alone
    two = f"{names[0]} + {names[2]}"
    assert parts_of([names[1], "each", two], meta) == {**alone, two: (names[0], names[2])}
    assert parts_of([f"all but {two}"], meta) == {f"all but {two}": (names[1], *names[3:])}
    assert parts_of([], optimizer()) == {}
    with pytest.raises(EvaluationError, match=rf"no 'log nothing': it has {names[0]}; .*'each'"):
        parts_of([f"{names[0]} + log nothing"], meta)
    step = MetaOptimizer(shape_of(mode="lr", hidden=4))
    assert basis_of(step) == ()
    with pytest.raises(EvaluationError, match="nothing to leave out"):
        parts_of(["each"], step)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("single") / "one", 0)


def saved(path: Path, seed: int) -> Path:
    shape = optimizer("both", seed).config
    family = FamilySettings("leaky_mlp")
    recipe = Recipe(family, shape.rule, shape.teleport, shape.gauge, TruncatedSettings(seed=seed))
    training = {"recipe": recipe.table(), "runs": {"learned": {"validation": float(seed)}}}
    return save_checkpoint(path, optimizer("both", seed).float(), None, {"name": path.name, "training": training})


def test_the_report_has_a_row_for_every_part_and_baselines_are_apart(single: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(single)
    parts = parts_of(["each"], checkpoint.learned)
    methods: list[Method] = [Learned("learned", checkpoint.learned), *ablated_methods(checkpoint, parts)]
    report = report_of(evaluate(FAMILY, [*methods, BASELINES["gd"].make(lr=1e-4)], tasks=5, steps=STEPS))
    found = report["attribution"]["learned"]
    names = list(basis_of(checkpoint.learned))
    assert list(found["without"]) == names
    assert list(found["baselines"]) == ["gd"]
    for name in names:
        row = f"learned/without {name}"
        assert report["methods"][row]["settings"]["without"] == [name]
        assert report["methods"][row]["paired_ratios_to_learned"] == found["without"][name]["gradient_evaluations"]
        end = found["without"][name]["gradient_evaluations"][-1]
        assert end["low"] <= end["ratio"] <= end["high"]
        assert f"{name}: {end['ratio']:.3g} [" in words_of(report)[0]
    assert table_of(report).row_count == len(names) + 2
    assert ratios_table_of(report).row_count == len(names) + 1
    plot(report, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "gd" in drawn
    assert names[0] not in drawn


def test_the_card_keeps_it_beside_other_results_of_the_same_task(single: Path) -> None:
    checkpoint = load_checkpoint(single)
    learned = Learned("learned", checkpoint.learned)
    ablated = ablated_methods(checkpoint, parts_of(["identity"], checkpoint.learned))
    for methods in ([learned], [learned, *ablated]):
        record_result(single, report_of(evaluate(FAMILY, methods, tasks=2, steps=2)), "command")
    first, second = load_checkpoint(single).card["results"].items()
    assert second[0] == f"{first[0]}, parts of the basis left out"
    assert list(first[1]["methods"]) == ["learned"]
    assert list(second[1]["methods"]) == ["learned", "learned/without identity"]


def test_the_command_runs_it_for_every_meta_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    combine_meta_seeds([saved(tmp_path / str(seed), seed) for seed in (0, 1)], tmp_path / "two")
    sizes = ["--set", "width=4", "--set", "activation=identity", "--tasks", "3", "--steps", "4", "--no-track"]
    rows = ["identity", f"{basis_of(optimizer('gauge'))[0]} + log feature_covariance"]
    asked = ["--methods", "learned,gd", "--without", rows[0], "--without", rows[1]]
    assert cli.main(["evaluate", str(tmp_path / "two"), "leaky_mlp", *sizes, *asked, "--json", "a.json"]) == 0
    report = json.loads(Path("a.json").read_text())
    assert list(report["methods"]) == ["learned", *(f"learned/without {row}" for row in rows), "gd"]
    assert [each["seed"] for each in report["meta_seeds"]["seeds"]] == [0, 1]
    for each in report["meta_seeds"]["seeds"]:
        assert list(each["methods"]) == ["learned", *(f"learned/without {row}" for row in rows)]
    for row in rows:
        assert "worst" in report["attribution"]["learned"]["without"][row]["meta_seeds"]["gradient_evaluations"][-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none", "leaky_mlp", "--without", "each"], "name a checkpoint"),
        (["CHECKPOINT", "leaky_mlp", "--without", "each", "--methods", "gd"], "add learned to the methods"),
        (["CHECKPOINT", "leaky_mlp", "--without", "nothing"], "no 'nothing'"),
    ],
)
def test_what_cannot_be_left_out(
    arguments: list[str], words: str, single: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(single) if each == "CHECKPOINT" else each for each in arguments]
    assert cli.main(["evaluate", *given, "--no-track"]) == 2
    assert words in capsys.readouterr().err
