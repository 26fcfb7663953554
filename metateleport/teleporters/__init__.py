"""Teleporters: ways to choose the group element, hand-designed ones here, the learned one in `learned`."""

from metateleport.teleporters.base import Move, Teleporter, TrustRegion, travel
from metateleport.teleporters.gradient_ascent import GradientAscentTeleporter
from metateleport.teleporters.once import TeleportReport, teleport
from metateleport.teleporters.simple import NoTeleport, RandomTeleporter
from metateleport.teleporters.whitening import WhiteningTeleporter

__all__ = [
    "GradientAscentTeleporter",
    "Move",
    "NoTeleport",
    "RandomTeleporter",
    "TeleportReport",
    "Teleporter",
    "TrustRegion",
    "WhiteningTeleporter",
    "teleport",
    "travel",
]
