"""The equations between scalings of parameter entries (equal, inverse, one), and their solution."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

__all__ = ["Classes", "Kill", "Ledger", "Slot", "compressed"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place where a parameter may be scaled.

    Args:
        name: of the parameter or buffer.
        variables: a variable for each place, of the parameter's number of dimensions and broadcastable to its shape.
        variance: for the running variance of a BatchNorm, its epsilon: it moves as $d^2(v + \\epsilon) - \\epsilon$.
    """

    name: str
    variables: Tensor
    variance: float | None = None


@dataclasses.dataclass(frozen=True)
class Kill:
    """Variables that are fixed, and why; an empty reason stands for the model's inputs and outputs."""

    variables: np.ndarray
    reason: str
    module: str


@dataclasses.dataclass(frozen=True)
class Classes:
    """The solution: variables that move together.

    Args:
        root: the class of each variable, named by its smallest member.
        sign: whether a variable moves with its class or against it.
        dead: whether a variable is fixed.
    """

    root: np.ndarray
    sign: np.ndarray
    dead: np.ndarray


def compressed(label: Tensor) -> Tensor:
    """The smallest tensor that broadcasts to the same label: dimensions along which it is constant have size one."""
    for dim in range(label.ndim):
        if label.shape[dim] > 1:
            first = label.narrow(dim, 0, 1)
            if label.stride(dim) == 0 or bool((label == first).all()):
                label = first
    return label


class Ledger:
    r"""Variables $s$ (logarithms of scalings) and the equations that a model's operations impose on them.

    Every place of a slot is a variable; variable zero is the scaling by one. An edge says $s_a = \pm s_b$, a kill says
    $s_a = 0$. A touch says that an operation treats the variables within one fiber alike. Variables may mix under a
    matrix group if every operation treats them alike.
    """

    def __init__(self) -> None:
        self.size = 1
        self.slots: dict[tuple[object, ...], Slot] = {}
        self.by_parameter: dict[str, list[Slot]] = {}
        self.dead = np.zeros(1, dtype=bool)
        self.affine: dict[str, tuple[str, int]] = {}
        self.first_use: dict[str, int] = {}
        self.history: dict[tuple[str, str], list[np.ndarray]] = {}
        self.begin()

    def begin(self) -> None:
        """Begins a pass over the model: only slots and fixed variables are kept."""
        self.edges: list[tuple[np.ndarray, np.ndarray, int, bool]] = []
        self.kills: list[Kill] = []
        self.tentative: list[Kill] = []
        self.touches: list[tuple[int, np.ndarray, np.ndarray, bool]] = []
        self.diagonal: list[np.ndarray] = []
        self.tags: dict[str, list[np.ndarray]] = {}
        self.used: set[str] = set()
        self.calls: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def slot(self, key: tuple[object, ...], name: str, shape: tuple[int, ...], variance: float | None = None) -> Tensor:
        """The variables of a slot, made when first asked for."""
        if key not in self.slots:
            count = int(np.prod(shape))
            variables = torch.arange(self.size, self.size + count).reshape(shape)
            self.size += count
            self.slots[key] = Slot(name, variables, variance)
            self.by_parameter.setdefault(name, []).append(self.slots[key])
            self.dead = np.concatenate([self.dead, np.zeros(count, dtype=bool)])
        return self.slots[key].variables

    def alive(self, label: Tensor) -> Tensor:
        """A label with fixed variables replaced by zero."""
        dead = torch.from_numpy(self.dead[label.numpy()])
        return compressed(torch.where(dead, 0, label)) if bool(dead.any()) else label

    def equal(self, first: Tensor, second: Tensor, sign: int = 1, tentative: bool = False) -> None:
        """Adds $s_a = \\pm s_b$, entry by entry."""
        a, b = torch.broadcast_tensors(first, second)
        # Both numbers of a pair in one, so that finding the different ones is fast.
        pairs = np.unique(((a << 32) | b).numpy())
        self.edges.append((pairs >> 32, pairs & 0xFFFFFFFF, sign, tentative))

    def kill(self, labels: list[Tensor], reason: str = "", module: str = "", tentative: bool = False) -> None:
        """Fixes the variables of some labels; `tentative` if a later pass may release them."""
        for label in labels:
            kill = Kill(np.unique(label.numpy()), reason, module)
            (self.tentative if tentative else self.kills).append(kill)

    def touch(self, operation: int, label: Tensor, fibers: tuple[int, ...], scales: bool = False) -> None:
        """Records that an operation treats the variables of a label alike, but for their place along `fibers`.

        `scales` says that it does no more than scale each by a fixed number, as a rotation in planes may be made of.
        """
        fiber = torch.zeros((1,) * label.ndim, dtype=torch.int64)
        for dim in fibers:
            shape = [1] * label.ndim
            shape[dim] = label.shape[dim]
            fiber = fiber * label.shape[dim] + torch.arange(label.shape[dim]).reshape(shape)
        self.touches.append(
            (operation, label.reshape(-1).numpy(), fiber.expand(label.shape).reshape(-1).numpy(), scales)
        )

    def elementwise(self, label: Tensor) -> None:
        """Records that each variable of a label is treated by itself."""
        self.diagonal.append(np.unique(label.numpy()))

    def tag(self, name: str, label: Tensor) -> None:
        """Marks variables by the operation they pass, for the name of the kind."""
        self.tags.setdefault(name, []).append(np.unique(label.numpy()))

    @property
    def is_tentative(self) -> bool:
        """Whether anything in this pass holds for the time being only."""
        return bool(self.tentative) or any(tentative for *_, tentative in self.edges)

    def remember(self, tentative: bool) -> None:
        """Keeps the reasons given in this pass: what stays is no longer seen in the next."""
        for kill in self.kills + (self.tentative if tentative else []):
            if kill.reason:
                self.history.setdefault((kill.module, kill.reason), []).append(kill.variables)

    def solve(self, tentative: bool) -> Classes:
        """The classes of variables under all edges and kills, or under those that are not tentative only."""
        edges = [edge for edge in self.edges if tentative or not edge[3]]
        kills = self.kills + (self.tentative if tentative else [])
        # Each variable stands twice, for itself and for its inverse: a sign is an edge between the two halves.
        parent = np.arange(2 * self.size)
        left = [np.zeros(1, dtype=np.int64)]
        right = [np.full(1, self.size, dtype=np.int64)]
        for a, b, sign, _ in edges:
            left += [a, a + self.size]
            right += [b, b + self.size] if sign > 0 else [b + self.size, b]
        _connect(parent, np.concatenate(left), np.concatenate(right))
        root, opposite = parent[: self.size], parent[self.size :]
        dead = root == opposite
        dead_roots = np.zeros(2 * self.size, dtype=bool)
        for kill in kills:
            dead_roots[root[kill.variables]] = True
            dead_roots[opposite[kill.variables]] = True
        dead = dead | dead_roots[root] | dead_roots[opposite] | self.dead
        dead[0] = True
        smallest = np.minimum(root, opposite)
        return Classes(smallest, np.where(root <= opposite, 1, -1), dead)


def _connect(parent: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Gives all members of each connected component their smallest member as parent, in place."""
    while True:
        before = parent.copy()
        a, b = parent[left], parent[right]
        low = np.minimum(a, b)
        np.minimum.at(parent, a, low)
        np.minimum.at(parent, b, low)
        np.minimum.at(parent, left, low)
        np.minimum.at(parent, right, low)
        while not np.array_equal(parent, parent[parent]):
            parent[:] = parent[parent]
        if np.array_equal(before, parent):
            return
