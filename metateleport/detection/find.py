"""Finding the continuous symmetries of a module, each with a certificate."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from metateleport.detection.assemble import Candidate, candidates
from metateleport.detection.batch import batch_candidates
from metateleport.detection.certificate import certify
from metateleport.detection.found import Refused, Symmetries
from metateleport.detection.given import check_model, copied
from metateleport.detection.trace import Graph, split, trace
from metateleport.detection.walk import Walk, aliased, walk
from metateleport.symmetries import Symmetry, Unsuitable

__all__ = ["exact_symmetries", "find_symmetries"]


def find_symmetries(
    model: nn.Module, example_input: Any, loss: Callable[[Any], Tensor] | None = None, frozen: bool = False
) -> Symmetries:
    r"""Finds the continuous symmetries of a model's parameters, and certifies each.

    The model is traced by `torch.export`. Every axis of every parameter gets unknown scalings $s$, and the rule of each
    operation says which scalings have to be equal, inverse to each other, or one. The remaining freedom is a symmetry:
    of a matrix group if all operations treat the features of an axis alike and linearly, of a diagonal group
    otherwise. An operation without a rule fixes all scalings that reach it. Every candidate is then certified on a
    copy of the model in float64: see `certify`.

    | kind | action | group |
    |---|---|---|
    | linear pair, chain | $(U, V, b) \mapsto (U g^{-1}, g V, g b)$ | $GL(k)$ |
    | rescaling | $(U, V, b) \mapsto (U D^{-1}, D V, D b)$ through ReLU, LeakyReLU, PReLU | $D \in \mathbb{R}_{>0}^k$ |
    | before batch norm | $(V, b, \mu) \mapsto (DV, Db, D\mu)$, $v \mapsto d^2(v+\epsilon)-\epsilon$ | diagonal |
    | layer scale | $(W, b, \gamma) \mapsto (D W, D b, D^{-1} \gamma)$ | diagonal |
    | after batch norm, norm gain | $(\gamma, \beta, W) \mapsto (D\gamma, D\beta, W D^{-1})$ | diagonal |
    | attention QK, a key head | $(W_Q, W_K) \mapsto (A W_Q, A^{-\top} W_K)$ | $GL(d)$; rotary $(\mathbb{C}^*)^{d/2}$ |
    | attention VO, a value head | $(W_V, W_O) \mapsto (B W_V, W_O B^{-1})$ | $GL(d)$ |
    | gated MLP | $(W_{up}, W_{down}) \mapsto (D W_{up}, W_{down} D^{-1})$ | diagonal |
    | translation | $(b, c) \mapsto (b + t, c - W t)$; key biases freely | $\mathbb{R}^k$ |
    | batch pair, 2022 form | bijective activations, on the batch: see `BatchPair2022` | $GL(k)$ |
    | batch pair, 2024 form | any elementwise activation, on the batch: see `BatchPair2024` | $GL(k)$ |
    | LoRA pair | $(A, B) \mapsto (g A, B g^{-1})$ | $GL(r)$ |

    Args:
        model: the model, in the mode (train or eval) that it is used in; it is not changed.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        loss: maps the outputs to the quantity that must not change; the outputs themselves if not given.
        frozen: whether parameters that are frozen (`requires_grad=False`) move too; they are named in `refused` if not.

    Returns:
        The symmetries that hold, in the order of the data flow; `refused` lists what was considered and not claimed.

    Raises:
        ValueError: if the model has no parameters, does not run on the example input, or is wrapped (for several
            devices, or compiled), lazy or sharded.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 1))
        >>> for found in find_symmetries(model, torch.ones(5, 3)):
        ...     print(found.kind, found.group, found.where)
        rescaling PositiveDiagonal(4) 0.weight, 0.bias, 2.weight
        linear pair GeneralLinear(2) 2.weight, 2.bias, 3.weight
        translation Translation(2) 2.bias[0:2], 3.weight, 3.bias
    """
    return _found(model, example_input, loss, True, frozen)


def _found(
    model: nn.Module, example_input: Any, loss: Callable[[Any], Tensor] | None, batch_pairs: bool, frozen: bool
) -> Symmetries:
    check_model(model)
    inputs, keywords = split(copied(example_input))
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so it has no parameter symmetries")
    try:
        graphs, unfollowed = trace(model, inputs, keywords, loss)
    except Exception as error:
        name = type(model).__name__
        raise ValueError(f"{name} does not run on its example input: {type(error).__name__}: {error}") from error
    refused = [Refused(reason, (), module) for module, reason in unfollowed]
    found: list[Candidate] = []
    for graph in graphs:
        more, reasons = _walked(graph, model, batch_pairs, frozen)
        found += more
        refused += reasons
    wary = any(graph.prefix for graph in graphs)
    held = _certified(model, found, inputs, keywords, loss, refused, wary)
    return Symmetries(held, refused)


def _walked(graph: Graph, model: nn.Module, batch_pairs: bool, frozen: bool) -> tuple[list[Candidate], list[Refused]]:
    graph, shared = _by_first_name(graph, model)
    pinned = _pinned(graph, model, shared, frozen)
    named = dict(model.named_parameters())
    used = set(graph.parameters.values())
    movable = set(named).difference(pinned)
    statistics = {name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    walked = walk(graph, movable, statistics)
    if graph.calls > 1:
        # What passes such a module is several batches, of which a point holds one.
        walked.ledger.inputs.clear()
        walked.ledger.outputs.clear()
    reasons: dict[str, list[str]] = {}
    for name in named:
        if name in pinned and name in used:
            reasons.setdefault(pinned[name], []).append(name)
    refused = [Refused(reason, tuple(names)) for reason, names in reasons.items()]
    batch = batch_candidates(graph, model, movable, frozen) if batch_pairs and graph.calls == 1 else []
    return [*candidates(walked, model, frozen), *batch], [*refused, *_reasons(walked, named, shared)]


def _pinned(graph: Graph, model: nn.Module, shared: dict[str, list[str]], frozen: bool) -> dict[str, str]:
    """Parameters that no symmetry may move, each with the reason."""
    pinned = aliased(model, graph)
    if graph.prefix:
        # Outside of the part that was traced nobody has looked.
        pinned.update(
            {name: f"shared ({', '.join(names)}) beyond what could be traced" for name, names in shared.items()}
        )
    for name, value in model.named_parameters():
        if not value.is_floating_point():
            pinned[name] = f"of {value.dtype}: only real floating-point numbers are moved"
        elif type(value) is not nn.Parameter:
            pinned[name] = f"a {type(value).__name__}: only plain tensors are moved"
        elif not value.requires_grad and not frozen:
            pinned.setdefault(name, "frozen (requires_grad=False): moved with frozen=True")
    return pinned


def _by_first_name(graph: Graph, model: nn.Module) -> tuple[Graph, dict[str, list[str]]]:
    """The graph with every parameter and buffer under the first of its names, and those that have several."""
    names: dict[int, list[str]] = {}
    for name, value in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(value), []).append(name)
    first = {name: several[0] for several in names.values() for name in several}
    renamed = dataclasses.replace(
        graph,
        parameters={key: first.get(name, name) for key, name in graph.parameters.items()},
        tensors={key: first.get(name, name) for key, name in graph.tensors.items()},
    )
    return renamed, {several[0]: several for several in names.values() if len(several) > 1}


def _reasons(walked: Walk, named: dict[str, nn.Parameter], shared: dict[str, list[str]]) -> list[Refused]:
    """Why parameters cannot move: one entry for each operation that fixes them."""
    ledger, classes = walked.ledger, walked.classes
    # Arrays, not one class after another: a model of eleven million parameters has a hundred thousand of them.
    owned = [
        (np.unique(classes.root[slot.variables.numpy()]), slot.name)
        for slot in ledger.slots.values()
        if slot.name in named
    ]
    refused = []
    for (module, reason), parts in ledger.history.items():
        fixed = np.zeros(len(classes.root), dtype=bool)
        for part in parts:
            fixed[classes.root[part]] = True
        fixed[0] = False
        hits = [(roots[fixed[roots]], name) for roots, name in owned]
        # In the order of the first class of each that is fixed here.
        first = sorted(((int(roots[0]), name) for roots, name in hits if len(roots)), key=operator.itemgetter(0))
        if first:
            refused.append(Refused(reason, tuple(dict.fromkeys(name for _, name in first)), module))
    for name, names in shared.items():
        slots = ledger.by_parameter.get(name, []) if name in named else []
        if slots and all(bool(classes.dead[slot.variables.numpy()].all()) for slot in slots):
            refused.append(Refused(f"shared ({', '.join(names)}): it cannot move in one place only", (name,)))
    return refused


def _certified(
    model: nn.Module,
    found: list[Candidate],
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    loss: Callable[[Any], Tensor] | None,
    refused: list[Refused],
    wary: bool,
) -> list[Symmetry]:
    held: list[tuple[tuple[int, int], Symmetry]] = []
    # Of batch pairs one line for each reason: a batch that is too large is too large for most of them.
    on_batch: dict[str, dict[str, None]] = {}
    waiting = found
    while waiting:
        certificates = certify(model, [candidate.symmetry for candidate in waiting], inputs, keywords, loss, wary)
        instead: list[Candidate] = []
        for candidate, certificate in zip(waiting, certificates, strict=True):
            symmetry = candidate.symmetry
            symmetry.certificate = certificate
            if certificate.holds:
                held.append((candidate.place, symmetry))
                continue
            instead += candidate.instead()
            if symmetry.exactness == "batch-exact":
                on_batch.setdefault(f"{symmetry.kind}: {certificate.reason}", {}).update(
                    dict.fromkeys(symmetry.parameters)
                )
            else:
                what = f"{symmetry.kind} under {symmetry.group!r}: {certificate.reason}"
                refused.append(Refused(what, symmetry.parameters))
        waiting = instead
    refused += [Refused(reason, tuple(names)) for reason, names in on_batch.items()]
    return [symmetry for _, symmetry in sorted(held, key=lambda pair: pair[0])]


def exact_symmetries(model: nn.Module, example_input: Any, buffers: bool = True, frozen: bool = False) -> Symmetries:
    """The exact symmetries of a model; an error if there is none.

    Args:
        model: the model.
        example_input: as in `find_symmetries`.
        buffers: with those that move buffers too.
        frozen: with those that move frozen parameters.

    Raises:
        Unsuitable: if there is none.
    """
    found = _found(model, example_input, None, False, frozen)
    exact = Symmetries([each for each in found.exact if buffers or not each.buffers], found.refused)
    if not exact:
        held = any("frozen=True" in each.reason for each in found.refused)
        raise Unsuitable(
            f"no exact symmetry was found in this {type(model).__name__} on its example_input=; if you know one, name "
            "it with symmetries=[metateleport.Rescaling(model, first, second), ...]"
            + (", and find_symmetries(model, example_input, frozen=True) moves what is frozen too" if held else "")
            + f"\n{found}"
        )
    return exact
