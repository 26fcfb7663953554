"""The command line: one file a command."""

from metateleport.cli.main import main

__all__ = ["main"]
