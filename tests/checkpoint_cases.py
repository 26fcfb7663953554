"""Checkpoints whose cards a test has edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metateleport.checkpoint.card import digests_of

CARD = "card.json"


def edited(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits a card and gives it the digest of what it is then, so that nothing but the entries tells."""
    card = json.loads((checkpoint / CARD).read_text())
    edit(card)
    card = {name: value for name, value in card.items() if name not in ("digest", "digests")}
    (checkpoint / CARD).write_text(json.dumps({**card, **digests_of(card)}))
