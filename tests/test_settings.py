"""Settings as tables: types, ranges and names are checked, and a table goes through TOML unchanged."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, strategies

from metateleport.settings import (
    ABOVE_ONE,
    POSITIVE,
    Settings,
    SettingsError,
    Text,
    flattened,
    from_toml,
    nearest,
    setting,
    to_toml,
)


@dataclasses.dataclass(frozen=True)
class Box(Settings):
    part: ClassVar[str] = "box"

    kind: Literal["open", "shut"] = setting()
    width: int = setting(3)
    weight: float = setting(1.0, POSITIVE)
    factor: float | None = setting(None, ABOVE_ONE)
    label: str = setting("a")
    sealed: bool = setting(False)
    sides: tuple[tuple[str, tuple[int, ...]], ...] = setting(())


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "box.kind is missing"),
        ({"width": 3}, "box.kind is missing, and box.width cannot stand without it"),
        ({"kind": "ajar"}, "box.kind is one of open, shut; not 'ajar'"),
        ({"kind": "open", "widht": 3}, "there is no setting box.widht: the nearest is box.width"),
        ({"kind": "open", "width": 3.0}, "box.width takes a whole number, not 3.0"),
        ({"kind": "open", "width": True}, "box.width takes a whole number, not True"),
        ({"kind": "open", "width": None}, "box.width takes a whole number, not None"),
        ({"kind": "open", "width": "3"}, "box.width takes a whole number, not '3'"),
        ({"kind": "open", "weight": "1"}, "box.weight takes a number, not '1'"),
        ({"kind": "open", "weight": 0}, "box.weight has to be a positive number, not 0.0"),
        ({"kind": "open", "weight": math.inf}, "box.weight has to be a positive number, not inf"),
        ({"kind": "open", "weight": math.nan}, "box.weight has to be a positive number, not nan"),
        ({"kind": "open", "weight": 10**400}, "box.weight has to be a positive number, not inf"),
        ({"kind": "open", "weight": -(10**400)}, "box.weight has to be a positive number, not -inf"),
        ({"kind": "open", "sealed": 10**5000}, "takes true or false, not a number of more than 30 digits"),
        ({"kind": "open", "width": Text("9" * 5000)}, "9...9"),
        ({"kind": "open", "factor": 1}, "box.factor has to be a number above 1, not 1.0"),
        ({"kind": "open", "label": 3}, "box.label takes a text, not 3"),
        ({"kind": "open", "sealed": 1}, "box.sealed takes true or false, not 1"),
        ({"kind": "open", "sides": 3}, "box.sides takes a list, not 3"),
        ({"kind": "open", "sides": [["a"]]}, "box.sides takes 2 values together, not ['a']"),
        ({"kind": "open", "sides": [["a", [1.5]]]}, "box.sides takes a whole number, not 1.5"),
        ({"kind": "open", "width": Text("three")}, "box.width takes a whole number, not 'three'"),
        ({"kind": "open", "sealed": Text("maybe")}, "box.sealed takes true or false, not 'maybe'"),
    ],
)
def test_what_cannot_be_is_named(table: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Box.read(table)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


def test_text_of_the_command_line_is_read_in_the_type_of_its_setting() -> None:
    text = {"kind": "shut", "width": "7", "weight": "2", "factor": "1e1", "label": "7", "sealed": "True"}
    found = Box.read({name: Text(value) for name, value in text.items()})
    assert found == Box("shut", 7, 2.0, 10.0, "7", True)
    assert [type(value) for value in found.table().values()] == [str, int, float, float, str, bool, list]
    assert Box.read({"kind": "shut", "factor": Text("none")}).factor is None


boxes = strategies.builds(
    Box,
    kind=strategies.sampled_from(["open", "shut"]),
    width=strategies.integers(-(2**63), 2**63 - 1),
    weight=strategies.floats(0, exclude_min=True, allow_infinity=False),
    factor=strategies.none() | strategies.floats(1, exclude_min=True, allow_infinity=False),
    label=strategies.text(),
    sealed=strategies.booleans(),
    sides=strategies.lists(
        strategies.tuples(strategies.text(), strategies.lists(strategies.integers(0, 9)).map(tuple)), max_size=3
    ).map(tuple),
)


@given(boxes)
def test_settings_go_through_toml_unchanged(box: Box) -> None:
    assert Box.read(from_toml(to_toml({"box": box.table()}), "a text")["box"]) == box


@given(strategies.dictionaries(strategies.text(), strategies.text()))
def test_any_key_and_any_text_can_be_written(table: dict[str, str]) -> None:
    assert from_toml(to_toml({"family": table}), "a text") == {"family": table}


@pytest.mark.parametrize(
    "text", ["[outer", "a = " + "[" * 5000, "a = " + "9" * 5000], ids=["cut off", "nested too deep", "long number"]
)
def test_what_is_no_toml_says_where_it_is_from(text: str) -> None:
    with pytest.raises(SettingsError, match=r"recipe\.toml is not TOML: "):
        from_toml(text, "recipe.toml")


def test_the_nearest_key_is_found_with_and_without_its_part() -> None:
    known = ["rule.secants", "outer.seconds", "teleport.max_stretch"]
    assert nearest("secant", known) == "rule.secants"
    assert nearest("outer.secondes", known) == "outer.seconds"
    assert nearest("gauge.max_stretch", known) == "teleport.max_stretch"


def test_a_table_of_tables_is_flattened() -> None:
    assert flattened({"rule": {"kind": "lr", "hidden": 3}, "groups": ["GL"]}) == {
        "rule.kind": "lr",
        "rule.hidden": 3,
        "groups": ["GL"],
    }
