"""Evolution strategies: the mean of the estimator, particles side by side, and memory that no horizon adds to."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from learned_cases import shape_of
from rank_cases import evolved, in_ranks, networks
from torch import Tensor, nn
from training_cases import small, trainer

import metateleport as mt
from metateleport.learned import MetaOptimizer
from metateleport.training import PersistentSettings, Recipe
from metateleport.training.distributed import ALONE
from metateleport.training.evolution import Evolution
from metateleport.training.particles import Particles, side_by_side

FAMILY = mt.load_family("leaky_mlp", {"width": 3, "distribution": "normal"})
WINDOWS, UNROLL = 3, 2


def meta_optimizer(mode: str = "lr", **given: Any) -> MetaOptimizer:
    torch.manual_seed(0)
    return MetaOptimizer(shape_of(mode, **{"hidden": 1, **given})).double()


def settings(pairs: int, spread: float, unroll: int = UNROLL, horizon: int = UNROLL * WINDOWS) -> PersistentSettings:
    return PersistentSettings(tasks=pairs, spread=spread, unroll=unroll, horizon=horizon, blind=0.0)


def estimates(meta: MetaOptimizer, outer: PersistentSettings, number: int = 0) -> list[Tensor]:
    """The meta-gradient of every window, all pairs on the same task."""
    estimator = Evolution(
        FAMILY.stack([0] * 2 * outer.tasks, dtype=torch.float64), meta, outer, ALONE, number, outer.unroll
    )
    found = []
    for _ in range(outer.horizon // outer.unroll):
        estimator.meta_gradient(blind=False, seconds=0.0)
        found.append(nn.utils.parameters_to_vector([each.grad for each in meta.parameters()]))
    return found


def differences(meta: MetaOptimizer, windows: int = WINDOWS, size: float = 1e-5) -> Tensor:
    """Central differences of the sum of the windows' losses, in every weight."""
    weights = nn.utils.parameters_to_vector(meta.parameters()).detach()
    moves = size * torch.eye(len(weights), dtype=torch.float64)
    particles = Particles(FAMILY.stack([0] * 2 * len(weights), dtype=torch.float64), meta)
    rows = weights + torch.cat((moves, -moves))
    total = sum((particles.window(UNROLL, rows).losses for _ in range(windows)), torch.zeros(()))
    upper, lower = total.chunk(2)
    return (upper - lower) / (2 * size)


