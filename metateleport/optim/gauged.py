"""A hand-designed optimizer whose steps are taken in gauges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.capture import unwrapped
from metateleport.gauges import DIRECTIONS, GAUGES, Direction, FactorPair, GaugeKind, Sketches, directions_in_gauges
from metateleport.gauges.factors import FactorSide
from metateleport.gauges.whitened import SIDES, column_squares
from metateleport.linalg import alike, polar_factors, squarable
from metateleport.optim.closure import evaluated
from metateleport.optim.factors import Factors, known_factors
from metateleport.optim.fitting import as_number, check_parameters, check_total_steps
from metateleport.optim.parameters import dense_gradient, master, raised, trainable, working_dtype, write
from metateleport.point import Tensors
from metateleport.symmetries import Symmetry

__all__ = ["BETAS", "FLOOR", "MATCHED", "GaugedOptimizer"]

FLOOR = 2.0
"""The floor on the singular values of a pair's product, in steps.

One factor's step is long in the other's gauge where they are small. At a tenth of the step, the split was seen to drift
apart by 1e5 in 300 steps.
"""

_FLOOR_OF_DESCENT = 0.1

MATCHED = 0.2
"""Root mean square of the entries of a polar step over `lr`, as AdamW's steps have it."""

_TABLE = 0.5
"""Where there is no model to ask, a matrix of more rows than columns whose root mean square is above this at its first
step counts as a table of embeddings."""

_EPS = 1e-8

