"""Symmetries: groups that act on named parameters and leave the model's outputs unchanged, one file for each kind."""

from metateleport.symmetries.activations import HOMOGENEOUS, activation_of, inverse_of, slope
from metateleport.symmetries.attention import AttentionQK, AttentionVO
from metateleport.symmetries.axes import AxisSymmetry, Leg
from metateleport.symmetries.base import Carried, Pair, Symmetry, Unsuitable
from metateleport.symmetries.batch_norm import AfterBatchNorm, BeforeBatchNorm
from metateleport.symmetries.batch_pair import BatchPair2022, BatchPair2024
from metateleport.symmetries.certificate import Certificate
from metateleport.symmetries.channel_rescaling import ChannelRescaling
from metateleport.symmetries.gated import GatedMLP
from metateleport.symmetries.layer_scale import LayerScale
from metateleport.symmetries.linear_chain import LinearChain
from metateleport.symmetries.linear_pair import LinearPair
from metateleport.symmetries.linearised_pair import LinearisedPair
from metateleport.symmetries.lora import LoRAPair
from metateleport.symmetries.norm_gain import NormGain
from metateleport.symmetries.quadratic import QuadraticRotation
from metateleport.symmetries.rescaling import Rescaling
from metateleport.symmetries.rotary import PlaneScaling
from metateleport.symmetries.translation import Absorber, BiasTranslation, Translation

__all__ = [
    "HOMOGENEOUS",
    "Absorber",
    "AfterBatchNorm",
    "AttentionQK",
    "AttentionVO",
    "AxisSymmetry",
    "BatchPair2022",
    "BatchPair2024",
    "BeforeBatchNorm",
    "BiasTranslation",
    "Carried",
    "Certificate",
    "ChannelRescaling",
    "GatedMLP",
    "LayerScale",
    "Leg",
    "LinearChain",
    "LinearPair",
    "LinearisedPair",
    "LoRAPair",
    "NormGain",
    "Pair",
    "PlaneScaling",
    "QuadraticRotation",
    "Rescaling",
    "Symmetry",
    "Translation",
    "Unsuitable",
    "activation_of",
    "inverse_of",
    "slope",
]
