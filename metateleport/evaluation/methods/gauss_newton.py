"""Damped Gauss-Newton: a reference with similar linear algebra and no teleport."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metateleport.evaluation.lost import where
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.run import EvaluationError
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import Batch, TaskStack
from metateleport.point import Tensors

__all__ = ["RIVALS", "GaussNewton"]


class GaussNewton(Method):
    r"""Levenberg-Marquardt with the generalised Gauss-Newton matrix, for small problems, with one batch per step.

    $$d = -(J^\top H J + \mu 1)^{-1} J^\top \nabla_z L, \qquad H = \nabla^2_z L,$$

    with $z$ the outputs and $J$ their Jacobian. A step that lowers the loss on its batch is taken and divides $\mu$
    by 3. Any other step is not taken and multiplies $\mu$ by 4; on full batches the Jacobian is then reused.

    The cost of a Jacobian is its number of multiplications over that of a gradient. Each trial of a step is a forward
    pass, a third of a gradient evaluation. Models have to treat samples independently.

    Args:
        lr: factor on the step, 1 for the full step.
        damping: $\mu$ at the start, relative to the mean of the diagonal of $J^\top H J$.

    Source: Nocedal and Wright, Numerical Optimization, section 10.3; Martens, JMLR 2020 (arXiv 1412.1193), section 8.
    """

    def __init__(self, lr: float = 1.0, damping: float = 1e-3) -> None:
        super().__init__("gauss-newton", {"lr": lr, "damping": damping})
        self.lr, self.damping = lr, damping

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        tensors = {name: value.detach() for name, value in stack.tensors().items()}
        count = len(stack)
        recorder = Recorder(stack, budget)
        price = jacobian_cost(stack, tensors, stack.batch(0))
        damping = torch.full((count,), self.damping, device=stack.device, dtype=next(iter(tensors.values())).dtype)
        known: _System | None = None
        fresh = torch.ones(count, dtype=torch.bool, device=stack.device)
        number = 0
        with torch.no_grad():
            while bool(recorder.affords(1 / 3).any()):
                batch = stack.batch(number)
                if bool(fresh.any()):
                    recorder.charge(torch.where(fresh, price, 0.0))
                    known = _System.at(stack, tensors, batch, fresh, known)
                assert known is not None
                step = known.step(damping)
                trial = {name: value + self.lr * step[name] for name, value in tensors.items()}
                after = stack.losses_at(trial, batch)
                recorder.charge(1 / 3)
                better = after < known.losses
                tensors = {name: where(better, trial[name], value) for name, value in tensors.items()}
                damping = torch.where(better, damping / 3, damping * 4).clamp(1e-16, 1e16)
                recorder.record(tensors)
                fresh = better if stack.deterministic else torch.ones_like(better)
                number += 1
        return recorder.trajectory()


RIVALS = (
    Rival(
        "gauss-newton",
        GaussNewton,
        Lattice(-1, 0),
        choices={"damping": Choice((1e-3, 1.0))},
        tasks=8,
        on_request=True,
    ),
)


def jacobian_cost(stack: TaskStack, tensors: Tensors, batch: Batch) -> float:
    """Multiplications of the Jacobian of the outputs, relative to those of one gradient of the loss.

    At least one: a Jacobian contains the gradient.

    Raises:
        EvaluationError: if the model cannot be differentiated for single samples.
    """
    (inputs, targets), template = batch, stack.template
    one = {name: value[0].detach() for name, value in tensors.items()}
    fixed = {name: value[0] for name, value in stack.fixed().items()}
    given, wanted = tuple(value[0] for value in inputs), tuple(value[0] for value in targets)

    def loss(values: Tensors) -> Tensor:
        return stack.loss(torch.func.functional_call(template, {**fixed, **values}, given), *wanted)

    counts = []
    for function in (lambda: torch.func.grad(loss)(one), lambda: _jacobian(stack, one, fixed, given)):
        with FlopCounterMode(display=False) as counter, torch.enable_grad():
            try:
                function()
            except Exception as error:
                raise EvaluationError(
                    "gauss-newton differentiates the outputs of every sample by itself, which the tasks' model does "
                    f"not allow ({type(error).__name__}: {str(error)[:120]}): leave gauss-newton out of --methods"
                ) from error
        counts.append(counter.get_total_flops())
    return max(counts[1] / max(counts[0], 1), 1.0)


def _jacobian(stack: TaskStack, values: Tensors, fixed: Tensors, given: tuple[Tensor, ...]) -> Tensors:
    """Derivatives of every sample's outputs with respect to every parameter, `(samples, outputs, *parameter)`."""

    def single(parameters: Tensors, sample: tuple[Tensor, ...]) -> Tensor:
        inputs = tuple(each.unsqueeze(0) for each in sample)
        return torch.func.functional_call(stack.template, {**fixed, **parameters}, inputs).flatten()

    return torch.func.vmap(torch.func.jacrev(single), (None, 0))(values, given)


