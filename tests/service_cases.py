"""Services without a network: what a client sends is answered in the same process, through the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metateleport.checkpoint import Checkpoint, load_checkpoint
from metateleport.learned import GaugeTeleporter, LearnedTeleporter
from metateleport.service import Answerer, Client, Refused
from metateleport.service.batching import together
from metateleport.service.client import ServiceError
from metateleport.service.message import BINARY, JSON, Message, decode, encode
from metateleport.service.remote import OnceTeleporter, RemoteStep, Service


class Beside(Client):
    """A client of an answerer in this process.

    Args:
        answerer: answers.
        kind: of the bodies.
        stacked: whether every request is answered together with a copy of itself, as a service that batches does.
    """

    def __init__(self, answerer: Answerer, kind: str = BINARY, stacked: bool = False) -> None:
        super().__init__("http://beside", kind=kind)
        self.answerer, self.stacked = answerer, stacked
        self.asked: list[Message] = []

    def _send(self, method: str, what: str, body: bytes | None) -> bytes:
        try:
            if body is None:
                return encode(self.answerer.answer(Message({"schema": 1, "ask": what}, {})), JSON)
            request = decode(body, self.kind)
            request = Message({**request.fields, "ask": what}, request.tensors)
            self.asked.append(request)
            if self.stacked:
                answer = together(self.answerer, [request, request])[0]
                if isinstance(answer, Refused):
                    raise answer
                return encode(answer, self.kind)
            return encode(self.answerer.answer(request), self.kind)
        except Refused as refused:
            raise ServiceError(json.dumps(refused.table()), refused.field, refused.status) from refused


def beside(checkpoint: Checkpoint | str | Path, kind: str = BINARY, stacked: bool = False) -> Any:
    """What `metateleport.connect` gives, without a network between."""
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    client = Beside(Answerer(loaded), kind, stacked)
    service = Service(client, client.about())
    meta = service.networks()
    found: Any = RemoteStep()
    if isinstance(meta.teleporter, LearnedTeleporter):
        found = meta.teleporter
    elif meta.gauge is not None:
        found = GaugeTeleporter(meta.gauge).eval()
    found.service = service
    return found


def once_beside(method: str, **settings: Any) -> OnceTeleporter:
    """A teleporter that nothing is learned for, without a network between."""
    return OnceTeleporter(Beside(Answerer(load_checkpoint("digits"))), method, **settings)
