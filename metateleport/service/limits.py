"""What a service takes: the bounds on every request."""

from __future__ import annotations

import dataclasses

__all__ = ["Limits"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on a request; one beyond them is refused before anything is computed.

    Args:
        bytes: of a binary body.
        json_bytes: of a JSON body, whose numbers take ten times their bytes in memory.
        held_bytes: of all bodies that are in memory at one time.
        size: dimensions of the space that a group acts on.
        tasks: tasks in one request, the product of its batch dimensions.
        tensors: tensors in one body.
        rows: rows of the inputs of a step: tensors times tasks.
        depth: levels of nesting of a JSON body.
        body_seconds: for a body to arrive.
        answer_seconds: for an answer to be computed.
        waiting: requests that are worked on or wait at one time; further ones are asked to come again.
    """

    bytes: int = 32 << 20
    json_bytes: int = 8 << 20
    held_bytes: int = 256 << 20
    size: int = 512
    tasks: int = 1024
    tensors: int = 1024
    rows: int = 1 << 16
    depth: int = 8
    body_seconds: float = 10.0
    answer_seconds: float = 30.0
    waiting: int = 256

    def table(self) -> dict[str, float]:
        """The bounds by name."""
        return dataclasses.asdict(self)
