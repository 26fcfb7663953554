"""Checkpoints: trained weights and a card, written whole, loaded by name or path without running code."""

from metateleport.checkpoint.checkpoint import (
    RECIPE,
    SCHEMA,
    Checkpoint,
    CheckpointError,
    MetaSeed,
    check_place,
    load,
    load_checkpoint,
    meta_optimizer_of,
    read_card,
    save_checkpoint,
    seal,
    shipped_checkpoints,
    update_card,
)
from metateleport.checkpoint.seeds import combine_meta_seeds, each_meta_seed

__all__ = [
    "RECIPE",
    "SCHEMA",
    "Checkpoint",
    "CheckpointError",
    "MetaSeed",
    "check_place",
    "combine_meta_seeds",
    "each_meta_seed",
    "load",
    "load_checkpoint",
    "meta_optimizer_of",
    "read_card",
    "save_checkpoint",
    "seal",
    "shipped_checkpoints",
    "update_card",
]
