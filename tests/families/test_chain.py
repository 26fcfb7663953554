"""Plain chains of layers: run directly they give what `vmap` gives, and what is no chain is not taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from metateleport.families import Task, TaskStack
from metateleport.families.chain import chain_of, losses_of
from metateleport.symmetries import Rescaling


def stack(bias: bool, activation: type[nn.Module] = nn.LeakyReLU) -> TaskStack:
    torch.manual_seed(0)
    tasks = []
    for _ in range(3):
        model = nn.Sequential(nn.Linear(4, 5, bias=bias), activation(), nn.Linear(5, 2, bias=bias)).double()
        data = (torch.randn(6, 4, dtype=torch.float64),), (torch.randn(6, 2, dtype=torch.float64),)
        tasks.append(Task(model, nn.functional.mse_loss, *data, symmetries=(Rescaling(model, "0", "2"),)))
    return TaskStack(tasks)


def seen(tasks: TaskStack) -> list[Tensor]:
    """Losses, gradients, activations, cotangents, and derivatives of the gradients."""
    found = tasks(tasks.full, probe=True)
    point = found.point(in_graph=True)
    size = sum((value.square().sum() for value in point.gradients.values()), torch.zeros(()))
    second = torch.autograd.grad(size, list(tasks.parameters()), allow_unused=True)
    parts = [point.gradients, point.activations, point.cotangents]
    return [found.losses, *(value for part in parts for value in part.values()), *(g for g in second if g is not None)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_chain_is_evaluated_as_vmap_does(bias: bool) -> None:
    plain, mapped = stack(bias), stack(bias)
    assert plain._chain is not None
    mapped.__dict__["_chain"] = None
    ours, theirs = seen(plain), seen(mapped)
    assert len(ours) == len(theirs) >= 9
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_data_are_the_same_tensor_at_every_evaluation() -> None:
    tasks = stack(True)
    first, second = (tasks.point_at(tasks.tensors(), tasks.full).activations for _ in range(2))
    assert first["0"] is second["0"]
    assert first["2"] is not second["2"]


def test_cross_entropies_of_all_tasks_at_once_are_those_of_each() -> None:
    source = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 6, 4, generator=source, dtype=torch.float64).requires_grad_()
    targets = torch.randint(4, (3, 6), generator=source)
    targets[1, 2:4] = -100
    found = losses_of(nn.functional.cross_entropy, outputs, (targets,))
    assert found is not None
    own = torch.stack([nn.functional.cross_entropy(*each) for each in zip(outputs, targets, strict=True)])
    assert torch.allclose(found, own, rtol=1e-13)
    slopes = [torch.autograd.grad(each.square().sum(), outputs, create_graph=True)[0] for each in (found, own)]
    bends = [torch.autograd.grad(each.square().sum(), outputs)[0] for each in slopes]
    assert torch.allclose(*slopes, atol=1e-14)
    assert torch.allclose(*bends, atol=1e-14)


def test_another_loss_and_other_targets_are_left_to_vmap() -> None:
    outputs, labels = torch.zeros(3, 6, 4), torch.zeros(3, 6, dtype=torch.long)
    assert losses_of(nn.functional.cross_entropy, outputs, (labels,)) is not None
    assert losses_of(nn.functional.mse_loss, outputs, (outputs,)) is None
    assert losses_of(nn.functional.cross_entropy, outputs, (outputs,)) is None
    assert losses_of(nn.functional.cross_entropy, outputs, (labels[:, :1],)) is None
    assert losses_of(nn.functional.cross_entropy, outputs, (labels, labels)) is None


def other(kind: str) -> nn.Module:
    shared = nn.Linear(3, 3)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    hooked = nn.Sequential(nn.Linear(3, 3))
    hooked[0].register_forward_hook(lambda *_: None)

    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    models = {
        "in place": nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)),
        "dropout": nn.Sequential(nn.Linear(3, 3), nn.Dropout()),
        "nested": nn.Sequential(nn.Sequential(nn.Linear(3, 3))),
        "twice": nn.Sequential(shared, nn.Tanh(), shared),
        "tied": tied,
        "hooked": hooked,
        "parametrised": nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))),
        "subclass": Doubled(nn.Linear(3, 3)),
        "layer": nn.Linear(3, 3),
    }
    return models[kind]


@pytest.mark.parametrize(
    "kind", ["in place", "dropout", "nested", "twice", "tied", "hooked", "parametrised", "subclass", "layer"]
)
def test_what_is_no_plain_chain_is_left_to_vmap(kind: str) -> None:
    assert chain_of(other(kind)) is None
