"""The contract: what torch's own optimizers do in a training loop, the learned one does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from .cells import CHECKPOINTS, Cell, judge
from .models import PROBLEMS
from .registry import IDIOMS
from .stand_in import ADAMW, GAUGED
from .table import MOST_REFUSALS, Table, brief, chosen, covering, is_tried


def _hold(cells: Sequence[Cell]) -> None:
    verdicts = {cell: judge(cell) for cell in cells}
    wrong = [f"{cell}: {verdict.why}" for cell, verdict in verdicts.items() if verdict.kind == "wrong"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_every_idiom(idiom: str) -> None:
    _hold([cell for cell in brief() if cell.idiom == idiom])


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_model_with_every_checkpoint_in_plain_steps(checkpoint: str) -> None:
    _hold([Cell("step()", problem, checkpoint) for problem in PROBLEMS])


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize("idiom", IDIOMS)
def test_every_idiom_with_every_model_and_every_checkpoint(idiom: str) -> None:
    _hold([cell for cell in covering() if cell.idiom == idiom])


def test_few_checkpoints_refuse_the_perceptron() -> None:
    refused = {name: judge(Cell("step()", "mlp", name)) for name in CHECKPOINTS}
    refused = {name: verdict for name, verdict in refused.items() if verdict.kind == "refused"}
    assert len(refused) <= MOST_REFUSALS, refused


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("idiom", IDIOMS)
def test_the_whole_table(idiom: str) -> None:
    table = Table([cell for cell in chosen(None, None, None, "cpu") if cell.idiom == idiom])
    list(table.rows())
    assert not table.wrong, "\n".join(table.footer())


@pytest.mark.cuda
@pytest.mark.parametrize("idiom", IDIOMS)
def test_every_idiom_on_a_gpu(idiom: str) -> None:
    _hold([cell for cell in covering(device="cuda") if cell.idiom == idiom])


def test_the_parts_that_are_run_meet_all() -> None:
    cells = covering()
    assert {(cell.idiom, cell.problem) for cell in cells} == set(itertools.product(IDIOMS, PROBLEMS))
    assert {(cell.idiom, cell.checkpoint) for cell in cells} == set(itertools.product(IDIOMS, CHECKPOINTS))
    assert {(cell.problem, cell.checkpoint) for cell in cells} == set(itertools.product(PROBLEMS, CHECKPOINTS))
    short = brief()
    assert {cell.idiom for cell in short} == set(IDIOMS)
    perceptrons = {("mlp", checkpoint) for checkpoint in CHECKPOINTS}  # by the test of refusals
    met = {(cell.problem, cell.checkpoint) for cell in short if is_tried(cell.idiom, cell.problem)} | perceptrons
    assert met == set(itertools.product(PROBLEMS, CHECKPOINTS))


@pytest.mark.slow(seconds=2)
def test_adamw_keeps_the_contract() -> None:
    """It is torch's: what AdamW does not keep could not be asked for."""
    _hold([Cell(idiom, "mlp", ADAMW) for idiom in IDIOMS])


@pytest.mark.slow(seconds=4)
def test_steps_in_gauges_keep_the_contract() -> None:
    _hold([Cell(idiom, "lora, by hand", GAUGED) for idiom in IDIOMS])


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("optimizer", [ADAMW, GAUGED])
@pytest.mark.parametrize("idiom", IDIOMS)
def test_optimizers_made_by_hand_keep_the_contract_everywhere(idiom: str, optimizer: str) -> None:
    _hold([Cell(idiom, problem, optimizer) for problem in PROBLEMS])


def test_the_models_are_the_same_each_time() -> None:
    for problem in PROBLEMS.values():
        torch.rand(3)
        pairs = zip(problem.model().parameters(), problem.model().parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), problem.name
        labels = problem.data(64)[-1]
        assert len(labels.unique()) == 3, problem.name
