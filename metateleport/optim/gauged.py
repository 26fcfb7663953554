"""A hand-designed optimizer whose steps are taken in gauges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import unwrapped
from metateleport.detection import exact_symmetries
from metateleport.detection.adapters import adapter_pairs, told_symmetries
from metateleport.gauges import DIRECTIONS, GAUGES, Direction, FactorPair, GaugeKind, directions_in_gauges, factor_pairs
from metateleport.gauges.whitened import SIDES, column_squares, rows_of
from metateleport.linalg import alike, polar_factors, squarable
from metateleport.optim.closure import told_loss
from metateleport.optim.fitting import check_parameters
from metateleport.optim.parameters import dense_gradient, master, raised, trainable, working_dtype, write
from metateleport.point import Tensors
from metateleport.symmetries import Symmetry, Unsuitable

__all__ = ["FLOOR", "MATCHED", "GaugedOptimizer"]

FLOOR = 2.0
"""The floor on the singular values of a pair's product, in steps.

One factor's step is long in the other's gauge where they are small. At a tenth of the step, the split was seen to drift
apart by 1e5 in 300 steps.
"""

_FLOOR_OF_DESCENT = 0.1

MATCHED = 0.2
"""Root mean square of the entries of a polar step over `lr`, as AdamW's steps have it."""

_TABLE = 0.5
"""A matrix whose root mean square is above this at its first step counts as a table of embeddings."""

_EPS = 1e-8


