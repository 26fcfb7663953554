"""Checkpoints of schema 1: read as those of today, and what meant nothing in them is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_cases import shape_of

import metateleport.papers  # noqa: F401
from metateleport.checkpoint import SCHEMA, CheckpointError, combine_meta_seeds, load_checkpoint, save_checkpoint
from metateleport.checkpoint.schema_1 import card_of_schema_1
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig
from metateleport.training import Recipe, load_recipe

SHAPE: dict[str, Any] = {
    "mode": "lr+tele",
    "network": "equivariant",
    "hidden": 4,
    "coordinate_hidden": 20,
    "groups": ["GL"],
    "base": "sgd",
    "base_lr": 0.001,
    "shapes": [],
    "max_size": 100.0,
    "max_stretch": None,
    "stays": True,
    "gauge": "none",
    "metric_memory": 0.95,
    "secants": 0,
    "longest": 1.5,
    "cooling": 0.0,
    "update": "coordinate",
}
SHAPES = (("0.weight", (2, 2)),)

# The flat settings of a card, and the same for `shape_of`.
CARDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lr+tele": ({}, {}),
    "bounded": ({"max_stretch": 2.0, "cooling": 0.1}, {"max_stretch": 2.0, "cooling": 0.1}),
    "lr": ({"mode": "lr"}, {"mode": "lr"}),
    "void in mode lr": (
        {
            "mode": "lr",
            "gauge": "exact",
            "max_stretch": 2.0,
            "base": "adam",
            "update": "adaptive",
            "coordinate_hidden": 9,
        },
        {"mode": "lr"},
    ),
    "update": ({"mode": "update", "coordinate_hidden": 5}, {"mode": "update", "coordinate_hidden": 5}),
    "tensor": (
        {"mode": "update", "update": "tensor", "secants": 2},
        {"mode": "update", "update": "tensor", "secants": 2},
    ),
    "adaptive": (
        {"mode": "update+tele", "update": "adaptive", "cooling": 0.1, "secants": 3, "longest": 7.0},
        {"mode": "update+tele", "update": "adaptive", "cooling": 0.1},
    ),
    "gauge": (
        {"stays": False, "gauge": "linearised", "metric_memory": 0.5},
        {"stays": False, "gauge": "linearised", "metric_memory": 0.5},
    ),
    "tele": (
        {"mode": "tele", "base": "adam", "base_lr": 0.1, "secants": 3},
        {"mode": "tele", "base": "adam", "base_lr": 0.1},
    ),
    "flat": (
        {"network": "flat", "shapes": [["0.weight", [2, 2]]], "cooling": 1.0, "secants": 3},
        {"shapes": SHAPES},
    ),
    "flat update": (
        {"network": "flat", "mode": "update", "shapes": [["0.weight", [2, 2]]]},
        {"mode": "update", "shapes": SHAPES},
    ),
}


def of_schema_1(path: Path, meta: MetaOptimizer, **card: Any) -> Path:
    """A checkpoint as an earlier version wrote it."""
    save_checkpoint(path, meta, None, {})
    written = json.loads((path / "card.json").read_text())
    # Versions that wrote schema 1 knew of no digest.
    del written["digest"], written["digests"]
    (path / "card.json").write_text(json.dumps({**written, "schema": 1, **card}))
    return path


@pytest.mark.parametrize("kind", CARDS)
def test_networks_are_those_that_they_were(kind: str, tmp_path: Path) -> None:
    flat, own = CARDS[kind]
    torch.manual_seed(1)
    expected = MetaOptimizer(shape_of(**{"hidden": 4, "groups": ("GL",), **own}))
    found = load_checkpoint(of_schema_1(tmp_path / "a", expected, meta_optimizer={**SHAPE, **flat})).learned
    assert found.config == expected.config
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())


def test_settings_that_an_early_version_did_not_know() -> None:
    early = {name: SHAPE[name] for name in ("mode", "network", "hidden", "groups", "stays", "gauge", "secants")}
    read = card_of_schema_1({"meta_optimizer": early, "step_only": None})
    assert MetaOptimizerConfig.read(read["meta_optimizer"]) == shape_of(hidden=4, groups=("GL",))
    assert read["step_only"] is None


CONFIG: dict[str, Any] = {
    **{
        name: value
        for name, value in SHAPE.items()
        if name not in ("groups", "shapes", "coordinate_hidden", "max_size")
    },
    "family": "leaky_mlp",
    "settings": {"width": 4, "samples": None},
    "meta_steps": 5,
    "seconds": None,
    "tasks": 2,
    "unroll": 2,
    "horizon": 4,
    "lr": 0.003,
    "validation_tasks": 3,
    "validation_every": 20,
    "seed": 7,
    "device": "auto",
}


def trained(path: Path, seed: int = 7, **changes: Any) -> Path:
    meta = MetaOptimizer(shape_of(hidden=4, groups=("GL",)))
    config = {**CONFIG, "seed": seed, **changes}
    training = {"command": "metateleport train leaky_mlp", "config": config, "runs": {"learned": {"validation": -1.0}}}
    return of_schema_1(path, meta, meta_optimizer=SHAPE, training=training)


def test_the_recipe_of_a_card(tmp_path: Path) -> None:
    path = trained(tmp_path / "a")
    recipe = load_recipe(path)
    assert recipe == Recipe.read(load_checkpoint(path).card["training"]["recipe"])
    assert recipe.family.table() == {"name": "leaky_mlp", "width": 4, "samples": None}
    assert (recipe.outer.meta_steps, recipe.outer.lr, recipe.outer.seed, recipe.outer.clip) == (5, 0.003, 7, 1.0)
    assert (recipe.validation.tasks, recipe.validation.every) == (3, 5)
    # Versions of before hid no losses, and had no other name for it.
    assert recipe.outer.blind == 0.0
    assert load_checkpoint(path).card["training"]["command"] == "metateleport train leaky_mlp"
    timed = load_recipe(trained(tmp_path / "b", meta_steps=10**6, seconds=60.0))
    assert (timed.outer.meta_steps, timed.outer.seconds, timed.validation.every) == (None, 60.0, 20)


def test_they_are_combined_into_one_of_today_s_schema(tmp_path: Path) -> None:
    paths = [trained(tmp_path / f"s{seed}", seed) for seed in (3, 4)]
    path = combine_meta_seeds(paths, tmp_path / "both")
    assert [each.seed for each in load_checkpoint(path).meta_seeds] == [3, 4]
    cards = [json.loads((each.path / "card.json").read_text()) for each in load_checkpoint(path).meta_seeds]
    assert [card["schema"] for card in cards] == [SCHEMA, SCHEMA]
    assert load_recipe(path).outer.seed == 3
    assert load_recipe(load_checkpoint(path).meta_seeds[1].path).outer.seed == 4
    with pytest.raises(CheckpointError, match=r"not of one recipe: family\.(width|samples) is"):
        combine_meta_seeds(
            [paths[0], trained(tmp_path / "c", 5, settings={"width": 5, "samples": None})], tmp_path / "d"
        )


@pytest.mark.parametrize(
    "damage",
    [
        {"meta_optimizer": None},
        {"meta_optimizer": {**SHAPE, "groups": 3}},
        {"meta_optimizer": {**SHAPE, "mode": 3}},
        {"meta_optimizer": {**SHAPE, "mode": "tele", "network": "flat"}},
        {"training": {"config": {"mode": "lr"}}},
    ],
)
def test_damage_is_named(damage: dict[str, Any], tmp_path: Path) -> None:
    path = trained(tmp_path / "a")
    card = json.loads((path / "card.json").read_text())
    (path / "card.json").write_text(json.dumps({**card, **damage}))
    with pytest.raises(CheckpointError, match="of schema 1, is damaged"):
        load_checkpoint(path)
