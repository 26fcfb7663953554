"""What a service refuses, and by which name; on its app, without a network."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from typing import Any

import pytest
import torch

from metateleport.checkpoint import load_checkpoint
from metateleport.service import Answerer, Guard, Limits, Refused, add_routes
from metateleport.service.message import BINARY, JSON, Message, decode, encode

FASTAPI = pytest.importorskip("fastapi")

SQUARE = [[2.0, 0.1], [0.1, 1.0]]


@pytest.fixture(scope="module")
def digits() -> Answerer:
    """Teleports along rescalings, and the adaptive step."""
    return Answerer(load_checkpoint("digits"), Limits(size=8, tasks=4, tensors=32, rows=16))


@pytest.fixture(scope="module")
def leaky() -> Answerer:
    """Gauges along linear pairs."""
    return Answerer(load_checkpoint("leaky_mlp"), Limits(size=8, tasks=4, tensors=32, rows=16))


def tensor(values: Any) -> dict[str, Any]:
    found = torch.tensor(values, dtype=torch.float64)
    return {"dtype": "float64", "shape": list(found.shape), "data": found.flatten().tolist()}


def teleport() -> dict[str, Any]:
    """A request for a teleport along a rescaling of two units."""
    return {
        "schema": 1,
        "ask": "teleport",
        "group": {"name": "diagonal", "size": 2},
        "tensors": {
            "progress": tensor([0.1, 0.0, 0.0, 0.0, 1.0]),
            "matrices.incoming_covariance": tensor([1.0, 4.0]),
            "matrices.outgoing_covariance": tensor([2.0, 1.0]),
        },
    }


def gauges() -> dict[str, Any]:
    place = {"group": {"name": "GL", "size": 2}, "side": "in", "rows": 12}
    tensors = {"progress": tensor([[0.1, 0.0, 0.0, 0.0, 1.0]])}
    tensors |= {"0.metric": tensor([SQUARE]), "0.gradient": tensor([SQUARE])}
    return {"schema": 1, "ask": "gauges", "places": [place], "tensors": tensors}


def steps() -> dict[str, Any]:
    return {"schema": 1, "ask": "steps", "tensors": {"inputs": tensor([[0.1] * 12] * 3)}}


def once() -> dict[str, Any]:
    request = teleport()
    request.pop("tensors")
    known = {"matrices.feature_covariance": tensor(SQUARE)}
    return {**request, "ask": "once", "method": "whitening", "group": {"name": "GL", "size": 2}, "tensors": known}


def answered(answerer: Answerer, request: Any) -> Message:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return answerer.answer(decode(body, JSON, answerer.limits))


def put(table: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The request with another value at a path; without it if the value is `...`."""
    changed = copy.deepcopy(table)
    at: Any = changed
    *folders, last = (int(each) if each.isdigit() else each for each in path.split("/"))
    for each in folders:
        at = at[each]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return changed


def test_what_is_right_is_answered(digits: Answerer, leaky: Answerer) -> None:
    found = answered(digits, teleport())
    assert found.fields == {"schema": 1, "group": {"name": "diagonal", "size": 2}}
    assert found.tensors["element"].shape == (2,)
    assert torch.equal(found.tensors["element"], found.tensors["generator"].exp())
    assert set(found.tensors) >= {"size", "effect.weight_norm", "state.hidden", "state.memory"}
    assert answered(leaky, gauges()).tensors["0.element"].shape == (1, 2, 2)
    assert answered(digits, steps()).tensors["outputs"].shape == (3, 6)
    white = answered(digits, once()).tensors["element"]
    made = white @ torch.tensor(SQUARE, dtype=torch.float64) @ white.mT
    assert torch.allclose(made, torch.eye(2, dtype=torch.float64), atol=1e-10)


FEATURES = "tensors/matrices.feature_covariance"