class GaugedOptimizer(torch.optim.Optimizer):
    r"""Steps the factors of a product in gauges: how the product is split makes no difference.

    Where two tensors are factors of a product, as $A$ and $B$ of a low-rank adapter, two linear layers, queries and
    keys, values and the output layer, elements $g$ of $GL(k)$ change the factors and not the model. Each tensor is
    stepped in a gauge of its own, a group element that is undone after the step:

    $$W_i \mapsto g_i^{-1} . \mathrm{step}(g_i . W).$$

    With momenta $M$ and the gauges in which the other factor is white

    $$B \mapsto B - \eta\, \mathrm{polar}(M_B (A A^\top)^{-1/2})\, (A A^\top)^{-1/2}, \qquad
      A \mapsto A - \eta\, (B^\top B)^{-1/2}\, \mathrm{polar}((B^\top B)^{-1/2} M_A).$$

    Singular values of $B A$ that are far below a floor of two steps are not divided by
    (`metateleport.gauges.whitening_roots`): so adapters leave $B = 0$, and the floor moves along with a group element
    as all else does. The product is the same after any number of steps whatever the split, but for rounding. Momenta
    are kept as they are at home and are covectors: seen in a gauge, they have moved from the last one to this one
    exactly. Weight decay and `lr` scale tensors, which no split notices either, as long as both factors have the same.

    **The other tensors** take the same rule in the identity's gauge. With `rule="polar"` matrices step along their
    polar factors and vectors and tables of embeddings as AdamW does; that is Muon with AdamW. With `rule="adam"` all of
    them step as AdamW does, with `rule="descent"` along their momenta.

    **Lengths.** A polar step, and one by Adam in a gauge, is as long as AdamW's would be in root mean square, if all
    singular values of the product moved: $\eta = 0.2\,\mathrm{lr} \sqrt{\max(m, n)}$ for a product of $m \times n$. So
    one `lr` serves all tensors. Descent has `lr` alone.

    **Symmetries** are found without an input in adapters by their names (PEFT, loralib) and in chains of linear layers;
    in any other model with `example_input`, or named, as `metateleport.symmetries.LoRAPair.of(model, "a", "b")`. A
    tensor of two pairs, as in a chain of three linear layers, is stepped in the gauge of the first. A factor that is
    frozen still makes the other's gauge.

    It is a `torch.optim` optimizer as `metateleport.LearnedOptimizer` is one: a step whose loss or gradient is not
    finite is left out and counted in `skipped`; half-precision weights have their rounding errors kept. A step never
    waits for the device.

    Args:
        model_or_params: the model; or parameters, groups of them or pairs of name and parameter. Without a model there
            are no gauges but the identity's.
        rule: `polar`, `adam` (second moments of columns with one another, as a gauge has no coordinates of its own) or
            `descent`.
        gauge: `whitening`; `identity` for none and `random` for one of the same spectrum in other directions, both to
            compare with.
        symmetries: of the model, in the order of the data flow; those that are known if not given.
        example_input: a tensor, a tuple or a dict of keyword inputs: finds the symmetries of any model.
        lr: of each group.
        betas: memories of the momentum, which is Nesterov's, and of second moments.
        weight_decay: decoupled, of each group: each step takes off `lr * weight_decay` of the weights.
        total_steps: length of the run, where it is known: steps get shorter along half a cosine, down to zero there.
            Steps that were left out count, until a state is loaded: it knows those that were taken.

    Raises:
        ValueError: if a setting is out of range, a symmetry names what the model does not have, or parameters cannot
            be served.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 4))
        >>> optimizer = GaugedOptimizer(model, lr=0.1)
        >>> x = torch.ones(5, 6)
        >>> for _ in range(20):
        ...     loss = (model(x) - 1).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> bool(loss < 0.1), optimizer.pairs[0].names("out")
        (True, ('0.weight', '0.bias'))

    Source: "LoRA-Muon" (arXiv 2606.12921) for the polar factor on adapters; Tong, Ma and Chi, JMLR 2021 (arXiv
    2005.08898) for descent; Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982) for the lengths.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        rule: Direction = "polar",
        gauge: GaugeKind = "whitening",
        symmetries: Sequence[Symmetry] | None = None,
        example_input: Any = None,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        for name, value, known in (("rule", rule, DIRECTIONS), ("gauge", gauge, GAUGES)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; not {value!r}")
        if total_steps is not None and (isinstance(total_steps, bool) or not total_steps >= 1):
            raise ValueError(f"total_steps is the number of steps of the run, or None; not {total_steps!r}")
        self.rule, self.gauge, self.total_steps = rule, gauge, total_steps
        self.model: nn.Module | None = None
        given: Any = model_or_params
        if isinstance(model_or_params, nn.Module):
            self.model = unwrapped(model_or_params)[0]
            given = list(self.model.parameters())
        elif symmetries or example_input is not None:
            raise ValueError("symmetries are those of a model: give the model itself in the place of its parameters")
        self.steps = 0
        self._skipped: Tensor | None = None
        super().__init__(given, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})
        self.pairs: tuple[FactorPair, ...] = ()
        if self.model is not None and gauge != "identity":
            self.pairs = factor_pairs(_symmetries(self.model, symmetries, example_input))
            if not self.pairs and symmetries is None:
                warnings.warn(
                    "GaugedOptimizer knows no factors of a product in this model and steps as without gauges: give "
                    "example_input=, a batch that the model takes, or name them, as "
                    "symmetries=[metateleport.symmetries.LoRAPair.of(model, 'a', 'b')]; symmetries=[] says that there "
                    "are none",
                    stacklevel=2,
                )
        self._factors: dict[str, Tensor] = {}
        if self.model is not None and self.pairs:
            named = dict(self.model.named_parameters(remove_duplicate=False))
            names = {name for pair in self.pairs for side in SIDES for name in pair.names(side)}
            self._factors = {name: named[name] for name in sorted(names)}
        self._swapped = [self._is_swapped(pair) for pair in self.pairs]
        self._whole = self._covered()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with `lr`, `betas` and `weight_decay` of its own or the defaults.

        Raises:
            ValueError: if one of its numbers cannot be, or its parameters are of a kind that no step is taken on.
        """
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            _check_numbers(options)
        super().add_param_group(param_group)
        held = [value for group in self.param_groups for value in group["params"]]
        for device in {value.device for value in held}:
            check_parameters([{"params": [value for value in held if value.device == device]}])

    @property
    def skipped(self) -> int:
        """Number of steps that were not taken, as the loss, a gradient or its square was not finite."""
        return 0 if self._skipped is None else int(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One step.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward()` on the loss and returns it.
            loss: the loss whose gradients are in `p.grad`, if there is no closure; a step is left out where it is not
                finite, and it is not read otherwise.

        Returns:
            What the closure returned, or `loss`.

        Raises:
            ValueError: if the loss is not a scalar.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        told = None if loss is None else told_loss(loss)
        devices: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for value in group["params"]:
                if trainable(value):
                    devices.setdefault(value.device, []).append((value, group))
        gradients = {id(value): dense_gradient(value) for held in devices.values() for value, _ in held}
        if not gradients:
            return loss
        finite: Tensor | None = None if told is None else told.isfinite()
        for device, held in devices.items():
            own = squarable([raised(gradients[id(value)], _dtype(held)) for value, _ in held]).all()
            finite = own if finite is None else finite.to(device) & own
        assert finite is not None
        missed = (~finite).long()
        self._skipped = missed if self._skipped is None else self._skipped.to(missed.device) + missed
        left = self._left()
        for device, held in devices.items():
            self._step_on(held, gradients, finite.to(device), left)
        self.steps += 1
        return loss

    def _left(self) -> float:
        """The factor on all steps that `total_steps` asks for."""
        if self.total_steps is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, self.steps / self.total_steps)))

    def _step_on(
        self,
        held: Sequence[tuple[Tensor, dict[str, Any]]],
        gradients: Mapping[int, Tensor],
        finite: Tensor,
        left: float,
    ) -> None:
        """Steps the parameters of one device."""
        dtype = _dtype(held)
        known = {id(value): name for name, value in self._factors.items()}
        names = {id(value): known.get(id(value), f"/{number}") for number, (value, _) in enumerate(held)}
        parameters = {names[id(value)]: value for value, _ in held}
        groups = {names[id(value)]: group for value, group in held}
        rates = {name: float(group["lr"]) * left for name, group in groups.items()}
        starts = {name: master(value, dtype, self.state[value]) for name, value in parameters.items()}
        seen, momentum, corrections = {}, {}, {}
        for name, value in parameters.items():
            gradient = torch.where(finite, raised(gradients[id(value)], dtype), 0.0)
            state, (memory, _) = self.state[value], groups[name]["betas"]
            if "momentum" not in state:
                if self._by_coordinates(value, starts[name]):
                    state["squares"] = torch.zeros_like(gradient[0])
                state["step"] = torch.zeros((), dtype=torch.float32, device=value.device)
                state["momentum"] = torch.zeros_like(gradient[0])
            state["step"] += finite
            before = raised(state["momentum"], dtype)
            state["momentum"].copy_(torch.where(finite, torch.lerp(gradient, before, memory), before)[0])
            # Nesterov's: what the momentum is going to be if the next gradient is like this one.
            corrected = 1 - memory ** (state["step"] + 1).to(dtype)
            momentum[name] = torch.lerp(gradient, raised(state["momentum"], dtype), memory) / corrected
            seen[name], corrections[name] = gradient, state["step"].to(dtype)
        steps = self._in_gauges(starts, seen, momentum, rates, groups, corrections, finite, parameters)
        rest = {name: value for name, value in momentum.items() if name not in steps or not self._whole[name]}
        plain = self._as_they_are(rest, seen, rates, groups, corrections, finite, parameters)
        for name, value in parameters.items():
            step = steps.get(name, plain.get(name))
            if name in steps and name in plain:
                step = self._joined(name, steps[name], plain[name])
            assert step is not None
            decay = 1 - rates[name] * groups[name]["weight_decay"]
            moved = torch.where(finite, decay * starts[name] - step, starts[name])
            write(value, moved, self.state[value])

    def _by_coordinates(self, value: Tensor, start: Tensor) -> bool:
        """Whether a tensor steps as AdamW does where it has no gauge; decided at its first step."""
        if self.rule != "polar":
            return self.rule == "adam"
        return value.ndim < 2 or value.is_complex() or bool(start.square().mean() > _TABLE**2)

    def _in_gauges(
        self,
        starts: Tensors,
        gradients: Tensors,
        momentum: Tensors,
        rates: Mapping[str, float],
        groups: Mapping[str, dict[str, Any]],
        counts: Tensors,
        finite: Tensor,
        parameters: Mapping[str, Tensor],
    ) -> Tensors:
        """The steps of the tensors of pairs."""
        if not self.pairs:
            return {}
        like = next(iter(starts.values()))
        whole = dict(starts)
        for name, value in self._factors.items():
            if name not in whole and value.device == like.device:
                whole[name] = master(value, like.dtype, self.state.get(value, {}))
        covectors = {name: value for name, value in momentum.items() if name in self._factors}
        lengths = []
        squares: dict[tuple[int, Any], Tensor] | None = {} if self.rule == "adam" else None
        floors: list[float] = []
        for number, pair in enumerate(self.pairs):
            counted = [_rows(pair, side, self._factors) for side in SIDES]
            lengths.append(1.0 if self.rule == "descent" else MATCHED * math.sqrt(max(counted)))
            own = [rates[name] for side in SIDES for name in pair.names(side) if name in covectors]
            least = _FLOOR_OF_DESCENT if self.rule == "descent" else FLOOR
            floors.append(least * max(own, default=0.0) * lengths[-1])
            for side in SIDES if squares is not None else ():
                found = column_squares(pair, side, {name: gradients[name] for name in covectors})
                if found is not None and squares is not None:
                    squares[number, side] = self._remembered(
                        number, side, found, groups, counts, finite, parameters, covectors
                    )
        steps = directions_in_gauges(
            self.rule, self.pairs, whole, covectors, floors, squares, self.gauge, self._swapped
        )
        factor: dict[str, float] = {}
        for pair, length in zip(self.pairs, lengths, strict=True):
            factor.update({name: length for side in SIDES for name in pair.names(side)})
        return {name: value * (factor[name] * rates[name]) for name, value in steps.items()}

    def _remembered(
        self,
        number: int,
        side: Any,
        found: Tensor,
        groups: Mapping[str, dict[str, Any]],
        counts: Tensors,
        finite: Tensor,
        parameters: Mapping[str, Tensor],
        covectors: Tensors,
    ) -> Tensor:
        """The running mean of the second moments of columns, without the bias of its start."""
        name = next(each for each in self.pairs[number].names(side) if each in covectors)
        own = [each for each, pair in enumerate(self.pairs) if name in pair.names(side)]
        state, memory = self.state[parameters[name]], groups[name]["betas"][1]
        if "columns" not in state:
            state["columns"] = found.new_zeros(len(own), *found.shape[1:])
        kept = state["columns"][own.index(number)]
        kept.copy_(torch.where(finite, torch.lerp(found[0], kept, memory), kept))
        return (kept / (1 - memory ** counts[name].clamp_min(1.0))).unsqueeze(0)

    def _as_they_are(
        self,
        momentum: Tensors,
        gradients: Tensors,
        rates: Mapping[str, float],
        groups: Mapping[str, dict[str, Any]],
        counts: Tensors,
        finite: Tensor,
        parameters: Mapping[str, Tensor],
    ) -> Tensors:
        """The steps of the other tensors."""
        if self.rule == "descent":
            return {name: rates[name] * value for name, value in momentum.items()}
        steps: Tensors = {}
        matrices = {name: value for name, value in momentum.items() if "squares" not in self.state[parameters[name]]}
        for several in alike(matrices):
            for name, polar in zip(several, polar_factors([matrices[name] for name in several]), strict=True):
                sides = polar.shape[1], polar[0].numel() // polar.shape[1]
                steps[name] = polar * (MATCHED * math.sqrt(max(sides)) * rates[name])
        for name in momentum.keys() - matrices.keys():
            kept, memory = self.state[parameters[name]]["squares"], groups[name]["betas"][1]
            kept.copy_(torch.where(finite, torch.lerp(gradients[name][0].square(), kept, memory), kept))
            root = (kept / (1 - memory ** counts[name].clamp_min(1.0))).sqrt()
            steps[name] = rates[name] * momentum[name] / (root + _EPS)
        return steps

    def _joined(self, name: str, gauged: Tensor, plain: Tensor) -> Tensor:
        """A step in a gauge where pairs move a tensor, and the plain one in its other entries."""
        step = plain
        for pair in self.pairs:
            for leg in (*pair.outgoing, *pair.incoming):
                if leg.name == name:
                    places = leg.flat.to(step.device)
                    step = step.index_copy(leg.axis + 1, places, gauged.index_select(leg.axis + 1, places))
        return step

    def _is_swapped(self, pair: FactorPair) -> bool:
        """Whether the factor that takes features in is the one of full rank, and the floor goes on the other."""
        out, into = (rows_of(pair, side, self._raised(pair, side)) for side in SIDES)
        assert out is not None
        assert into is not None
        if not bool(out.any()) or not bool(into.any()):
            return bool(into.any())
        return out.shape[1] < pair.size <= into.shape[1]

    def _raised(self, pair: FactorPair, side: Any) -> Tensors:
        return {name: self._factors[name].detach().unsqueeze(0) for name in pair.names(side)}

    def _covered(self) -> dict[str, bool]:
        """Of each tensor of pairs, whether they move all of its entries."""
        moved: dict[str, set[int]] = {}
        sizes: dict[str, int] = {}
        for pair in self.pairs:
            for leg in (*pair.outgoing, *pair.incoming):
                moved.setdefault(leg.name, set()).update(leg.places.flatten().tolist())
                sizes[leg.name] = self._factors[leg.name].shape[leg.axis]
        return {name: len(places) == sizes[name] for name, places in moved.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict; moments keep their precision.

        Raises:
            ValueError: if the parameters are not as many, or it is another optimizer's.
        """
        groups = state_dict["param_groups"]
        held = [each for each in state_dict["state"].values() if each]
        if any("betas" not in group for group in groups) or any("momentum" not in each for each in held):
            raise ValueError("this state dict is not a GaugedOptimizer's: start a new optimizer from the saved weights")
        super().load_state_dict(state_dict)
        # The base class has cast everything to the parameter's dtype; moments of half precision are wider.
        parameters = [value for group in self.param_groups for value in group["params"]]
        indices = [index for group in groups for index in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            own = state_dict["state"].get(index, {})
            if own:
                self.state[parameter] = {key: value.detach().clone().to(parameter.device) for key, value in own.items()}
        counts = [float(each["step"]) for each in held]
        self.steps = int(max(counts, default=0.0))

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled."""
        return {**self.__dict__, "_zero_grad_profile_name": None}


def _dtype(held: Sequence[tuple[Tensor, dict[str, Any]]]) -> torch.dtype:
    return working_dtype({str(number): value for number, (value, _) in enumerate(held)})


def _rows(pair: FactorPair, side: Any, parameters: Mapping[str, Tensor]) -> int:
    """How many rows the matrix of one side has."""
    return sum(
        parameters[leg.name].numel() // parameters[leg.name].shape[leg.axis] * leg.places.shape[0]
        for leg in pair.legs(side)
    )


def _symmetries(model: nn.Module, given: Sequence[Symmetry] | None, example_input: Any) -> Sequence[Symmetry]:
    if given is None and example_input is None:
        return told_symmetries(model, frozen=True)
    if given is None:
        adapters = adapter_pairs(model, frozen=True)
        try:
            return (*adapters, *exact_symmetries(model, example_input, buffers=False))
        except Unsuitable:
            return adapters
    named = dict(model.named_parameters(remove_duplicate=False))
    for symmetry in given:
        unknown = [name for name in symmetry.parameters if name not in named]
        if unknown:
            raise ValueError(f"{symmetry!r} names {unknown[0]!r}, which the model does not have")
    return given


def _check_numbers(options: Mapping[str, Any]) -> None:
    for name, what in (("lr", "the size of the steps"), ("weight_decay", "a share times lr")):
        number = float(options[name])
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {what}, a number of at least zero; not {options[name]!r}")
    betas = options["betas"]
    if len(betas) != 2 or not all(0 <= each < 1 for each in betas):
        raise ValueError(f"betas are the memories of momentum and second moments, two numbers in [0, 1); not {betas!r}")
