"""Processes that torchrun started are killed: it starts them anew, and they go on from the last state."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = [
    *("train", "leaky_mlp", "--no-track", "--out", "trained", "--set", "teleport=none", "family.width=4"),
    *("outer.meta_steps=3000", "outer.tasks=4", "outer.unroll=3", "outer.horizon=6"),
    *("validation.every=10", "validation.tasks=4"),
]


def torchrun(folder: Path, restarts: int) -> subprocess.Popen[str]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "metateleport", *TRAINING]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def children(process: int) -> list[int]:
    said = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    return [int(each) for each in said.stdout.split()]


@pytest.mark.slow(seconds=300)
def test_killed_at_random_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    draws, kills = random.Random(0), 10
    whole = torchrun(tmp_path / "whole", 0)
    killed = torchrun(tmp_path / "killed", kills)
    state = tmp_path / "killed" / "trained.unfinished" / "state.safetensors"
    done = 0
    while done < kills and killed.poll() is None:
        ranks = children(killed.pid)
        if len(ranks) == 2 and state.exists():
            # Python takes seconds to start: often a state is written in between, sometimes none is.
            time.sleep(draws.uniform(0.0, 10.0))
            victim = draws.choice(children(killed.pid) or ranks)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            done += 1
            while killed.poll() is None and victim in children(killed.pid):
                time.sleep(0.1)
        time.sleep(0.1)
    said = killed.communicate(timeout=1200)[1]
    assert killed.returncode == 0, said
    assert done == kills, said
    assert whole.wait(timeout=1200) == 0
    assert "was lost" in said or "started anew" in said
    weights = [each / "trained" / "weights.safetensors" for each in (tmp_path / "whole", tmp_path / "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
