"""The walk on the page on tracking runs as it stands, only shorter."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from serving_cases import free, served

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tracking.md"
WALK = PAGE.read_text().split("## A walk\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", WALK, re.DOTALL | re.MULTILINE)
SHORTER = {"--seconds": "4", "--tasks": "4", "--steps": "10"}
"""What a person gives a minute for, the test gives seconds."""


@pytest.mark.slow(seconds=150)
def test_the_walk(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    port = str(free())

    def run(command: list[str]) -> str:
        found = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert found.returncode == 0, (command, found.stderr)
        assert "Traceback" not in found.stderr
        return found.stdout

    printed, serving = [], False
    for kind, block in BLOCKS:
        if kind == "python":
            code = block.replace("8000", port)
            if "mt.connect" in code:
                assert serving
                with served(
                    "models:/gauges@champion", tmp_path / "log", MLFLOW_TRACKING_URI=environment["MLFLOW_TRACKING_URI"]
                ) as (url, _):
                    printed.append(run([sys.executable, "-c", code.replace(f"http://127.0.0.1:{port}", url)]))
            else:
                printed.append(run([sys.executable, "-c", code]))
            continue
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "metateleport"
            if arguments[0] == "serve":
                serving = True
                continue
            for option, value in SHORTER.items():
                if option in arguments:
                    arguments[arguments.index(option) + 1] = value
            run([sys.executable, "-m", "metateleport.cli", *arguments])
    assert (tmp_path / "compared.png").stat().st_size > 1000
    first, last = map(float, printed[0].split())
    assert last < first
    # The same numbers, bit for bit, in both processes.
    assert printed[1] == printed[0]
