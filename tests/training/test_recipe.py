"""Recipes: what cannot go together cannot be written, and each is read as it was written."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies
from learned_cases import shape_of

import metateleport.papers  # noqa: F401
from metateleport.checkpoint import load_checkpoint, save_checkpoint, shipped_checkpoints
from metateleport.families import load_family
from metateleport.learned import (
    AdaptiveSettings,
    BaseOptimizerSettings,
    CoordinateSettings,
    GaugeSettings,
    MetaOptimizer,
    StepSettings,
    TeleportSettings,
    TensorSettings,
)
from metateleport.learned.rules import known_rules
from metateleport.settings import SettingsError, from_toml, to_toml
from metateleport.training import (
    EvolutionSettings,
    FamilySettings,
    PersistentSettings,
    Recipe,
    TrainingError,
    TruncatedSettings,
    ValidationSettings,
    load_recipe,
)

FAMILY = {"name": "leaky_mlp"}
STEP = {"kind": "lr"}
FLAT = {"kind": "flat", "shapes": [["0.weight", [2, 2]]]}

# What used to be void and silent, as the flat settings of before (mode, update, network and so on) had it, the same in
# a recipe, and the two keys that the error names.
VOID: dict[str, tuple[dict[str, Any], str, str]] = {
    "update=adaptive, secants=3": ({"rule": {"kind": "adaptive", "secants": 3}}, "rule.secants", "rule.kind"),
    "update=adaptive, longest=7": ({"rule": {"kind": "adaptive", "longest": 7.0}}, "rule.longest", "rule.kind"),
    "update=adaptive, coordinate_hidden=9": (
        {"rule": {"kind": "adaptive", "coordinate_hidden": 9}},
        "rule.coordinate_hidden",
        "rule.kind",
    ),
    "update=tensor, coordinate_hidden=9": (
        {"rule": {"kind": "tensor", "coordinate_hidden": 9}},
        "rule.coordinate_hidden",
        "rule.kind",
    ),
    "mode=lr, coordinate_hidden=9": (
        {"rule": {**STEP, "coordinate_hidden": 9}},
        "rule.coordinate_hidden",
        "rule.kind",
    ),
    "mode=lr, base=adam": ({"rule": {**STEP, "optimizer": "adam"}}, "rule.optimizer", "rule.kind"),
    "mode=lr, base_lr=1": ({"rule": {**STEP, "lr": 1.0}}, "rule.lr", "rule.kind"),
    "mode=update, base_lr=1": ({"rule": {"kind": "coordinate", "lr": 1.0}}, "rule.lr", "rule.kind"),
    "mode=tele, secants=3": ({"rule": {"kind": "base", "secants": 3}, "teleport": {}}, "rule.secants", "rule.kind"),
    "mode=tele, longest=7": ({"rule": {"kind": "base", "longest": 7.0}, "teleport": {}}, "rule.longest", "rule.kind"),
    "mode=tele, cooling=1": (
        {"rule": {"kind": "base", "cooling": 1.0}, "teleport": {}},
        "rule.cooling",
        "rule.kind",
    ),
    "mode=tele, hidden of the step": (
        {"rule": {"kind": "base", "hidden": 9}, "teleport": {}},
        "rule.hidden",
        "rule.kind",
    ),
    "network=flat, cooling=1": ({"rule": {**FLAT, "cooling": 1.0}}, "rule.cooling", "rule.kind"),
    "network=flat, secants=3": ({"rule": {**FLAT, "secants": 3}}, "rule.secants", "rule.kind"),
    "network=flat, longest=7": ({"rule": {**FLAT, "longest": 7.0}}, "rule.longest", "rule.kind"),
    "network=flat, coordinate_hidden=9": (
        {"rule": {**FLAT, "coordinate_hidden": 9}},
        "rule.coordinate_hidden",
        "rule.kind",
    ),
    "metric_memory=0.5 without a gauge": (
        {"rule": STEP, "gauge": {"metric_memory": 0.5}},
        "gauge.metric_memory",
        "gauge.kind",
    ),
    "validation_every beyond meta_steps": (
        {"rule": STEP, "outer": {"meta_steps": 30}, "validation": {"every": 31}},
        "validation.every",
        "outer.meta_steps",
    ),
    # These were errors before, some of one key alone.
    "teleport_cost=1 without a teleport": (
        {"rule": STEP, "outer": {"teleport_cost": 1.0}},
        "outer.teleport_cost",
        "teleport",
    ),
    "mode=tele, gauge=exact": (
        {"rule": {"kind": "base"}, "teleport": {}, "gauge": {"kind": "exact"}},
        "gauge.kind",
        "rule.kind",
    ),
    "mode=tele without a teleport": ({"rule": {"kind": "base"}}, "rule.kind", "teleport"),
    "network=flat, gauge=exact": ({"rule": FLAT, "gauge": {"kind": "exact"}}, "gauge.kind", "rule.kind"),
    "network=flat, max_stretch=2": (
        {"rule": FLAT, "teleport": {"max_stretch": 2}},
        "teleport.max_stretch",
        "rule.kind",
    ),
    "start_from, starts=2": (
        {"rule": STEP, "outer": {"start_from": "digits", "starts": 2}},
        "outer.start_from",
        "outer.starts",
    ),
    "horizon below unroll": ({"rule": STEP, "outer": {"horizon": 5}}, "outer.horizon", "outer.unroll"),
    "estimator=pes, first_order=true": (
        {"rule": STEP, "outer": {"estimator": "pes", "first_order": True}},
        "outer.first_order",
        "outer.estimator",
    ),
    "estimator=es, unroll=5": (
        {"rule": STEP, "outer": {"estimator": "es", "unroll": 5}},
        "outer.unroll",
        "outer.estimator",
    ),
    "estimator=tbptt, spread=1": ({"rule": STEP, "outer": {"spread": 1.0}}, "outer.spread", "outer.estimator"),
    "no end": ({"rule": STEP, "outer": {"meta_steps": None}}, "outer.meta_steps", "outer.seconds"),
}


@pytest.mark.parametrize("before", VOID)
def test_two_settings_that_cannot_go_together_are_both_named(before: str) -> None:
    tables, *keys = VOID[before]
    with pytest.raises(SettingsError) as caught:
        Recipe.read({"family": FAMILY, **tables})
    for key in keys:
        assert re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        # The gauge of before was without effect in mode lr; a recipe with one is not of mode lr.
        ({"mode": "lr", "gauge.kind": "exact"}, ["mode", "rule.kind", "teleport", "gauge"]),
        ({"teleport": "none", "teleport.max_stretch": "2"}, ["teleport.max_stretch", "teleport"]),
        ({"gauge": "none", "gauge.metric_memory": "0.5"}, ["gauge.metric_memory", "gauge"]),
        ({"teleport": "none", "outer.teleport_cost": "1"}, ["outer.teleport_cost", "teleport"]),
        ({"rule.kind": "adaptive", "rule.secants": "3"}, ["rule.secants", "rule.kind"]),
        ({"outer.meta_steps": "5"}, ["validation.every", "outer.meta_steps"]),
        ({"outer.estimator": "es", "outer.unroll": "5"}, ["outer.unroll", "outer.estimator"]),
    ],
)
def test_changes_that_cannot_go_together_are_both_named(changes: dict[str, str], keys: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        Recipe(FamilySettings("leaky_mlp")).changed(changes)
    assert all(key in str(caught.value) for key in keys), str(caught.value)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({}, "family.name is missing"),
        ({"family": FAMILY}, "rule.kind is missing: it is one of lr, coordinate"),
        ({"family": FAMILY, "rule": {"kind": "step"}}, "no update rule of rule.kind = 'step' is known: known are lr"),
        ({"family": FAMILY, "rule": {**STEP, "secant": 3}}, "no setting rule.secant: the nearest is rule.secants"),
        (
            {"family": FAMILY, "rule": STEP, "teleport": {"cost": 1}},
            "no setting teleport.cost: the nearest is teleport.",
        ),
        ({"family": FAMILY, "rule": STEP, "outer": {"horizons": 3}}, "outer.horizons: the nearest is outer.horizon"),
        ({"family": FAMILY, "rule": STEP, "network": {}}, "there is no setting network"),
        ({"family": FAMILY, "rule": "lr"}, "rule is a table of settings, not 'lr'"),
        ({"family": FAMILY, "rule": STEP, "teleport": True}, "teleport is a table of settings, not True"),
        ({"family": FAMILY, "rule": STEP, "outer": 3}, "outer is a table of settings, not 3"),
        ({"family": {"name": 3}, "rule": STEP}, "family.name takes a text, not 3"),
        ({"family": FAMILY, "rule": {**STEP, "hidden": 0}}, "rule.hidden has to be at least 1, not 0"),
        ({"family": FAMILY, "rule": {**STEP, "hidden": 9000}}, "rule.hidden has to be at most 2048, not 9000"),
        ({"family": FAMILY, "rule": STEP, "outer": {"tasks": 10**9}}, "outer.tasks has to be at most 1e+06, not"),
        ({"family": FAMILY, "rule": STEP, "outer": {"seed": 2**63}}, "outer.seed has to be a whole number from 0 to"),
        ({"family": FAMILY, "rule": STEP, "validation": {"tasks": 1.5}}, "validation.tasks takes a whole number"),
    ],
)
def test_what_is_no_recipe_is_named(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Recipe.read(tables)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": "12"}, "there is no setting width"),
        ({"secants": "3"}, "the nearest is rule.secants"),
        ({"teleport": "yes"}, "teleport is none or default: not 'yes'"),
        ({"gauge": "exact"}, "gauge is none, and added by gauge.kind: not 'exact'"),
        ({"rule": "adaptive"}, "rule has settings of its own: give one, as rule.NAME"),
        ({"steps.lr": "3"}, "there is no setting steps.lr: the nearest is"),
        ({"outer.lr": "fast"}, "outer.lr takes a number, not 'fast'"),
        ({"outer.first_order": "perhaps"}, "outer.first_order takes true or false, not 'perhaps'"),
        ({"gauge.hidden": "3"}, "gauge.kind is missing, and gauge.hidden cannot stand without it"),
    ],
)
def test_changes_that_cannot_be_made_are_named(changes: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Recipe(FamilySettings("leaky_mlp")).changed(changes)
    assert said in str(caught.value)


def test_changes_as_they_are_written_on_the_command_line() -> None:
    recipe = Recipe(FamilySettings("leaky_mlp", {"width": 5}), StepSettings(hidden=7, longest=3.0))
    assert recipe.changed({}) == recipe
    assert recipe.changed({"rule.hidden": "9"}).rule == StepSettings(hidden=9, longest=3.0)
    # The same kind changes nothing, another begins anew.
    assert recipe.changed({"rule.kind": "lr"}) == recipe
    assert recipe.changed({"rule.kind": "adaptive", "rule.cooling": "0.1"}).rule == AdaptiveSettings(cooling=0.1)
    assert recipe.changed({"rule.kind": "tensor"}).rule == TensorSettings()
    assert recipe.changed({"family.name": "digits"}).family == FamilySettings("digits")
    assert recipe.changed({"family.depth": "3"}).family == FamilySettings("leaky_mlp", {"width": 5, "depth": "3"})
    gauged = recipe.changed({"teleport": "none", "gauge.kind": "exact", "gauge.hidden": "4"})
    assert (gauged.teleport, gauged.gauge) == (None, GaugeSettings("exact", 4))
    assert gauged.changed({"gauge.kind": "linearised"}).gauge == GaugeSettings("linearised")
    assert gauged.changed({"teleport": "default"}).teleport == TeleportSettings()
    assert gauged.changed({"teleport.max_stretch": "2"}).teleport == TeleportSettings(max_stretch=2.0)
    assert gauged.changed({"gauge": "none"}).mode == "lr"
    timed = recipe.changed({"outer.seconds": "60", "outer.meta_steps": "none"}).outer
    assert (timed.seconds, timed.meta_steps) == (60.0, None)


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [
        (Recipe(FamilySettings("digits")), "lr+tele"),
        (Recipe(FamilySettings("digits"), teleport=None), "lr"),
        (Recipe(FamilySettings("digits"), teleport=None, gauge=GaugeSettings("exact")), "lr+tele"),
        (Recipe(FamilySettings("digits"), CoordinateSettings()), "update+tele"),
        (Recipe(FamilySettings("digits"), AdaptiveSettings(), None), "update"),
        (Recipe(FamilySettings("digits"), BaseOptimizerSettings("adam")), "tele"),
    ],
)
def test_what_is_learned_follows_from_the_parts(recipe: Recipe, mode: str) -> None:
    assert recipe.mode == mode


hidden = strategies.integers(1, 99)
rates, above = strategies.floats(1e-6, 10), strategies.floats(1.1, 9)
kinds = strategies.sampled_from(["exact", "linearised"])
recipes = strategies.builds(
    Recipe,
    family=strategies.builds(
        FamilySettings,
        strategies.text(),
        strategies.dictionaries(
            strategies.text().filter(lambda name: name != "name"), strategies.integers(0, 9) | rates | strategies.text()
        ),
    ),
    rule=strategies.builds(StepSettings, hidden=hidden, secants=hidden, longest=above, cooling=rates)
    | strategies.builds(CoordinateSettings, hidden=hidden, coordinate_hidden=hidden)
    | strategies.builds(AdaptiveSettings, hidden=hidden, cooling=rates),
    teleport=strategies.none()
    | strategies.builds(TeleportSettings, hidden=hidden, max_stretch=strategies.none() | above),
    gauge=strategies.none() | strategies.builds(GaugeSettings, kinds, hidden),
    outer=strategies.builds(
        TruncatedSettings,
        meta_steps=strategies.integers(50, 99),
        seconds=strategies.none() | rates,
        lr=rates,
        first_order=strategies.booleans(),
        start_from=strategies.none() | strategies.text().filter(lambda name: name.lower() != "none"),
        dtype=strategies.sampled_from([None, "float64"]),
    )
    | strategies.builds(EvolutionSettings, meta_steps=strategies.integers(50, 99), spread=rates)
    | strategies.builds(PersistentSettings, meta_steps=strategies.integers(50, 99), spread=rates),
    validation=strategies.builds(ValidationSettings, every=strategies.integers(1, 50)),
)


@given(recipes)
def test_a_recipe_is_read_as_it_was_written(recipe: Recipe) -> None:
    assert Recipe.read(json.loads(json.dumps(recipe.table()))) == recipe
    assert Recipe.read(from_toml(to_toml(recipe.table()), "a text")) == recipe


@pytest.mark.parametrize("kind", [each for each in known_rules() if each != "flat"])
def test_every_rule_s_settings_are_read_from_their_table(kind: str) -> None:
    settings = known_rules()[kind]()
    # Steps in gauges of their own go with no teleport; those of a base optimizer with nothing else.
    teleport: dict[str, Any] = {} if kind == "gauged" else {"teleport": {}}
    assert Recipe.read({"family": FAMILY, "rule": settings.table(), **teleport}).rule == settings


@pytest.mark.parametrize("name", shipped_checkpoints())
def test_the_recipe_of_a_shipped_checkpoint_is_its_card_s(name: str) -> None:
    path = shipped_checkpoints()[name]
    checkpoint = load_checkpoint(path)
    for each in (checkpoint.path, *(seed.path for seed in checkpoint.meta_seeds if seed.path != path)):
        card = load_checkpoint(each).card
        recipe = load_recipe(each)
        recipe = recipe.of_family(load_family(recipe.family.name, recipe.family.settings))
        first = {**card["training"]["recipe"]["outer"], "seed": recipe.outer.seed}
        told = Recipe.read({**card["training"]["recipe"], "outer": first})
        # A card of before a setting was there has its default.
        assert recipe == told.of_family(load_family(told.family.name, told.family.settings))
        assert recipe.outer.blind == {"default": 0.8, "lora": 0.2}.get(name, 0)
        own = load_checkpoint(each).learned.config.table()
        assert recipe.networks(tuple(card["meta_optimizer"]["groups"])).table() == own
        assert card["meta_optimizer"]["rule"].items() <= own["rule"].items()
        assert recipe.family.name == card["family"]["name"]
        assert card["family"]["settings"].items() <= recipe.family.settings.items()
    assert load_recipe(name).outer.seed == min(seed.seed for seed in checkpoint.meta_seeds) == 0


def test_a_recipe_is_found_by_name_folder_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = shipped_checkpoints()["digits"]
    recipe = load_recipe("digits")
    assert recipe == load_recipe(path) == load_recipe(path / "recipe.toml")
    shorter = dataclasses.replace(recipe, outer=dataclasses.replace(recipe.outer, horizon=20))
    Path("short.toml").write_text(to_toml(shorter.table()))
    assert load_recipe("short.toml") == shorter
    Path("bad.toml").write_text("[outer]\nlr = 'fast'")
    with pytest.raises(SettingsError, match=r"bad\.toml: family\.name is missing"):
        load_recipe("bad.toml")
    # As editors of Windows write it.
    Path("marked.toml").write_text(to_toml(shorter.table()), encoding="utf-8-sig", newline="\r\n")
    assert load_recipe("marked.toml") == shorter
    Path("cut.toml").write_text("[outer")
    with pytest.raises(SettingsError, match=r"^cut\.toml is not TOML"):
        load_recipe("cut.toml")
    Path("text.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainingError, match=r"text\.toml cannot be read"):
        load_recipe("text.toml")
    with pytest.raises(TrainingError, match="no recipe 'nowhere': known by name are bottleneck_digits"):
        load_recipe("nowhere")
    Path("empty").mkdir()
    with pytest.raises(TrainingError, match=r"empty has no recipe\.toml, and no card"):
        load_recipe("empty")
    Path("card").mkdir()
    save_checkpoint("card", MetaOptimizer(shape_of(mode="lr")), None, {"name": "card"})
    with pytest.raises(TrainingError, match="does not say how it was trained"):
        load_recipe("card")
