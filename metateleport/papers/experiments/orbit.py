"""The experiment `orbit`: is the orbit the whole level set?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metateleport.capture import point_of
from metateleport.detection import find_symmetries
from metateleport.evaluation.style import BLUE, GREY, ORANGE, SKY
from metateleport.families import FamilyError, Task, gallery, load_family
from metateleport.papers.experiments.actions import fields, flatten, unflatten
from metateleport.papers.experiments.base import Claim, Experiment, ExperimentError, Findings, Progress
from metateleport.symmetries import Symmetry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Orbit", "rank"]

# Small enough for a whole Jacobian; families that are not here are taken as they come.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "quadratic": [{}],
    "leaky_mlp": [
        {"width": 8},
        {"width": 8, "depth": 3},
        {"width": 8, "samples": 4},
        {"width": 8, "samples": 16, "distribution": "normal"},
        {"width": 8, "samples": 16, "activation": "identity"},
        {"width": 8, "samples": 16, "activation": "relu", "distribution": "normal"},
        {"width": 8, "samples": 8, "activation": "tanh", "distribution": "normal"},
    ],
    "matrix_factorisation": [{"width": 10, "rank": 3}],
    "digits": [{"hidden": 8}],
}
TANGENT = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orbit(Experiment):
    """Is the orbit the whole level set? Dimensions of both for the models of the gallery.

    Settings:
        largest: models with more parameters are left out, and named.
        tolerance: singular values below this share of the largest count as zero.
    """

    name: ClassVar[str] = "orbit"
    size: ClassVar[tuple[float, float]] = (11.0, 6.5)

    largest: int = 1200
    tolerance: float = 1e-9

    def __post_init__(self) -> None:
        if self.largest < 1 or not 0 < self.tolerance < 1:
            raise ExperimentError(
                f"orbit needs room for one parameter and a tolerance between 0 and 1; got largest={self.largest}, "
                f"tolerance={self.tolerance}"
            )

    def findings(self, seed: int, progress: Progress) -> Findings:
        models: list[dict[str, Any]] = []
        left_out: list[dict[str, Any]] = []
        for family in gallery():
            for settings in SETTINGS.get(family, [{}]):
                label = " ".join([family, *(f"{name}={value}" for name, value in settings.items())])
                progress(label)
                try:
                    task = load_family(family, settings).task(0, "held-out", seed, torch.float64)
                except FamilyError as error:
                    # Families whose data are not on this machine.
                    left_out.append({"model": label, "reason": str(error)})
                    continue
                count = sum(value.numel() for value in task.model.parameters())
                if count > self.largest:
                    left_out.append({"model": label, "parameters": count})
                else:
                    models.append({"model": label, "parameters": count, **self._dimensions(task, seed)})
        if not models:
            raise ExperimentError(f"orbit: no model of the gallery has at most largest={self.largest} parameters")
        return Findings({"models": models, "left out": left_out}, _claims(models))

    def _dimensions(self, task: Task, seed: int) -> dict[str, Any]:
        model, (inputs, targets) = task.model, task.training
        # What the task names, and what is found; the ranks below count every direction once.
        found: list[Symmetry] = [*task.symmetries, *find_symmetries(model, inputs)]
        exact = [symmetry for symmetry in found if symmetry.exactness == "exact"]
        point, _ = point_of(model, found, inputs, None, lambda out: task.loss(out, *targets))
        names = list(dict(model.named_parameters()))
        gradient = flatten(
            {name: point.gradients.get(name, torch.zeros_like(point.parameters[name])) for name in names}, names
        )
        start = point.detach()
        moves, exact_moves = fields(found, start, names), fields(exact, start, names)
        x = flatten(start.parameters, names)

        def outputs(weights: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
            return torch.func.functional_call(model, unflatten(weights, start.parameters, names), rows).flatten()

        batch = _jacobian(outputs, x, inputs)
        if _is_data(task):
            leaving, at_minima = batch, torch.func.hessian(lambda weights: outputs(weights, inputs).sum())(x)
        else:
            # With a loss that is a sum of squares the Hessian at zero loss is J'J.
            leaving, at_minima = _jacobian(outputs, x, _fresh(inputs, batch.shape, len(x), seed)), batch
        lengths = moves.norm(dim=1) * gradient.norm()
        cosines = (moves @ gradient).abs()[lengths > 0] / lengths[lengths > 0]
        count = len(x)
        return {
            "exact_orbit": rank(exact_moves, self.tolerance),
            "orbit": rank(moves, self.tolerance),
            "level_set": count - 1,
            "minima": count - rank(at_minima, self.tolerance),
            "same_function": count - rank(leaving, self.tolerance),
            "tangent": float(cosines.max()) if len(cosines) else 0.0,
            "symmetries": sorted({symmetry.kind for symmetry in found}),
        }

    def draw(self, figure: Figure, results: Mapping[str, Any]) -> None:
        axes = figure.subplots()
        models = results["models"]
        bars = {
            "level_set": ("level set", "#CCCCCC"),
            "minima": ("minima of zero loss, on the batch", GREY),
            "orbit": ("orbit of all symmetries, batch forms too", ORANGE),
            "same_function": ("same outputs on all inputs", SKY),
            "exact_orbit": ("orbit of the exact symmetries", BLUE),
        }
        rows = np.arange(len(models))
        for place, (name, (label, colour)) in enumerate(bars.items()):
            values = [entry[name] for entry in models]
            offset = rows + (place - 2) * 0.16
            # On a logarithmic axis a dimension of zero has no bar, but its number.
            axes.barh(offset, [max(value, 0.8) for value in values], 0.15, left=0.7, color=colour, label=label)
            for value, height in zip(values, offset, strict=True):
                axes.text(max(value, 0.8) + 0.75, height, str(value), fontsize=6, va="center")
        axes.set(xscale="log", xlabel="dimension", yticks=rows)
        axes.set_yticklabels([f"{entry['model']}\n({entry['parameters']} parameters)" for entry in models], fontsize=7)
        axes.invert_yaxis()
        figure.legend(fontsize=7, loc="outside lower center", ncols=len(bars))


def rank(matrix: Tensor, tolerance: float) -> int:
    """The rank of a matrix, singular values below a share of the largest counting as zero.

    Example:
        >>> rank(torch.ones(3, 2), 1e-6)
        1
    """
    if not matrix.numel():
        return 0
    singular = torch.linalg.svdvals(matrix)
    return int((singular > tolerance * singular[0]).sum()) if float(singular[0]) > 0 else 0


def _jacobian(outputs: Any, x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    found: Tensor = torch.func.jacrev(lambda weights: outputs(weights, rows), chunk_size=256)(x)
    return found


def _is_data(task: Task) -> bool:
    """Whether the input is the problem itself, such as a quadratic's matrix, and not a batch of samples."""
    return not task.targets


