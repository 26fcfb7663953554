"""Rules: how scalings pass through each operation. An operation without a rule fixes its inputs' scalings."""

from metateleport.detection.rules import attention, elementwise, layers, norms, shapes
from metateleport.detection.rules.registry import RULES, Rule

__all__ = ["FRESH", "RULES", "Rule", "attention", "elementwise", "layers", "norms", "shapes"]

FRESH = frozenset(
    (
        "linear",
        "addmm",
        "matmul",
        "mm",
        "bmm",
        "baddbmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "batch_norm",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "relu",
        "leaky_relu",
        "prelu",
        "add",
        "sub",
        "mul",
        "div",
        "embedding",
        "cat",
        "stack",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "relu_",
        "leaky_relu_",
        "add_",
        "sub_",
        "mul_",
        "div_",
        "clone",
        "scaled_dot_product_attention",
    )
)
"""Operations whose result is memory of its own, or memory that an in-place operation was allowed to overwrite."""
