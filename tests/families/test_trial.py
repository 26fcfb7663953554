"""Models of tasks that are out of the ordinary: they train in stacks, or a `FamilyError` says why before any work."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import metateleport as mt
from metateleport.evaluation import BASELINES, REFERENCES, Method, evaluate
from metateleport.evaluation.methods.learned import learned_methods
from metateleport.families import FamilyError, TaskStack
from metateleport.families.trial import StackError, check_evaluation, check_second_order
from metateleport.training import Unroll

mse = nn.functional.mse_loss


class Net(nn.Module):
    """Runs a function of itself and its inputs."""

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self._run = [run]
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self._run[0](self, *inputs)


def perceptron(self: Any, x: Tensor) -> Tensor:
    return self.b(torch.relu(self.a(x)))


def layers() -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3)}


def last_of_sequence(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x.unsqueeze(-1))[0][:, -1])


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def counting(self: Any, x: Tensor) -> Tensor:
    self.runs.add_(1)
    return self.a(x)


def with_a_counter() -> nn.Module:
    model = Net(counting, a=nn.Linear(4, 3))
    model.register_buffer("runs", torch.zeros(()))
    return model


def stack_of(
    build: Callable[[], nn.Module],
    loss: Callable[..., Any] = mse,
    inputs: Callable[[], Tensor] = lambda: torch.randn(12, 4),
    targets: Callable[[], Tensor] = lambda: torch.randn(12, 3),
    symmetries: Callable[[nn.Module], Any] = lambda _: (),
    freeze: Callable[[nn.Module], Any] = lambda _: None,
    tasks: int = 2,
) -> TaskStack:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Case(mt.TaskFamily):
        name: ClassVar[str] = "case"

        def sample(self, seed: int) -> mt.Task:
            model = build()
            found = symmetries(model)
            freeze(model)
            return mt.Task(model, loss, (inputs(),), (targets(),), symmetries=found, seed=seed)

    return Case().stack(range(tasks))


def methods() -> list[Method]:
    learned = learned_methods(mt.checkpoint.load_checkpoint("leaky_mlp"))[:1]
    made = [BASELINES["adam"].make(lr=0.01), BASELINES["lbfgs"].make(), REFERENCES["gauss-newton"].make()]
    return [*learned, *made]


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "a weight that is not used": lambda: Net(perceptron, **layers(), spare=nn.Linear(5, 5)),
    "batch normalisation": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    "tied weights": tied,
    "a buffer written in place": with_a_counter,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.ReLU(), nn.Linear(6, 3)),
}
ONE_BY_ONE: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Net(last_of_sequence, a=nn.LSTM(1, 6, batch_first=True), b=nn.Linear(6, 3)),
    "GRU of two layers": lambda: Net(last_of_sequence, a=nn.GRU(1, 6, 2, batch_first=True), b=nn.Linear(6, 3)),
    "item": lambda: Net(lambda self, x: self.a(x) * (1.0 if x.sum().item() > 1e9 else 0.5), a=nn.Linear(4, 3)),
    "a branch on data": lambda: Net(lambda self, x: self.a(x) if x.sum() < 1e9 else x, a=nn.Linear(4, 3)),
}


def trains(stack: TaskStack) -> None:
    for method in methods()[:3]:
        loss = method.run(stack, 12).loss
        assert (loss[:, -1] < loss[:, 0]).all(), method.name
    unroll = Unroll(stack, mt.checkpoint.load_checkpoint("leaky_mlp_mixture").learned)
    losses = unroll.window(3)
    losses.mean().backward()
    assert bool(losses.isfinite().all())


@pytest.mark.parametrize("name", TRAINED)
def test_unusual_models_train_in_stacks(name: str) -> None:
    stack = stack_of(TRAINED[name])
    assert stack.batched
    before = {key: value.clone() for key, value in stack.named_buffers()}
    trains(stack)
    assert all(torch.equal(value, before[key]) for key, value in stack.named_buffers())


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_models_that_vmap_cannot_batch_are_evaluated_one_by_one(name: str) -> None:
    with pytest.warns(UserWarning, match="one by one"):
        stack = stack_of(ONE_BY_ONE[name])
    assert not stack.batched
    for task, loss in zip(stack.tasks, stack(stack.full), strict=True):
        torch.testing.assert_close(task.loss(task.model(*task.inputs), *task.targets), loss)
    trains(stack)


def test_one_by_one_gives_what_the_batch_gives() -> None:
    stack = stack_of(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), mse, *_double())
    found = stack.point_at(stack.tensors(), stack.full)
    stack.batched = False
    other = stack.point_at(stack.tensors(), stack.full)
    for name, value in found.gradients.items():
        torch.testing.assert_close(other.gradients[name], value, rtol=1e-12, atol=1e-14)


def _double() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    return lambda: torch.randn(12, 4).double(), lambda: torch.randn(12, 3).double()


def test_integers_go_in_and_classes_come_out() -> None:
    stack = stack_of(
        lambda: nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(12, 3)),
        nn.functional.cross_entropy,
        lambda: torch.randint(5, (12, 2)),
        lambda: torch.randint(3, (12,)),
    )
    trains(stack)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "complex": (
        {"build": lambda: Net(lambda _, x: x, a=nn.Linear(4, 3, dtype=torch.complex64))},
        "is complex.*view_as_complex",
    ),
    "lazy": ({"build": lambda: nn.LazyLinear(3)}, "run lazy modules once"),
    "all frozen": ({"build": lambda: nn.Linear(4, 3).requires_grad_(False)}, "nothing to train"),
    "another width": ({"build": lambda: nn.Linear(5, 3)}, "does not run on the task's inputs"),
    "a vector": ({"loss": lambda out, y: (out - y).square().mean(1)}, r"scalar; its shape is \(12,\)"),
    "a float": ({"loss": lambda out, y: float((out - y).sum())}, "a tensor of one entry; it is of type float"),
    "a count": ({"loss": lambda out, y: (out > y).sum()}, "a real number; its dtype is torch.int64"),
    "no gradient": ({"loss": lambda out, y: (out - y).detach().sum()}, "with its gradients"),
    "no samples": ({"inputs": lambda: torch.randn(0, 4), "targets": lambda: torch.randn(0, 3)}, "no training samples"),
    "a loss of other targets": ({"loss": lambda out: out.sum()}, "does not take its outputs and targets"),
    "a module that is not run": (
        {
            "build": lambda: Net(perceptron, **layers(), c=nn.Linear(5, 5), d=nn.Linear(5, 5)),
            "symmetries": lambda model: [mt.Rescaling(model, "c", "d")],
        },
        "'c', which forward.. does not run",
    ),
    "another model's symmetry": (
        {
            "build": lambda: nn.Linear(4, 3),
            "symmetries": lambda _: [
                mt.Rescaling(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), "0", "2")
            ],
        },
        "names '0', which the model does not have",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_evaluated_is_a_family_error(name: str) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(FamilyError, match=said):
        stack_of(**{"build": lambda: nn.Linear(4, 3), **changes})


def test_one_sample_and_nan_tasks_end_nothing() -> None:
    trains(
        stack_of(lambda: nn.Linear(4, 3), inputs=lambda: torch.randn(1, 4), targets=lambda: torch.randn(1, 3), tasks=1)
    )
    stack = stack_of(
        lambda: nn.Linear(4, 3), inputs=lambda: torch.full((3, 4), torch.nan), targets=lambda: torch.ones(3, 3)
    )
    for method in methods():
        assert method.run(stack, 3).diverged.all(), method.name
    assert all(bool(value.isfinite().all()) for value in stack.parameters())


def half_frozen(model: nn.Module) -> None:
    model[0].requires_grad_(False)


def two_rescalings(model: nn.Module) -> list[mt.Symmetry]:
    return [mt.Rescaling(model, "0", "2"), mt.Rescaling(model, "2", "4")]


def test_frozen_weights_stay_and_only_symmetries_that_move_them_are_left_out() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    with pytest.warns(UserWarning, match=r"1 of 2 symmetries are left out: they move 0.weight, 0.bias"):
        stack = stack_of(build, symmetries=two_rescalings, freeze=half_frozen)
    assert stack.symmetries == stack.symmetries
    assert [each.modules for each in stack.symmetries] == [("2", "4")]
    assert stack.names == ("2.weight", "2.bias", "4.weight", "4.bias")
    kept = {name: value.clone() for name, value in stack.fixed().items()}
    assert set(kept) == {"0.weight", "0.bias"}
    for method in [*methods(), BASELINES["whitening"].make(lr=0.1), REFERENCES["soap"].make(lr=0.01)]:
        loss = method.run(stack, 8).loss
        assert (loss[:, -1] < loss[:, 0]).all(), method.name
        for number, task in enumerate(stack.tasks):
            assert torch.equal(task.model[0].weight, kept["0.weight"][number])
    unroll = Unroll(stack, mt.checkpoint.load_checkpoint("digits").learned)
    before = stack.tensors()["2.weight"].clone()
    unroll.window(2).mean().backward()
    assert all(torch.equal(value, kept[name]) for name, value in stack.fixed().items())
    assert not torch.equal(before, stack.tensors()["2.weight"])


def test_every_method_uses_each_tasks_own_frozen_weights() -> None:
    """With the first layer frozen the last one is a least-squares problem of the features that each task has."""
    stack = stack_of(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1), nn.Linear(3, 3, bias=False)).double(),
        mse,
        *_double(),
        freeze=half_frozen,
    )
    floors = []
    for task in stack.tasks:
        features = task.model[1](task.model[0](task.inputs[0])).detach()
        best = torch.linalg.lstsq(features, task.targets[0]).solution
        floors.append(float((features @ best - task.targets[0]).square().mean()))
    for method in (BASELINES["lbfgs"].make(), REFERENCES["gauss-newton"].make()):
        assert method.run(stack, 60).loss[:, -1] == pytest.approx(floors, rel=1e-6), method.name


def test_tasks_that_freeze_different_weights_are_not_stacked() -> None:
    models = [nn.Linear(2, 1), nn.Linear(2, 1)]
    models[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        TaskStack([mt.Task(model, mse, (torch.ones(4, 2),), (torch.ones(4, 1),)) for model in models])


def test_a_trial_draws_no_random_numbers_and_is_made_once() -> None:
    stack = TaskStack([stack_of(TRAINED["dropout"], tasks=1).tasks[0]])
    before = torch.get_rng_state()
    check_evaluation(stack, stack.full)
    check_second_order(stack, stack.full)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_that_have_no_derivative_are_told_before_meta_training() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            context.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return 3 * context.saved_tensors[0] ** 2 * gradient

    task = mt.Task(nn.Linear(4, 3), lambda out: Once.apply(out).square().mean(), (torch.randn(5, 4),), ())
    stack = TaskStack([task])
    stack.batched = False
    check_evaluation(stack, stack.full)
    with pytest.raises(StackError, match="meta-training differentiates the gradients"):
        check_second_order(stack, stack.full)


def test_gauss_newton_says_where_it_is_not_for_a_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack = stack_of(ONE_BY_ONE["GRU of two layers"])
    with pytest.raises(mt.evaluation.run.EvaluationError, match="leave gauss-newton out"):
        REFERENCES["gauss-newton"].make().run(stack, 3)


def test_evaluations_of_losses_below_zero_say_differences(tmp_path: Any) -> None:
    from metateleport.evaluation import plot, ratios_table_of, report_of, table_of, words_of, write_report

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Below(mt.TaskFamily):
        name: ClassVar[str] = "below"

        def sample(self, seed: int) -> mt.Task:
            model = nn.Linear(4, 3)
            return mt.Task(
                model, lambda out, y: mse(out, y) - 5, (torch.randn(12, 4),), (torch.randn(12, 3),), seed=seed
            )

    report = report_of(evaluate(Below(), methods()[:3], tasks=3, steps=6))
    table_of(report)
    plot(report, tmp_path / "plot.png")
    assert not any("paired_ratio_to_learned" in entry for entry in report["methods"].values())
    assert "their ratios have no meaning" in " ".join(words_of(report))
    assert ratios_table_of(report) is None
    write_report(tmp_path / "report.json", report)
