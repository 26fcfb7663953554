"""Finding symmetries: from a module to a graph, to scalings that its operations allow, to certified groups."""

from metateleport.detection.certificate import Certificate, certify
from metateleport.detection.find import Refused, Symmetries, exact_symmetries, find_symmetries

__all__ = ["Certificate", "Refused", "Symmetries", "certify", "exact_symmetries", "find_symmetries"]
