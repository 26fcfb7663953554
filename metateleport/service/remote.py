"""Learned parts whose networks run in a service: weights, gradients and samples stay where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metateleport.gauges.step import Gauge
from metateleport.learned import LearnedTeleporter, MetaOptimizer, MetaOptimizerConfig
from metateleport.learned.gauge import LearnedGauge
from metateleport.learned.gauge_teleporter import GaugeTeleporter
from metateleport.learned.rules.gauged import GaugedSettings
from metateleport.learned.teleporter import BASIS
from metateleport.point import Point
from metateleport.service.answering import MATRICES, PER_TENSOR, step_refusal
from metateleport.service.client import Client, ServiceError
from metateleport.service.message import BINARY, JSON, Message
from metateleport.service.reading import kind_of
from metateleport.symmetries import Symmetry
from metateleport.teleporters import Teleporter

__all__ = ["OnceTeleporter", "RemoteGauge", "RemoteStep", "RemoteTeleporter", "Service", "connect"]

Cell = tuple[Tensor, Tensor]


def connect(
    url: str,
    ask: str = "learned",
    token: str | None = None,
    timeout: float = 30.0,
    json: bool = False,
    **settings: Any,
) -> Any:
    """A teleporter whose networks run in a service that `metateleport serve` has started.

    The symmetries are found, certified and moved along here. The service is sent small matrices of each symmetry
    (covariances of size k x k) and numbers of order one; weights, gradients and samples never leave. The service keeps
    nothing: the state of its networks comes back with each answer, and is saved with the optimizer's.

    With `metateleport.TeleportingOptimizer(optimizer, model, connect(url))` it chooses the teleports; with
    `metateleport.LearnedOptimizer(model, connect(url))` also the steps, where the checkpoint's update rule reads a few
    numbers of each tensor. Answers equal those of the checkpoint loaded here, bit for bit on one kind of machine, if
    the service does not batch, and to rounding if it does.

    Args:
        url: where the service is, as `http://127.0.0.1:8000`.
        ask: `learned`, or a teleport that nothing is learned for: `balance`, `whitening` or `random`.
        token: its bearer token; that of the environment variable `METATELEPORT_TOKEN` if not given.
        timeout: seconds after which a request counts as failed, tries again included.
        json: whether to send JSON, which people can read, in the place of safetensors.
        settings: of `whitening` (`side`, `damping`), `balance` (`damping`) or `random` (`size`, `seed`).

    Returns:
        The teleporter. Of a checkpoint that learns a step alone, something that only `LearnedOptimizer` takes.

    Raises:
        ServiceError: if the service cannot be reached or is of another version.
        ValueError: if `ask` or a setting is unknown.
    """
    client = Client(url, token, timeout, JSON if json else BINARY)
    if ask != "learned":
        return OnceTeleporter(client, ask, **settings)
    if settings:
        raise ValueError(f"a learned teleporter has no setting {next(iter(settings))!r}")
    service = Service(client, client.about())
    meta = service.networks()
    found: Any
    if isinstance(meta.teleporter, RemoteTeleporter):
        found = meta.teleporter
    elif meta.gauge is not None:
        found = GaugeTeleporter(meta.gauge).eval()
    else:
        found = RemoteStep()
    found.service = service
    return found


@dataclasses.dataclass(frozen=True)
class Service:
    """A service and what it has said of itself.

    Args:
        client: asks it.
        about: what it is: its checkpoint's name, shape and card.
    """

    client: Client
    about: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return str(self.about["name"])

    @property
    def made_for(self) -> Mapping[str, Any]:
        """What the checkpoint's card says that it is made for."""
        found = self.about.get("card", {}).get("made_for", {})
        return found if isinstance(found, Mapping) else {}

    def meta_optimizer(self) -> MetaOptimizer:
        """A meta-optimizer whose networks run in the service.

        Raises:
            ServiceError: if the checkpoint's step cannot be asked for without the weights.
        """
        config = MetaOptimizerConfig.read(self.about["meta_optimizer"])
        refusal = step_refusal(config.rule)
        if refusal:
            raise ServiceError(f"{self.name} at {self.client.url}: {refusal}")
        return self.networks()

    def networks(self) -> MetaOptimizer:
        """The meta-optimizer, whose step may be one that cannot be asked for."""
        config = MetaOptimizerConfig.read(self.about["meta_optimizer"])
        with torch.random.fork_rng(devices=[]):
            meta = MetaOptimizer(config).to(getattr(torch, str(self.about["dtype"])))
            if config.teleport is not None:
                if not isinstance(meta.teleporter, LearnedTeleporter):
                    raise ServiceError(f"the teleporter of {self.name} serves only the model it was made for")
                meta.teleporter = RemoteTeleporter(
                    self.client, config.groups, config.teleport.hidden, max_stretch=config.teleport.max_stretch
                )
            if config.gauge is not None:
                meta.gauge = RemoteGauge(
                    self.client, config.gauge_groups, config.gauge.hidden, config.gauge.metric_memory
                )
        if type(config.rule) in PER_TENSOR:
            rule: Any = meta.rule
            gauged = isinstance(config.rule, GaugedSettings)
            (rule.plain if gauged else rule).network = partial(_asked_steps, self.client, "tensors")
            for side, network in rule.networks.items() if gauged else ():
                network.forward = partial(_asked_steps, self.client, side)
        # No weights are here; what stands in their place tells checkpoints apart, as a saved state has to.
        mark = int(str(self.about.get("card", {}).get("weights_sha256", "0"))[:12] or "0", 16) / 16**12
        with torch.no_grad():
            for value in meta.parameters():
                value.fill_(mark)
        return meta.eval()


