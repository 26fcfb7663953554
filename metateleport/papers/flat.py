"""The source paper's own networks: gradients flattened in, a learning rate or an update and a k x k generator out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metateleport.gauges import Gauge
from metateleport.learned.parts import UNITS, GaugeSettings, TeleportSettings
from metateleport.learned.progress import Progress
from metateleport.learned.rules.base import Learns, RuleSettings, UpdateRule
from metateleport.learned.rules.registry import register
from metateleport.point import Point, Tensors
from metateleport.settings import AT_LEAST_ONE, SettingsError, setting, shown
from metateleport.symmetries import Symmetry, Unsuitable
from metateleport.teleporters import Teleporter, TrustRegion

__all__ = ["FlatRule", "FlatSettings", "FlatTeleporter"]

Shapes = Sequence[tuple[str, tuple[int, ...]]]
_GENERATOR_NORM = 0.01
_COORDINATES = 1_000_000
# The source's learning rates lie between 1e-7 and 5e-3.
_LOG_RATES = (math.log(1e-7), math.log(5e-3))


def _count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for _, shape in shapes)


def _dtype(networks: nn.Module) -> torch.dtype:
    return next(networks.parameters()).dtype


def _flat(point: Point, shapes: Shapes) -> Tensor:
    """All gradients of a task side by side, each tensor over its norm, `(tasks, coordinates)`."""
    parts = []
    for name, shape in shapes:
        if name not in point.gradients or tuple(point.gradients[name].shape[1:]) != tuple(shape):
            raise Unsuitable(
                f"these flat networks were made for {name} of shape {tuple(shape)}; the model has "
                f"{tuple(point.gradients[name].shape[1:]) if name in point.gradients else 'no such parameter'}"
            )
        gradient = point.gradients[name].detach().flatten(1)
        norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        parts.append(gradient / norm.clamp_min(torch.finfo(gradient.dtype).tiny) * gradient.shape[-1] ** 0.5)
    return torch.cat(parts, -1)


@register
@dataclasses.dataclass(frozen=True)
class FlatSettings(RuleSettings):
    """The source paper's networks, which serve one shape only (`FlatRule`, and `FlatTeleporter` for the teleport).

    Args:
        shapes: names and shapes of the parameters that they are made for.
        hidden: units of the LSTM.
        per_coordinate: put out the update itself, and not a learning rate for each tensor.
    """

    kind: ClassVar[str] = "flat"

    shapes: tuple[tuple[str, tuple[int, ...]], ...] = setting()
    hidden: int = setting(300, AT_LEAST_ONE, UNITS)
    per_coordinate: bool = setting(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = [size for _, shape in self.shapes for size in shape]
        if not self.shapes or min(sizes, default=1) < 1:
            raise SettingsError(
                f"rule.shapes has to name parameters with sizes of at least 1, not {shown(self.shapes)}"
            )
        if sum(math.prod(shape) for _, shape in self.shapes) > _COORDINATES:
            raise SettingsError(
                f"rule.shapes asks for more than {_COORDINATES} coordinates, which flat networks do not serve"
            )

    @property
    def learns(self) -> Learns:
        return "update" if self.per_coordinate else "lr"

    def rule(self) -> FlatRule:
        return FlatRule(self.shapes, self.hidden, self.per_coordinate)

    def teleporter(self, teleport: TeleportSettings, groups: tuple[str, ...]) -> FlatTeleporter:
        return FlatTeleporter(self.shapes, teleport.hidden)

    def check(self, teleport: TeleportSettings | None, gauge: GaugeSettings | None) -> None:
        if gauge is not None:
            raise SettingsError(
                f"gauge.kind = {gauge.kind!r} does not go with rule.kind = 'flat', whose steps are in no gauge: leave "
                "the gauge out"
            )
        if teleport is not None and teleport.max_stretch is not None:
            raise SettingsError(
                f"teleport.max_stretch = {teleport.max_stretch:g} does not go with rule.kind = 'flat', whose networks "
                "do not know where on the orbit they are: leave it out"
            )


class FlatRule(nn.Module, UpdateRule):
    r"""An LSTM over all gradients at once that puts out a learning rate for each tensor, or every coordinate's update.

    Args:
        shapes: names and shapes of the parameters it is made for.
        hidden: units of the LSTM (the source's is 300).
        per_coordinate: puts out the update itself.

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 5 and appendix E.
    """

    def __init__(self, shapes: Shapes, hidden: int = 300, per_coordinate: bool = False) -> None:
        super().__init__()
        self.shapes, self.hidden, self.per_coordinate = tuple(shapes), hidden, per_coordinate
        self.cell = nn.LSTMCell(_count(shapes), hidden)
        self.head = nn.Linear(hidden, _count(shapes) if per_coordinate else len(self.shapes))
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            # The source's learning rates start near 1e-4.
            self.head.bias.fill_(0.0 if per_coordinate else -9.0)

    def initial_state(self, point: Point) -> Any:
        assert point.loss is not None
        zero = torch.zeros(*point.loss.shape, self.hidden, dtype=_dtype(self), device=point.loss.device)
        return {"cell": (zero, zero)}

    def step(
        self,
        point: Point,
        symmetries: Sequence[Symmetry],
        progress: Progress,
        state: Any,
        gauges: Sequence[Gauge] = (),
        spend: bool = False,
    ) -> tuple[Tensors, Any]:
        hidden, memory = self.cell(_flat(point, self.shapes).to(_dtype(self)), state["cell"])
        outputs = self.head(hidden).to(progress.damping.dtype)
        moved, start = dict(point.parameters), 0
        for index, (name, shape) in enumerate(self.shapes):
            gradient = point.gradients[name]
            size = torch.Size(shape).numel()
            if self.per_coordinate:
                change = (progress.damping.unsqueeze(-1) * outputs[:, start : start + size]).reshape(gradient.shape)
            else:
                rate = (outputs[:, index].clamp(*_LOG_RATES).exp() * progress.damping).reshape(-1, *(1,) * len(shape))
                change = rate * gradient
            start += size
            moved[name] = point.parameters[name] - change
        return moved, {"cell": (hidden, memory)}


class FlatTeleporter(Teleporter, nn.Module):
    r"""An LSTM over all gradients at once that puts out a generator, entry by entry, of norm 0.01.

    Args:
        shapes: names and shapes of the parameters it is made for.
        hidden: units of the LSTM (the source's is 300).
        trust_region: bounds on what is carried out.

    Source: Zhao et al., ICLR 2024 (arXiv 2305.13404), section 5 and appendix E.
    """

    name = "learned"
    needs_gradient = True

    def __init__(self, shapes: Shapes, hidden: int = 300, trust_region: TrustRegion | None = None) -> None:
        nn.Module.__init__(self)
        Teleporter.__init__(self, trust_region)
        self.shapes, self.hidden = tuple(shapes), hidden
        self.cell = nn.LSTMCell(_count(shapes), hidden)
        widths = {torch.Size(shape)[0] for _, shape in shapes}
        self.heads = nn.ModuleDict({str(width): nn.Linear(hidden, width * width) for width in sorted(widths)})

    def initial_state(self, point: Point, symmetries: Sequence[Symmetry]) -> dict[str, Any]:
        like = next(iter(point.parameters.values()))
        batch = () if point.loss is None else point.loss.shape
        zero = torch.zeros(*batch, self.hidden, dtype=_dtype(self), device=like.device)
        return {symmetry.key: (zero, zero) for symmetry in symmetries}

    def generator(self, symmetry: Symmetry, point: Point, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        group, own = symmetry.group, _dtype(self)
        if str(group.size) not in self.heads:
            raise Unsuitable(f"these flat networks were not made for a symmetry of {group.size} units")
        single = point.loss is None or point.loss.ndim == 0
        stacked = point.map(lambda value: value.unsqueeze(0)) if single else point
        cell = state[symmetry.key]
        hidden, memory = self.cell(
            _flat(stacked, self.shapes).to(own), tuple(part.reshape(-1, self.hidden) for part in cell)
        )
        matrix = self.heads[str(group.size)](hidden).reshape(-1, group.size, group.size)
        matrix = matrix.squeeze(0) if single else matrix
        chosen = group.project(matrix.to(next(iter(point.parameters.values())).dtype))
        norm = group.norm(chosen).clamp_min(torch.finfo(chosen.dtype).tiny)
        return chosen * group.expand(_GENERATOR_NORM / norm), {**state, symmetry.key: (hidden, memory)}
