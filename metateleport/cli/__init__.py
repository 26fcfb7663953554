"""The command line, with one file for each command."""

from metateleport.cli.entry import main

__all__ = ["main"]