def test_a_zero_covariance_that_is_not_read_is_no_matter(digits: Answerer) -> None:
    request = once()
    request["tensors"]["matrices.outgoing_covariance"] = tensor([[0.0, 0.0], [0.0, 0.0]])
    assert torch.equal(answered(digits, request).tensors["element"], answered(digits, once()).tensors["element"])


def test_a_side_asks_for_what_it_reads_alone(digits: Answerer) -> None:
    request = once() | {"side": "outgoing"}
    request["tensors"] = {"matrices.outgoing_covariance": tensor(SQUARE)}
    element = torch.linalg.inv(answered(digits, request).tensors["element"])
    white = element @ torch.tensor(SQUARE, dtype=torch.float64) @ element.mT
    assert torch.allclose(white, torch.eye(2, dtype=torch.float64), atol=1e-10)


REFUSALS: list[tuple[Any, str, Any, str]] = [
    (teleport, "schema", 2, "schema"),
    (teleport, "schema", True, "schema"),
    (teleport, "schema", ..., "schema"),
    (teleport, "ask", "everything", "ask"),
    (teleport, "ask", ["teleport"], "ask"),
    (teleport, "ask", "gauges", "ask"),
    (teleport, "group", None, "group"),
    (teleport, "group/name", "SU", "group.name"),
    (teleport, "group/name", "GL", "group.name"),
    (teleport, "group/name", ["GL"], "group.name"),
    (teleport, "group/size", 9, "group.size"),
    (teleport, "group/size", 2.0, "group.size"),
    (teleport, "group/size", -1, "group.size"),
    (teleport, "group/size", 3, "tensors.matrices.incoming_covariance"),
    (teleport, "group/more", 1, "group"),
    (teleport, "more", 1, "more"),
    (teleport, "tensors", [], "tensors"),
    (teleport, "tensors/more", tensor([1.0]), "tensors.more"),
    (teleport, "tensors/progress", ..., "tensors.progress"),
    (teleport, "tensors/progress", 3, "tensors.progress"),
    (teleport, "tensors/progress", tensor([1.0]), "tensors.progress"),
    (teleport, "tensors/progress/dtype", "float16", "tensors.progress.dtype"),
    (teleport, "tensors/progress/dtype", 64, "tensors.progress.dtype"),
    (teleport, "tensors/progress/shape", [5.0], "tensors.progress.shape"),
    (teleport, "tensors/progress/shape", [0], "tensors.progress.shape"),
    (teleport, "tensors/progress/shape", [1 << 40], "tensors.progress.shape"),
    (teleport, "tensors/progress/shape", "5", "tensors.progress.shape"),
    (teleport, "tensors/progress/data", [0.1] * 4, "tensors.progress.data"),
    (teleport, "tensors/progress/data", [0.1] * 4 + ["1"], "tensors.progress.data"),
    (teleport, "tensors/progress/data", [0.1] * 4 + [True], "tensors.progress.data"),
    (teleport, "tensors/progress/data", [0.1] * 4 + [None], "tensors.progress.data"),
    (teleport, "tensors/progress/data", [0.1] * 4 + [[1.0]], "tensors.progress.data"),
    (teleport, "tensors/progress/data", [0.1] * 4 + [10**400], "tensors.progress.data"),
    (teleport, "tensors/progress", tensor([[[0.1] * 5]]), "tensors.progress"),
    (teleport, "tensors/progress", tensor([[0.1] * 5] * 5), "tensors.progress"),
    (teleport, "tensors/matrices.incoming_covariance", tensor([[1.0, 4.0]]), "tensors.matrices.incoming_covariance"),
    (teleport, "tensors/matrices.weights", tensor([1.0, 4.0]), "tensors.matrices.weights"),
    (teleport, "tensors/matrices.incoming_covariance/dtype", "float32", "tensors.matrices.outgoing_covariance"),
    (teleport, "tensors/state.hidden", tensor([0.0] * 32), "tensors.state.memory"),
    (teleport, "tensors/state.hidden", tensor([0.0] * 3), "tensors.state.hidden"),
    (teleport, "max_stretch", 2.0, "tensors.reached"),
    (teleport, "max_stretch", 1.0, "max_stretch"),
    (teleport, "max_stretch", "2", "max_stretch"),
    (gauges, "places", [], "places"),
    (gauges, "places", {}, "places"),
    (gauges, "places/0", 1, "places"),
    (gauges, "places/0/side", "up", "places.0.side"),
    (gauges, "places/0/rows", 0, "places.0.rows"),
    (gauges, "places/0/group/size", 3, "tensors.0.metric"),
    (gauges, "places/0/more", 3, "places.0"),
    (gauges, "tensors/0.gradient", ..., "tensors.0.gradient"),
    (gauges, "tensors/progress", tensor([0.1] * 5), "tensors.progress"),
    (steps, "tensors/inputs", tensor([[0.1] * 11]), "tensors.inputs"),
    (steps, "tensors/inputs", tensor([[0.1] * 12] * 17), "tensors.inputs"),
    (steps, "tensors/state.hidden", tensor([[1e9] * 32] * 3), "tensors.state.memory"),
    (once, "method", "ascent", "method"),
    (once, "side", "balanced", "side"),
    (once, "damping", -1.0, "damping"),
    (once, "damping", 1e400, ""),
    (once, "tensors", {}, "tensors"),
    (once, FEATURES, tensor([[1.0, 2.0], [2.0, 1.0]]), FEATURES.replace("/", ".")),
    (once, FEATURES, tensor([[2.0, 1.0], [-1.0, 2.0]]), FEATURES.replace("/", ".")),
    (once, FEATURES, tensor([[0.0, 0.0], [0.0, 0.0]]), "element"),
    (once, FEATURES, tensor([SQUARE, [[0.0, 0.0], [0.0, 0.0]]]), "element"),
    (teleport, "tensors/matrices.incoming_covariance", tensor([1.0, -1e-3]), "tensors.matrices.incoming_covariance"),
]


