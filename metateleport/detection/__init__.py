"""Finding symmetries: module to graph of operations, to the scalings that they allow, to certified symmetries."""

from metateleport.detection.adapters import adapter_pairs, told_symmetries
from metateleport.detection.certificate import certify
from metateleport.detection.chain import symmetries_of
from metateleport.detection.find import exact_symmetries, find_symmetries
from metateleport.detection.found import Refused, Symmetries

__all__ = [
    "Refused",
    "Symmetries",
    "adapter_pairs",
    "certify",
    "exact_symmetries",
    "find_symmetries",
    "symmetries_of",
    "told_symmetries",
]
