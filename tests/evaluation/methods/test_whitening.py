"""Whitening by hand, as a teleport and as gauges."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_cases import lines

from metateleport import TaskFamily
from metateleport.evaluation import (
    BASELINES,
    Whitening,
)


class TestWhitening:
    @pytest.mark.parametrize(
        ("variant", "cost"),
        [
            ("gauge of the upper layers", 1),
            ("features, upper layers", 1),
            ("features", 4 / 3),
            # The lower layer's gauge also runs that layer once more.
            ("gauge per tensor", 3 / 2),
            ("alternating", (1 + 4 / 3) / 2),
            ("gauges in turn", (1 + 3 / 2) / 2),
        ],
    )
    def test_it_pays_for_what_it_rebuilds(self, family: TaskFamily, variant: str, cost: float) -> None:
        loss = Whitening(1e-3, variant).run(family.stack(range(2), "held-out"), 60).loss
        # Every step lowers the loss, so that the grid shows when each was paid for.
        assert len(np.unique(loss[0])) - 1 == pytest.approx(60 / cost, abs=1)

    @pytest.mark.parametrize("variant", ["alternating", "gauges in turn", "features, upper layers"])
    def test_it_solves_the_last_layer(self, family: TaskFamily, variant: str) -> None:
        trajectory = Whitening(1.0, variant, relative=False).run(family.stack(range(4), "held-out"), 20)
        assert (trajectory.loss[:, -1] < 1e-16 * trajectory.loss[:, 0]).all()
        plain = BASELINES["gd"].make(lr=1e-3).run(family.stack(range(4), "held-out"), 20)
        assert (plain.loss[:, -1] > 1e-4 * plain.loss[:, 0]).all()

    def test_gauges_never_move_along_the_orbit_and_teleports_do(self, family: TaskFamily) -> None:
        stack = family.stack(range(2), "held-out")
        assert Whitening(1.0, "gauge per tensor").moves_by == "undone"
        assert Whitening(1.0, "gauge per tensor").run(stack, 4).drift_max is None
        assert Whitening(1.0, "features").moves_by == "stays"
        assert (Whitening(1.0, "features").run(stack, 4).drift_max or 0) > 0

    def test_without_symmetries_it_is_gradient_descent(self) -> None:
        stack = lines(2)
        loss = Whitening(0.1, relative=False).run(stack, 5).loss
        np.testing.assert_allclose(loss, BASELINES["gd"].make(lr=0.1).run(stack, 5).loss, rtol=1e-12)

    def test_an_unknown_variant_is_refused(self) -> None:
        with pytest.raises(ValueError, match="one of alternating, gauge per tensor"):
            Whitening(1.0, "sideways")
