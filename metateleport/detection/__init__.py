"""Finding symmetries: from a module to a graph, to scalings that its operations allow, to certified groups."""

from metateleport.detection.certificate import certify
from metateleport.detection.chain import symmetries_of
from metateleport.detection.find import exact_symmetries, find_symmetries
from metateleport.detection.found import Refused, Symmetries

__all__ = ["Refused", "Symmetries", "certify", "exact_symmetries", "find_symmetries", "symmetries_of"]
