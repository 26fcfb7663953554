"""Where the program begins: what a signal ends, at whatever moment, ends in order."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from metateleport.cli.who import who
from metateleport.interruption import code_of, received, stoppable

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: what stands behind the program's name; the process's own if not given.

    Returns:
        The exit code: 0; 2 after bad input, with a one-line message; 130 after Ctrl-C, 143 after SIGTERM; 141 if
        stdout's reader is gone.
    """
    with stoppable():
        try:
            # What is imported here takes a part of a second, in which Ctrl-C may come.
            from metateleport.cli.commands import run

            return run(arguments)
        except KeyboardInterrupt as stopped:
            print(f"{who()}: {str(stopped) or 'interrupted'}", file=sys.stderr)
            return code_of(stopped)
        except Exception:
            stopped_by = received()
            if stopped_by is None:
                raise
            print(f"{who()}: interrupted", file=sys.stderr)
            return 128 + stopped_by
