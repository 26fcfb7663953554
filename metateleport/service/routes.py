"""The service's routes, and the guard in front of all routes of its app."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from metateleport.service.answering import Answerer
from metateleport.service.batching import Batcher
from metateleport.service.limits import Limits
from metateleport.service.message import BINARY, JSON, Message, Refused, decode, encode

__all__ = ["Guard", "add_routes"]

PREFIX = "/v1"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """Refuses requests before any route sees them: without the token, too large, or too slow to arrive.

    Args:
        app: the ASGI app behind it.
        limits: bounds on requests.
        token: the bearer token that every request needs, except for `/ping`; None for none.
    """

    def __init__(self, app: Any, limits: Limits | None = None, token: str | None = None) -> None:
        self.app, self.limits, self.token = app, limits or Limits(), token
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            try:
                self._check_token(scope)
                whole = await self._read(scope, receive, parts)
            except Refused as refused:
                await _reply(send, refused.status, json.dumps(refused.table()).encode())
                return
            except (asyncio.TimeoutError, TimeoutError):
                late = Refused("", f"the body did not arrive within {self.limits.body_seconds:g} s")
                await _reply(send, 408, json.dumps(late.table()).encode())
                return
            if whole:
                parts[:] = [b"".join(parts)]
                await self._pass_on(scope, receive, send, parts[0])
        finally:
            self._held -= sum(map(len, parts))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        given = False

        async def once() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, once, send)

    def _check_token(self, scope: Scope) -> None:
        if self.token is None or scope["path"] == "/ping":
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
            raise Refused("authorization", "this service asks for its bearer token", 401)

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> bool:
        """Reads a body; false if the client is gone before its end."""
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = Refused("", f"the body is too large: at most {self.limits.bytes} bytes are taken", 413)
        if not said.isdigit() or int(said) > self.limits.bytes:
            raise too_large
        total = 0
        loop = asyncio.get_running_loop()
        until = loop.time() + self.limits.body_seconds
        while True:
            message = await asyncio.wait_for(receive(), max(0.0, until - loop.time()))
            if message["type"] == "http.disconnect":
                return False
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            self._held += len(parts[-1])
            if total > self.limits.bytes:
                raise too_large
            if self._held > self.limits.held_bytes:
                raise Refused("", "too much waits to be answered: come again in a second", 503)
            if not message.get("more_body", False):
                return True


def add_routes(app: Any, answerer: Answerer, batching: bool = False) -> None:
    """Adds the service's routes to a FastAPI app: `POST /v1/ASK`, and `GET /v1/about`.

    A body is JSON or safetensors, by its content type, and the answer is of the same kind.

    Args:
        app: the app.
        answerer: answers.
        batching: whether requests that arrive together are answered together.
    """
    from fastapi import Request, Response

    limits = answerer.limits
    pool = ThreadPoolExecutor(max(1, os.cpu_count() or 1), "metateleport-answers")
    waiting = 0

    async def run(function: Callable[[], Any]) -> Any:
        return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(pool, function), limits.answer_seconds)

    batcher = Batcher(answerer, run) if batching else None

    def read(ask: str, body: bytes, kind: str) -> Message:
        request = decode(body, kind, limits)
        if request.fields.get("ask", ask) != ask:
            raise Refused("ask", f"it is {ask!r} on this route")
        return Message({**request.fields, "ask": ask}, request.tensors)

    async def answer(ask: str, body: bytes, kind: str) -> bytes:
        if batcher is None:
            return bytes(await run(lambda: encode(answerer.answer(read(ask, body, kind)), kind)))
        request = await run(lambda: read(ask, body, kind))
        found = await asyncio.wait_for(batcher.answer(request), limits.answer_seconds)
        return bytes(await run(lambda: encode(found, kind)))

    def refusal(refused: Refused) -> Response:
        return Response(json.dumps(refused.table()), status_code=refused.status, media_type=JSON)

    async def asked(ask: str, request: Request) -> Response:
        nonlocal waiting
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind not in (JSON, BINARY):
            return refusal(Refused("content-type", f"a body is {JSON} or {BINARY}", 415))
        if ask not in answerer.asks:
            return refusal(Refused("ask", f"there is {', '.join(answerer.asks)}", 404))
        if waiting >= limits.waiting:
            late = Response(
                json.dumps(Refused("", "too many requests wait: come again in a second").table()),
                status_code=503,
                media_type=JSON,
            )
            late.headers["Retry-After"] = "1"
            return late
        waiting += 1
        try:
            return Response(await answer(ask, await request.body(), kind), media_type=kind)
        except Refused as refused:
            return refusal(refused)
        except (asyncio.TimeoutError, TimeoutError):
            return refusal(Refused("", f"there is no answer within {limits.answer_seconds:g} s", 503))
        finally:
            waiting -= 1

    async def about() -> Response:
        return Response(encode(answerer.answer(Message({"schema": 1, "ask": "about"}, {})), JSON), media_type=JSON)

    # Annotations are texts in this file, and FastAPI has to know what they stand for.
    asked.__annotations__ = {"ask": str, "request": Request}
    about.__annotations__ = {}
    app.add_api_route(f"{PREFIX}/about", about, methods=["GET"], response_model=None)
    app.add_api_route(f"{PREFIX}/{{ask}}", asked, methods=["POST"], response_model=None)


async def _reply(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    # What is left of a body is not read: the connection is of no more use.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
