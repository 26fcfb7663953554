"""Fixtures that the tests of this room share."""

from __future__ import annotations

import pytest

from metateleport import TaskFamily, load_family


@pytest.fixture
def family() -> TaskFamily:
    return load_family("leaky_mlp", {"width": 5})
