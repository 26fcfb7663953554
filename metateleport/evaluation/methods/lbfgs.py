"""torch's L-BFGS with a strong Wolfe line search; every evaluation is counted."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from metateleport.evaluation.rival import Lattice, Rival
from metateleport.evaluation.trajectory import Method, Recorder, Trajectory
from metateleport.families import Task, TaskStack
from metateleport.families.stack import Batch

__all__ = ["LBFGS", "RIVALS"]


class LBFGS(Method):
    """`torch.optim.LBFGS` with strong Wolfe line search, task by task.

    A point is recorded once the line search has accepted it, at the number of evaluations spent by then. On minibatches
    each iteration uses one batch.

    Args:
        lr: length of the first trial of each line search; 1 is the textbook's choice.
        history_size: number of pairs of steps and gradient differences that are kept.

    Example:
        >>> LBFGS(lr=1.0).name
        'lbfgs'

    Source: Nocedal and Wright, Numerical Optimization, algorithms 3.5 and 7.5.
    """

    stacked = False

    def __init__(self, lr: float = 1.0, history_size: int = 100) -> None:
        super().__init__("lbfgs", {"lr": lr, "history_size": history_size, "line_search_fn": "strong_wolfe"})
        self.lr, self.history_size = lr, history_size

    def run(self, stack: TaskStack, budget: int) -> Trajectory:
        solvers = [_Solver(task, stack.device, self.lr, self.history_size) for task in stack.tasks]
        recorder = Recorder(stack, budget)
        while True:
            costs = torch.zeros(len(stack), dtype=torch.float64)
            for index in recorder.affords().nonzero().flatten().tolist():
                costs[index] = solvers[index].iterate()
            if not bool(costs.any()):
                return recorder.trajectory()
            recorder.charge(costs)
            names = solvers[0].parameters
            recorder.record({name: torch.stack([each.parameters[name].detach() for each in solvers]) for name in names})


class _Solver:
    """One task under L-BFGS, one iteration at a time.

    torch evaluates the start of every call again. On full batches that is the point where the last line search ended,
    so its loss and gradient are reused: single iterations evaluate exactly what one long call would.
    """

    def __init__(self, task: Task, device: torch.device, lr: float, history_size: int) -> None:
        self.task, self.device = task, device
        self.model = copy.deepcopy(task.model).to(device)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.LBFGS(
            [value for value in self.parameters.values() if value.requires_grad],
            lr=lr,
            max_iter=1,
            # Newer versions of torch end a line search at the rest of this number; older ones always after 25 trials.
            max_eval=26,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=history_size,
            line_search_fn="strong_wolfe",
        )
        self.iterations = 0
        self.ended = False
        self._seen: list[tuple[list[Tensor], Tensor, list[Tensor]]] = []
        self._batch: Batch | None = None

    def iterate(self) -> int:
        """Takes one iteration; returns its number of evaluations, zero if the search has ended."""
        if self.ended:
            return 0
        fixed = self.task.batch_size is None
        if self._batch is None or not fixed:
            inputs, targets = self.task.batch(self.iterations)
            self._batch = tuple(v.to(self.device) for v in inputs), tuple(v.to(self.device) for v in targets)
        evaluations = 0
        known = self._seen if fixed else []
        self._seen = []

        def closure() -> Tensor:
            nonlocal evaluations, known
            here = [value.detach().clone() for value in self.parameters.values()]
            found = next((each for each in known if all(map(torch.equal, each[0], here))), None)
            known = []
            if found is None:
                evaluations += 1
                found = here, *self._evaluate()
            self._seen.append(found)
            for value, gradient in zip(self.parameters.values(), found[2], strict=True):
                if value.requires_grad:
                    value.grad = gradient.clone()
            return found[1]

        before = [value.detach().clone() for value in self.parameters.values()]
        self.optimizer.step(closure)
        self.iterations += 1
        stayed = all(map(torch.equal, before, self.parameters.values()))
        lost = not all(bool(value.isfinite().all()) for value in self.parameters.values())
        self.ended = lost or (fixed and stayed)
        return evaluations

    def _evaluate(self) -> tuple[Tensor, list[Tensor]]:
        assert self._batch is not None
        inputs, targets = self._batch
        self.model.zero_grad()
        with torch.enable_grad():
            loss = self.task.loss(self.model(*inputs), *targets)
            loss.backward()
        gradients = [
            torch.zeros_like(value) if value.grad is None else value.grad for value in self.parameters.values()
        ]
        return loss.detach(), gradients


# The line search finds the length; lr is only that of its first trial.
RIVALS = (Rival("lbfgs", LBFGS, Lattice(-1, 0), tasks=8),)
