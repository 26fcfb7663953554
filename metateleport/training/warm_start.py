"""Starting a meta-training from the networks of a checkpoint."""

from __future__ import annotations

import torch

from metateleport.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from metateleport.learned.meta_optimizer import MetaOptimizer
from metateleport.learned.rules.adaptive import AdaptiveRule
from metateleport.learned.rules.gauged import GaugedRule
from metateleport.settings import flattened
from metateleport.training.recipe import TrainingError

__all__ = ["warm_start", "warm_start_checkpoint"]

_MAY_DIFFER = ("rule.secants", "groups", "teleport.max_stretch", "gauge.metric_memory")
_HEAD = "rule.head."


def warm_start_checkpoint(name_or_path: str, seed: int) -> Checkpoint:
    """The meta-seed of a checkpoint to start from: the one with the same seed if there is one, else the chosen one.

    Args:
        name_or_path: a folder, or the bare name of a shipped checkpoint.
        seed: the seed of the training that starts.

    Returns:
        The checkpoint.

    Raises:
        TrainingError: if it cannot be loaded.

    Example:
        >>> warm_start_checkpoint("leaky_mlp", seed=3).card["training"]["recipe"]["outer"]["seed"]
        3
    """
    try:
        checkpoint = load_checkpoint(name_or_path)
        paths = {each.seed: each.path for each in checkpoint.meta_seeds}
        return load_checkpoint(paths[seed]) if paths.get(seed, checkpoint.path) != checkpoint.path else checkpoint
    except CheckpointError as error:
        raise TrainingError(f"the training cannot start from {name_or_path}: {error}") from error


def warm_start(meta: MetaOptimizer, checkpoint: Checkpoint, step_only: bool = False) -> None:
    """Copies the weights of a checkpoint's networks.

    Of a checkpoint with the rule `adaptive` a rule `gauged` takes what steps the tensors that are no factors. Otherwise
    the two have to be of one shape. They may differ in the groups, `teleport.max_stretch`, `gauge.metric_memory`, and
    in whether there are secants, whose additional output, the trust in them, is then left as it is. The rate of
    `cooling` may differ if both rules have one; for the `adaptive` update it may be any.

    Args:
        meta: the networks; changed in place.
        checkpoint: the checkpoint.
        step_only: copy the networks of the step alone.

    Raises:
        TrainingError: if the checkpoint lacks these networks, or they are of another shape.

    Example:
        >>> checkpoint = warm_start_checkpoint("leaky_mlp", seed=0)
        >>> meta = MetaOptimizer(checkpoint.learned.config)
        >>> warm_start(meta, checkpoint)
        >>> bool((meta.rule.head.bias == checkpoint.learned.rule.head.bias).all())
        True
    """
    if isinstance(meta.rule, GaugedRule) and isinstance(checkpoint.learned.rule, AdaptiveRule):
        _other_tensors(meta.rule, checkpoint)
        return
    source = checkpoint.step_only if step_only else checkpoint.learned
    if source is None:
        raise TrainingError(f"{checkpoint.path} has no networks without teleports to start from: start without it")
    own_shape, its_shape = flattened(meta.config.table()), flattened(source.config.table())
    for key in dict.fromkeys((*own_shape, *its_shape)):
        wanted, there = own_shape.get(key), its_shape.get(key)
        # If the rate is learned from a start value, networks without a rate have no output for it.
        constant = isinstance(meta.rule, AdaptiveRule)
        another_rate = key == "rule.cooling" and (constant or bool(wanted and there))
        if key not in _MAY_DIFFER and wanted != there and not another_rate:
            raise TrainingError(
                f"the networks of {checkpoint.path} have {key} = {there!r}, and these {wanted!r}: train with the "
                "settings of the checkpoint, or start without it"
            )
    weights, own = source.state_dict(), meta.state_dict()
    for name, value in weights.items():
        if name not in own:
            continue
        if value.shape != own[name].shape and not name.startswith(_HEAD):
            raise TrainingError(f"{name} of {checkpoint.path} is {tuple(value.shape)}, not {tuple(own[name].shape)}")
        rows = min(len(value), len(own[name]))
        with torch.no_grad():
            own[name][:rows] = value[:rows]
    meta.load_state_dict(own)


def _other_tensors(rule: GaugedRule, checkpoint: Checkpoint) -> None:
    """Copies the networks for tensors that are no factors."""
    source = checkpoint.learned.rule
    assert isinstance(source, AdaptiveRule)
    if source.hidden != rule.plain.hidden:
        raise TrainingError(
            f"the networks of {checkpoint.path} have rule.hidden = {source.hidden}, and these rule.plain_hidden = "
            f"{rule.plain.hidden}: train with the same, or start without it"
        )
    rule.plain.load_state_dict(source.state_dict())