def _fresh(inputs: tuple[Tensor, ...], shape: torch.Size, parameters: int, seed: int) -> tuple[Tensor, ...]:
    """Gaussian inputs, enough of them for eight times as many outputs as there are parameters."""
    outputs = shape[0] // inputs[0].shape[0]
    samples = -(-8 * parameters // outputs)
    source = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(samples, *each.shape[1:], generator=source, dtype=each.dtype) for each in inputs)


def _claims(models: Sequence[Mapping[str, Any]]) -> list[Claim]:
    quadratics = [entry for entry in models if entry["model"].startswith("quadratic")]
    networks = [entry for entry in models if not entry["model"].startswith("quadratic")]
    tangent = max(entry["tangent"] for entry in models)
    claims = [
        Claim(
            "infinitesimal symmetries are tangent to the level sets: largest cosine with the gradient",
            "NeurIPS 2022, abstract: the actions leave the loss invariant",
            tangent,
            None,
            tangent <= TANGENT,
        )
    ]
    for entry in quadratics:
        share = entry["orbit"] / entry["level_set"]
        claims.append(
            Claim(
                "on a quadratic the orbit is the whole level set: share of its dimension",
                "ICLR 2024, section 3",
                share,
                None,
                share == 1,
            )
        )
    if networks:
        whole = [entry["orbit"] / entry["level_set"] for entry in networks]
        at_minima = [entry["orbit"] / entry["minima"] for entry in networks if entry["minima"]]
        missing = [entry["same_function"] - entry["exact_orbit"] for entry in networks]
        claims += [
            Claim(
                "symmetry acts transitively on a network's level sets, which the likeness to Newton's method assumes: "
                "largest share of their dimension, over the networks",
                "ICLR 2024, section 3",
                max(whole),
                None,
                min(whole) == 1,
            ),
            Claim(
                "at minima of zero loss the orbit is the whole set of minima: smallest share of its dimension, over "
                "the networks",
                "here: what curvature along an orbit would have to stand for",
                min(at_minima, default=1.0),
                None,
                all(share == 1 for share in at_minima),
            ),
            Claim(
                "for some networks it is: share of the networks",
                "here",
                float(np.mean([share == 1 for share in at_minima])) if at_minima else 0.0,
                None,
                any(share == 1 for share in at_minima),
            ),
            Claim(
                "the exact symmetries account for every direction that leaves the outputs on all inputs alone: largest "
                "number of directions that they miss",
                "here",
                float(max(missing)),
                None,
                max(missing) == 0,
            ),
        ]
    return claims
