"""Cards and weights: every field checked, changes named, earlier formats read, files that are none refused at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import CARD, edited
from learned_cases import shape_of
from safetensors.torch import load, save
from torch import Tensor
from training_cases import tiny

from metateleport import cli
from metateleport.checkpoint import (
    SCHEMA,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    seal,
    shipped_checkpoints,
    update_card,
)
from metateleport.learned import MetaOptimizer
from metateleport.training import train

FORMATS = Path(__file__).parent / "formats"
WEIGHTS = "weights.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(), tmp_path_factory.mktemp("made") / "mine")


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "mine")
    return tmp_path / "mine"


def card_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / CARD).read_text())
    return found


def put(card: dict[str, Any], key: str, value: Any) -> None:
    *folders, last = key.split(".")
    for folder in folders:
        card = card[folder]
    card[last] = value


# A dotted key, a value that JSON has, and what the message says of it.
FIELDS: list[tuple[str, Any, str]] = [
    ("meta_optimizer.rule.hidden", 9000, r"rule\.hidden has to be at most 2048, not 9000"),
    ("meta_optimizer.rule.hidden", 10**9, r"rule\.hidden has to be at most 2048"),
    ("meta_optimizer.rule.hidden", 4, r"meta_optimizer\.rule\.hidden is 4, and training\.recipe\.rule\.hidden is 3"),
    ("meta_optimizer.rule.secants", 10**9, r"rule\.secants has to be at most 1000"),
    ("meta_optimizer.rule.cooling", -1e308, r"rule\.cooling has to be a number that is not negative"),
    ("meta_optimizer.rule", {"kind": "base", "lr": -1e308}, r"rule\.lr has to be a positive number"),
    ("meta_optimizer.rule", {"kind": "base", "lr": 1e308}, r"rule\.lr has to be at most 1e\+06"),
    ("meta_optimizer.teleport.hidden", 10**6, r"teleport\.hidden has to be at most 2048"),
    ("meta_optimizer.groups", ["GL", "GL"], "groups cannot have 'GL'"),
    ("meta_optimizer.groups", ["a.b"], "groups cannot have"),
    ("meta_optimizer.groups", [""], "groups cannot have"),
    ("meta_optimizer.groups", ["keys"], "groups cannot have 'keys'"),
    ("meta_optimizer.own", 1, r"meta_optimizer\.own is not known"),
    ("step_only.rule.hidden", 9000, r"step_only.*rule\.hidden has to be at most"),
    ("mode", "lr", r"mode is 'lr', and meta_optimizer is of mode 'lr\+tele'"),
    ("mode", "fast", "mode is one of update, lr"),
    ("weights_sha256", "0", "weights_sha256 is '0'"),
    ("versions", {"torch": 2}, r"versions\.torch is a text"),
    ("name", 3, "name is a text"),
    ("family.name", "digits", r"family\.name is 'digits', and training\.recipe\.family\.name is 'leaky_mlp'"),
    ("family.settings.width", 5, r"family\.settings\.width is 5, and training\.recipe\.family\.width is 3"),
    ("training.recipe.outer.seed", -1, r"training\.recipe\.outer\.seed is a whole number from 0"),
    ("training.recipe.outer.lr", "fast", r"training\.recipe\.outer\.lr is a finite number, not 'fast'"),
    ("training.recipe.outer.depth", 10**400, r"training\.recipe\.outer\.depth is a finite number"),
    ("training.recipe.own", {}, r"training\.recipe\.own is not known"),
    ("training.recipe.validation.tasks", 0, r"training\.recipe\.validation\.tasks is a whole number from 1"),
    ("training.runs.learned.validation", None, r"training\.runs\.learned\.validation is a finite number, not None"),
    ("training.runs.learned.validations", [[1, 2, 3]], r"validations\[0\] is a list of exactly 2"),
    ("training.runs.learned.seconds", -1, r"training\.runs\.learned\.seconds is a number from 0"),
    ("training.runs.learned.openness", 2, r"training\.runs\.learned\.openness is a number from 0 to 1"),
    ("training.runs.other", {}, r"training\.runs\.other is not known"),
    ("training.tracking_run", 3, r"training\.tracking_run is a text"),
    ("results", {"a": {"tasks": 0}}, r"results\.a\.tasks is a whole number from 1"),
    ("results", {"a": {"dtype": "float8"}}, r"results\.a\.dtype is one of"),
    ("results", {"a": {"methods": {"adam": [10**400]}}}, r"results\.a\.methods\.adam\[0\] is a finite number"),
    ("limits", "none", "limits is a list"),
    ("notes", [3], r"notes\[0\] is a text"),
    ("meta_seeds", [{"seed": 0, "validation": 1.0, "chosen": False}], "exactly one that is chosen"),
    ("meta_seeds", [{"seed": 7, "validation": 1.0, "chosen": True}], "meta_seeds says that seed 7 is chosen"),
    ("meta_seeds", [{"seed": "../../x", "validation": 1.0, "chosen": True}], r"meta_seeds\[0\]\.seed is a whole"),
    ("made_for", {"minibatches": 1}, r"made_for\.minibatches is true or false"),
    ("rewritten", {"from_schema": 0}, r"rewritten\.from_schema is a whole number from 1"),
]


@pytest.mark.parametrize(("key", "value", "said"), FIELDS, ids=str)
def test_a_field_out_of_its_schema_is_named_though_the_digest_is_right(
    key: str, value: Any, said: str, checkpoint: Path
) -> None:
    edited(checkpoint, lambda card: put(card, key, value))
    with pytest.raises(CheckpointError, match=f"the card of {checkpoint} is damaged.*{said}"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("entry", sorted({key.partition(".")[0] for key, _, _ in FIELDS} - {"limits", "notes"}))
def test_an_entry_that_was_changed_added_or_removed_is_named(entry: str, checkpoint: Path) -> None:
    card = card_of(checkpoint)
    if entry in card:
        (checkpoint / CARD).write_text(json.dumps({name: each for name, each in card.items() if name != entry}))
        with pytest.raises(CheckpointError, match=f"{entry} (was removed since|is missing)"):
            load_checkpoint(checkpoint)
    else:
        edited(checkpoint, lambda card: card.update({entry: [] if entry == "meta_seeds" else {}}))
        digests = {name: card_of(checkpoint)[name] for name in ("digest", "digests")}
        (checkpoint / CARD).write_text(json.dumps({**card, entry: [] if entry == "meta_seeds" else {}}))
        with pytest.raises(CheckpointError, match=f"{entry} was added since"):
            load_checkpoint(checkpoint)
        (checkpoint / CARD).write_text(json.dumps({**card, **digests}))
        with pytest.raises(CheckpointError, match=f"{entry} was removed since"):
            load_checkpoint(checkpoint)


def test_a_value_that_is_allowed_but_not_the_one_written_is_named(checkpoint: Path) -> None:
    card = card_of(checkpoint)
    card["training"]["recipe"]["outer"]["lr"] *= 2
    (checkpoint / CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="training was changed since the card was written"):
        load_checkpoint(checkpoint)
    for name in ("digest", "digests"):
        card = card_of(checkpoint)
        del card[name]
        (checkpoint / CARD).write_text(json.dumps(card))
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            load_checkpoint(checkpoint)
        edited(checkpoint, lambda _: None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 3, "schema": 3}', "'schema' is there twice"),
        ('{"schema": 3, "mode": NaN}', "a number is NaN"),
        ('{"schema": 3, "mode": -Infinity}', "a number is -Infinity"),
        ('{"schema": 3} x', "truncated or not JSON"),
        ('{"schema": 3' + " " * (17 << 20) + "}", "at most 16777216 are read"),
    ],
)
def test_what_json_lets_pass_is_refused(text: str, said: str, checkpoint: Path) -> None:
    (checkpoint / CARD).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(checkpoint)


def test_limits_and_notes_are_a_person_s_to_edit(checkpoint: Path) -> None:
    card = card_of(checkpoint)
    (checkpoint / CARD).write_text(json.dumps({**card, "limits": ["Not for RNNs."], "notes": ["Trained at night."]}))
    loaded = load_checkpoint(checkpoint).card
    assert (loaded["limits"], loaded["notes"]) == (["Not for RNNs."], ["Trained at night."])
    update_card(checkpoint, {"notes": []})
    assert load_checkpoint(checkpoint).card["limits"] == ["Not for RNNs."]


def test_other_entries_are_edited_and_sealed_by_a_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (checkpoint / WEIGHTS).read_bytes()
    card = {**card_of(checkpoint), "made_for": {"minibatches": False}}
    (checkpoint / CARD).write_text(json.dumps(card))
    assert cli.main(["seal", str(checkpoint)]) == 2
    assert "made_for was added" in capsys.readouterr().err
    assert cli.main(["seal", "--edited", str(checkpoint)]) == 0
    assert f"wrote the card of {checkpoint}" in "".join(capsys.readouterr().err.split("\n"))
    assert load_checkpoint(checkpoint).card["made_for"] == {"minibatches": False}
    assert cli.main(["seal", str(checkpoint)]) == 0
    assert "is as it should be" in capsys.readouterr().err
    (checkpoint / CARD).write_text(json.dumps({**card, "mode": "tele"}))
    assert cli.main(["seal", "--edited", str(checkpoint)]) == 2
    assert "mode is 'tele'" in capsys.readouterr().err
    assert (checkpoint / WEIGHTS).read_bytes() == before


def tampered(checkpoint: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Weights that were changed together with their hash and the card's digest."""
    tensors = load((checkpoint / WEIGHTS).read_bytes())
    change(tensors)
    content = save({name: value.contiguous() for name, value in tensors.items()})
    (checkpoint / WEIGHTS).write_bytes(content)
    edited(checkpoint, lambda card: card.update(weights_sha256=hashlib.sha256(content).hexdigest()))


