"""Finding symmetries: from a module to a graph, to scalings that its operations allow, to certified groups."""

from metateleport.detection.find import Refused, Symmetries, find_symmetries

__all__ = ["Refused", "Symmetries", "find_symmetries"]
