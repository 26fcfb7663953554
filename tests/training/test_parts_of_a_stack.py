"""Windows over parts of a stack, one after another: the meta-gradient of the whole."""

from __future__ import annotations

import pytest
import torch

import metateleport as mt
from metateleport.learned import MetaOptimizer, MetaOptimizerConfig, StepSettings
from metateleport.learned.parts import TeleportSettings
from metateleport.training.distributed import ALONE
from metateleport.training.estimators import Truncated
from metateleport.training.outer import TruncatedSettings


@pytest.mark.parametrize("cost", [0.0, 0.5])
def test_the_meta_gradient_is_that_of_the_whole_stack(cost: float) -> None:
    family = mt.load_family("leaky_mlp", {"width": 4})
    outer = TruncatedSettings(tasks=5, unroll=3, horizon=6, teleport_cost=cost, late=0.5)
    found = []
    for parts in ([range(5)], [range(2), range(2, 4), range(4, 5)]):
        torch.manual_seed(0)
        config = MetaOptimizerConfig(StepSettings(hidden=4), TeleportSettings(hidden=4), None, ("GL",))
        meta = MetaOptimizer(config).double()
        estimator = Truncated([family.stack(part, dtype=torch.float64) for part in parts], meta, outer, ALONE)
        for blind in (False, True):
            seen = estimator.meta_gradient(blind, 0.0)
            gradients = [value.grad.clone() for value in meta.parameters() if value.grad is not None]
            found.append((seen, gradients))
    for (whole, gradients), (part, own) in zip(found[:2], found[2:], strict=True):
        assert part.loss == pytest.approx(whole.loss, rel=1e-8)
        assert len(gradients) == len(own) > 4
        largest = max(float(value.abs().max()) for value in gradients)
        for one, other in zip(gradients, own, strict=True):
            # Logarithms of covariances that are nearly singular amplify rounding.
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * largest)
