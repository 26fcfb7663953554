"""The command line: its commands, the journey without one, and the exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from metateleport.cli import (
    checkpoints,
    combine,
    compare,
    completion,
    demo,
    evaluate,
    experiment,
    promote,
    report,
    reproduce,
    seal,
    serve,
    show,
    symmetries,
    sync,
    tasks,
    train,
    ui,
    which,
)
from metateleport.cli.common import Parser, UsageError
from metateleport.cli.completion import commands_of
from metateleport.cli.journey import journey
from metateleport.cli.who import who
from metateleport.interruption import received
from metateleport.version import VERSION

__all__ = ["run"]

_EXAMPLES = """\
a first session ('metateleport' alone shows more of it):
  metateleport demo --first                           a learned optimizer beside AdamW, under a minute
  metateleport train digits --seconds 120             meta-train; writes runs/digits
  metateleport evaluate runs/digits digits            against tuned baselines, on tasks never trained on
  metateleport compare digits                         all evaluations on digits, side by side
  metateleport ui                                     the same in a browser
  metateleport promote runs/digits --as champion      then: metateleport.load("models:/digits@champion")
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `metateleport.cli.main` ends it in order where a signal asks for it.

    Args:
        arguments: what stands behind the program's name; the process's own if not given. Without any the way through
            the commands is printed.

    Returns:
        The exit code: 0; 2 after bad input, with a one-line message; 141 if stdout's reader is gone.

    Raises:
        KeyboardInterrupt: after a signal; the message says what was saved.
    """
    try:
        parser = _parser()
        if not (sys.argv[1:] if arguments is None else arguments):
            print(journey(commands_of(parser)))
            return 0
        parsed = parser.parse_args(arguments)
        # Registers the source paper's update rules, so that their checkpoints can be evaluated.
        import metateleport.papers  # noqa: F401

        return int(parsed.run(parsed))
    except SystemExit:
        # After --help; what comes below would import every room to learn their errors.
        raise
    except BrokenPipeError:
        # The reader of the pipe is gone: stdout is redirected, as flushing it at exit would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A full disk, a vanished folder, a missing right: the place says more than where in the program it was met.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"{who()}: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except _bad_input() as error:
        from metateleport.training.distributed import ToldByFirstError

        if received() is not None:
            # What a library makes of an interruption while it is imported is no fault of the caller's.
            raise
        if not isinstance(error, ToldByFirstError):
            print(f"{who()}: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def _bad_input() -> tuple[type[Exception], ...]:
    """Errors that are the caller's and not this program's."""
    from metateleport.checkpoint import CheckpointError
    from metateleport.evaluation import EvaluationError
    from metateleport.families import FamilyError
    from metateleport.families.trial import StackError
    from metateleport.files import FileError
    from metateleport.papers.experiments import ExperimentError
    from metateleport.settings import SettingsError
    from metateleport.symmetries import Unsuitable
    from metateleport.tracking import TrackingError
    from metateleport.training import TrainingError

    return (
        UsageError,
        FamilyError,
        StackError,
        CheckpointError,
        EvaluationError,
        ExperimentError,
        FileError,
        SettingsError,
        TrainingError,
        TrackingError,
        Unsuitable,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="metateleport",
        description="Learns to teleport: meta-learned moves along the symmetries of a network's loss.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"metateleport {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for command in (
        demo,
        train,
        combine,
        seal,
        evaluate,
        compare,
        report,
        checkpoints,
        show,
        promote,
        serve,
        ui,
        sync,
        symmetries,
        which,
        reproduce,
        experiment,
        tasks,
    ):
        command.add(commands)
    completion.add(commands, parser)
    return parser
