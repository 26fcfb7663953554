"""What the outer loop tells of the length of runs, and which losses count."""

from __future__ import annotations

import pytest
import torch

import metateleport as mt
from metateleport.learned import MetaOptimizer
from metateleport.settings import SettingsError
from metateleport.training.distributed import ALONE
from metateleport.training.estimators import Truncated
from metateleport.training.outer import EvolutionSettings, TruncatedSettings
from metateleport.training.particles import Particles
from metateleport.training.recipe import Recipe
from metateleport.training.trainer import MetaTrainer
from metateleport.training.unroll import Unroll

FAMILY = {"name": "matrix_factorisation", "width": 6, "rank": 2, "batch": 20}


def recipe(**outer: object) -> Recipe:
    tables = {
        "family": FAMILY,
        "rule": {"kind": "gauged", "hidden": 4, "plain_hidden": 4},
        "outer": {"meta_steps": 2, "tasks": 2, "unroll": 3, "horizon": 3, **outer},
        "validation": {"tasks": 2, "every": 2},
    }
    return Recipe.read(tables)


def stacks() -> mt.families.TaskStack:
    return mt.load_family("matrix_factorisation", {"width": 6, "rank": 2, "batch": 20}).stack(range(2))


def meta() -> MetaOptimizer:
    torch.manual_seed(0)
    return MetaOptimizer(recipe().networks(("GL",)))


def test_one_stack_of_four_is_not_told() -> None:
    told = TruncatedSettings(told=True)
    assert [told.total(stack, 30) for stack in range(5)] == [30, 30, 30, None, 30]
    assert TruncatedSettings().total(0, 30) is None


def test_only_rules_that_make_use_of_it_are_told() -> None:
    assert recipe(told=True).outer.told
    with pytest.raises(SettingsError, match="makes no use of it"):
        recipe(told=True).changed({"rule.kind": "adaptive"})


def test_the_meta_loss_is_the_mean_of_the_last_losses() -> None:
    networks = meta()
    whole = Unroll(stacks(), networks, total=4).window(4, track=False)
    for late, count in ((1.0, 4), (0.5, 2), (0.01, 1)):
        outer = TruncatedSettings(tasks=2, unroll=4, horizon=4, late=late, told=True)
        found = Truncated([stacks()], networks, outer, ALONE, total=4).meta_gradient(blind=False, seconds=0.0)
        assert found.loss == pytest.approx(float(whole[-count:].mean()), rel=1e-5)
        weights = torch.nn.utils.parameters_to_vector(networks.parameters()).detach().expand(2, -1)
        seen = Particles(stacks(), networks, total=4).window(4, weights, last=outer.last(4))
        assert torch.allclose(seen.losses, whole[-count:].mean(0).to(seen.losses), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["tbptt", "es"])
def test_a_training_tells_and_changes_the_networks(estimator: str) -> None:
    extra = {} if estimator == "tbptt" else {"estimator": "es"}
    tables = recipe().table()
    tables["outer"] = {"meta_steps": 2, "tasks": 2, "horizon": 6, "late": 0.5, "told": True, **extra}
    if estimator == "tbptt":
        tables["outer"]["unroll"] = 3
    made = Recipe.read(tables)
    assert isinstance(made.outer, EvolutionSettings if extra else TruncatedSettings)
    torch.manual_seed(0)
    networks = MetaOptimizer(made.networks(("GL",)))
    before = [value.detach().clone() for value in networks.rule.networks.parameters()]  # type: ignore[union-attr]
    trainer = MetaTrainer(made, mt.load_family("matrix_factorisation", {"width": 6, "rank": 2, "batch": 20}), networks)
    trainer.run()
    after = list(networks.rule.networks.parameters())  # type: ignore[union-attr]
    assert trainer.progression.meta_step == 2
    assert not trainer.progression.skipped
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_other_tensors_of_a_gauged_rule_start_from_an_adaptive_one() -> None:
    from metateleport.training.recipe import TrainingError
    from metateleport.training.warm_start import warm_start, warm_start_checkpoint

    digits = warm_start_checkpoint("digits", seed=0)
    made = recipe().changed({"rule.plain_hidden": "32"})
    networks = MetaOptimizer(made.networks(("GL",)))
    warm_start(networks, digits)
    assert torch.equal(networks.rule.plain.head.bias, digits.learned.rule.head.bias)  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match="plain_hidden = 4"):
        warm_start(meta(), digits)


def test_held_out_data_have_their_share_of_the_meta_loss() -> None:
    family = mt.load_family("digits", {"batch": 20, "hidden": 4})
    recipe_ = Recipe.read({"family": {"name": "digits"}, "rule": {"kind": "adaptive", "hidden": 3}})
    torch.manual_seed(0)
    networks = MetaOptimizer(recipe_.networks(("diagonal",)))
    stack = family.stack(range(2))
    assert stack.held_out is not None
    first = stack.losses_at(stack.tensors(), stack.held_out).detach()
    seen = Unroll(family.stack(range(2)), networks).window(3, track=False)
    unroll = Unroll(stack, networks, unseen=1.0)
    unseen = unroll.window(3, track=False)
    last = stack.losses_at(stack.tensors(), stack.held_out).detach()
    assert torch.allclose(unseen, (last / first).log().expand(3, -1), atol=1e-5)
    mixed = Unroll(family.stack(range(2)), networks, unseen=0.25).window(3, track=False)
    assert torch.allclose(mixed, 0.75 * seen + 0.25 * unseen, atol=1e-5)


def test_tasks_without_held_out_data_have_no_share_of_it() -> None:
    with pytest.raises(mt.families.FamilyError, match=r"outer.unseen = 0.5 is a share for held-out data"):
        Unroll(stacks(), meta(), unseen=0.5).window(1, track=False)


def test_a_good_start_is_kept_where_training_finds_nothing_better() -> None:
    tables = {
        "family": {"name": "digits", "batch": 20, "hidden": 4, "samples": 40},
        "rule": {"kind": "adaptive", "hidden": 3, "told": True},
        "outer": {"meta_steps": 2, "tasks": 2, "unroll": 4, "horizon": 4, "told": True, "lr": 1e3},
        "validation": {"tasks": 2, "every": 1},
    }
    recipe_ = Recipe.read(tables)
    networks = MetaOptimizer(recipe_.networks(("diagonal",)))
    trainer = MetaTrainer(recipe_, mt.load_family("digits", recipe_.family.settings), networks)
    start = {name: value.clone() for name, value in networks.state_dict().items()}
    trainer.run()
    (first, *later) = trainer.progression.validations
    assert first[0] == 0
    assert min(score for _, score in later) > first[1]
    assert all(torch.equal(value, start[name]) for name, value in trainer.best.items())
