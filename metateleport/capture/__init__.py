"""Recording of a model's forward and backward passes: a single pass, or those of a training loop."""

from metateleport.capture.layout import (
    channel_modules,
    first_input,
    input_of,
    modules_of,
    named_module,
    output_of,
    rows,
    tensors_in,
    unwrapped,
)
from metateleport.capture.once import Recording, point_of, record, unseen
from metateleport.capture.passes import RecordedPass
from metateleport.capture.recorder import PassRecorder

__all__ = [
    "PassRecorder",
    "RecordedPass",
    "Recording",
    "channel_modules",
    "first_input",
    "input_of",
    "modules_of",
    "named_module",
    "output_of",
    "point_of",
    "record",
    "rows",
    "tensors_in",
    "unseen",
    "unwrapped",
]
