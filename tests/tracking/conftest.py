"""A store that is no store, for the tests that need none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tracking_cases import FakeClient

from metateleport.tracking import sender, sync


@pytest.fixture(autouse=True)
def _own_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has left to be sent."""
    monkeypatch.setenv("METATELEPORT_CACHE", str(tmp_path / "cache"))
    sender._unreachable.clear()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(sender, "connect", fake.connect)
    monkeypatch.setattr(sync, "connect", fake.connect)
    monkeypatch.setattr(sender, "EVERY", 0.05)
    monkeypatch.setattr(sender, "PATIENCE", 0.3)
    return fake
