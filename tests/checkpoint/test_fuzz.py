"""Mutated checkpoints: a clean load of what was meant, or a `CheckpointError` that names the field, within a second."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import CARD, edited
from safetensors.torch import load, save
from training_cases import tiny

from metateleport.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from metateleport.checkpoint.card import FREE
from metateleport.learned import MetaOptimizerConfig
from metateleport.training import train, train_meta_seeds

FORMATS = Path(__file__).parent / "formats"
WEIGHTS = "weights.safetensors"
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    9000,
    10**9,
    2**63,
    10**400,
    -1e308,
    1e308,
    5e-324,
    0.5,
    "",
    "none",
    "lr",
    "a" * 5000,
    "\u0000",
    "../../etc",
    [],
    [[]],
    [1, "x"],
    {},
    {"kind": "coordinate"},
    {"a": {"b": {"c": 1}}},
]

Places = list[tuple[Any, Any, str]]
Mutation = Callable[[random.Random, Path], str]


def places(value: Any, key: str = "") -> Places:
    """Every container in a card with one of its keys and that key's dotted name."""
    found: Places = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        inside = f"{key}.{name}" if key else str(name)
        found.append((value, name, inside))
        found += places(each, inside)
    return found


def mutate(draw: random.Random, card: dict[str, Any]) -> str:
    """Changes one place of a card; the name of its entry."""
    # The deeper places are many, those of the networks few: an entry first, then a place in it.
    entry = draw.choice(sorted(card))
    inside = [place for place in places(card) if place[2].partition(".")[0] == entry]
    holder, name, key = draw.choice(inside)
    kind = draw.randrange(6)
    if kind == 0:
        del holder[name]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{name}s"] = holder.pop(name)
        return key if holder is card else entry
    elif kind == 2 and isinstance(holder, dict):
        added = draw.choice(["own", "hidden", "kind", "lr"])
        holder[added] = draw.choice(VALUES)
        if holder is card:
            return added
    elif kind == 3 and isinstance(holder[name], (int, float)) and not isinstance(holder[name], bool):
        holder[name] = draw.choice([holder[name] + 1, -holder[name] - 1, holder[name] * 1e6, float(holder[name])])
    elif kind == 4:
        other, place, _ = draw.choice(inside)
        holder[name] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else other[place]))
    else:
        holder[name] = draw.choice(VALUES)
    return entry


def entries(draw: random.Random, path: Path) -> str:
    """A changed entry, with the digest of the card as it was."""
    card = json.loads((path / CARD).read_text())
    named = mutate(draw, card)
    (path / CARD).write_text(json.dumps(card))
    return named


def sealed_entries(draw: random.Random, path: Path) -> str:
    """A changed entry, with the digest of the card as it is then: a person or a program has meant it."""
    named = ""

    def edit(card: dict[str, Any]) -> None:
        nonlocal named
        own = {name: value for name, value in card.items() if name not in ("digest", "digests")}
        named = mutate(draw, own)
        card.clear()
        card.update(own)

    edited(path, edit)
    return named


def card_bytes(draw: random.Random, path: Path) -> str:
    (path / CARD).write_bytes(scrambled(draw, (path / CARD).read_bytes()))
    return ""


def weight_bytes(draw: random.Random, path: Path) -> str:
    (path / WEIGHTS).write_bytes(scrambled(draw, (path / WEIGHTS).read_bytes()))
    return "weights"


def sealed_weight_bytes(draw: random.Random, path: Path) -> str:
    """Other weights under their own hash: what loads is what the file has."""
    content = scrambled(draw, (path / WEIGHTS).read_bytes())
    (path / WEIGHTS).write_bytes(content)
    edited(path, lambda card: card.update(weights_sha256=hashlib.sha256(content).hexdigest()))
    return "weights"


def tensors(draw: random.Random, path: Path) -> str:
    """A changed tensor under its own hash."""
    own = load((path / WEIGHTS).read_bytes())
    name = draw.choice(sorted(own))
    value = own[name]
    kind = draw.randrange(7)
    if kind == 0:
        del own[name]
    elif kind == 1:
        own[f"{name}s"] = own.pop(name)
    elif kind == 2:
        own[draw.choice(["own", "learned.own", "step-only.own"])] = torch.zeros(draw.randrange(4))
    elif kind == 3:
        own[name] = value.to(draw.choice([torch.float64, torch.float16, torch.int32, torch.uint8, torch.bool]))
    elif kind == 4:
        own[name] = value.reshape(-1) if value.ndim > 1 else value[None]
    elif kind == 5:
        own[name] = torch.cat((value, value))
    else:
        own[name] = value.clone().fill_(draw.choice([float("nan"), float("inf"), -float("inf")]))
    content = save({key: each.contiguous() for key, each in own.items()})
    (path / WEIGHTS).write_bytes(content)
    edited(path, lambda card: card.update(weights_sha256=hashlib.sha256(content).hexdigest()))
    return "weights"


def files(draw: random.Random, path: Path) -> str:
    """Something else where a file was."""
    file = path / draw.choice([CARD, WEIGHTS])
    file.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(draw.choice(["/dev/zero", "/dev/stdin", "nowhere", file.name]))
    elif kind == 3:
        with file.open("wb") as written:
            written.truncate(1 << draw.randrange(43))
    elif kind == 4:
        file.write_bytes(b"")
    return file.stem


