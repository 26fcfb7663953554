"""`metateleport symmetries`: finds the symmetries of a model and prints them as a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from metateleport.cli.common import UsageError, check_files
from metateleport.cli.progress import status
from metateleport.files import run_file, write_text

__all__ = ["add", "load_factory"]

_DESCRIPTION = """\
Finds the continuous symmetries of a model and prints them as a table, each with its certificate.

The factory is a function without arguments in a Python file of yours. It returns the model and an example input (a
tensor, a tuple of positional inputs or a dict of keyword inputs):

  # nets.py
  def small():
      return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), torch.randn(8, 4)

examples:
  metateleport symmetries nets.py:small
  metateleport symmetries nets.py:small --json found.json      also those that were refused, and why
  metateleport symmetries nets.py:adapted --frozen             of frozen parameters too
"""


def add(commands: Any) -> None:
    """Adds the command to the subparsers of `metateleport`."""
    command = commands.add_parser(
        "symmetries",
        help="find and certify the continuous symmetries of a model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("factory", metavar="FILE.py:FACTORY", help="function that returns model and example input")
    command.add_argument("--json", metavar="FILE", type=Path, help="also write found and refused symmetries as JSON")
    command.add_argument("--frozen", action="store_true", help="include symmetries that move frozen parameters")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from metateleport.detection import find_symmetries

    if arguments.json is not None and arguments.json.is_dir():
        raise UsageError(f"--json names a file to write, and {arguments.json} is a folder")
    check_files(arguments.json)
    model, example = load_factory(arguments.factory)
    try:
        with status("finding and certifying symmetries"):
            found = find_symmetries(model, example, frozen=arguments.frozen)
    except Exception as error:
        raise UsageError(
            f"{arguments.factory}: the model cannot be followed on its example input: {type(error).__name__}: {error}"
        ) from error
    print(found)
    if arguments.json is not None:
        write_text(arguments.json, found.to_json() + "\n")
        print(f"written to {arguments.json}", file=sys.stderr)
    return 0


def load_factory(name: str) -> tuple[Any, Any]:
    """The model and the example input that `FILE.py:FACTORY` returns. This runs the file.

    Raises:
        UsageError: if there is no such file or factory, or it does not return the two.
    """
    from torch import nn

    path_text, colon, factory_name = name.rpartition(":")
    if not colon or not path_text.endswith(".py") or not factory_name:
        raise UsageError(f"{name!r} is not of the form FILE.py:FACTORY, such as nets.py:small")
    path = Path(path_text)
    if not path.is_file():
        raise UsageError(f"there is no file {path}: give the path of a Python file, then a colon and the factory")
    try:
        module = run_file(path, "metateleport_model_")
    except ImportError as error:
        raise UsageError(str(error)) from error.__cause__
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{path} has no function {factory_name!r}; it has {', '.join(own) or 'none'}")
    try:
        returned = factory()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], nn.Module):
        raise UsageError(f"{name} has to return a pair, the model (nn.Module) and an example input")
    return returned
