"""Converts cards of schema 1, which had all settings in one flat table, to today's schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["card_of_schema_1"]

# Values of settings that older versions did not have yet.
_DEFAULTS: dict[str, Any] = {
    "mode": "lr+tele",
    "network": "equivariant",
    "hidden": 32,
    "coordinate_hidden": 20,
    "base": "sgd",
    "base_lr": 1e-3,
    "shapes": (),
    "max_stretch": None,
    "stays": True,
    "gauge": "none",
    "metric_memory": 0.95,
    "secants": 0,
    "longest": 1.5,
    "cooling": 0.0,
    "update": "coordinate",
}
_OUTER: dict[str, Any] = {
    "meta_steps": 300,
    "seconds": None,
    "tasks": 16,
    "unroll": 10,
    "horizon": 30,
    "lr": 5e-3,
    "clip": 1.0,
    "first_order": False,
    # Versions without this setting hid no losses.
    "blind": 0.0,
    "teleport_cost": 0.0,
    "search": 0,
    "starts": 1,
    "start_from": None,
    "seed": 0,
    "device": "auto",
    "dtype": None,
}
_UNBOUNDED = 10**6
"""The number of meta-steps in a card whose training was ended by the time alone."""


def card_of_schema_1(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card of schema 1 with its networks and its recipe in the tables of today's schema.

    Settings that had no effect, as a gauge in mode `lr`, are left out.

    Args:
        card: as it was written.

    Returns:
        The card; entries that schema 1 and today's have in common are unchanged.

    Raises:
        KeyError, TypeError, ValueError: if the card is damaged.

    Example:
        >>> card_of_schema_1({"meta_optimizer": {"mode": "lr", "gauge": "exact", "groups": ["GL"]}})["meta_optimizer"]
        {'rule': {'kind': 'lr', 'hidden': 32, 'secants': 0, 'longest': 1.5, 'cooling': 0.0}, 'groups': ['GL']}
    """
    read = {**card, "meta_optimizer": _shape(card["meta_optimizer"])}
    if card.get("step_only") is not None:
        read["step_only"] = _shape(card["step_only"])
    training = card.get("training")
    if isinstance(training, Mapping) and isinstance(training.get("config"), Mapping):
        others = {name: value for name, value in training.items() if name != "config"}
        read["training"] = {**others, "recipe": _recipe(training["config"])}
    return read


def _shape(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {**_networks({**_DEFAULTS, **flat}), "groups": list(flat["groups"])}


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {**_DEFAULTS, **_OUTER, "validation_tasks": 32, "validation_every": 20, **config}
    outer = {name: known[name] for name in _OUTER}
    if outer["seconds"] is not None and outer["meta_steps"] >= _UNBOUNDED:
        outer["meta_steps"] = None
    every = known["validation_every"]
    if outer["meta_steps"] is not None:
        every = min(every, outer["meta_steps"])
    return {
        "family": {"name": known["family"], **known.get("settings", {})},
        **_networks(known),
        "outer": outer,
        "validation": {"tasks": known["validation_tasks"], "every": every},
    }


def _networks(known: Mapping[str, Any]) -> dict[str, Any]:
    step, _, tele = known["mode"].rpartition("+") if "+" in known["mode"] else (known["mode"], "", "")
    teleports, flat = bool(tele) or known["mode"] == "tele", known["network"] == "flat"
    tables: dict[str, Any] = {"rule": _rule(step, known)}
    if teleports and known["stays"]:
        tables["teleport"] = {"hidden": known["hidden"], "max_stretch": None if flat else known["max_stretch"]}
    if teleports and known["gauge"] != "none":
        kept = {name: known[name] for name in ("hidden", "metric_memory")}
        tables["gauge"] = {"kind": known["gauge"], **kept}
    return tables


def _rule(step: str, known: Mapping[str, Any]) -> dict[str, Any]:
    hidden = {"hidden": known["hidden"]}
    if step == "tele" and known["network"] == "flat":
        raise ValueError("mode 'tele' of the 'flat' networks is no longer read: use metateleport 0.2")
    if step == "tele":
        return {"kind": "base", "optimizer": known["base"], "lr": known["base_lr"]}
    if known["network"] == "flat":
        shapes = [[name, list(size)] for name, size in known["shapes"]]
        return {"kind": "flat", "shapes": shapes, **hidden, "per_coordinate": step == "update"}
    kind = known["update"] if step == "update" else step
    if kind == "adaptive":
        return {"kind": kind, **hidden, "cooling": known["cooling"]}
    bounded = {name: known[name] for name in ("secants", "longest", "cooling")}
    wide = {"coordinate_hidden": known["coordinate_hidden"]} if kind == "coordinate" else {}
    return {"kind": kind, **hidden, **bounded, **wide}