def test_the_mean_over_all_directions_is_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws along the axes of all windows' perturbations together have the normal's covariance, without its noise."""
    meta = meta_optimizer()
    size = sum(each.numel() for each in meta.parameters())
    axes = (WINDOWS * size) ** 0.5 * torch.eye(WINDOWS * size, dtype=torch.float64)
    windows = axes.reshape(-1, WINDOWS, size)
    monkeypatch.setattr(Evolution, "_draws", lambda self: windows[:, self.window])
    found = estimates(meta, settings(len(axes), spread=1e-7))
    expected = differences(meta)
    assert torch.allclose(sum(found, torch.zeros(())), expected, rtol=1e-5, atol=1e-7)
    # The last window alone depends on the networks of the first, which truncation does not see.
    rest = differences(meta) - differences(meta, WINDOWS - 1)
    assert torch.allclose(found[-1], rest, rtol=1e-5, atol=1e-7)


@pytest.mark.slow(seconds=4)
def test_the_mean_over_draws_is_the_derivative_and_that_of_truncated_draws_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meta, outer = meta_optimizer(), settings(64, spread=1e-4)
    expected = differences(meta)
    along = expected / expected.norm()

    def mean() -> tuple[float, float]:
        found = torch.stack([sum(estimates(meta, outer, number), torch.zeros(())) @ along for number in range(12)])
        return float(found.mean() - expected.norm()), float(found.std() / len(found) ** 0.5)

    off, error = mean()
    assert abs(off) < 3 * error
    assert error < 0.15 * expected.norm()
    own = Evolution._draws

    def forgetting(self: Evolution) -> Tensor:
        self.drawn.zero_()
        return own(self)

    monkeypatch.setattr(Evolution, "_draws", forgetting)
    off, error = mean()
    assert abs(off) > 5 * error


def test_in_one_window_it_is_the_plain_strategy() -> None:
    persistent = small(mode="lr", estimator="pes", unroll=6, dtype="float64")
    plain = small(mode="lr", estimator="es", dtype="float64")
    both = []
    for recipe in (persistent, plain):
        learning = trainer(recipe)
        learning.run()
        both.append((learning.progression.meta_losses, learning.progression.validations))
    assert both[0] == both[1]


KINDS: dict[str, dict[str, Any]] = {
    "lr": {"mode": "lr", "secants": 2},
    "lr+tele": {"mode": "lr+tele"},
    "gauge": {"mode": "lr+tele", "stays": False, "gauge": "exact"},
    "tele": {"mode": "tele"},
    "adaptive": {"mode": "update", "update": "adaptive"},
    "tensor": {"mode": "update+tele", "update": "tensor"},
    "coordinate": {"mode": "update", "update": "coordinate"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_particles_side_by_side_are_those_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = meta_optimizer(**{**KINDS[kind], "hidden": 3, "groups": ("GL", "diagonal")})
    assert side_by_side(meta) is (kind != "coordinate")
    weights = nn.utils.parameters_to_vector(meta.parameters()).detach()
    rows = weights + 0.3 * torch.randn(4, len(weights), dtype=torch.float64)
    family = mt.load_family("leaky_mlp", {"width": 3, "distribution": "normal", "samples": 8})

    def followed() -> Tensor:
        particles = Particles(family.stack([0, 0, 1, 2], dtype=torch.float64), meta)
        return torch.stack([particles.window(3, rows * scale).losses for scale in (1.0, 0.9)])

    together = followed()
    monkeypatch.setattr("metateleport.training.particles.side_by_side", lambda _: False)
    alone = followed()
    assert torch.allclose(together, alone, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(alone[:, 0], alone[:, 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("count", "estimator"), [(2, "pes"), (4, "es")])
def test_any_number_of_processes_takes_the_same_meta_steps(count: int, estimator: str) -> None:
    changes = {"mode": "lr", "estimator": estimator, "horizon": 9, "spread": 0.05}
    expected, course = networks(ALONE, changes)
    every = in_ranks(count, networks, changes)
    for weights, own in every:
        assert torch.allclose(torch.tensor(weights), torch.tensor(expected), rtol=0, atol=1e-10)
        assert own["losses"] == pytest.approx(course["losses"], abs=1e-10)
    assert all(each == every[0] for each in every)


def test_a_step_exchanges_one_number_for_each_pair() -> None:
    for sizes in in_ranks(2, evolved, {"mode": "lr", "estimator": "pes", "tasks": 7, "meta_steps": 3}):
        assert sizes == [7 + 5] * 3


def test_no_tensor_is_kept_from_window_to_window() -> None:
    estimator = Evolution(FAMILY.stack([0] * 4), meta_optimizer().float(), settings(2, 0.01, 2, 200), ALONE, 0, 2)

    def kept() -> int:
        estimator.meta_gradient(blind=False, seconds=0.0)
        gc.collect()
        return sum(each.numel() for each in gc.get_objects() if isinstance(each, Tensor))

    sizes = [kept() for _ in range(8)]
    assert sizes[3:] == sizes[3:4] * 5


@pytest.mark.slow(seconds=8)
def test_it_learns_without_gradients() -> None:
    recipe = small(mode="lr", estimator="es", meta_steps=40, tasks=8, horizon=4, lr=4e-2, validation_every=20, hidden=2)
    learning = trainer(recipe)
    before = learning.validation_score()
    learning.run()
    assert learning.progression.best < before - 0.1


@pytest.mark.parametrize("estimator", ["es", "pes"])
def test_the_price_on_teleports_counts(estimator: str) -> None:
    def first(cost: float) -> tuple[list[Tensor], list[float]]:
        learning = trainer(small(estimator=estimator, teleport_cost=cost, meta_steps=1, dtype="float64"))
        learning.run()
        return [each.grad for each in learning.meta.parameters()], learning.progression.openness

    (free, opened), (priced, same) = first(0.0), first(1.0)
    assert len(opened) == 1
    assert opened == same
    assert 0 < opened[0] < 1
    assert any(not torch.equal(one, other) for one, other in zip(free, priced, strict=True))


def test_every_pair_draws_its_own_and_always_the_same() -> None:
    meta, outer = meta_optimizer(), settings(3, 0.1)
    stack = FAMILY.stack([0] * 6, dtype=torch.float64)
    rows = []
    for number, window in itertools.product((0, 1), (0, 1)):
        estimator = Evolution(stack, meta, outer, ALONE, number, outer.unroll)
        estimator.window = window
        rows += [*estimator._draws()]
        assert torch.equal(estimator._draws(), torch.stack(rows[-3:]))
    assert len({row.numpy().tobytes() for row in rows}) == 12


def test_a_recipe_says_which() -> None:
    recipe = Recipe.read({"family": {"name": "leaky_mlp"}, "rule": {"kind": "lr"}, "outer": {"estimator": "pes"}})
    changed = recipe.changed({"outer.tasks": "4"}).changed({"outer.estimator": "es"})
    assert (changed.outer.estimator, changed.outer.tasks, changed.outer.window) == ("es", 4, 30)
    assert changed.changed({"outer.estimator": "tbptt"}).outer.table()["first_order"] is False
