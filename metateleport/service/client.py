"""Asks a service: one connection for each thread, kept open, and made anew where it broke."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
import time
import urllib.parse
from typing import Any

from metateleport.service.message import BINARY, JSON, SCHEMA, Message, Refused, decode, encode

__all__ = ["Client", "ServiceError"]

TOKEN = "METATELEPORT_TOKEN"
"""The environment variable with the bearer token."""

_GONE = (http.client.HTTPException, ConnectionError, TimeoutError, OSError)


class ServiceError(RuntimeError):
    """A service cannot be reached, or does not do what it was asked for; the message says what to do.

    Args:
        message: what is wrong.
        field: the field of the request that it names, if it names one.
        status: HTTP's status; zero if there was no answer.
    """

    def __init__(self, message: str, field: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.field, self.status = field, status


class Client:
    """Sends messages to a service.

    A request can be sent again without harm, as a service remembers nothing: where a connection breaks or the service
    has too much to do, it is.

    Args:
        url: where the service is, as `http://127.0.0.1:8000`.
        token: its bearer token; that of the environment variable `METATELEPORT_TOKEN` if not given.
        timeout: seconds after which a request counts as failed, tries again included.
        kind: `application/x-safetensors`, or `application/json`.

    Raises:
        ServiceError: if the address is none.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, kind: str = BINARY) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServiceError(f"{url!r} is no address of a service: give one such as http://127.0.0.1:8000")
        if kind not in (JSON, BINARY):
            raise ServiceError(f"a body is {JSON} or {BINARY}, not {kind!r}")
        self.url, self.timeout, self.kind = url, timeout, kind
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self._port = parts.port
        self._token = token if token is not None else os.environ.get(TOKEN)
        self._own = threading.local()

    def __deepcopy__(self, memo: Any) -> Client:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own = threading.local()

    def about(self) -> dict[str, Any]:
        """What the service is."""
        found = json.loads(self._send("GET", "about", None))
        if not isinstance(found, dict) or found.get("service") != "metateleport":
            raise ServiceError(f"at {self.url} there is no service of metateleport")
        if found.get("schema") != SCHEMA:
            raise ServiceError(f"the service at {self.url} speaks schema {found.get('schema')!r}, and this is {SCHEMA}")
        return found

    def ask(self, what: str, message: Message) -> Message:
        """The service's answer.

        Raises:
            ServiceError: if there is none.
        """
        body = encode(Message({"schema": SCHEMA, **message.fields}, message.tensors), self.kind)
        answer = self._send("POST", what, body)
        try:
            return decode(answer, self.kind)
        except Refused as error:
            raise ServiceError(f"the answer of {self.url} cannot be read ({error})") from error

    def _send(self, method: str, what: str, body: bytes | None) -> bytes:
        until, pause = time.monotonic() + self.timeout, 0.1
        while True:
            try:
                status, answer, wait = self._once(method, f"{self._path}/v1/{what}", body)
            except _GONE as error:
                self._forget()
                if time.monotonic() + pause > until or isinstance(error, ssl.SSLCertVerificationError):
                    raise ServiceError(
                        f"the service at {self.url} cannot be reached ({error or type(error).__name__}): see that it "
                        "runs (metateleport serve), or raise timeout="
                    ) from error
            else:
                if status == 200:
                    return answer
                if status != 503 or time.monotonic() + max(pause, wait) > until:
                    raise self._refusal(status, answer)
                pause = max(pause, wait)
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, float]:
        connection = getattr(self._own, "connection", None)
        if connection is None:
            make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection = self._own.connection = make(self._host, self._port, timeout=self.timeout)
        headers = {"Content-Type": self.kind if body is not None else JSON}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.will_close:
            self._forget()
        return response.status, answer, float(response.getheader("Retry-After") or 0)

    def _forget(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            self._own.connection = None

    def _refusal(self, status: int, answer: bytes) -> ServiceError:
        field, said = "", f"HTTP {status}"
        try:
            error = json.loads(answer)["error"]
            field, said = str(error["field"]), str(error["message"])
        except (ValueError, KeyError, TypeError):
            pass
        text = f"{field}: {said}" if field else said
        return ServiceError(f"the service at {self.url} refuses the request: {text}", field, status)
