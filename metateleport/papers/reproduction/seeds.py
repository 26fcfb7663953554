"""Networks of several meta-seeds stacked, so that one unroll trains all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from metateleport.learned import MetaOptimizer
from metateleport.learned.copies import Copies

__all__ = ["stack_seeds", "unstack_seeds"]


def stack_seeds(metas: Sequence[MetaOptimizer]) -> MetaOptimizer:
    """One meta-optimizer of several with the source paper's networks, that serves a stack of as many equal parts."""
    whole = copy.deepcopy(metas[0])
    for name, module in metas[0].named_modules():
        if isinstance(module, nn.LSTMCell | nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent), child, Copies([each.get_submodule(name) for each in metas]))
    return whole


def unstack_seeds(whole: MetaOptimizer) -> list[MetaOptimizer]:
    """The meta-optimizers that `stack_seeds` was given, as they are now."""
    stacks = {name: each for name, each in whole.named_modules() if isinstance(each, Copies)}
    metas = []
    for number in range(next(iter(stacks.values())).count):
        meta = copy.deepcopy(whole)
        for name, each in stacks.items():
            parent, _, child = name.rpartition(".")
            setattr(meta.get_submodule(parent), child, each.copy(number))
        metas.append(meta)
    return metas
