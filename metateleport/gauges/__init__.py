"""Gauges: group elements that single tensors are stepped in and that are undone after the step."""

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

__all__ = [
    "Gauge",
    "GaugedStep",
    "Names",
    "TensorGroup",
    "gauge_symmetries",
    "precondition",
    "step_in_gauges",
    "tensor_groups",
    "undo",
]
