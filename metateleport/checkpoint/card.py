"""The card of a checkpoint: its schema, its digest, and the forms that earlier versions wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metateleport.checkpoint.schema import (
    FieldError,
    flag,
    items,
    number,
    one_of,
    optional,
    plain,
    table,
    text,
    whole,
)
from metateleport.checkpoint.schema_1 import card_of_schema_1
from metateleport.files import FileError, read_regular, write_json
from metateleport.learned.config import MODES, MetaOptimizerConfig
from metateleport.settings import SettingsError, flattened, shown
from metateleport.version import VERSION

__all__ = ["CARD", "SCHEMA", "CheckpointError", "digests_of", "read_card", "sealed", "sealed_for", "write_card"]

CARD = "card.json"
SCHEMA = 3
"""The form of the cards that this version writes. Schema 1 is of 0.1.0 and 0.2.0, schema 2 of versions on the way to
0.3.0; neither has a digest over the card."""

FREE = ("limits", "notes")
"""Entries that a person may edit: they are checked for their type, and are not under the digest."""

_MOST_BYTES = 16 << 20
_DIGITS = 16
_MANY = 1_000_000
_LONGEST = 1000
_HASH = text(64, "[0-9a-f]{64}")
_NAME = text(300)
_SETTINGS = table(plain, most=200)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another version or of another mode; the message says what to do."""


def _networks(value: Any, key: str) -> None:
    table(dict.fromkeys(("rule", "teleport", "gauge", "groups"), plain), ("rule", "groups"))(value, key)
    try:
        MetaOptimizerConfig.read(value)
    except SettingsError as error:
        raise FieldError(f"{key} does not describe a meta-optimizer that is known here: {error}") from error


def _recipe(value: Any, key: str) -> None:
    parts = dict.fromkeys(("family", "rule", "teleport", "gauge"), _SETTINGS)
    table({**parts, "outer": _OUTER, "validation": _VALIDATION}, ("family", "rule", "outer"))(value, key)
    table({**dict.fromkeys(value["family"], plain), "name": _NAME}, ("name",))(value["family"], f"{key}.family")


# The outer loop is of a room below this one, which checks the whole recipe where it is used: what is known of it here
# is checked here, and what it may gain is at least no nonsense.
_OUTER = table(
    {
        "estimator": one_of("tbptt", "es", "pes"),
        "spread": number(0),
        "meta_steps": optional(whole(1)),
        "seconds": optional(number(0)),
        "tasks": whole(1),
        "tasks_at_once": optional(whole(1)),
        "late": number(0, 1),
        "told": flag,
        "unroll": whole(1),
        "horizon": whole(1),
        "lr": number(0),
        "clip": number(0),
        "first_order": flag,
        "blind": number(0, 1),
        "teleport_cost": number(0),
        "search": whole(),
        "starts": whole(1),
        "start_from": optional(text()),
        "seed": whole(),
        "device": one_of("auto", "cpu", "cuda"),
        "dtype": optional(one_of("float32", "float64")),
    },
    ("seed",),
    others=plain,
)
_VALIDATION = table({"tasks": whole(1), "every": whole(1)}, others=plain)
_RUN = table(
    {
        "meta_steps": whole(),
        "chosen_at": whole(),
        "validation": number(),
        "validations": items(items(number(), 2, exactly=2), _MANY),
        "starts": items(number(), 10_000),
        "search": items(number(), _MANY),
        "skipped": whole(),
        "seconds": number(0),
        "openness": number(0, 1),
        "validated_steps": whole(1),
    },
    ("validation",),
    others=plain,
)
_RESULT = table(
    {
        "task": table({"name": _NAME, "settings": _SETTINGS}),
        "measure": _NAME,
        "tasks": whole(1),
        "steps": whole(1),
        "seed": whole(),
        "dtype": one_of("float32", "float64"),
        "conditions": _SETTINGS,
        "command": text(),
        "methods": table(plain),
        "meta_seeds": table({"seeds": plain, "worst": plain, "ratios_to_learned": plain}),
        "target": table(plain),
    },
    others=plain,
)
_ENTRIES = {
    "schema": whole(),
    "meta_optimizer": _networks,
    "step_only": optional(_networks),
    "weights_sha256": _HASH,
    "versions": table(_NAME),
    "rewritten": table({"from_schema": whole(1), "metateleport": _NAME}),
    "name": _NAME,
    "mode": one_of(*MODES),
    "family": table({"name": _NAME, "settings": _SETTINGS}, ("name",)),
    "training": table(
        {
            "command": text(),
            "recipe": _recipe,
            "runs": table({"learned": _RUN, "step-only": _RUN}),
            "tracking_run": optional(_NAME),
            "processes": whole(2),
        }
    ),
    "results": table(_RESULT),
    "limits": items(text(), 1000),
    "notes": items(text(), 1000),
    "meta_seeds": items(
        table({"seed": whole(), "validation": number(), "chosen": flag}, ("seed", "validation", "chosen")), 10_000
    ),
    "made_for": table({"minibatches": flag, "groups": items(_NAME, 100), "losses": _NAME}),
}
_DIGEST = {"digests": table(text(_DIGITS, "[0-9a-f]{16}")), "digest": _HASH}
_REQUIRED = ("schema", "meta_optimizer", "weights_sha256")


