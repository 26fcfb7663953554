"""Pages of results, written from checkpoints' cards and from the JSON files of evaluations."""

from metateleport.evaluation.pages.entry import Entry
from metateleport.evaluation.pages.write import Written, write_pages

__all__ = ["Entry", "Written", "write_pages"]
