"""Files and folders are written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from metateleport.files import replacing, replacing_folder, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def full(path: Path) -> None:
    path.write_text("half")
    raise OSError("the disk is full")


def test_a_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first")
    write_text(path, "sécond")
    assert path.read_text(encoding="utf-8") == "sécond"
    assert names(path.parent) == ["a.txt"]


def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        interrupted(temporary)
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_the_temporary_file_stands_beside_with_the_same_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "plot.png") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        assert temporary.name.startswith(".")


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "")
        with replacing_folder(tmp_path / "b"):
            pass
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing_folder(path) as temporary:
        (temporary / "old.txt").write_text("")
    with replacing_folder(str(path)) as temporary:
        (temporary / "new.txt").write_text("")
        assert names(path) == ["old.txt"]
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["a"]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing_folder(path) as temporary:
        (temporary / "old.txt").write_text("")
    with pytest.raises(OSError, match="full"), replacing_folder(path) as temporary:
        full(temporary / "new.txt")
    assert names(path) == ["old.txt"]
    assert names(tmp_path) == ["a"]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    with replacing_folder(path) as temporary:
        (temporary / "old.txt").write_text("")
    # As where the system cannot exchange two folders at one moment.
    monkeypatch.setattr("metateleport.files._exchanged", lambda *_: False)
    own, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError("no")
        return own(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"), replacing_folder(path) as temporary:
        (temporary / "new.txt").write_text("")
    monkeypatch.undo()
    assert len(calls) == 3
    assert names(path) == ["old.txt"]
    assert names(tmp_path) == ["a"]
