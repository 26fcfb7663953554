"""The registry of update rules: one of one's own is a file, and a checkpoint of it says what to import."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from learned_cases import shape_of

from metateleport.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from metateleport.learned import MODES, MetaOptimizer, MetaOptimizerConfig, StepSettings
from metateleport.learned.rules import RuleSettings, UpdateRule, known_rules, read_rule, register
from metateleport.learned.rules import registry as module
from metateleport.learned.rules.base import BaseRule
from metateleport.settings import SettingsError

SHAPES = (("0.weight", (2, 2)),)


def test_a_rule_of_one_s_own_is_built_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RULES", known_rules())

    @register
    @dataclasses.dataclass(frozen=True)
    class OwnSettings(RuleSettings):
        kind: ClassVar[str] = "own"
        speed: float = 2.0

        def rule(self) -> UpdateRule:
            return BaseRule("momentum", self.speed)

    config = MetaOptimizerConfig(OwnSettings(speed=3.0))
    path = save_checkpoint(tmp_path / "a", MetaOptimizer(config), None, {})
    assert load_checkpoint(path).learned.config == config
    assert load_checkpoint(path).learned.rule == BaseRule("momentum", 3.0)
    assert read_rule({"kind": "own"}) == OwnSettings()
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"rule\.kind = 'own' is known: known are lr, .*Import the file of your own rule first"
    ):
        load_checkpoint(path)


def test_a_kind_belongs_to_one_rule() -> None:
    @dataclasses.dataclass(frozen=True)
    class Taken(StepSettings):
        kind: ClassVar[str] = "lr"

    @dataclasses.dataclass(frozen=True)
    class Nameless(StepSettings):
        kind: ClassVar[str] = ""

    for settings in (Taken, Nameless):
        with pytest.raises(ValueError, match="taken or empty"):
            register(settings)
    assert known_rules()["lr"] is StepSettings
    assert "" not in known_rules()


@pytest.mark.slow(seconds=4)
def test_a_checkpoint_of_the_source_s_networks_names_what_to_import(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "flat", MetaOptimizer(shape_of(hidden=4, shapes=SHAPES)), None, {})
    assert json.loads((path / "card.json").read_text())["meta_optimizer"]["rule"]["kind"] == "flat"
    code = "import sys, metateleport as mt; mt.load_checkpoint(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "known are lr, coordinate, tensor, adaptive, static, gauged, base." in done.stderr
    assert "import metateleport.papers" in done.stderr
    subprocess.run([sys.executable, "-c", f"import metateleport.papers; {code}", str(path)], check=True)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_what_rules_learn(mode: str) -> None:
    assert shape_of(mode=mode).mode == mode


def test_a_shape_is_read_from_its_table() -> None:
    shapes = [shape_of(mode=mode) for mode in MODES]
    shapes += [shape_of(gauge="linearised", stays=False, groups=("GL",)), shape_of(shapes=SHAPES, mode="update+tele")]
    for shape in shapes:
        assert MetaOptimizerConfig.read(json.loads(json.dumps(shape.table()))) == shape
    for wrong in ({}, {"groups": "GL"}, {"groups": [3]}):
        with pytest.raises(SettingsError, match="groups is a list"):
            MetaOptimizerConfig.read({**shapes[0].table(), "groups": None, **wrong})
    with pytest.raises(SettingsError, match="has no 'mode'"):
        MetaOptimizerConfig.read({**shapes[0].table(), "mode": "lr"})
