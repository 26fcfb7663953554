"""What the learned optimizer remembers is each parameter's own: saved, loaded, named, there now and then."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from learned_cases import backward, meta_of, mlp, teleporting, trained, weights
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed

import metateleport as mt
from metateleport.learned import MetaOptimizer
from metateleport.point import Point

RULES = [{}, {"mode": "lr+tele", "gauge": "linearised", "groups": ("GL",), "stays": False}, {"mode": "update+tele"}]
MOMENTS = ("momentum", "squares", "recent", "weights", "seen")


def meta_for(config: dict[str, Any]) -> MetaOptimizer:
    return teleporting() if config.get("mode") == "update+tele" else meta_of(**config)


def made(model: nn.Module, config: dict[str, Any] | None = None, **settings: Any) -> mt.LearnedOptimizer:
    return mt.LearnedOptimizer(model, meta_for(config or {}), **settings)


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def halfway(config: dict[str, Any]) -> tuple[nn.Module, mt.LearnedOptimizer]:
    model = mlp()
    optimizer = made(model, config)
    list(trained(model, optimizer, 3))
    return model, optimizer


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", RULES)
@pytest.mark.parametrize("told", [True, False])
def test_a_run_that_was_saved_goes_on_with_the_same_steps(told: bool, config: dict[str, Any]) -> None:
    def steps(model: nn.Module, optimizer: mt.LearnedOptimizer) -> Tensor:
        for number in range(3):
            loss = backward(model, 20 + number)
            optimizer.step(loss=loss if told else None)
        return weights(model)

    model, optimizer = halfway(config)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    expected = steps(model, optimizer)
    other = mlp(seed=1)
    again = made(other, config)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert (again.steps, again.skipped) == (3, 0)
    assert torch.equal(steps(other, again), expected)


def test_moments_of_half_precision_weights_are_loaded_in_single_precision() -> None:
    model, other = mlp(torch.bfloat16), mlp(torch.bfloat16)
    optimizer, again = made(model), made(other)
    list(trained(model, optimizer, 3))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        ours = again.state[mine]
        assert {ours[name].dtype for name in MOMENTS} == {torch.float32}
        assert ours["compensation"].dtype == torch.bfloat16
        for name in (*MOMENTS, "compensation"):
            assert torch.equal(ours[name], optimizer.state[theirs][name])


def test_what_is_loaded_is_no_view_of_what_was_given() -> None:
    _, optimizer = halfway(RULES[1])
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved["state"])
    ends = []
    for overwritten in (False, True):
        other = mlp()
        again = made(other, RULES[1])
        again.load_state_dict(saved)
        if overwritten:
            # As who loads a file into the same tensors once more.
            for entries in saved["state"].values():
                for value in entries.values():
                    value.zero_()
        ends.append(list(trained(other, again, 2))[-1])
        if not overwritten:
            for index, entries in saved["state"].items():
                assert all(torch.equal(value, kept[index][name]) for name, value in entries.items())
    assert torch.equal(*ends)


def test_a_saved_state_holds_tensors_alone_and_an_entry_for_each_parameter() -> None:
    _, optimizer = halfway(RULES[1])
    saved = optimizer.state_dict()["state"]
    assert set(saved) == set(range(4))
    assert all(isinstance(value, Tensor) for entries in saved.values() for value in entries.values())
    assert {float(entries["step"]) for entries in saved.values()} == {3.0}
    # What is remembered of all is saved once.
    assert [any(key.startswith("learned/") for key in saved[index]) for index in range(4)] == [True] + 3 * [False]


@pytest.mark.parametrize("config", RULES)
@pytest.mark.parametrize(("begun", "flat"), [(False, False), (False, True), (True, False)])
def test_the_interface_of_distributed_checkpoints(begun: bool, flat: bool, config: dict[str, Any]) -> None:
    model = mlp()
    optimizer = made(model, config)
    if begun:
        list(trained(model, optimizer, 3))
    optimizer.zero_grad()
    before, options = weights(model), distributed.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(distributed.get_state_dict(model, optimizer, options=options))
    assert torch.equal(weights(model), before)
    other = mlp(seed=1)
    again = made(other, config)
    distributed.set_state_dict(other, again, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    assert torch.equal(weights(other), before)
    assert again.steps == optimizer.steps
    ours, theirs = list(trained(other, again, 3)), list(trained(model, optimizer, 3))
    assert torch.equal(ours[-1], theirs[-1])


def test_a_stand_in_remembers_the_step_and_not_the_teleport_before_it() -> None:
    model = mlp()
    optimizer = mt.LearnedOptimizer(model, teleporting(mode="lr+tele"))
    step, seen = optimizer.meta.rule.step, []

    def noted(point: Point, *rest: Any) -> Any:
        start = {name: value.clone() for name, value in point.parameters.items()}
        moved, state = step(point, *rest)
        seen.append({name: value - start[name] for name, value in moved.items()})
        return moved, state

    optimizer.meta.rule.step = noted  # type: ignore[method-assign]
    list(trained(model, optimizer, 1))
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.size) > 0
    assert optimizer.loop.state is not None
    assert optimizer.loop.state.stand_in is not None
    for name, change in optimizer.loop.state.stand_in.change.items():
        torch.testing.assert_close(change, seen[0][name])


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_the_model_s_where_there_is_one() -> None:
    model = mlp()
    assert list(made(model)._named()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    groups = [{"params": list(model[2].parameters())}, {"params": list(model[0].parameters())}]
    optimizer = mt.LearnedOptimizer(groups, meta_of())
    assert list(optimizer._named()) == ["0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"]
    named = mt.LearnedOptimizer(model.named_parameters(), meta_of())
    assert list(named._named()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_wrapped_model_is_named_as_the_one_inside() -> None:
    model = mlp()
    optimizer = made(nn.DataParallel(model))
    assert optimizer.model is model
    assert list(optimizer._named()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("how", ["model", "parameters", "named", "groups"])
def test_parameters_alone_are_stepped_as_a_model_s(how: str) -> None:
    """Layers are told apart by their shapes where they have no names."""

    def run(how: str) -> Tensor:
        model = mlp()
        given: Any = {
            "model": model,
            "parameters": model.parameters(),
            "named": model.named_parameters(),
            "groups": [{"params": list(each.parameters())} for each in (model[0], model[2])],
        }[how]
        return list(trained(model, mt.LearnedOptimizer(given, meta_of()), 4))[-1]

    torch.testing.assert_close(run(how), run("model"))


# --- parameters that come and go -------------------------------------------------------------------------------------


def two(seed: int = 0) -> nn.ModuleDict:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()


def feed(
    model: nn.ModuleDict, optimizer: mt.LearnedOptimizer, uses: list[str], told: bool = False, factor: float = 1.0
) -> None:
    """A step for each of `uses`, which name the layers that it uses; its loss times a factor is told or is not."""
    for number, use in enumerate(uses):
        optimizer.zero_grad()
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        loss = torch.stack([(model[name](x) - x.sum(1, keepdim=True)).square().mean() for name in use]).sum()
        loss.backward()
        optimizer.step(loss=factor * loss.detach() if told else None)


def test_a_parameter_without_a_gradient_keeps_its_moments_and_stays() -> None:
    model = two()
    optimizer = made(model)
    feed(model, optimizer, ["ab", "ab"])
    kept = {name: optimizer.state[model["b"].weight][name].clone() for name in MOMENTS}
    before = weights(model["b"])
    feed(model, optimizer, ["a", "a", "a"])
    assert torch.equal(weights(model["b"]), before)
    for name in MOMENTS:
        assert torch.equal(optimizer.state[model["b"].weight][name], kept[name])
    feed(model, optimizer, ["b"])
    state = optimizer.state
    assert float(state[model["b"].weight]["seen"]) == 3
    assert float(state[model["a"].weight]["seen"]) == 5
    assert not torch.equal(state[model["b"].weight]["momentum"], kept["momentum"])


def test_a_parameter_that_appears_later_has_moments_of_its_own_from_then_on() -> None:
    model, alone = two(), two()
    optimizer = made(model)
    feed(model, optimizer, ["a", "a"])
    assert "momentum" not in optimizer.state[model["b"].weight]
    feed(model, optimizer, ["ab"])
    first = made(alone)
    feed(alone, first, ["ab"])
    b, fresh = optimizer.state[model["b"].weight], first.state[alone["b"].weight]
    for name in ("squares", "recent", "seen"):
        assert torch.equal(b[name], fresh[name])


@pytest.mark.filterwarnings("ignore:.*not made for this", "ignore:.*without symmetries")
def test_secants_of_other_tensors_are_dropped() -> None:
    """A pair of the steps of some tensors says nothing of those of others."""
    model = two()
    optimizer = made(model, {"mode": "lr", "secants": 3}, deterministic=True)
    known = []
    for use in ["ab", "ab", "ab", "a", "a", "ab"]:
        feed(model, optimizer, [use], told=True)
        assert optimizer.loop.state is not None
        known.append(len(optimizer.loop.state.rule["secants"]))
    assert known == [0, 1, 2, 0, 1, 0]


def test_a_step_is_taken_back_with_tensors_that_have_no_gradient_now() -> None:
    model = two()
    optimizer = made(model, deterministic=True)
    start = weights(model)
    feed(model, optimizer, ["ab"], told=True)
    once = weights(model) - start
    feed(model, optimizer, ["a"], told=True, factor=1e3)
    # Damped; the network sees that it is.
    torch.testing.assert_close(weights(model) - start, 0.3 * once, rtol=0.02, atol=0)


@pytest.mark.parametrize("uses", [["ab", "a", "b", "ab"], ["a", "ab", "b"], ["b", "a"]])
@pytest.mark.parametrize("config", RULES[:2])
@pytest.mark.filterwarnings("ignore:.*not made for this", "ignore:.*without symmetries")
def test_saved_between_such_steps_it_goes_on_alike(uses: list[str], config: dict[str, Any]) -> None:
    model, other = two(), two()
    optimizer, again = made(model, config), made(other, config)
    feed(model, optimizer, uses)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for each, taken in ((model, optimizer), (other, again)):
        feed(each, taken, uses)
    assert torch.equal(weights(model), weights(other))


def test_copies_go_on_by_themselves() -> None:
    model, optimizer = halfway(RULES[1])
    other, again = copy.deepcopy((model, optimizer))
    assert again.model is other
    expected = list(trained(model, optimizer, 2))[-1]
    assert torch.equal(list(trained(other, again, 2))[-1], expected)


# --- state dicts of something else, models that change ---------------------------------------------------------------


def test_a_state_of_another_checkpoint_or_optimizer_is_refused_before_anything_moves() -> None:
    model = mlp()
    optimizer = made(model)
    list(trained(model, optimizer, 2))
    before = [value.clone() for value in model.parameters()]
    other = mt.LearnedOptimizer(model, "digits")
    with pytest.raises(ValueError, match="another checkpoint"):
        other.load_state_dict(optimizer.state_dict())
    for foreign in (torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters(), 0.1)):
        with pytest.raises(ValueError, match="not a LearnedOptimizer's"):
            optimizer.load_state_dict(foreign.state_dict())
    assert all(torch.equal(value, each) for value, each in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_the_same_parameters_under_other_names_go_on() -> None:
    model, again = mlp(), mlp()
    optimizer = mt.LearnedOptimizer(list(model.parameters()), meta_of())
    for _ in range(3):
        optimizer.step(loss=backward(model))
    saved = optimizer.state_dict()
    again.load_state_dict(model.state_dict())
    resumed = mt.LearnedOptimizer(again, meta_of(), [])
    resumed.load_state_dict(saved)
    resumed.step(loss=backward(again))
    assert resumed.steps == 4


@pytest.mark.filterwarnings("ignore:.*not made for this", "ignore:.*without what a pass")
def test_what_a_model_got_later_is_named_and_what_it_lost_does_not_stop_it() -> None:
    model = mlp()
    optimizer = mt.LearnedOptimizer(model, "leaky_mlp_mixture")
    optimizer.step(loss=backward(model))
    model[0].bias = None
    optimizer.step(loss=backward(model))
    assert optimizer.steps == 2
    model[2] = torch.nn.Linear(model[2].in_features, model[2].out_features).double()
    with pytest.warns(UserWarning, match=r"'2\.weight' was added to the model after.*add_param_group"):
        optimizer.step(loss=backward(model))


def test_hooks_go_with_their_optimizer() -> None:
    model = mlp()

    def hooks() -> int:
        return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())

    for _ in range(3):
        optimizer = mt.LearnedOptimizer(model, "digits")
        assert hooks() > 0
        del optimizer
        gc.collect()
        assert hooks() == 0


def test_a_model_that_changes_its_precision_goes_on() -> None:
    model = mlp()
    optimizer = mt.LearnedOptimizer(model, "digits")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        x = torch.ones(4, model[0].in_features, dtype=dtype)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()
    assert optimizer.steps == 8


def test_a_state_whose_symmetries_are_due_is_gone_on_from_where_they_rest() -> None:
    model = mlp()
    optimizer = mt.LearnedOptimizer(model, "digits")

    def step(number: int) -> None:
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()

    step(0)
    began = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    number = 0
    while not all(left for left, _ in optimizer._rests):
        number += 1
        assert number < 60
        step(number)
    weights_of, state = began
    model.load_state_dict(weights_of)
    optimizer.load_state_dict(state)
    assert not any(left for left, _ in optimizer._rests)
    step(1)
    assert optimizer.last_step is not None
    assert len(optimizer.last_step.moves) == len(optimizer.symmetries) > 0
