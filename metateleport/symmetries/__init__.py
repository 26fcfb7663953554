"""Symmetries: groups acting on named parameters without changing what a model computes."""

from metateleport.symmetries.activations import HOMOGENEOUS, inverse_of, slope
from metateleport.symmetries.base import Carried, Pair, Symmetry, Unsuitable
from metateleport.symmetries.batch_pair import BatchPair2022, BatchPair2024
from metateleport.symmetries.linear_pair import LinearPair
from metateleport.symmetries.quadratic import QuadraticRotation
from metateleport.symmetries.rescaling import Rescaling

__all__ = [
    "HOMOGENEOUS",
    "BatchPair2022",
    "BatchPair2024",
    "Carried",
    "LinearPair",
    "Pair",
    "QuadraticRotation",
    "Rescaling",
    "Symmetry",
    "Unsuitable",
    "inverse_of",
    "slope",
]
