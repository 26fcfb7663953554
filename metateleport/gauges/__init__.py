"""Gauges: group elements that single tensors are stepped in and that are undone after the step."""

from metateleport.gauges.directions import DIRECTIONS, Direction, in_gauge
from metateleport.gauges.factors import FactorPair, factor_pairs
from metateleport.gauges.polar import polar_by_gram
from metateleport.gauges.roots import Roots, inverse_root, whitening_roots
from metateleport.gauges.step import (
    Gauge,
    GaugedStep,
    Names,
    TensorGroup,
    gauge_symmetries,
    precondition,
    step_in_gauges,
    tensor_groups,
    undo,
)
from metateleport.gauges.whitened import GAUGES, GaugeKind, Sketches, directions_in_gauges

__all__ = [
    "DIRECTIONS",
    "GAUGES",
    "Direction",
    "FactorPair",
    "Gauge",
    "GaugeKind",
    "GaugedStep",
    "Names",
    "Roots",
    "Sketches",
    "TensorGroup",
    "directions_in_gauges",
    "factor_pairs",
    "gauge_symmetries",
    "in_gauge",
    "inverse_root",
    "polar_by_gram",
    "precondition",
    "step_in_gauges",
    "tensor_groups",
    "undo",
    "whitening_roots",
]