@pytest.mark.parametrize(("make", "path", "value", "field"), REFUSALS)
def test_what_is_wrong_is_named(
    make: Any, path: str, value: Any, field: str, digits: Answerer, leaky: Answerer
) -> None:
    with pytest.raises(Refused) as refused:
        answered(leaky if make is gauges else digits, put(make(), path, value))
    assert refused.value.field == field, refused.value
    assert 400 <= refused.value.status < 500


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float, digits: Answerer) -> None:
    request = put(teleport(), "tensors/matrices.incoming_covariance/data", [1.0, value])
    with pytest.raises(Refused, match="not finite"):
        answered(digits, request)
    message = decode(json.dumps(teleport()).encode(), JSON)
    message.tensors["progress"][0] = value  # type: ignore[index]
    from safetensors.torch import save

    body = save(dict(message.tensors), {"metateleport": json.dumps(message.fields)})
    with pytest.raises(Refused, match=r"tensors\.progress: it has values that are not finite"):
        decode(body, BINARY)


def test_numbers_out_of_range_are_refused_and_not_answered(digits: Answerer) -> None:
    request = put(teleport(), "tensors/matrices.incoming_covariance/data", [1e308, 1e-308])
    for value in answered(digits, request).tensors.values():
        assert bool(value.isfinite().all())


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"teleport"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"schema": 1, "schema": 1}',
    b'{"schema": NaN}',
    b'{"schema": ' + b"9" * 10_000 + b"}",
    json.dumps({"schema": 1, "ask": "teleport", "group": [[[[[[[[[[1]]]]]]]]]]}).encode(),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:12]))
def test_bodies_that_are_none_are_refused(body: bytes, digits: Answerer) -> None:
    with pytest.raises(Refused):
        answered(digits, body)
    for kind in (JSON, BINARY):
        with pytest.raises(Refused):
            digits.answer(decode(body, kind))