class RemoteTeleporter(LearnedTeleporter):
    """A learned teleporter whose networks run in a service; it is a `LearnedTeleporter` in all else.

    Args:
        client: asks the service.
        groups, hidden, max_stretch: as in `LearnedTeleporter`.
    """

    def __init__(self, client: Client, groups: Sequence[str], hidden: int, max_stretch: float | None = None) -> None:
        super().__init__(groups, hidden, max_stretch=max_stretch)
        self.client = client

    def proposed(
        self,
        symmetry: Symmetry,
        point: Point,
        progress: Tensor,
        cell: Cell,
        network: Any = None,
    ) -> tuple[Tensor, Cell]:
        """The service's generator and state; see `LearnedTeleporter.proposed`."""
        group, weight = symmetry.group, point.parameters[symmetry.parameters[0]]
        batch = () if point.loss is None else point.loss.shape
        matrices = _matrices(symmetry, point)
        if not all(bool(value.isfinite().all()) for value in matrices.values()):
            return weight.new_full((*batch, *group.shape), float("nan")), cell
        tensors = {"progress": progress, "state.hidden": cell[0], "state.memory": cell[1]}
        tensors |= {f"matrices.{name}": value for name, value in matrices.items()}
        try:
            answer = self.client.ask("teleport", Message({"group": _described(symmetry)}, tensors)).tensors
        except ServiceError as error:
            if error.field == "answer":
                return weight.new_full((*batch, *group.shape), float("nan")), cell
            raise _as_here(error) from error
        chosen, hidden, memory = (answer[name] for name in ("generator", "state.hidden", "state.memory"))
        return chosen.to(weight), (hidden.to(weight.device), memory.to(weight.device))


class RemoteGauge(LearnedGauge):
    """A learned gauge whose networks run in a service; it is a `LearnedGauge` in all else.

    Args:
        client: asks the service.
        groups, hidden, metric_memory: as in `LearnedGauge`.
    """

    def __init__(self, client: Client, groups: Sequence[str], hidden: int, metric_memory: float) -> None:
        super().__init__(groups, hidden, metric_memory)
        self.client = client
        # Optimizers in use hold the gauges of wide layers for some steps, and ask for the networks' choices alone.
        for group, network in self.networks.items():
            network.forward = partial(_asked_steps, client, f"gauge {group}")

    def elements(
        self,
        places: Sequence[Any],
        seen: Mapping[str, tuple[Tensor, Tensor]],
        point: Point,
        progress: Tensor,
        cells: Mapping[str, Cell],
    ) -> tuple[dict[str, Cell], list[Gauge]]:
        """The service's gauges and states; see `LearnedGauge.elements`."""
        if not places:
            return dict(cells), []
        tables, tensors = [], {"progress": progress}
        for index, (symmetry, side, _) in enumerate(places):
            key = f"{symmetry.key}/{side}"
            rows = {}
            if symmetry.modules and symmetry.modules[-1] in point.activations:
                rows = {"rows": int(point.activations[symmetry.modules[-1]].shape[-2])}
            tables.append({"group": _described(symmetry), "side": side, **rows})
            parts = (*seen[key], *cells[key])
            tensors |= {f"{index}.{name}": part for name, part in zip(_PLACE, parts, strict=True)}
        if not all(bool(value.isfinite().all()) for value in tensors.values()):
            raise torch.linalg.LinAlgError("a metric is not finite")
        try:
            answer = self.client.ask("gauges", Message({"places": tables}, tensors)).tensors
        except ServiceError as error:
            raise _as_here(error) from error
        after, gauges = dict(cells), []
        for index, (symmetry, side, names) in enumerate(places):
            element, inverse, size, hidden, memory = (
                answer[f"{index}.{name}"] for name in ("element", "inverse", "size", "hidden", "memory")
            )
            like = seen[f"{symmetry.key}/{side}"][0]
            gauge = Gauge(symmetry, side, names, element.to(like), size.to(like))
            # As exact as the element: made of the generator, which only the service knows.
            gauge.__dict__["inverse"] = inverse.to(like)
            gauges.append(gauge)
            after[f"{symmetry.key}/{side}"] = (hidden.to(like.device), memory.to(like.device))
        return after, gauges


