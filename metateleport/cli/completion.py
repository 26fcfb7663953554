"""`metateleport completion`: prints a script that completes commands, options and names in a shell."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from metateleport.cli.common import Parser

__all__ = ["add", "commands_of", "script_of"]

_EXAMPLES = """\
examples:
  metateleport completion bash > ~/.local/share/bash-completion/completions/metateleport
  metateleport completion zsh >> ~/.zshrc
  metateleport completion fish > ~/.config/fish/completions/metateleport.fish

The script has the commands, their options with the values that they take, and the names of shipped checkpoints and task
families. Everywhere else files are completed. Print it anew after an update.
"""

_CHECKPOINTS = ("checkpoint", "checkpoints", "recipe")
"""Arguments that take the name of a checkpoint."""

_FAMILIES = ("task", "family")
"""Arguments that take the name of a task family."""

_BASH = """\
_metateleport() {{
    local now=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} words=""
    if [[ $COMP_CWORD -eq 1 ]]; then
        words={commands}
    else
        case "${{COMP_WORDS[1]}} $before" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$now"))
}}
complete -o default -F _metateleport metateleport
"""


def add(commands: Any, root: Parser) -> None:
    """Adds the command to a parser's subcommands; `root` is the parser whose commands are completed."""
    parser: Parser = commands.add_parser(
        "completion",
        help="print a script that completes commands in your shell",
        description="Prints a script that completes commands, options and names in bash, zsh or fish.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to complete in")
    parser.set_defaults(run=partial(run, root))


def run(root: Parser, arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from metateleport.checkpoint import shipped_checkpoints
    from metateleport.families import gallery

    print(script_of(root, arguments.shell, sorted(shipped_checkpoints()), sorted(gallery())), end="")
    return 0


def commands_of(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's commands by name."""
    (subcommands,) = (each for each in root._actions if isinstance(each, argparse._SubParsersAction))
    return dict(subcommands.choices)


def script_of(root: Parser, shell: str, checkpoints: Iterable[str], families: Iterable[str]) -> str:
    """The script.

    Args:
        root: the parser.
        shell: bash, zsh or fish.
        checkpoints: names of checkpoints.
        families: names of task families.
    """
    known = {**dict.fromkeys(_CHECKPOINTS, tuple(checkpoints)), **dict.fromkeys(_FAMILIES, tuple(families))}
    parsers = commands_of(root)
    if shell == "fish":
        return _fish(parsers, known)
    cases = []
    for name, parser in parsers.items():
        for action in parser._actions:
            if action.option_strings and action.nargs != 0:
                # What follows an option that takes a value; where nothing is known of it, a file does.
                patterns = "|".join(f'"{name} {option}"' for option in action.option_strings)
                cases.append(f"            {patterns}) words={_quoted(_values(action, known))} ;;")
        options = [option for action in parser._actions for option in action.option_strings]
        named = [value for action in parser._actions if not action.option_strings for value in _values(action, known)]
        cases.append(f'            "{name} "*) words={_quoted([*named, *options])} ;;')
    bash = _BASH.format(commands=_quoted(parsers), cases="\n".join(cases))
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def _values(action: argparse.Action, known: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What an argument may be, as far as that is known."""
    return [str(each) for each in action.choices] if action.choices is not None else list(known.get(action.dest, ()))


def _quoted(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _fish(parsers: Mapping[str, argparse.ArgumentParser], known: Mapping[str, tuple[str, ...]]) -> str:
    lines = []
    for name, parser in parsers.items():
        told = _fish_quoted((parser.description or "").partition("\n")[0])
        lines.append(f"complete -c metateleport -f -n __fish_use_subcommand -a {name} -d {told}")
        within = f"complete -c metateleport -n '__fish_seen_subcommand_from {name}'"
        for action in parser._actions:
            values = " ".join(_values(action, known))
            if not action.option_strings:
                lines += [f"{within} -a {_fish_quoted(values)}"] if values else []
                continue
            longs = "".join(f" -l {each[2:]}" for each in action.option_strings if each.startswith("--"))
            takes = "" if action.nargs == 0 else f" -x -a {_fish_quoted(values)}" if values else " -r"
            lines.append(f"{within}{longs}{takes} -d {_fish_quoted((action.help or '') % vars(action))}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = re.sub(r'(["\\$])', r"\\\1", text)
    return f'"{escaped}"'