def sealed(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card in today's schema with its digests.

    Args:
        card: the entries; digests among them are made anew.

    Returns:
        The card as JSON has it: `digests` has the start of a SHA-256 for each entry but those of `FREE`, so that a
        changed entry can be named, and `digest` has that of all of them.

    Raises:
        FieldError: if an entry is not allowed.
        TypeError, ValueError: if a value is none that JSON has.
    """
    entries = {name: value for name, value in card.items() if name not in _DIGEST}
    # What is checked is what will be read.
    whole_card: dict[str, Any] = json.loads(json.dumps({**entries, "schema": SCHEMA}, allow_nan=False))
    _check(whole_card)
    return {**whole_card, **digests_of(whole_card)}


def read_card(path: Path, edited: bool = False) -> dict[str, Any]:
    """The card in a checkpoint's folder, converted to today's schema, with every entry checked.

    Args:
        path: the folder.
        edited: whether entries may differ from what was written, as a person has edited them.

    Raises:
        CheckpointError: if there is no card, it cannot be read, an entry is not allowed, or one was changed.
    """
    try:
        content = read_regular(path / CARD, _MOST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {CARD}: it is not a checkpoint, or was not copied whole") from None
    except (FileError, NotADirectoryError) as error:
        raise CheckpointError(f"the {CARD} of {path} cannot be read ({error}): copy it again") from error
    try:
        card = json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_refused)
    except FieldError as error:
        raise CheckpointError(_damaged(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / CARD} is truncated or not JSON ({error}): copy it again") from error
    card = card if isinstance(card, dict) else {}
    schema = card.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise CheckpointError(_other_schema(path, card))
    try:
        if schema == SCHEMA and edited:
            _check({name: value for name, value in card.items() if name not in _DIGEST})
            return card
        if schema == SCHEMA:
            _check(card, digested=True)
            _check_digests(card)
            return card
        return _of_earlier(path, card)
    except FieldError as error:
        raise CheckpointError(_damaged(path, error)) from error


def sealed_for(path: str | Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """What `sealed` returns, for the folder that the card is going to be written into.

    Raises:
        CheckpointError: if an entry is not allowed; the message names the folder too.
        TypeError, ValueError: if a value is none that JSON has.
    """
    try:
        return sealed(card)
    except FieldError as error:
        raise CheckpointError(f"this card cannot be written into {path}: {error}") from error


def write_card(path: Path, card: Mapping[str, Any]) -> None:
    """Writes a card with its digests into a checkpoint's folder, whole or not at all; raises as `sealed_for`."""
    write_json(path / CARD, sealed_for(path, card))


def _of_earlier(path: Path, card: dict[str, Any]) -> dict[str, Any]:
    """A card of schema 1 or 2 in today's schema, without digests."""
    for name in _DIGEST:
        if name in card:
            raise FieldError(f"schema is {card['schema']}, and cards of that schema have no {name}: it was changed")
    read = card
    if card["schema"] == 1:
        try:
            read = card_of_schema_1(card)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the card of {path}, of schema 1, is damaged ({error!r}): copy it again") from error
    known = {**read, "rewritten": read.get("rewritten", {"from_schema": card["schema"], "metateleport": VERSION})}
    _check({**known, "schema": SCHEMA})
    return {**known, "schema": SCHEMA}


def _check(card: Mapping[str, Any], digested: bool = False) -> None:
    """Every entry for its type and range, and what two entries say of the same."""
    known, required = ({**_ENTRIES, **_DIGEST}, (*_REQUIRED, *_DIGEST)) if digested else (_ENTRIES, _REQUIRED)
    table(known, required)(card, "")
    _check_sense(card)


def _check_sense(card: Mapping[str, Any]) -> None:
    networks = MetaOptimizerConfig.read(card["meta_optimizer"])
    if card.get("mode", networks.mode) != networks.mode:
        raise FieldError(f"mode is {card['mode']!r}, and meta_optimizer is of mode {networks.mode!r}")
    training = card.get("training", {})
    recipe = training.get("recipe")
    if recipe is not None:
        _check_agree(recipe, networks)
        family = card.get("family", {})
        ours = dict(family.get("settings", {}))
        # A recipe may give a family by the path of its file, and a file's class may have another name.
        if not str(recipe["family"].get("name", "")).endswith(".py"):
            ours["name"] = family.get("name")
        for name, value in recipe["family"].items():
            # A recipe may name its family by the path of a file.
            same = name == "name" and str(value).endswith(".py")
            if family and name in ours and ours[name] != value and not same:
                said = "name" if name == "name" else f"settings.{name}"
                raise FieldError(
                    f"family.{said} is {shown(ours[name])}, and training.recipe.family.{name} is {shown(value)}"
                )
    seeds = card.get("meta_seeds", [])
    if seeds and sum(each["chosen"] for each in seeds) != 1:
        raise FieldError("meta_seeds has to have exactly one that is chosen")
    if len({each["seed"] for each in seeds}) < len(seeds):
        raise FieldError("meta_seeds has the same seed twice")
    chosen = next((each for each in seeds if each["chosen"]), None)
    if chosen is None or recipe is None:
        return
    if chosen["seed"] != recipe["outer"]["seed"]:
        raise FieldError(
            f"meta_seeds says that seed {chosen['seed']} is chosen, and training.recipe.outer.seed is "
            f"{recipe['outer']['seed']}"
        )
    score = training.get("runs", {}).get("learned", {}).get("validation", chosen["validation"])
    if chosen["validation"] != score:
        raise FieldError(
            f"meta_seeds says that the chosen one's validation is {chosen['validation']}, and "
            f"training.runs.learned.validation is {score}"
        )


def _check_agree(recipe: Mapping[str, Any], networks: MetaOptimizerConfig) -> None:
    """The networks in the card are those of the recipe."""
    parts = {name: recipe[name] for name in ("rule", "teleport", "gauge") if name in recipe}
    try:
        asked = MetaOptimizerConfig.read({**parts, "groups": list(networks.groups)})
    except SettingsError as error:
        raise FieldError(f"training.recipe is not allowed: {error}") from error
    wanted, found = flattened(asked.table()), flattened(networks.table())
    for key in (*wanted, *found):
        if wanted.get(key) != found.get(key):
            raise FieldError(
                f"meta_optimizer.{key} is {shown(found.get(key))}, and training.recipe.{key} is "
                f"{shown(wanted.get(key))}"
            )


def digests_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """The entries `digests` and `digest` of a card in today's schema, whose entries are not checked."""
    under = {name: value for name, value in card.items() if name not in (*FREE, *_DIGEST)}
    each = {name: _hash(value)[:_DIGITS] for name, value in under.items()}
    return {"digests": each, "digest": _hash(each)}


def _check_digests(card: Mapping[str, Any]) -> None:
    wanted, found = card["digests"], digests_of(card)["digests"]
    if _hash(wanted) != card["digest"]:
        raise FieldError("digests was changed since the card was written, or digest was")
    for said, names in (
        ("added", [name for name in found if name not in wanted]),
        ("removed", [name for name in wanted if name not in found]),
        ("changed", [name for name in found if found[name] != wanted.get(name)]),
    ):
        if names:
            raise FieldError(
                f"{' and '.join(names)} {'were' if len(names) > 1 else 'was'} {said} since the card was written"
            )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FieldError(f"{shown(twice)} is there twice in one table")
    return found


def _refused(constant: str) -> Any:
    raise FieldError(f"a number is {constant}, which is not finite")


def _damaged(path: Path, error: FieldError) -> str:
    said = str(error)
    # What is wrong may be a text of any length, which a setting's own message has in full.
    said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."
    return (
        f"the card of {path} is damaged: {said}. Copy the folder again; if it was edited on purpose, "
        "'metateleport seal --edited' writes its digest anew"
    )


def _other_schema(path: Path, card: Mapping[str, Any]) -> str:
    wrote = card.get("versions")
    version = wrote.get("metateleport", "unknown") if isinstance(wrote, dict) else "unknown"
    return (
        f"{path} is a checkpoint of schema {shown(card.get('schema'))}, and this version reads 1 to {SCHEMA}: use the "
        f"version of metateleport that wrote it ({shown(version)[1:-1]})"
    )
