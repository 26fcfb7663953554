"""Prints the table: `python tests/contract`, as learn2learn installs a package that is named `tests` too."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# What the tests stand on.
importlib.import_module("conftest")

from contract.table import Table, chosen  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cells and prints them; 1 if one is wrong or too much is refused."""
    parser = argparse.ArgumentParser(prog="python tests/contract", description=__doc__)
    parser.add_argument("--idioms", nargs="+", metavar="WORD", help="rows whose name has one of these words in it")
    parser.add_argument("--models", nargs="+", metavar="WORD", help="columns whose name has one of these words in it")
    parser.add_argument("--checkpoints", nargs="+", metavar="NAME", help="these; `adamw` is torch's own in their place")
    parser.add_argument("--pairwise", action="store_true", help="a part in which any two of the three meet")
    parser.add_argument("--device", default="cpu", help="where (default %(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = chosen(given.idioms, given.models, given.checkpoints, given.device, covered=given.pairwise)
    if not cells:
        parser.error("no cell has these names")
    table = Table(cells)
    for row in table.rows():
        print(row, flush=True)
    print("\n".join(table.footer()))
    return int(table.wrong)


if __name__ == "__main__":
    sys.exit(main())
