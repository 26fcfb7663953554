"""`lora_text`: adapters of a character transformer; what splits share, and what a task is judged by."""

from __future__ import annotations

import itertools

import torch
from gallery_cases import TASKS, load
from torch import nn

import metateleport as mt
from metateleport.families import SPLITS
from metateleport.files import run_file

SMALL = {"rank": 2, "samples": 12, "batch": 3}


def test_splits_share_no_module_and_held_out_tasks_have_a_backbone_of_their_own() -> None:
    module = run_file(TASKS / "lora_text.py", "test_")
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(module.MODULES[one]) & set(module.MODULES[other])
    embeddings = {
        split: load("lora_text", SMALL).task(0, split).model.get_parameter("embed.weight") for split in SPLITS
    }
    assert torch.equal(embeddings["train"], embeddings["validation"])
    assert not torch.equal(embeddings["train"], embeddings["held-out"])


def test_a_character_sees_none_behind_it() -> None:
    module = run_file(TASKS / "lora_text.py", "test_")
    model = module.CharacterTransformer()
    inputs = torch.randint(90, (2, 64))
    changed = inputs.clone()
    changed[:, 40] += 1
    before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_the_shipped_backbones_know_prose() -> None:
    """A character of prose takes about 2 nats by this small a network; all alike take 4.6."""
    module = run_file(TASKS / "lora_text.py", "test_")
    prose = (
        "The king is come to see the play, and all the lords of the realm are with him; but the queen has gone to her "
        "chamber, for she would not look on those who had done her brother wrong. "
    )
    inputs, wanted = module.windows(module.encoded(prose * 2), torch.arange(0, 160, 8))
    for text in ("topics", "shakespeare"):
        model = module.CharacterTransformer()
        model.load_state_dict(module.pretrained(text))
        assert float(module.next_character(model(inputs), wanted).detach()) < 2.9, text


def test_it_is_judged_by_text_that_it_does_not_train_on() -> None:
    family = load("lora_text", {**SMALL, "samples": 400})
    task = family.task(0, "held-out")
    assert task.measure is not None
    assert task.measure.name == "held-out loss"
    seen = {tuple(window[:32].tolist()) for window in task.inputs[0]}
    kept = {tuple(window[:32].tolist()) for window in task.measure.data[0]}
    assert not seen & kept
    stack = family.stack([0, 1], "held-out")
    found = stack.measured(stack.tensors())
    for place, each in enumerate(stack.tasks):
        assert each.measure is not None
        alone = nn.functional.cross_entropy(
            each.model(each.measure.data[0]).flatten(0, 1), each.measure.data[1].flatten()
        )
        torch.testing.assert_close(found[place], alone.detach())


def test_targets_are_those_that_are_found() -> None:
    for targets, layers in (("all", 6), ("attention", 4), ("query-value", 2)):
        task = load("lora_text", {**SMALL, "targets": targets}).task(0)
        assert len(task.symmetries) == 2 * layers
    found = mt.find_symmetries(task.model, task.inputs[0][:2])
    assert {each.key for each in task.symmetries} == {each.key for each in found if each.kind == "LoRA pair"}
