"""What a service answers: group elements, gauges and step factors for what a request describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metateleport.checkpoint import Checkpoint
from metateleport.groups import Group, PositiveDiagonal
from metateleport.learned import LearnedTeleporter
from metateleport.learned.progress import PROGRESS_FEATURES
from metateleport.learned.rules import AdaptiveSettings, StepSettings
from metateleport.learned.rules.gauged import GaugedSettings
from metateleport.learned.rules.static import StaticSettings
from metateleport.learned.teleporter import BASIS
from metateleport.service.described import DescribedSymmetry, effect_of, nowhere
from metateleport.service.limits import Limits
from metateleport.service.message import SCHEMA, Message, Refused
from metateleport.service.reading import Reader, batch_of, check_covariance, group_of, kind_of, whole
from metateleport.teleporters import RandomTeleporter, WhiteningTeleporter
from metateleport.teleporters.reach import within_reach
from metateleport.version import VERSION

__all__ = ["MATRICES", "PER_TENSOR", "Answerer", "step_refusal"]

PER_TENSOR = (StepSettings, AdaptiveSettings, GaugedSettings)
"""Update rules whose networks read a few numbers of each tensor."""

_ONCE = ("balance", "whitening", "random")
_SIDES = ("features", "outgoing")
_LARGEST_STATE = 1e6


def step_refusal(rule: Any) -> str:
    """Why a rule cannot be asked for steps without the weights; empty if it can.

    Args:
        rule: the rule's settings.

    Example:
        >>> from metateleport.learned.rules import StaticSettings, TensorSettings
        >>> step_refusal(StepSettings())
        ''
        >>> step_refusal(TensorSettings())
        "rule.kind = 'tensor' reads every coordinate of the weights, which never leave their machine: load the \
checkpoint there"
        >>> step_refusal(StaticSettings())
        "rule.kind = 'static' has no network to ask, only a few constants for each tensor: load the checkpoint where \
the weights are"
    """
    if not rule.learns:
        return f"rule.kind = {rule.kind!r} learns no step: use the teleporter, with an optimizer of your own"
    if type(rule) in PER_TENSOR:
        return ""
    if isinstance(rule, StaticSettings):
        return (
            f"rule.kind = {rule.kind!r} has no network to ask, only a few constants for each tensor: load the "
            "checkpoint where the weights are"
        )
    return (
        f"rule.kind = {rule.kind!r} reads every coordinate of the weights, which never leave their machine: load the "
        "checkpoint there"
    )


class Answerer:
    """Answers requests with a checkpoint's networks, without any memory of who has asked before.

    Args:
        checkpoint: the checkpoint.
        limits: bounds on requests.

    Example:
        >>> from metateleport.checkpoint import load_checkpoint
        >>> answerer = Answerer(load_checkpoint("digits"))
        >>> request = Message({"schema": 1, "ask": "about"}, {})
        >>> answerer.answer(request).fields["name"]
        'digits'
    """

    def __init__(self, checkpoint: Checkpoint, limits: Limits | None = None) -> None:
        self.checkpoint, self.limits = checkpoint, limits or Limits()
        self.meta = checkpoint.learned.eval()
        self._asks: dict[str, Callable[[Reader], Message]] = {
            "about": self._about,
            "teleport": self._teleport,
            "gauges": self._gauges,
            "steps": self._steps,
            "once": self._once,
        }

    @property
    def asks(self) -> tuple[str, ...]:
        """What can be asked."""
        return tuple(self._asks)

    def answer(self, request: Message, apart: Sequence[int] | None = None) -> Message:
        """The answer to a request; its field `ask` says what is asked.

        Args:
            request: the request.
            apart: of several requests for teleports that are stacked, how many tasks each of them has; zero for one
                that has no task dimension.

        Raises:
            Refused: if the request cannot be meant, or the checkpoint has no such part.
        """
        reader = Reader(request, self.limits)
        reader.apart = apart
        ask = reader.choice("ask", self._asks)
        with torch.no_grad():
            try:
                answer = self._asks[ask](reader)
            except torch.linalg.LinAlgError as error:
                raise Refused("element", f"none could be chosen ({error})", 422) from error
        for name, value in answer.tensors.items():
            if not bool(value.isfinite().all()):
                raise Refused("answer", f"{name} is not finite: the matrices are out of range", 422)
        return Message({"schema": SCHEMA, **answer.fields}, answer.tensors)

    # --- what there is ------------------------------------------------------------------------------------------------

    def _about(self, reader: Reader) -> Message:
        reader.done()
        card, config = self.checkpoint.card, self.meta.config
        known = {key: card[key] for key in ("mode", "family", "made_for", "limits", "weights_sha256") if key in card}
        return Message(
            {
                "service": "metateleport",
                "version": VERSION,
                "name": self.checkpoint.name,
                "card": known,
                "meta_optimizer": config.table(),
                "dtype": str(self._own).removeprefix("torch."),
                "asks": list(self.asks),
                "steps": {"served": not step_refusal(config.rule), "why_not": step_refusal(config.rule)},
                "limits": self.limits.table(),
            },
            {},
        )

    @property
    def _own(self) -> torch.dtype:
        return next((each.dtype for each in self.meta.parameters()), torch.float32)

    # --- a teleport that stays ----------------------------------------------------------------------------------------

    def _teleport(self, reader: Reader) -> Message:
        teleporter = self.meta.teleporter
        if not isinstance(teleporter, LearnedTeleporter):
            raise Refused("ask", f"{self.checkpoint.name} has no teleport that stays: ask for gauges", 422)
        group = reader.group()
        if group.name not in teleporter.networks:
            raise Refused("group.name", f"there are networks for {', '.join(teleporter.networks)}", 422)
        progress = reader.tensor("progress", PROGRESS_FEATURES, free=True)
        batch = batch_of("progress", progress, self.limits)
        state = self._state(reader, "state", batch, teleporter.hidden)
        matrices = _matrices(reader, group, batch)
        dtype = next(iter(matrices.values())).dtype
        bound = reader.number("max_stretch", 1.0, 1e12) if reader.has("max_stretch") else None
        reached = None
        if bound is not None:
            reached = reader.in_one_dtype("reached", reader.tensor("reached", *batch, *group.shape))
            if isinstance(group, PositiveDiagonal) and not bool((reached > 0).all()):
                raise Refused("tensors.reached", "it is positive")
        reader.done()
        symmetry, point = DescribedSymmetry(group, matrices), nowhere(batch, dtype)
        network = None if reader.apart is None else _apart(teleporter.networks[group.name], reader.apart)
        generator, state = teleporter.proposed(symmetry, point, progress, state, network=network)
        if reached is not None and bound is not None:
            generator = within_reach(group, generator, reached, math.log(bound))
        return _moved(group, generator, matrices, {"state.hidden": state[0], "state.memory": state[1]})

    # --- gauges -------------------------------------------------------------------------------------------------------

    def _gauges(self, reader: Reader) -> Message:
        gauge = self.meta.gauge
        if gauge is None:
            raise Refused("ask", f"{self.checkpoint.name} has no gauges", 422)
        progress = reader.tensor("progress", None, PROGRESS_FEATURES)
        tasks = batch_of("progress", progress, self.limits)
        places, seen, cells, samples = [], {}, {}, None
        for index, table in enumerate(reader.tables("places")):
            field = f"places.{index}"
            if not table.keys() <= {"group", "side", "rows"} or not {"group", "side"} <= table.keys():
                raise Refused(field, "it is a table of group, side and perhaps rows")
            group = group_of(f"{field}.group", table["group"], self.limits)
            if group.name not in gauge.networks:
                raise Refused(f"{field}.group.name", f"there are networks for {', '.join(gauge.networks)}")
            if table["side"] not in ("in", "out"):
                raise Refused(f"{field}.side", "it is in or out")
            rows = table.get("rows")
            rows = None if rows is None else whole(f"{field}.rows", rows, 1, 1 << 31)
            square = (group.size, group.size)
            metric, gradient = (
                reader.in_one_dtype(f"{index}.{what}", reader.tensor(f"{index}.{what}", *tasks, *square))
                for what in ("metric", "gradient")
            )
            # Places of one request may see different numbers of samples: each has a symmetry of its own.
            symmetry = DescribedSymmetry(group, {}, str(index), rows is not None)
            if rows is not None:
                symmetry.modules = (f"module {index}",)
                samples = {**(samples or {}), f"module {index}": rows}
            places.append((symmetry, table["side"], symmetry.parameters))
            seen[f"{index}/{table['side']}"] = (metric, gradient)
            cells[f"{index}/{table['side']}"] = self._state(reader, str(index), tasks, gauge.hidden)
        reader.done()
        assert reader.dtype is not None
        point = nowhere(tasks, reader.dtype)
        empty = {name: torch.empty(*tasks, rows, 0, dtype=reader.dtype) for name, rows in (samples or {}).items()}
        after, gauges = gauge.elements(places, seen, point.replace(activations=empty), progress, cells)
        found = {}
        for index, (place, each) in enumerate(zip(places, gauges, strict=True)):
            hidden, memory = after[f"{index}/{place[1]}"]
            found[f"{index}.element"], found[f"{index}.inverse"] = each.element, each.inverse
            found[f"{index}.size"] = each.size
            found[f"{index}.hidden"], found[f"{index}.memory"] = hidden, memory
        return Message({}, found)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _steps(self, reader: Reader) -> Message:
        rule: Any = self.meta.rule
        sides = isinstance(self.meta.config.rule, GaugedSettings)
        # The rule of factors has a network for each of their two sides, and another rule's for all other tensors.
        known: dict[str, Any] = dict(rule.networks) if sides else {}
        gauges = {
            f"gauge {group}": network
            for group, network in (self.meta.gauge.networks if self.meta.gauge else {}).items()
        }
        which = reader.choice("network", ("tensors", *known, *gauges), "tensors")
        refusal = "" if which in gauges else step_refusal(self.meta.config.rule)
        if refusal:
            raise Refused("ask", refusal, 422)
        part = {**known, **gauges}.get(which, rule.plain if sides else rule)
        network = part.network if which == "tensors" else part
        inputs = reader.tensor("inputs", None, part.cell.input_size)
        if len(inputs) > self.limits.rows:
            raise Refused("tensors.inputs", f"there are {len(inputs)} rows, and at most {self.limits.rows} are taken")
        state = self._state(reader, "state", (len(inputs),), part.cell.hidden_size)
        reader.done()
        outputs, (hidden, memory) = network(inputs.to(self._own), state)
        return Message({}, {"outputs": outputs, "state.hidden": hidden, "state.memory": memory})

    # --- one-shot teleports, which nothing is learned for -------------------------------------------------------------

    def _once(self, reader: Reader) -> Message:
        method, group = reader.choice("method", _ONCE), reader.group()
        matrices = _matrices(reader, group, None, needed=method != "random")
        if method == "random":
            size = reader.number("size", 0.0, 100.0, 1.0)
            seed = reader.whole("seed", 0, 2**63 - 1, 0)
            reader.done()
            teleporter: Any = RandomTeleporter(size=size, seed=seed)
        else:
            side: Any = "balanced" if method == "balance" else reader.choice("side", _SIDES, "features")
            damping = reader.number("damping", 0.0, 1.0) if reader.has("damping") else None
            reader.done()
            _check_read(side, matrices, len(group.shape))
            teleporter = WhiteningTeleporter(side, damping)
        known = next(iter(matrices.values()), torch.zeros(1, dtype=torch.float64))
        batch = tuple(known.shape[: known.ndim - len(group.shape)]) if matrices else ()
        if len(batch) > 1 or math.prod(batch) > self.limits.tasks:
            raise Refused("tensors", f"in front is one dimension at most, of {self.limits.tasks} tasks at most")
        symmetry, point = DescribedSymmetry(group, matrices), nowhere(batch, known.dtype)
        generator, _ = teleporter.generator(symmetry, point, teleporter.initial_state(point, [symmetry]))
        return _moved(group, generator, matrices, {})

    def _state(self, reader: Reader, prefix: str, batch: tuple[int, ...], hidden: int) -> tuple[Tensor, Tensor]:
        """The state that an earlier answer gave; zero if there is none."""
        names = [f"{prefix}.{part}" for part in ("hidden", "memory")]
        if not any(reader.has(name) for name in names):
            zero = torch.zeros(*batch, hidden, dtype=self._own)
            return zero, zero
        found = [reader.tensor(name, *batch, hidden) for name in names]
        for name, value in zip(names, found, strict=True):
            if bool((value.abs() > _LARGEST_STATE).any()):
                raise Refused(f"tensors.{name}", "it is no state that this service has given")
        return found[0].to(self._own), found[1].to(self._own)


def _apart(network: Callable[..., Any], counts: Sequence[int]) -> Callable[..., Any]:
    """A network that is evaluated for each of some stacked requests alone.

    Networks are of float32, and products of more rows are rounded otherwise: what one client is answered would depend
    on the others by 1e-7.
    """

    def evaluated(inputs: Tensor, cell: tuple[Tensor, Tensor]) -> Any:
        found, start = [], 0
        for count in counts:
            part = slice(start, start + count) if count else start
            coefficients, gate, state = network(inputs[part], tuple(each[part] for each in cell))
            found.append((coefficients, gate, *state))
            start += count or 1
        join = torch.cat if counts[0] else torch.stack
        coefficients, gate, hidden, memory = (join(each) for each in zip(*found, strict=True))
        return coefficients, gate, (hidden, memory)

    return evaluated


def _matrices(reader: Reader, group: Group, batch: tuple[int, ...] | None, needed: bool = True) -> Mapping[str, Tensor]:
    """The small matrices of a symmetry by name; for groups of vectors their diagonals."""
    names = BASIS["O"] if group.name == "O" else MATRICES
    found = {}
    for name in reader.under("matrices."):
        whole_name = f"matrices.{name}"
        if name not in names:
            raise Refused(f"tensors.{whole_name}", f"the matrices are {', '.join(names)}")
        square = group.shape if len(group.shape) == 1 else (group.size, group.size)
        value = reader.tensor(whole_name, *(batch or ()), *square, free=batch is None)
        found[name] = reader.in_one_dtype(whole_name, value)
        if name.endswith("_covariance"):
            check_covariance(whole_name, value, len(group.shape))
    if needed and not found:
        raise Refused("tensors", "there are no matrices: their names begin with 'matrices.'")
    if group.name == "O" and needed and set(found) != set(names):
        raise Refused("tensors", f"matrices.{next(name for name in names if name not in found)} is missing")
    if len({tuple(value.shape) for value in found.values()}) > 1:
        raise Refused("tensors", "the matrices are of several shapes")
    return found


MATRICES = (
    "feature_covariance",
    "preactivation_covariance",
    "outgoing_covariance",
    "incoming_covariance",
    "outgoing_gradient_covariance",
    "incoming_gradient_covariance",
    "outgoing_moment",
    "incoming_moment",
)


_READ_BY = {"outgoing": ("outgoing_covariance",), "balanced": ("outgoing_covariance", "incoming_covariance")}
"""The matrices that the whitening of a side reads."""

_FEATURES = ("preactivation_covariance", "feature_covariance", "incoming_covariance")
"""Those of which the whitening of features reads the first that is there."""


def _check_read(side: str, matrices: Mapping[str, Tensor], dimensions: int) -> None:
    """Refuses where what the whitening of a side reads is missing, or is zero in any task of a stack."""
    read = _READ_BY.get(side) or tuple(name for name in _FEATURES if name in matrices)[:1]
    if not read:
        raise Refused("tensors", f"one of the matrices {', '.join(_FEATURES)} is needed")
    for name in read:
        if name not in matrices:
            raise Refused(f"tensors.matrices.{name}", "it is missing")
    for name in read:
        if not bool(matrices[name].flatten(-dimensions).any(-1).all()):
            raise Refused("element", f"matrices.{name} is zero: there is nothing to whiten")


def _moved(group: Group, generator: Tensor, matrices: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Message:
    """The answer with a generator, its element and size, and the effect that the matrices predict."""
    element = group.exp(generator)
    effect = {f"effect.{name}": value for name, value in effect_of(group, element, matrices).items()}
    found = {"generator": generator, "element": element, "size": group.norm(generator), **effect, **state}
    return Message({"group": {"name": kind_of(group), "size": group.size}}, found)
