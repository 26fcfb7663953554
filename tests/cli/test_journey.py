"""The command line teaches: the way through it, examples in every help, completion in a shell."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from metateleport import cli
from metateleport.cli.commands import _parser
from metateleport.cli.completion import commands_of, script_of
from metateleport.cli.journey import journey

COMMANDS = commands_of(_parser())


def test_alone_it_shows_the_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    named = re.findall(r"^  metateleport (\w+)", shown.out, re.MULTILINE)
    assert {"demo", "symmetries", "train", "evaluate", "ui"} <= set(named) <= set(COMMANDS)
    monkeypatch.setattr("sys.argv", ["metateleport"])
    assert cli.main() == 0
    assert capsys.readouterr().out == shown.out


def test_every_command_of_the_way_can_be_given_as_it_stands() -> None:
    for line in journey(COMMANDS).splitlines():
        if line.startswith("  metateleport "):
            words = shlex.split(re.split(r"  +", line.strip())[0])
            _parser().parse_args(words[1:])


def test_the_way_has_only_commands_that_there_are() -> None:
    assert "metateleport serve" in journey([*COMMANDS, "serve"])
    assert "metateleport train" not in journey(["ui"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_can_be_given(name: str) -> None:
    """Each is parsed by the very parser; files that they name need not be there."""
    text = COMMANDS[name].format_help()
    assert "examples:\n" in text, f"metateleport {name} --help has no examples"
    given = [line for line in text.split("examples:\n")[1].splitlines() if "metateleport " in line]
    own = [line for line in given if f"metateleport {name}" in line]
    assert own
    for line in own:
        # Behind the command stands what it does, behind two spaces or more.
        command = re.split(r"   *|[|>]", line.strip())[0]
        words = shlex.split(command.partition("metateleport ")[2])
        _parser().parse_args(words)


def completed(*words: str) -> set[str]:
    """What bash offers for the last of some words."""
    script = script_of(_parser(), "bash", ["digits", "leaky_mlp"], ["digits", "quadratic"])
    given = " ".join(shlex.quote(word) for word in ("metateleport", *words))
    code = f'{script}\nCOMP_WORDS=({given}); COMP_CWORD={len(words)}; _metateleport; echo "${{COMPREPLY[@]}}"'
    return set(subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_names() -> None:
    assert completed("tr") == {"train"}
    assert completed("train", "--re") == {"--recipe", "--resume"}
    assert completed("train", "--recipe", "") == {"digits", "leaky_mlp"}
    assert completed("train", "qua") == {"quadratic"}
    assert completed("evaluate", "leaky_mlp", "q") == {"quadratic"}
    assert completed("evaluate", "digits", "digits", "--dtype", "") == {"float32", "float64"}
    # A file, which bash completes by itself where this has nothing.
    assert completed("evaluate", "digits", "digits", "--json", "") == set()


def test_fish_is_told_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert f"-n __fish_use_subcommand -a {name} " in script
    assert "-l resume" in script
    # No value of argparse's own is left in a text, and quotes are closed.
    assert "%(" not in script
    for line in script.splitlines():
        shlex.split(line)


def test_zsh_takes_bash_s(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit && bashcompinit\n_metateleport()")
    assert not list(tmp_path.iterdir())
