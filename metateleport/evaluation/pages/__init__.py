"""Pages of results, written from cards and from the JSON of evaluations alone."""

from metateleport.evaluation.pages.entry import Entry
from metateleport.evaluation.pages.write import Written, write_pages

__all__ = ["Entry", "Written", "write_pages"]