BETAS: dict[Direction, tuple[float, float]] = {**dict.fromkeys(DIRECTIONS, (0.9, 0.99)), "shampoo": (0.8, 0.95)}
"""Memories of the momentum and of second moments by the rule, where none are given."""


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

    **Shampoo's rule** has the polar factor in a gauge of the rows as well, $P = (1 + L / \rho)^{-1/4}$ for the running
    mean $L$ of the gradients' second moments, seen in the gauge:

    $$B \mapsto B - \eta\, P\, \mathrm{polar}(P\, M_B (A A^\top)^{-1/2})\, (A A^\top)^{-1/2}.$$

    $L$ is kept as a sketch of $\max(2 k, 16)$ columns, so that the price is that of a few more products, however wide
    the layer is; $\rho$ is a thousandth of its largest eigenvalue (`metateleport.gauges.outer`).

    **The other tensors** take the same rule in the identity's gauge. With `rule="polar"` and `"shampoo"` matrices step
    along their polar factors and vectors and tables of embeddings as AdamW does; that is Muon with AdamW. With
    `rule="adam"` all of them step as AdamW does, with `rule="descent"` along their momenta.

    **Lengths.** A polar step, and one by Adam in a gauge, is as long as AdamW's would be in root mean square, if all
    singular values of the product moved: $\eta = 0.2\,\mathrm{lr} \sqrt{\max(m, n)}$ for a product of $m \times n$. So
    one `lr` serves all tensors. Descent has `lr` alone.

    **Symmetries** are found without an input in adapters by their names (PEFT, loralib) and in chains of linear layers;
    in any other model with `example_input`, or named, as `metateleport.symmetries.LoRAPair.of(model, "a", "b")`. A
    tensor of two pairs, as in a chain of three linear layers, is stepped in the gauge of the first. A factor that is
    frozen still makes the other's gauge.

    It is a `torch.optim` optimizer as `metateleport.LearnedOptimizer` is one: a step whose loss or gradient is not
    finite is left out and counted in `skipped`; half-precision weights have their rounding errors kept. A step never
    waits for the device, but for `rule="shampoo"`, which takes eigenvectors of small matrices.

    Args:
        model_or_params: the model; or parameters, groups of them or pairs of name and parameter. Without a model there
            are no gauges but the identity's.
        rule: `polar`, `shampoo`, `adam` (second moments of columns with one another, as a gauge has no coordinates of
            its own) or `descent`.
        gauge: `whitening`; `identity` for none and `random` for one of the same spectrum in other directions, both to
            compare with.
        symmetries: of the model, in the order of the data flow; those that are known if not given.
        example_input: a tensor, a tuple or a dict of keyword inputs: finds the symmetries of any model.
        lr: of each group.
        betas: memories of the momentum, which is Nesterov's, and of second moments; `(0.9, 0.99)` if not given, and
            `(0.8, 0.95)` for `rule="shampoo"`.
        weight_decay: decoupled, of each group: each step takes off `lr * weight_decay` of the weights.
        total_steps: length of the run, where it is known: steps get shorter along half a cosine, down to zero there.
            Steps that were left out count.

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

    Source: "LoRA-Muon" (arXiv 2606.12921) for the polar factor on adapters; Gupta, Koren and Singer, ICML 2018 (arXiv
    1802.09568) for Shampoo's metric; Tong, Ma and Chi, JMLR 2021 (arXiv
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
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        for name, value, known in (("rule", rule, DIRECTIONS), ("gauge", gauge, GAUGES)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; not {value!r}")
        check_total_steps(total_steps)
        self.rule, self.gauge, self.total_steps = rule, gauge, total_steps
        self.model: nn.Module | None = None
        given: Any = model_or_params
        if isinstance(model_or_params, nn.Module):
            self.model = unwrapped(model_or_params)[0]
            given = list(self.model.parameters())
        elif symmetries or example_input is not None:
            raise ValueError("symmetries are those of a model: give the model itself in the place of its parameters")
        betas = BETAS[rule] if betas is None else betas
        self.steps = 0
        self._skipped: Tensor | None = None
        self._factors = Factors(self.model, ())
        self._finds_added = False
        super().__init__(given, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        if self.model is not None and gauge != "identity":
            self._factors = known_factors(self.model, symmetries, example_input)
            self._finds_added = symmetries is None

    @property
    def pairs(self) -> tuple[FactorPair, ...]:
        """The pairs of factors that are stepped in gauges."""
        return self._factors.pairs

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with `lr`, `betas` and `weight_decay` of its own or the defaults.

        Factors of adapters among them, known by their names, are stepped in gauges from then on, unless the symmetries
        were given.

        Raises:
            ValueError: if one of its numbers cannot be, or its parameters are of a kind that no step is taken on.
        """
        if isinstance(param_group, dict):
            _check_numbers({**self.defaults, **param_group})
        super().add_param_group(param_group)
        held = [value for group in self.param_groups for value in group["params"]]
        for device in {value.device for value in held}:
            check_parameters([{"params": [value for value in held if value.device == device]}])
        if self._finds_added:
            self._factors.add(self._factors.new_pairs({id(value) for value in self.param_groups[-1]["params"]}))

    @property
    def skipped(self) -> int:
        """Number of steps that were not taken, as the loss, a gradient, its square or the step was not finite."""
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
        loss, told = (loss, None) if closure is None and loss is None else evaluated(closure, loss)
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
        known = {id(value): name for name, value in self._factors.tensors.items()}
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
        rest = {name: value for name, value in momentum.items() if name not in steps or not self._factors.whole[name]}
        plain = self._as_they_are(rest, seen, rates, groups, corrections, finite, parameters)
        moved: dict[str, Tensor] = {}
        for name in parameters:
            step = steps.get(name, plain.get(name))
            if name in steps and name in plain:
                step = self._factors.joined(name, steps[name], plain[name])
            assert step is not None
            decay = 1 - rates[name] * groups[name]["weight_decay"]
            moved[name] = decay * starts[name] - step
        kept = torch.stack([each.isfinite().all() for each in moved.values()]).all()
        assert self._skipped is not None
        self._skipped = self._skipped.to(kept.device) + (finite & ~kept)
        for name, value in parameters.items():
            write(value, torch.where(finite & kept, moved[name], starts[name]), self.state[value])

    def _by_coordinates(self, value: Tensor, start: Tensor) -> bool:
        """Whether a tensor steps as AdamW does where it has no gauge; decided at its first step."""
        if self.rule in ("adam", "descent"):
            return self.rule == "adam"
        if value.ndim < 2 or value.is_complex():
            return True
        if self.model is None:
            tall = value.ndim == 2 and value.shape[0] > value.shape[1]
            return tall and bool(start.square().mean() > _TABLE**2)
        tables = (
            module.weight for module in self.model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        )
        return any(value is table for table in tables)

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
        factors = self._factors
        if not factors.pairs:
            return {}
        like = next(iter(starts.values()))
        whole = dict(starts)
        for name, value in factors.tensors.items():
            if name not in whole and value.device == like.device:
                whole[name] = master(value, like.dtype, self.state.get(value, {}))
        covectors = {name: value for name, value in momentum.items() if name in factors.tensors}
        lengths = []
        squares: dict[tuple[int, Any], Tensor] | None = {} if self.rule == "adam" else None
        floors: list[float] = []
        for number, pair in enumerate(factors.pairs):
            counted = [factors.rows(pair, side) for side in SIDES]
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
        sketches = self._sketches(covectors, gradients, groups, finite, parameters)
        steps = directions_in_gauges(
            self.rule, factors.pairs, whole, covectors, floors, squares, self.gauge, factors.swapped, sketches
        )
        if sketches is not None:
            self._keep(sketches, covectors, parameters)
        factor: dict[str, float] = {}
        for pair, length in zip(factors.pairs, lengths, strict=True):
            factor.update({name: length for side in SIDES for name in pair.names(side)})
        return {name: value * (factor[name] * rates[name]) for name, value in steps.items()}

    def _sketches(
        self,
        covectors: Tensors,
        gradients: Tensors,
        groups: Mapping[str, dict[str, Any]],
        finite: Tensor,
        parameters: Mapping[str, Tensor],
    ) -> Sketches | None:
        """What Shampoo's direction remembers."""
        if self.rule != "shampoo":
            return None
        memory, kept = {}, {}
        like = next(iter(covectors.values()))
        for number, pair in enumerate(self.pairs):
            for side in SIDES:
                name = next((each for each in pair.names(side) if each in covectors), None)
                if name is None:
                    continue
                own = torch.tensor(groups[name]["betas"][1], dtype=like.dtype, device=like.device)
                memory[number, side] = torch.where(finite, own, 1.0).reshape(1)
                if "sketch" in self.state[parameters[name]]:
                    kept[number, side] = self.state[parameters[name]]["sketch"][self._place(number, name)].unsqueeze(0)
        return Sketches({name: gradients[name] for name in covectors}, memory, kept)

    def _keep(self, sketches: Sketches, covectors: Tensors, parameters: Mapping[str, Tensor]) -> None:
        """Writes what Shampoo's direction remembers into the states of the tensors."""
        for (number, side), sketch in sketches.kept.items():
            name = next(each for each in self.pairs[number].names(side) if each in covectors)
            state = self.state[parameters[name]]
            if "sketch" not in state or state["sketch"].shape[1:] != sketch.shape[1:]:
                count = sum(name in pair.names(side) for pair in self.pairs)
                state["sketch"] = sketch.new_zeros(count, *sketch.shape[1:])
            state["sketch"][self._place(number, name)] = sketch[0]

    def _place(self, number: int, name: str) -> int:
        """Which of the pairs of a tensor one is, as heads of one projection are several."""
        side: FactorSide = "out" if name in self.pairs[number].names("out") else "in"
        return [each for each, pair in enumerate(self.pairs) if name in pair.names(side)].index(number)

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
        state, memory = self.state[parameters[name]], groups[name]["betas"][1]
        if "columns" not in state:
            count = sum(name in pair.names(side) for pair in self.pairs)
            state["columns"] = found.new_zeros(count, *found.shape[1:])
        kept = state["columns"][self._place(number, name)]
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

    def state_dict(self) -> dict[str, Any]:
        """The state dict. Each group has, beside its settings, what the optimizer as a whole remembers."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group |= {
                "rule": self.rule, "steps": self.steps, "skipped": self.skipped, "swapped": self._factors.decided
            }  # fmt: skip
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict; moments keep their precision.

        Raises:
            ValueError: if the parameters are not as many or of other shapes, or it is another optimizer's or another
                rule's; the optimizer is as it was before.
        """
        groups = state_dict["param_groups"]
        parameters = [value for group in self.param_groups for value in group["params"]]
        indices = [index for group in groups for index in group["params"]]
        held = [each for each in state_dict["state"].values() if each]
        foreign = any("betas" not in group or "eps" in group for group in groups)
        if foreign or any("momentum" not in each for each in held):
            raise ValueError("this state dict is not a GaugedOptimizer's: start a new optimizer from the saved weights")
        # Of the first versions: a rule is known by its moments, and steps were those that were taken.
        rule = groups[0].get("rule", self.rule)
        if rule != self.rule:
            raise ValueError(f"this state dict is of rule={rule!r} and the optimizer of rule={self.rule!r}")
        for parameter, index in zip(parameters, indices, strict=False):
            momentum = state_dict["state"].get(index, {}).get("momentum")
            if momentum is not None and momentum.shape != parameter.shape:
                raise ValueError(
                    f"this state dict has moments of shape {tuple(momentum.shape)} for parameter {index}, which has "
                    f"shape {tuple(parameter.shape)}: it was saved with another model, or with its parameters in "
                    "another order"
                )
        super().load_state_dict(state_dict)
        own = self.param_groups[0]
        self.steps = int(own.get("steps", max([float(each["step"]) for each in held], default=0.0)))
        self._skipped = torch.tensor(int(own.get("skipped", 0)))
        swapped = own.get("swapped", ())
        if len(swapped) == len(self.pairs):
            self._factors.swapped = swapped
        for group in self.param_groups:
            for key in ("rule", "steps", "skipped", "swapped"):
                group.pop(key, None)
        # The base class has cast everything to the parameter's dtype; moments of half precision are wider.
        for parameter, index in zip(parameters, indices, strict=True):
            kept = state_dict["state"].get(index, {})
            if kept:
                self.state[parameter] = {
                    key: value.detach().clone().to(parameter.device) for key, value in kept.items()
                }

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled."""
        return {**self.__dict__, "_zero_grad_profile_name": None}


def _dtype(held: Sequence[tuple[Tensor, dict[str, Any]]]) -> torch.dtype:
    return working_dtype({str(number): value for number, (value, _) in enumerate(held)})


def _check_numbers(options: Mapping[str, Any]) -> None:
    for name, what in (("lr", "the size of the steps"), ("weight_decay", "a share times lr")):
        if not 0 <= as_number(options[name]) < math.inf:
            raise ValueError(f"{name} is {what}, a number of at least zero; not {options[name]!r}")
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= as_number(each) < 1 for each in betas):
        raise ValueError(f"betas are the memories of momentum and second moments, two numbers in [0, 1); not {betas!r}")
