"""The command line, with one file for each command."""

from metateleport.cli.main import main

__all__ = ["main"]
