"""Ratios of two methods on the same tasks, and their intervals over tasks and meta-seeds."""

from __future__ import annotations

import numpy as np
import pytest

from metateleport.evaluation import (
    paired_ratio,
    ratio_over_seeds,
)


class TestPairedRatio:
    def test_it_is_paired(self) -> None:
        reference = np.logspace(-6, 6, 64)
        ratio = paired_ratio(2 * reference, reference)
        assert ratio.ratio == pytest.approx(2)
        assert ratio.low == pytest.approx(2)
        assert ratio.high == pytest.approx(2)

    def test_the_interval_covers_the_truth_about_as_often_as_it_says(self) -> None:
        source = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            pair = paired_ratio(3 * np.exp(source.normal(size=40)), np.ones(40), draws=300)
            hits += pair.low <= 3 <= pair.high
        assert 0.88 <= hits / 200 <= 0.99

    def test_over_seeds_the_interval_covers_the_truth_about_as_often_as_it_says(self) -> None:
        source = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            # Seeds and tasks both have effects of their own, and there are few seeds.
            logs = source.normal(size=(8, 1)) + source.normal(size=(1, 20)) + 0.3 * source.normal(size=(8, 20))
            pair = ratio_over_seeds(3 * np.exp(logs), np.ones((8, 20)), draws=200)
            hits += pair.low <= 3 <= pair.high
        assert 0.85 <= hits / 200 <= 0.99

    def test_over_seeds_it_is_paired_and_an_outlier_moves_it_little(self) -> None:
        reference = np.logspace(-6, 6, 20).reshape(4, 5)
        ratio = ratio_over_seeds(2 * reference, reference)
        assert tuple(ratio) == pytest.approx((2, 2, 2))
        lost = np.full((4, 5), 2.0)
        lost[0, 0] = np.inf
        assert ratio_over_seeds(lost * reference, reference).ratio == pytest.approx(2)

    def test_over_seeds_more_tasks_do_not_make_up_for_seeds(self) -> None:
        seeds = np.exp(np.random.default_rng(1).normal(size=(5, 1)))
        widths = []
        for tasks in (10, 1000):
            pair = ratio_over_seeds(np.repeat(seeds, tasks, axis=1), np.ones((5, tasks)), draws=200)
            widths.append(pair.high / pair.low)
        assert widths[1] > 0.9 * widths[0] > 1.5

    def test_values_that_are_not_paired_raise(self) -> None:
        with pytest.raises(ValueError, match="same tasks"):
            paired_ratio([1.0, 2.0], [1.0])
        with pytest.raises(ValueError, match="same tasks"):
            ratio_over_seeds([[1.0, 2.0]], [[1.0]])
        with pytest.raises(ValueError, match="one loss for each task"):
            paired_ratio([[1.0, 2.0]], [[1.0, 2.0]])
        with pytest.raises(ValueError, match="a row of losses for each"):
            ratio_over_seeds([1.0, 2.0], [1.0, 2.0])