class RemoteStep:
    """A learned step whose networks run in a service, for `LearnedOptimizer` alone: it has no teleport."""

    service: Service


class OnceTeleporter(Teleporter):
    """A teleporter of a service that nothing is learned for.

    Args:
        client: asks the service.
        method: `balance`, `whitening` or `random`.
        settings: of the method.

    Raises:
        ValueError: if the method or a setting is unknown.
    """

    def __init__(self, client: Client, method: str, **settings: Any) -> None:
        super().__init__()
        if method not in _SETTINGS:
            raise ValueError(f"what a service is asked for is learned, {', '.join(_SETTINGS)}; not {method!r}")
        for name in settings:
            if name not in _SETTINGS[method]:
                raise ValueError(f"{method} has {', '.join(_SETTINGS[method])}, and no setting {name!r}")
        self.name, self.client, self.method, self.settings = method, client, method, settings

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> int:
        """How many elements were asked for: of `random` each has a seed of its own."""
        return 0

    def generator(self, symmetry: Symmetry, point: Point, state: int | None) -> tuple[Tensor, int]:
        asked, weight = state or 0, point.parameters[symmetry.parameters[0]]
        fields = {"method": self.method, "group": _described(symmetry), **self.settings}
        tensors = {}
        if self.method == "random":
            fields["seed"] = int(self.settings.get("seed", 0)) + asked
        else:
            found = {name: value for name, value in symmetry.matrices(point.detach()).items() if name in MATRICES}
            if len(symmetry.group.shape) == 1:
                # What is whitened here is the diagonal of a whole matrix, whose sums are taken in another order.
                found = {name: torch.diagonal(value, dim1=-2, dim2=-1) for name, value in found.items()}
            tensors = {f"matrices.{name}": value for name, value in found.items()}
        try:
            answer = self.client.ask("once", Message(fields, tensors)).tensors["generator"].to(weight)
        except ServiceError as error:
            raise _as_here(error) from error
        batch = () if point.loss is None else point.loss.shape
        return answer.expand(*batch, *symmetry.group.shape), asked + 1


_PLACE = ("metric", "gradient", "hidden", "memory")
_SETTINGS = {"balance": ("damping",), "whitening": ("side", "damping"), "random": ("size", "seed")}


def _asked_steps(client: Client, network: str, inputs: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Cell]:
    """What the network of a rule would have put out here."""
    tensors = {"inputs": inputs, "state.hidden": state[0], "state.memory": state[1]}
    found = client.ask("steps", Message({"network": network}, tensors)).tensors
    outputs, hidden, memory = (found[name].to(inputs) for name in ("outputs", "state.hidden", "state.memory"))
    return outputs, (hidden, memory)


def _described(symmetry: Symmetry) -> dict[str, Any]:
    kind = kind_of(symmetry.group)
    if kind is None:
        raise ServiceError(f"a service knows no {symmetry.group!r}, the group of {symmetry!r}: leave it out")
    return {"name": kind, "size": symmetry.group.size}


def _matrices(symmetry: Symmetry, point: Point) -> dict[str, Tensor]:
    """The small matrices that a service reads; of groups of vectors their diagonals."""
    point = point.detach()
    found = symmetry.diagonals(point) if len(symmetry.group.shape) == 1 else symmetry.matrices(point)
    known = BASIS["O"] if symmetry.group.name == "O" else MATRICES
    return {name: value for name, value in found.items() if name in known}


def _as_here(error: ServiceError) -> Exception:
    """What would have been raised here."""
    return torch.linalg.LinAlgError(str(error)) if error.field == "element" else error
