"""A service in a process of its own, and clients that treat it badly."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from metateleport.service.client import Client, ServiceError
from metateleport.service.message import BINARY, JSON, Message, encode

PROGRESS = torch.tensor([0.1, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)


def free() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def served(checkpoint: str, log: Path, *options: str, **environment: str) -> Iterator[tuple[str, Any]]:
    """The address of `metateleport serve`, and its process, which is ended afterwards."""
    port = free()
    command = [sys.executable, "-m", "metateleport.cli", "serve", checkpoint, "--port", str(port), *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
    try:
        until = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def request_of(size: int, seed: int, matrices: bool = False) -> Message:
    """A request for a teleport of `digits` (diagonals), or of a checkpoint that has networks for GL."""
    source = torch.Generator().manual_seed(seed)
    tensors = {"progress": PROGRESS}
    for name in ("incoming_covariance", "outgoing_covariance", "feature_covariance"):
        value = torch.rand(size, size, generator=source, dtype=torch.float64)
        covariance = value @ value.mT
        tensors[f"matrices.{name}"] = covariance if matrices else covariance.diagonal()
    name = "GL" if matrices else "diagonal"
    return Message({"schema": 1, "ask": "teleport", "group": {"name": name, "size": size}}, tensors)


def spoilt(source: random.Random) -> tuple[bytes, str, int]:
    """A body, its kind, and the lowest status that is right for it: bad in some way or other."""
    good = request_of(source.choice((2, 8, 32)), source.randrange(100))
    kind = source.choice((JSON, BINARY))
    body = encode(good, kind)
    way = source.randrange(6)
    if way == 0:
        return body[: source.randrange(len(body) - 1)], kind, 400
    if way == 1:
        place = source.randrange(8)
        return bytes([*body[:place], body[place] ^ 0xFF, *body[place + 1 :]]), kind, 400
    if way == 2:
        return (
            encode(Message({**good.fields, "group": {"name": "diagonal", "size": "8"}}, good.tensors), kind),
            kind,
            400,
        )
    if way == 3:
        text = encode(good, JSON).replace(b'"data": [', b'"data": [NaN, ', 1)
        return text, JSON, 400
    if way == 4:
        return b"[" * source.randrange(1, 100_000), JSON, 400
    return b"\0" * (33 << 20), BINARY, 400


class Load:
    """Clients that ask at once, some of them badly, some of which go away in the middle.

    Args:
        url: the service.
        right: the answers to the requests of `request_of(8, seed)`, by seed.
        clients: how many.
        seconds: for how long.
    """

    def __init__(self, url: str, right: dict[int, Message], clients: int, seconds: float) -> None:
        self.url, self.right, self.until = url, right, time.monotonic() + seconds
        self.wrong: list[str] = []
        self.answers = self.refusals = self.gone = 0
        self.mutex = threading.Lock()
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
            if thread.is_alive():
                self.wrong.append("a client hangs")

    def _work(self, number: int) -> None:
        source = random.Random(number)
        client = Client(self.url, timeout=60, kind=source.choice((JSON, BINARY)))
        try:
            while time.monotonic() < self.until:
                way = source.random()
                if way < 0.6:
                    self._ask(client, source.randrange(len(self.right)))
                elif way < 0.95:
                    self._ask_badly(source)
                else:
                    self._go_away(source)
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def _ask(self, client: Client, seed: int) -> None:
        request = request_of(8, seed)
        answer = client.ask("teleport", Message({"group": request.fields["group"]}, request.tensors))
        with self.mutex:
            self.answers += 1
        for name, value in self.right[seed].tensors.items():
            if not torch.equal(answer.tensors[name], value):
                self.wrong.append(f"{name} of {seed}")

    def _ask_badly(self, source: random.Random) -> None:
        body, kind, _ = spoilt(source)
        asked = urllib.request.Request(f"{self.url}/v1/teleport", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(asked, timeout=60) as response:
                self.wrong.append(f"{response.status} for {kind} {body[:60]!r}")
        except urllib.error.HTTPError as error:
            said = error.read()
            with self.mutex:
                self.refusals += 1
            if not 400 <= error.code < 500 and error.code != 503:
                self.wrong.append(f"{error.code} for {kind} {body[:60]!r}: {said[:200]!r}")
            elif not json.loads(said)["error"]["message"]:
                self.wrong.append(f"no message for {body[:60]!r}")
        except (ConnectionError, urllib.error.URLError):
            # A body that is too large is not read to its end.
            if len(body) < 1 << 20:
                self.wrong.append(f"no answer for {kind} {body[:60]!r}")

    def _go_away(self, source: random.Random) -> None:
        body = encode(request_of(32, source.randrange(100)), BINARY)
        host, port = self.url.removeprefix("http://").split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=10) as connection:
            head = ("POST /v1/teleport HTTP/1.1", "Host: x", f"Content-Type: {BINARY}", f"Content-Length: {len(body)}")
            connection.sendall("\r\n".join((*head, "", "")).encode() + body[: source.randrange(len(body) + 1)])
        with self.mutex:
            self.gone += 1


__all__ = ["Load", "ServiceError", "free", "request_of", "served", "spoilt"]