class _System:
    """The linear systems of a stack: factors K with `K^T K` the Gauss-Newton matrix, and `q` with `K^T q` the gradient.

    Args:
        factors: `(tasks, rows, parameters)`.
        rights: `(tasks, rows)`.
        losses: on the batch, `(tasks,)`.
        shapes: of one task's parameters, by name.
    """

    def __init__(self, factors: Tensor, rights: Tensor, losses: Tensor, shapes: dict[str, torch.Size]) -> None:
        self.factors, self.rights, self.losses, self.shapes = factors, rights, losses, shapes

    @classmethod
    def at(cls, stack: TaskStack, tensors: Tensors, batch: Batch, where: Tensor, known: _System | None) -> _System:
        """The systems at new parameters; tasks where `where` is false keep their known system.

        The tasks are computed one by one, to save memory.
        """
        parts = []
        for task, wanted in enumerate(where.tolist()):
            if known is not None and not wanted:
                parts.append((known.factors[task], known.rights[task], known.losses[task]))
                continue
            values = {name: value[task] for name, value in tensors.items()}
            given, targets = (tuple(value[task] for value in part) for part in batch)
            fixed = {name: value[task] for name, value in stack.fixed().items()}
            parts.append(cls._of_one(stack, values, fixed, given, targets))
        factors, rights, losses = (torch.stack(each) for each in zip(*parts, strict=True))
        return cls(factors, rights, losses, {name: value.shape[1:] for name, value in tensors.items()})

    @staticmethod
    def _of_one(
        stack: TaskStack, values: Tensors, fixed: Tensors, given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = torch.func.functional_call(stack.template, {**fixed, **values}, given)

        def loss(flat: Tensor) -> Tensor:
            return stack.loss(flat.reshape(outputs.shape), *wanted)

        jacobian = torch.cat(
            [value.reshape(outputs.numel(), -1) for value in _jacobian(stack, values, fixed, given).values()], 1
        )
        flat = outputs.flatten()
        slope = torch.func.grad(loss)(flat)
        curvature = torch.func.hessian(loss)(flat)
        finite = bool(curvature.isfinite().all()) and bool(jacobian.isfinite().all())
        if not finite:
            return torch.zeros_like(jacobian), torch.zeros_like(slope), loss(flat)
        tiny = torch.finfo(flat.dtype).tiny
        diagonal = torch.diagonal(curvature)
        if torch.equal(curvature, torch.diag(diagonal)):
            roots = diagonal.clamp_min(1e-12 * diagonal.max().clamp_min(tiny)).sqrt()
            return roots.unsqueeze(1) * jacobian, slope / roots, loss(flat)
        eigenvalues, vectors = torch.linalg.eigh(curvature)
        roots = eigenvalues.clamp_min(1e-12 * eigenvalues[-1].clamp_min(tiny)).sqrt()
        return roots.unsqueeze(1) * (vectors.mT @ jacobian), (vectors.mT @ slope) / roots, loss(flat)

    def step(self, damping: Tensor) -> Tensors:
        """The step of every task, by parameter name."""
        rows, columns = self.factors.shape[1:]
        scale = self.factors.square().sum((1, 2)) / columns
        shift = (damping * scale).clamp_min(torch.finfo(scale.dtype).tiny)
        dual = rows <= columns
        gram = self.factors @ self.factors.mT if dual else self.factors.mT @ self.factors
        gram = gram + shift[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        right = self.rights.unsqueeze(-1)
        solved, _ = torch.linalg.solve_ex(gram, right if dual else self.factors.mT @ right)
        whole = -(self.factors.mT @ solved if dual else solved).squeeze(-1)
        parts = whole.split([shape.numel() for shape in self.shapes.values()], 1)
        return {
            name: part.reshape(len(part), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
