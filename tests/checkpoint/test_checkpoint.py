"""Checkpoints: a round trip, every error by name, whole or not at all, and no code run."""

from __future__ import annotations

import builtins
import hashlib
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import CARD, edited
from learned_cases import shape_of
from symmetry_cases import assert_close, case
from torch import Tensor, nn

import metateleport as mt
from metateleport.checkpoint import (
    SCHEMA,
    CheckpointError,
    load_checkpoint,
    meta_optimizer_of,
    save_checkpoint,
    shipped_checkpoints,
    update_card,
)
from metateleport.learned import MODES, MetaOptimizer
from metateleport.training import StackOptimizer

WEIGHTS = "weights.safetensors"


def meta_optimizer(mode: str = "lr+tele", **settings: Any) -> MetaOptimizer:
    torch.manual_seed(3)
    return MetaOptimizer(shape_of(mode=mode, hidden=5, **settings))


def saved(path: Path, mode: str = "lr+tele", **settings: Any) -> Path:
    learned = meta_optimizer(mode, **settings)
    twin = None
    if "+tele" in mode:
        twin = MetaOptimizer(learned.config.without_teleport())
    return save_checkpoint(path, learned, twin, {"name": path.name})


def steps(meta: MetaOptimizer) -> dict[str, Tensor]:
    model, batch = case("linear pair").stack(2)
    optimizer = StackOptimizer(model, meta)
    for _ in range(4):
        optimizer.step(lambda: model(batch, probe=True))
    return {name: value.detach() for name, value in model.tensors().items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_round_trip_takes_the_same_steps(mode: str, tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path / "a", mode, base="adam", base_lr=0.02))
    assert loaded.learned.config == meta_optimizer(mode, base="adam", base_lr=0.02).config
    assert loaded.mode == mode
    assert loaded.name == "a"
    assert (loaded.step_only is not None) == ("+tele" in mode)
    assert_close(steps(loaded.learned), steps(meta_optimizer(mode, base="adam", base_lr=0.02)), 0.0)


def test_flat_networks_travel_too(tmp_path: Path) -> None:
    shapes = tuple((name, tuple(value.shape[1:])) for name, value in case("linear pair").stack(1)[0].tensors().items())
    path = saved(tmp_path / "a", shapes=shapes)
    assert_close(steps(load_checkpoint(path).learned), steps(meta_optimizer(shapes=shapes)), 0.0)
    with pytest.raises(CheckpointError, match=r"rule\.kind = 'flat', serves only"):
        mt.load(path)


def test_what_the_card_says(tmp_path: Path) -> None:
    card = load_checkpoint(saved(tmp_path / "a")).card
    assert card["schema"] == SCHEMA
    assert card["versions"]["metateleport"] == mt.__version__
    assert card["versions"]["torch"] == torch.__version__
    results = {"a task": {"tasks": 3, "methods": {}}}
    update_card(tmp_path / "a", {"results": results})
    again = load_checkpoint(tmp_path / "a").card
    assert {**again, "digest": 0, "digests": 0} == {**card, "results": results, "digest": 0, "digests": 0}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def recard(path: Path, **changes: Any) -> None:
    edited(path, lambda card: card.update(changes))


