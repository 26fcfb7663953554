"""Finding symmetries: from a module to a graph, to scalings that its operations allow, to certified groups."""

from metateleport.detection.certificate import Certificate, certify
from metateleport.detection.find import exact_symmetries, find_symmetries
from metateleport.detection.found import Refused, Symmetries

__all__ = ["Certificate", "Refused", "Symmetries", "certify", "exact_symmetries", "find_symmetries"]
