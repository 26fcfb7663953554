"""The service in a process of its own: equal to local, beside MLflow's routes, and unmoved by bad clients."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from serving_cases import Load, request_of, served
from torch import nn

import metateleport as mt
from metateleport import cli
from metateleport.checkpoint import load_checkpoint
from metateleport.service import Answerer, ServiceError

pytest.importorskip("mlflow")


def fetched(url: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def trained(checkpoint: Any, steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(0.1), nn.Linear(12, 3)).double()
    optimizer = mt.LearnedOptimizer(model, checkpoint)
    x = torch.randn(16, 6, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return [value.detach() for value in model.parameters()]


def right(count: int = 20) -> dict[int, Any]:
    answerer = Answerer(load_checkpoint("digits"))
    return {seed: answerer.answer(request_of(8, seed)) for seed in range(count)}


def loaded(url: str, process: Any, clients: int, seconds: float) -> Load:
    """Puts a load on a service, and checks that it gives no wrong answer and does not grow."""
    own = psutil.Process(process.pid)
    Load(url, right(), clients, min(2.0, seconds))
    before = own.memory_info().rss
    load = Load(url, right(), clients, seconds)
    assert load.wrong == []
    assert process.poll() is None
    assert load.answers > 10
    assert load.refusals > 10
    # What the largest bodies need at one time is bounded; it does not add up.
    assert own.memory_info().rss - before < 100e6
    return load


@pytest.mark.slow(seconds=10)
def test_a_service(tmp_path: Path) -> None:
    with served("digits", tmp_path / "log") as (url, process):
        assert all(
            torch.equal(mine, theirs) for mine, theirs in zip(trained("digits"), trained(mt.connect(url)), strict=True)
        )
        # In text, which people can read, too.
        again = trained(mt.connect(url, json=True))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(trained("digits"), again, strict=True))
        assert fetched(f"{url}/ping")[0] == 200
        assert fetched(f"{url}/version")[1].decode().startswith("3.")
        row = json.dumps({"schema": 1, "ask": "about"})
        status, body = fetched(f"{url}/invocations", {"dataframe_split": {"columns": ["request"], "data": [[row]]}})
        assert status == 200, body
        (answer,) = json.loads(body)["predictions"]
        assert json.loads(answer["answer"])["name"] == "digits"
        loaded(url, process, 32, 5.0)
    assert "UserWarning" not in (tmp_path / "log").read_text()


@pytest.mark.slow(seconds=120)
def test_a_service_that_batches_wants_a_token_and_bears_a_load(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    with served("digits", tmp_path / "log", "--token-file", str(token)) as (url, _):
        with pytest.raises(ServiceError, match="bearer token"):
            mt.connect(url)
        assert mt.connect(url, token="secret").service.name == "digits"
        assert fetched(f"{url}/invocations", {})[0] == 401
    with served("digits", tmp_path / "log", "--batching") as (url, _):
        pairs = zip(trained("digits"), trained(mt.connect(url)), strict=True)
        assert all(torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12) for mine, theirs in pairs)
    with served("digits", tmp_path / "log") as (url, process):
        loaded(url, process, 32, 60.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "there is no checkpoint"),
        (["digits", "--host", "0.0.0.0"], "METATELEPORT_TOKEN"),
        (["digits", "--port", "99999999"], "port"),
        (["digits", "--token-file", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_served_is_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("METATELEPORT_TOKEN", raising=False)
    assert cli.main(["serve", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_service_that_is_not_there_is_told() -> None:
    with pytest.raises(ServiceError, match="metateleport serve"):
        mt.connect("http://127.0.0.1:9", timeout=0.3)
    with pytest.raises(ServiceError, match="no address"):
        mt.connect("ftp://here")