def card_shape(path: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((path / CARD).read_text())["meta_optimizer"], **changes}


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: (path / CARD).unlink(), r"has no card\.json"),
    (lambda path: truncate(path / CARD), "truncated or not JSON"),
    (lambda path: (path / CARD).write_text("[1]"), "schema None"),
    (lambda path: (path / CARD).write_bytes(b"\xff\xfe\x00"), "truncated or not JSON"),
    (lambda path: (path / CARD).write_text("[" * 100_000), "truncated or not JSON"),
    (lambda path: (path / WEIGHTS).unlink(), r"no readable weights\.safetensors"),
    (lambda path: truncate(path / WEIGHTS), "truncated or changed"),
    (lambda path: flip(path / WEIGHTS), "truncated or changed"),
    (lambda path: (path / WEIGHTS).write_bytes(b""), "truncated or changed"),
    (lambda path: recard(path, schema=SCHEMA + 1), f"schema {SCHEMA + 1}.*reads 1 to {SCHEMA}.*{mt.__version__}"),
    (lambda path: recard(path, schema=0, versions=[]), "schema 0.*unknown"),
    (lambda path: recard(path, schema=True), "schema True"),
    (lambda path: recard(path, schema=2), "schema is 2, and cards of that schema have no digest"),
    (lambda path: recard(path, weights_sha256=None), "weights_sha256 is a text, not None"),
    (lambda path: recard(path, weights_sha256="0" * 64), "truncated or changed.*weights_sha256"),
    (lambda path: recard(path, own=3), "own is not known: the nearest is"),
    (lambda path: recard(path, meta_optimizer=card_shape(path, rule={"kind": "own"})), "rule.kind = 'own' is known"),
    (lambda path: recard(path, meta_optimizer=card_shape(path, depth=3)), "depth"),
    (lambda path: recard(path, meta_optimizer=None), "meta_optimizer is a table, not None"),
    (lambda path: recard(path, meta_optimizer=card_shape(path, rule={"kind": "lr", "hidden": 6})), "do not fit"),
    (lambda path: recard(path, meta_optimizer=card_shape(path, teleport={"hidden": "many"})), "takes a whole number"),
    (lambda path: recard(path, meta_optimizer=card_shape(path, teleport={"hidden": -1})), "has to be at least 1"),
    (lambda path: recard(path, step_only=card_shape(path, rule={"kind": "coordinate"})), "do not fit"),
    (
        lambda path: recard(path, meta_optimizer=card_shape(path, rule={"kind": "lr", "hidden": 10**9})),
        "at most 2048, not 1000000000",
    ),
    (
        lambda path: recard(path, meta_optimizer=card_shape(path, rule={"kind": "lr", "longest": 10**400})),
        "is a finite",
    ),
    (
        lambda path: recard(path, meta_seeds=[{"seed": 0, "validation": 10**400, "chosen": True}]),
        r"meta_seeds\[0\]\.validation",
    ),
    (lambda path: recard(path, made_for=None), "made_for"),
    (lambda path: recard(path, made_for={"groups": "GL"}), "made_for"),
    (lambda path: recard(path, step_only=[1]), "step_only is a table"),
    (lambda path: edited(path, lambda card: card.pop("meta_optimizer")), "meta_optimizer is missing"),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_damage_is_named(number: int, tmp_path: Path) -> None:
    damage, words = DAMAGES[number]
    path = saved(tmp_path / "a")
    load_checkpoint(path)
    damage(path)
    for use in (load_checkpoint, mt.load, meta_optimizer_of):
        with pytest.raises(CheckpointError, match=words) as caught:
            use(path)
        assert str(path) in str(caught.value)


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    content = b"not tensors at all"
    (path / WEIGHTS).write_bytes(content)
    recard(path, weights_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints" / "known")
    with pytest.raises(CheckpointError, match=r"no checkpoint 'nowhere'.*known"):
        mt.load("nowhere")
    (tmp_path / "file.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"a checkpoint is a folder.*is a file"):
        mt.load(tmp_path / "file.safetensors")


def test_modes_that_cannot_serve(tmp_path: Path) -> None:
    for mode in ("lr", "update"):
        path = saved(tmp_path / mode, mode)
        with pytest.raises(CheckpointError, match=f"{mode} is of mode '{mode}'.*LearnedOptimizer"):
            mt.load(path)
    path = saved(tmp_path / "only", "tele")
    assert mt.load(path).name == "learned"
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.raises(CheckpointError, match=r"only is of mode 'tele'.*TeleportingOptimizer"):
        mt.LearnedOptimizer(model, path)


def test_bare_names_resolve_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "shelf" / "mine", "lr")
    saved(tmp_path / "checkpoints" / "here", "lr")
    saved(tmp_path / "checkpoints" / "mine", "update")
    monkeypatch.setenv("METATELEPORT_CHECKPOINTS", str(tmp_path / "shelf"))
    assert load_checkpoint("here").mode == "lr"
    # The named shelf comes first.
    assert load_checkpoint("mine").mode == "lr"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_checkpoint("mine").path == tmp_path / "shelf" / "mine"
    assert "here" not in shipped_checkpoints()
    monkeypatch.setenv("METATELEPORT_CHECKPOINTS", str(tmp_path / "gone"))
    assert "mine" not in shipped_checkpoints()


def test_a_folder_of_a_known_name_that_is_no_checkpoint_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "shelf" / "mine", "lr")
    monkeypatch.setenv("METATELEPORT_CHECKPOINTS", str(tmp_path / "shelf"))
    (tmp_path / "mine").mkdir()
    assert load_checkpoint("mine").path == tmp_path / "shelf" / "mine"


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a", "lr")
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    own = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        own(self, content[: len(content) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", full)
    for target in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(OSError, match="full"):
            saved(target, "update")
    monkeypatch.undo()
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "a", meta_optimizer("update"), None, {"results": object()})
    with pytest.raises(TypeError):
        update_card(path, {"results": object()})
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a")
    (path / "evil.py").write_text("raise SystemExit")
    (path / "__init__.py").write_text("raise SystemExit")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("code was run")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    mt.load(path)


def test_loading_leaves_random_numbers_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    load_checkpoint(path)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (8, 16, 8), (3, 5, 7, 2), (16, 16, 16, 16)])
@pytest.mark.parametrize("mode", ["lr+tele", "update+tele"])
def test_a_checkpoint_serves_every_width_and_depth(mode: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    path = saved(tmp_path / "a", mode)
    layers: list[nn.Module] = []
    for incoming, outgoing in itertools.pairwise(sizes):
        layers += [nn.Linear(incoming, outgoing), nn.LeakyReLU(0.1)]
    model = nn.Sequential(*layers[:-1])
    x, y = torch.randn(20, sizes[0]), torch.randn(20, sizes[-1])
    optimizer = mt.LearnedOptimizer(model, path)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    first = float(optimizer.step(closure))
    for _ in range(10):
        last = float(optimizer.step(closure))
    assert last < first
    report = mt.teleport(model, mt.load(path), x, loss=lambda outputs: (outputs - y).square().mean())
    assert report.size > 0


def test_the_address_of_a_service_is_told_from_a_name() -> None:
    with pytest.raises(CheckpointError, match=r"metateleport\.connect\('http://127\.0\.0\.1:8000'\)"):
        load_checkpoint("http://127.0.0.1:8000")


@pytest.mark.parametrize("name", ["default", "lora", "digits"])
def test_torch_s_default_dtype_does_not_matter(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load_checkpoint(name)
        model = nn.Linear(3, 2)
        optimizer = mt.LearnedOptimizer(model, name, symmetries=[])
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in loaded.learned.parameters()} == {torch.float32}