def test_every_truncation_and_every_flipped_byte_of_a_binary_body(digits: Answerer) -> None:
    whole = encode(decode(json.dumps(teleport()).encode(), JSON), BINARY)
    right = digits.answer(decode(whole, BINARY))
    for length in range(0, len(whole), 3):
        with pytest.raises(Refused):
            digits.answer(decode(whole[:length], BINARY))
    answers = 0
    for place in range(len(whole)):
        changed = bytes([*whole[:place], whole[place] ^ 0x55, *whole[place + 1 :]])
        try:
            found = digits.answer(decode(changed, BINARY))
        except Refused:
            continue
        answers += 1
        assert found.tensors.keys() <= right.tensors.keys()
        assert all(bool(value.isfinite().all()) for value in found.tensors.values())
    # A changed number is another request.
    assert 0 < answers < len(whole)


def ask(
    app: Any, path: str, body: bytes = b"", kind: str = JSON, method: str = "POST", **more: Any
) -> tuple[int, bytes]:
    """What an ASGI app answers."""
    headers = [(b"content-type", kind.encode()), *more.get("headers", ())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    parts = list(more.get("parts", [body]))
    sent: list[Any] = []

    async def receive() -> Any:
        if not parts:
            await asyncio.sleep(3600)
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts) or more.get("endless", False)}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])


@pytest.fixture
def app(digits: Answerer) -> Any:
    made = FASTAPI.FastAPI()
    add_routes(made, digits)
    return made


def test_the_routes(app: Any, digits: Answerer) -> None:
    limits = Limits(bytes=4000, body_seconds=0.2)
    guarded = Guard(app, limits)
    status, body = ask(guarded, "/v1/about", method="GET")
    assert (status, json.loads(body)["name"]) == (200, "digits")
    status, body = ask(guarded, "/v1/teleport", json.dumps(teleport()).encode())
    assert status == 200
    right = answered(digits, teleport())
    assert all(torch.equal(value, right.tensors[name]) for name, value in decode(body, JSON).tensors.items())
    binary = encode(decode(json.dumps(teleport()).encode(), JSON), BINARY)
    status, body = ask(guarded, "/v1/teleport", binary, BINARY)
    assert (status, set(decode(body, BINARY).tensors)) == (200, set(right.tensors))
    for path, text, kind, expected in (
        ("/v1/steps", json.dumps(teleport()).encode(), JSON, 422),
        ("/v1/nothing", b"{}", JSON, 404),
        ("/v1/teleport", b"{", JSON, 400),
        ("/v1/teleport", b"a,b", "text/csv", 415),
        ("/v1/teleport", b" " * 5000, JSON, 413),
    ):
        status, body = ask(guarded, path, text, kind)
        assert status == expected, body
        assert json.loads(body)["error"]["message"]
    too_long = [(b"content-length", b"99999999999")]
    assert ask(guarded, "/v1/teleport", b"{}", headers=too_long)[0] == 413
    assert ask(guarded, "/v1/teleport", b"", parts=[b" " * 3000, b" " * 3000])[0] == 413
    assert ask(guarded, "/v1/teleport", b"", parts=[b"{"], endless=True)[0] == 408
    # What was refused is let go of.
    assert guarded._held == 0
    full = Guard(app, Limits(held_bytes=100))
    assert ask(full, "/v1/teleport", b" " * 200)[0] == 503
    assert ask(full, "/v1/teleport", b"{}")[0] == 422


def test_the_token(app: Any) -> None:
    guarded = Guard(app, token="secret")
    for headers in ([], [(b"authorization", b"Bearer wrong")], [(b"authorization", b"secret")]):
        status, body = ask(guarded, "/v1/about", method="GET", headers=headers)
        assert (status, json.loads(body)["error"]["field"]) == (401, "authorization")
    assert ask(guarded, "/v1/about", method="GET", headers=[(b"authorization", b"Bearer secret")])[0] == 200