NAME = "learned.rule.cell.weight_hh"
CHANGES: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda own: own[NAME].fill_(float("nan")), rf"{NAME} has numbers that are not finite"),
    (lambda own: own[NAME][0].fill_(float("inf")), rf"{NAME} has numbers that are not finite"),
    (lambda own: own.update({NAME: own[NAME].long()}), rf"{NAME} is of torch\.int64, and the card asks for torch\.fl"),
    (lambda own: own.update({NAME: own[NAME].double()}), rf"{NAME} is of torch\.float64"),
    (lambda own: own.update({NAME: own[NAME].bfloat16()}), rf"{NAME} is of torch\.bfloat16"),
    (lambda own: own.update({NAME: own[NAME].bool()}), rf"{NAME} is of torch\.bool"),
    (lambda own: own.update({NAME: own[NAME].reshape(-1)}), rf"of {NAME} there is \(36,\), and the card asks for"),
    (lambda own: own.update({NAME: own[NAME].reshape(1, 12, 3)}), rf"of {NAME} there is \(1, 12, 3\)"),
    (lambda own: own.pop(NAME), rf"of {NAME} there is nothing"),
    (lambda own: own.clear(), "there is nothing"),
    (lambda own: own.update(own=torch.zeros(2)), r"of own there is \(2,\), and the card asks for nothing"),
    (lambda own: own.update({"learned.own": torch.zeros(2)}), r"of learned\.own there is \(2,\)"),
    (lambda own: own.update(own=torch.zeros(10**6)), "at most"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_weights_that_the_card_does_not_build_are_named_though_their_hash_is_right(
    number: int, checkpoint: Path
) -> None:
    change, said = CHANGES[number]
    tampered(checkpoint, change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(checkpoint)


def test_such_weights_are_not_saved(tmp_path: Path) -> None:
    meta = MetaOptimizer(shape_of(mode="lr", hidden=3))
    with pytest.raises(CheckpointError, match=r"learned\.rule.* is of torch\.float64, and the card asks for"):
        save_checkpoint(tmp_path / "a", meta.double(), None, {})
    with torch.no_grad():
        next(meta.float().parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(tmp_path / "a", meta, None, {})
    with pytest.raises(CheckpointError, match=r"cannot be written into .*a: own is not known"):
        save_checkpoint(tmp_path / "a", MetaOptimizer(shape_of(mode="lr", hidden=3)), None, {"own": 3})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_what_is_no_regular_file_is_refused_at_once(name: str, checkpoint: Path, tmp_path: Path) -> None:
    file, kept = checkpoint / name, tmp_path / "kept"
    file.rename(kept)

    def pipe() -> None:
        os.mkfifo(file)

    def loop() -> None:
        file.symlink_to(file)

    def sparse() -> None:
        with file.open("wb") as written:
            written.truncate(1 << 40)

    cases: list[tuple[Callable[[], Any], str]] = [
        (pipe, "not a regular file"),
        (file.mkdir, "not a regular file|cannot be opened"),
        (lambda: file.symlink_to("/dev/zero"), "not a regular file"),
        (lambda: file.symlink_to(tmp_path / "gone"), "has no"),
        (loop, "cannot be (opened|read)|no readable"),
        (sparse, "at most .* are read"),
    ]
    for make, said in cases:
        make()
        started = time.perf_counter()
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(checkpoint)
        assert time.perf_counter() - started < 1
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    # A link to a regular file is as good as the file.
    file.symlink_to(kept)
    load_checkpoint(checkpoint)


def test_no_more_memory_is_asked_for_than_the_weights_have(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metateleport.checkpoint.weights._MOST", 1000)
    with pytest.raises(CheckpointError, match=r"meta_optimizer asks for .* GiB of weights"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["0.1.0-last", "schema-2"])
def test_a_format_of_an_earlier_version_is_read_and_sealed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "old"
    shutil.copytree(FORMATS / name, path)
    loaded = load_checkpoint(path)
    weights = load((path / WEIGHTS).read_bytes())
    assert {f"learned.{key}": each.tolist() for key, each in loaded.learned.state_dict().items()} == {
        key: each.tolist() for key, each in weights.items() if key.startswith("learned.")
    }
    assert loaded.card["training"]["recipe"]["family"]["width"] == 3
    assert loaded.card["rewritten"]["from_schema"] == card_of(path)["schema"] == (2 if name == "schema-2" else 1)
    assert seal(path) == [path]
    assert card_of(path)["schema"] == SCHEMA
    assert load_checkpoint(path).learned.config == loaded.learned.config
    assert (path / WEIGHTS).read_bytes() == (FORMATS / name / WEIGHTS).read_bytes()


def test_networks_that_are_no_longer_built_are_refused_with_the_version_that_has_them() -> None:
    with pytest.raises(CheckpointError, match=r"\(12, 9\), and the card asks for \(12, 12\).*metateleport 0\.1\.0"):
        load_checkpoint(FORMATS / "0.1.0-first")


def test_a_setting_that_was_removed_from_an_earlier_card_is_named(tmp_path: Path) -> None:
    """Without a digest the recipe beside the networks tells."""
    path = tmp_path / "old"
    shutil.copytree(FORMATS / "schema-2", path)
    card = card_of(path)
    del card["meta_optimizer"]["rule"]["hidden"]
    (path / CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"rule\.hidden is 32, and training\.recipe\.rule\.hidden is 3"):
        load_checkpoint(path)


def folders() -> Iterator[Path]:
    for path in shipped_checkpoints().values():
        yield path
        yield from sorted(each.parent for each in path.glob(f"meta_seeds/*/{CARD}"))


@pytest.mark.parametrize("path", list(folders()), ids=lambda path: "-".join(path.parts[-3:]))
def test_the_shipped_cards_are_under_a_digest(path: Path) -> None:
    assert card_of(path)["schema"] == SCHEMA
    load_checkpoint(path)