def scrambled(draw: random.Random, content: bytes) -> bytes:
    own = bytearray(content)
    kind, place = draw.randrange(5), draw.randrange(len(own))
    if kind == 0:
        own[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del own[place : place + draw.randrange(1, 40)]
    elif kind == 2:
        own[place:place] = draw.randbytes(draw.randrange(1, 20))
    elif kind == 3:
        del own[place:]
    else:
        other = draw.randrange(len(own))
        own[place : place + 20] = own[other : other + 20]
    return bytes(own)


MUTATIONS: list[Mutation] = [
    entries,
    sealed_entries,
    card_bytes,
    weight_bytes,
    sealed_weight_bytes,
    tensors,
    files,
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of every kind: of today, of several seeds, and of earlier versions."""
    folder = tmp_path_factory.mktemp("originals")
    gauged = train(tiny(gauge="linearised", stays=False), folder / "gauged")
    several = train_meta_seeds(tiny(mode="update+tele"), folder / "several", 2)
    alone = train(tiny(mode="tele"), folder / "alone")
    return [gauged, several, alone, FORMATS / "0.1.0-last", FORMATS / "schema-2"]


def hold(number: int, originals: list[Path], folder: Path) -> str:
    """One mutation: loaded as it was meant, or refused by name, in less than a second of this process."""
    draw = random.Random(number)
    original = draw.choice(originals)
    path = folder / "mutated"
    shutil.copytree(original, path)
    mutation = draw.choice(MUTATIONS if json.loads((path / CARD).read_text())["schema"] == 3 else OF_EARLIER)
    if original not in LOADED:
        LOADED[original] = load_checkpoint(original)
    named = mutation(draw, path)
    started = time.process_time()
    said = outcome(path)
    assert time.process_time() - started < 1
    if said is None:
        check(load_checkpoint(path), LOADED[original], path, mutation)
        return "loaded"
    assert str(path) in said
    assert len(said) < 2000
    # A card that is not JSON any more has no entries to name.
    assert named.replace("_", "-") in said.replace("_", "-") or "not JSON" in said, (named, said)
    return "refused"


def check(loaded: Checkpoint, meant: Checkpoint, path: Path, mutation: Mutation) -> None:
    """What has loaded is what was meant."""
    weights = load((path / WEIGHTS).read_bytes())
    for prefix, meta in (("learned.", loaded.learned), ("step-only.", loaded.step_only)):
        for name, value in meta.state_dict().items() if meta is not None else ():
            assert torch.equal(value, weights[prefix + name])
            assert value.isfinite().all()
    card = json.loads((path / CARD).read_text())
    if card["schema"] == 3:
        assert loaded.card == card
        assert MetaOptimizerConfig.read(card["meta_optimizer"]) == loaded.learned.config
    if mutation in (entries, card_bytes, weight_bytes, files):
        assert loaded.learned.config == meant.learned.config
        assert without(loaded.card, *FREE, "digest", "digests") == without(meant.card, *FREE, "digest", "digests")
        assert hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest() == meant.card["weights_sha256"]


def without(card: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in card.items() if name not in names}


LOADED: dict[Path, Checkpoint] = {}
OF_EARLIER: list[Mutation] = [weight_bytes, files]
"""Mutations of cards that have no digest; `test_earlier_cards` has the others."""


def run(numbers: range, originals: list[Path], folder: Path) -> dict[str, int]:
    ended = {"loaded": 0, "refused": 0}
    for number in numbers:
        own = folder / str(number)
        own.mkdir()
        try:
            ended[hold(number, originals, own)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error
        shutil.rmtree(own)
    return ended


def test_mutations_end_in_what_was_meant_or_are_named(originals: list[Path], tmp_path: Path) -> None:
    ended = run(range(400), originals, tmp_path)
    # A fuzz that never loads, or never fails, tests nothing.
    assert min(ended.values()) > 10, ended


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("thousand", range(10))
def test_ten_thousand_mutations(thousand: int, originals: list[Path], tmp_path: Path) -> None:
    ended = run(range(400 + 1000 * thousand, 1400 + 1000 * thousand), originals, tmp_path)
    assert min(ended.values()) > 10, ended


def test_earlier_cards(originals: list[Path], tmp_path: Path) -> None:
    """Without a digest a changed card may load, but never raises anything else, and never waits."""
    for number in range(150):
        draw = random.Random(number)
        path = tmp_path / str(number)
        shutil.copytree(draw.choice(originals[-2:]), path)
        if number % 3:
            entries(draw, path)
        else:
            card_bytes(draw, path)
        started = time.process_time()
        said = outcome(path)
        assert said is None or str(path) in said
        assert time.process_time() - started < 1


def outcome(path: Path) -> str | None:
    """What a `CheckpointError` says; None if the weights of the file have loaded."""
    try:
        loaded = load_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    weights = load((path / WEIGHTS).read_bytes())
    state = loaded.learned.state_dict()
    assert all(torch.equal(value, weights[f"learned.{name}"]) for name, value in state.items())
    return None
