"""Settings as tables: frozen dataclasses with checked values, read from and written to TOML and JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import reprlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "ABOVE_ONE",
    "AT_LEAST_ONE",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Range",
    "Settings",
    "SettingsError",
    "Text",
    "as_float",
    "flattened",
    "from_toml",
    "nearest",
    "setting",
    "shown",
    "to_toml",
]

Table = Mapping[str, Any]
Own = TypeVar("Own", bound="Settings")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


class SettingsError(ValueError):
    """A setting is unknown, of a wrong type or out of range, or does not go with another; the message has the keys."""


class Text(str):
    """A value as written on the command line; it is converted to the type of its setting."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a setting may have.

    Args:
        words: the values in words, to complete "it has to be ...".
        holds: tells whether a value is in the range.
    """

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_ONE = Range("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Range("a number that is not negative", lambda value: 0 <= value < math.inf)
POSITIVE = Range("a positive number", lambda value: 0 < value < math.inf)
ABOVE_ONE = Range("a number above 1", lambda value: 1 < value < math.inf)


def setting(default: Any = dataclasses.MISSING, within: Range | None = None, most: float | None = None) -> Any:
    """A field of `Settings`.

    Args:
        default: its default; without one the setting has to be given.
        within: the range of its values.
        most: their upper end, beyond which a value makes no sense, or asks for more memory than computers have.
    """
    return dataclasses.field(default=default, metadata={"range": within, "most": most})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one part, as a frozen dataclass. Each value is checked for the type and the range of its field.

    `part` is the part's name in a table of parts. Messages name a setting by part and name, as `outer.lr`. Types are
    `int`, `float`, `bool`, `str`, `Literal`, `tuple`, or one of these `| None`; None is written `"none"` in TOML.

    Raises:
        SettingsError: if a value is of another type or out of its range.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Box(Settings):
        ...     part: ClassVar[str] = "box"
        ...     width: int = setting(3, AT_LEAST_ONE)
        >>> Box(width=0)
        Traceback (most recent call last):
        metateleport.settings.SettingsError: box.width has to be at least 1, not 0
        >>> Box.read({"widht": 4})
        Traceback (most recent call last):
        metateleport.settings.SettingsError: there is no setting box.widht: the nearest is box.width
        >>> Box.read({"width": 4}).table()
        {'width': 4}
    """

    part: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            key, allowed = f"{self.part}.{field.name}", field.metadata.get("range")
            value = _typed(hints[field.name], getattr(self, field.name), key)
            if allowed is not None and value is not None and not allowed.holds(value):
                raise SettingsError(f"{key} has to be {allowed.words}, not {shown(value)}")
            most = field.metadata.get("most")
            if most is not None and value is not None and value > most:
                raise SettingsError(f"{key} has to be at most {most:g}, not {shown(value)}")
            object.__setattr__(self, field.name, value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def read(cls: type[Own], table: Table) -> Own:
        """The settings of a table; those that it leaves out have their defaults.

        Raises:
            SettingsError: if a key is unknown, a key without a default is missing, or a value is not allowed.
        """
        for name in table:
            if name not in cls.names():
                near = nearest(name, cls.names())
                raise SettingsError(f"there is no setting {cls.part}.{name}: the nearest is {cls.part}.{near}")
        for field in dataclasses.fields(cls):
            bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if bare and field.name not in table:
                raise SettingsError(f"{cls.part}.{field.name} is missing{_of_what(table, cls.part)}")
        return cls(**table)

    def table(self) -> dict[str, Any]:
        """All settings by name, as JSON has them."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def flattened(tables: Table) -> dict[str, Any]:
    """The values of a table of tables by their dotted keys.

    Example:
        >>> flattened({"rule": {"kind": "lr"}, "groups": []})
        {'rule.kind': 'lr', 'groups': []}
    """
    found: dict[str, Any] = {}
    for part, value in tables.items():
        found.update(
            {f"{part}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else {part: value}
        )
    return found


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key that is spelled most like another, with or without its part.

    Example:
        >>> nearest("secant", ["rule.secants", "outer.seconds"])
        'rule.secants'
    """

    def likeness(candidate: str) -> float:
        pairs = ((key, candidate), (key.rpartition(".")[2], candidate.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(known, key=likeness)


def from_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Args:
        text: in TOML 1.0.
        where: where the text is from, for the error message.

    Raises:
        SettingsError: if it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # The reader's own error is a ValueError; integers of thousands of digits raise a plain one.
        raise SettingsError(f"{where} is not TOML: {error}") from error


def as_float(whole: int) -> float:
    """A whole number as a float; infinite where it is beyond all of them.

    Example:
        >>> as_float(3), as_float(-(10**400))
        (3.0, -inf)
    """
    try:
        return float(whole)
    except OverflowError:
        return math.inf if whole > 0 else -math.inf


def shown(value: Any) -> str:
    """A value as messages show it: cut short where it is long.

    Example:
        >>> shown("a" * 1000)
        "'aaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    return _SHORT.repr(value)


def to_toml(tables: Table) -> str:
    """Tables of plain values as TOML; None is written `"none"`.

    Example:
        >>> print(to_toml({"outer": {"lr": 0.001, "seconds": None}}), end="")
        [outer]
        lr = 0.001
        seconds = "none"
    """
    written = []
    for part, table in tables.items():
        lines = [f"{_toml_key(name)} = {_toml_value(value)}\n" for name, value in table.items()]
        written.append(f"[{_toml_key(part)}]\n" + "".join(lines))
    return "\n".join(written)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python itself writes no number of thousands of digits.
        return repr(x) if abs(x) < 10**30 else "a number of more than 30 digits"


_SHORT = _Short()
_HINTS: dict[type[Settings], dict[str, Any]] = {}


def _hints(kind: type[Settings]) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def _typed(wanted: Any, value: Any, key: str) -> Any:
    """A value in the wanted type. An integer may stand for a float; only `Text` is converted from a string."""
    if get_origin(wanted) in (Union, types.UnionType):
        (own,) = (each for each in get_args(wanted) if each is not type(None))
        left_out = value is None or (isinstance(value, str) and value.lower() == "none")
        return None if left_out else _typed(own, value, key)
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            raise SettingsError(f"{key} is one of {', '.join(map(str, get_args(wanted)))}; not {shown(value)}")
        return str(value)
    if get_origin(wanted) is tuple and isinstance(value, (list, tuple)):
        inner = get_args(wanted)
        if inner[-1] is not Ellipsis and len(inner) != len(value):
            raise SettingsError(f"{key} takes {len(inner)} values together, not {shown(value)}")
        each = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_typed(kind, part, key) for kind, part in zip(each, value, strict=True))
    found = _read(wanted, value) if isinstance(value, Text) else value
    if wanted is float and isinstance(found, int) and not isinstance(found, bool):
        found = as_float(found)
    plain = get_origin(wanted) or wanted
    if not isinstance(found, plain) or (plain is int and isinstance(found, bool)):
        raise SettingsError(f"{key} takes {_WORDS.get(plain, plain.__name__)}, not {shown(value)}")
    return str(found) if plain is str else found


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a list",
}


def _read(wanted: Any, text: Text) -> Any:
    if wanted is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return wanted(text) if wanted in (int, float) else text
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return dict(value) if isinstance(value, Mapping) else value


def _of_what(table: Table, part: str) -> str:
    given = ", ".join(f"{part}.{name}" for name in table)
    return f", and {given} cannot stand without it" if given else ""


def _toml_key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    return repr(value)
