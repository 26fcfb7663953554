"""The interface of every symmetry: a group, and how its elements act on named parameters."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metateleport.groups import Group
from metateleport.linalg import product
from metateleport.point import Point
from metateleport.symmetries._memory import overlaps
from metateleport.symmetries.activations import slope
from metateleport.symmetries.certificate import Certificate

__all__ = ["Carried", "Kind", "Pair", "Symmetry", "Unsuitable", "overridden"]

Kind = Literal["vectors", "covectors", "squares"]


def overridden(cls: type, name: str, methods: Collection[str]) -> bool:
    """Whether a class has some methods from nearer than the attribute that tells of them; mixins count as they come.

    Args:
        cls: the class.
        name: of the attribute.
        methods: names of the methods.

    Example:
        >>> class Told:
        ...     known = True
        ...     def act(self): ...
        >>> class Acts:
        ...     def act(self): ...
        >>> [overridden(cls, "known", ["act"]) for cls in (Told, type("Mixed", (Acts, Told), {}))]
        [False, True]
    """
    for each in cls.__mro__:
        if name in vars(each):
            return False
        if not vars(each).keys().isdisjoint(methods):
            return True
    return False


class Carried(NamedTuple):
    """Tensors carried along by a group element, by parameter name, and whether they are exact."""

    tensors: dict[str, Tensor]
    exact: bool


class Unsuitable(ValueError):
    """The requested symmetry does not hold on this model, module or batch; the message says why."""


class Symmetry(abc.ABC):
    r"""A group $G$ acting on some of a model's parameters so that its outputs do not change.

    `exactness` says where that holds. `"exact"`: for all inputs. `"batch-exact"`: on the batch whose activations are in
    the point, under a rank condition that `holds` checks. `"approximate"`: up to a drift that has to be measured.

    A symmetry is pure: it keeps names and sizes, never tensors of a model, and `act` returns a new point.

    Example:
        >>> from metateleport.symmetries import Rescaling
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> symmetry = Rescaling(model, "0", "2")
        >>> symmetry.kind, symmetry.exactness, symmetry.dimension, symmetry.parameters
        ('rescaling', 'exact', 3, ('0.weight', '0.bias', '2.weight'))
        >>> moved = symmetry.act(torch.tensor([2.0, 1.0, 1.0]), Point(dict(model.named_parameters())))
        >>> torch.allclose(moved.parameters["0.weight"][0], 2 * model[0].weight[0])
        True
    """

    kind: str
    exactness: str
    group: Group
    parameters: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    """Buffers that it moves too (running statistics); a point holds them among its parameters."""
    modules: tuple[str, ...] = ()
    holds_by_element: bool = True
    """Whether its condition may depend on the group element, and not on the point alone."""
    reads_place: bool = True
    """Whether how covectors and squares are carried may depend on the point that the element acted at."""
    certificate: Certificate | None = None
    """What was measured of it, where it was found and not named by hand."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # What a base class says of its own carrying says nothing of another one.
        if overridden(cls, "reads_place", ("carry_covectors", "carry_squares")):
            cls.reads_place = True
        if overridden(cls, "multipliers", ("act", "carry_covectors", "carry_vectors", "carry_squares")):
            cls.multipliers = Symmetry.multipliers  # type: ignore[method-assign]

    @property
    def dimension(self) -> int:
        """Dimension of the Lie group."""
        return self.group.dimension

    @property
    def has_matrices(self) -> bool:
        """Whether it makes the matrices that learned teleporters and gauges read."""
        own = type(self)
        return own.matrices is not Symmetry.matrices or own.diagonals is not Symmetry.diagonals

    @property
    def where(self) -> str:
        """The parameters that it moves, as text that is unique among symmetries of its kind."""
        return ", ".join((*self.parameters, *self.buffers))

    @property
    def key(self) -> str:
        """Its kind and place, as text that is unique in a model; states of teleporters are stored by it."""
        return f"{self.kind}/{self.where}"

    @property
    def drift(self) -> float:
        """Largest relative drift of the outputs on inputs not used for finding it; NaN without a certificate."""
        return float("nan") if self.certificate is None else self.certificate.drift

    @abc.abstractmethod
    def act(self, element: Tensor, point: Point) -> Point:
        """Moves a point by a group element.

        Args:
            element: group elements, `(*batch, *group.shape)`.
            point: where to start; its gradients, activations and cotangents are carried along where present.

        Returns:
            The point `element . point`. Gradients that could not be carried are named in its `stale`.

        Raises:
            KeyError: if the point lacks a parameter or an activation that the action needs.
        """

    def action_at(self, point: Point, gradients_only: bool = False) -> Callable[[Tensor], Point]:
        """`act` at one point, for many elements: what depends on the point alone is computed once.

        Args:
            point: where to start, as in `act`.
            gradients_only: whether only the gradients will be read; parameters that they do not depend on may then be
                missing from the points that it gives.
        """
        return lambda element: self.act(element, point)

    def holds(self, point: Point, element: Tensor | None = None) -> Tensor:
        """Whether the symmetry's condition is met on the point's batch, boolean `(*batch,)`; exact ones always.

        Args:
            point: where the element would act.
            element: the element, for conditions that depend on it; the identity if not given.
        """
        weight = point.parameters[self.parameters[0]]
        return torch.ones(weight.shape[: self._batch(point)], dtype=torch.bool, device=weight.device)

    @abc.abstractmethod
    def carry_covectors(self, element: Tensor, covectors: Mapping[str, Tensor], point: Point) -> Carried:
        r"""Carries covectors (gradients, momenta) along.

        Under a linear action $w \mapsto A w$ a covector goes to $A^{-\top} p$. Where the action is not linear (batch
        forms) the nearest linear one is used, and the answer says that it is not exact.

        Args:
            element: the group element that moved the parameters.
            covectors: by parameter name, a tensor shaped like the parameter.
            point: where the element acted, for actions that depend on the place.

        Returns:
            Those of the symmetry's parameters, moved; and whether they are exact.
        """

    @abc.abstractmethod
    def carry_squares(self, element: Tensor, squares: Mapping[str, Tensor], point: Point) -> Carried:
        """Carries second moments of the gradient along; arguments and answer as in `carry_covectors`.

        Exact for diagonal groups; elsewhere the entries of a gradient are taken as uncorrelated.
        """

    def carry_vectors(self, element: Tensor, vectors: Mapping[str, Tensor], point: Point) -> dict[str, Tensor]:
        r"""Carries tangent vectors (steps) along a linear action: under $w \mapsto A w$ a step goes to $A\,dw$.

        Args:
            element: group elements, `(*batch, *group.shape)`.
            vectors: by parameter name, a tensor shaped like the parameter.
            point: where the element acts.

        Returns:
            Those of the symmetry's parameters, moved.

        Raises:
            Unsuitable: if the action is not linear.
        """
        own = {name: vectors.get(name, torch.zeros_like(point.parameters[name])) for name in self.parameters}
        moved = self.act(element, Point(own, loss=point.loss)).parameters
        return {name: moved[name] for name in self.parameters if name in vectors}

    def multipliers(self, element: Tensor, kind: Kind) -> dict[str, Tensor] | None:
        """What an action that scales entries multiplies its parameters by, so that their owner may do it in place.

        Where there are any, `act` makes new tensors, and leaves alone what the point lacks.

        Args:
            element: group elements, `(*batch, *group.shape)`.
            kind: whether parameters are to be moved, as `"vectors"`, or covectors or squares of them.

        Returns:
            By parameter name, shaped so that it multiplies the parameter; None where the action does more than that.
        """
        return None

    def preconditioned(
        self, element: Tensor, inverse: Tensor, covectors: Mapping[str, Tensor], point: Point
    ) -> dict[str, Tensor]:
        r"""A step along covectors taken at another place of the orbit and brought back: $p \mapsto g^{-1} (g \cdot p)$.

        Args:
            element: $g$, `(*batch, *group.shape)`; acts linearly.
            inverse: its inverse, of the same shape.
            covectors: by parameter name, a tensor shaped like the parameter.
            point: where the element acts.

        Returns:
            Those of the symmetry's parameters, as vectors.
        """
        return self.carry_vectors(inverse, self.carry_covectors(element, covectors, point).tensors, point)

    def rebuild_cost(self, point: Point) -> float:
        """Share of a gradient evaluation that carrying the gradients along costs; zero where they are covectors."""
        return 0.0

    def side(self, name: str) -> Literal["in", "out", "both"]:
        """Whether a parameter reads the features that move (as U does), outputs them (as V does), or both.

        Args:
            name: of one of the symmetry's parameters.
        """
        return "both"

    def undo_cost(self, point: Point, changed: Sequence[str]) -> float:
        """Share of a gradient evaluation that acting once more costs after a step; zero where it is algebra alone.

        Args:
            point: where the step led to.
            changed: names of the parameters that were stepped.
        """
        return 0.0

    def matrices(self, point: Point, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Small `(*batch, size, size)` matrices that transform with the group; a learned teleporter reads them.

        Args:
            point: where the model stands.
            names: those that are going to be read, so that the others need not be made; all if not given.

        Returns:
            By name. Names ending in `covariance` are positive semidefinite.
        """
        return {}

    def diagonals(self, point: Point) -> dict[str, Tensor]:
        """The diagonals of `matrices`, `(*batch, size)`: all that is read of them where the group is a diagonal one."""
        return {name: torch.diagonal(value, dim1=-2, dim2=-1) for name, value in self.matrices(point).items()}

    def moments(self, point: Point) -> dict[str, Tensor]:
        """Those of `matrices` that are moments: products of weights and their gradients, of any sign."""
        return {name: value for name, value in self.matrices(point).items() if name.endswith("moment")}

    def _batch(self, point: Point) -> int:
        """Number of batch dimensions of a point."""
        return 0 if point.loss is None else point.loss.ndim

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.where}; {self.group}, {self.exactness})"


class Pair(Symmetry):
    r"""A symmetry between two layers, $y = U\, s(V h + b)$: `first` holds $V$ and $b$, `second` holds $U$.

    Args:
        model: the module that holds both layers; it is read, not kept.
        first: name of the layer whose output is moved, as in `named_modules()`.
        second: name of the layer that takes it in.
        frozen: whether parameters that are frozen (`requires_grad=False`) move too.

    Raises:
        Unsuitable: if a name is unknown, a layer is of another type, the sizes do not fit or a parameter is shared.
    """

    layer_types: tuple[type[nn.Module], ...] = (nn.Linear,)

    def __init__(self, model: nn.Module, first: str, second: str, frozen: bool = False) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in (first, second):
            if name not in modules:
                known = ", ".join(repr(known) for known, module in modules.items() if isinstance(module, nn.Linear))
                raise Unsuitable(f"the model has no module named {name!r}; its linear layers are {known or 'none'}")
            if not isinstance(modules[name], self.layer_types):
                allowed = " or ".join(kind.__name__ for kind in self.layer_types)
                raise Unsuitable(f"{name!r} is a {type(modules[name]).__name__}; a {self.kind} needs {allowed}")
        if modules[first] is modules[second]:
            raise Unsuitable(f"{first!r} and {second!r} are the same layer; a {self.kind} needs two")
        self.first, self.second = first, second
        self.modules = (first, second)
        self.first_weight, self.second_weight = f"{first}.weight", f"{second}.weight"
        self.first_bias = f"{first}.bias" if modules[first].bias is not None else None
        self.parameters = tuple(
            name for name in (self.first_weight, self.first_bias, self.second_weight) if name is not None
        )
        self._refuse_unusual_parameters(model, frozen)
        self._first_ndim = modules[first].weight.ndim
        self._second_ndim = modules[second].weight.ndim
        self.width = modules[first].weight.shape[0]
        incoming = modules[second].weight.shape[1]
        if self.width < 1:
            raise Unsuitable(f"{first!r} outputs no features, so there is nothing between {first!r} and {second!r}")
        # Only a flattened convolution has several inputs of the next layer for each of its units.
        flattened = self._first_ndim > 2 and self._second_ndim == 2
        if incoming != self.width and (incoming % self.width or not flattened):
            grouped = " in each group" if getattr(modules[second], "groups", 1) > 1 else ""
            raise Unsuitable(f"{first!r} outputs {self.width} features, {second!r} reads {incoming}{grouped}")
        self._repeats = incoming // self.width

    @property
    def repeats(self) -> int:
        """How many inputs of the second layer each unit of the first stands in: several behind a flattening."""
        return self._repeats

    @property
    def is_dense(self) -> bool:
        """Whether both layers are linear ones, not convolutions."""
        return (self._first_ndim, self._second_ndim) == (2, 2)

    def side(self, name: str) -> Literal["in", "out", "both"]:
        return "in" if name == self.second_weight else "out"

    def _refuse_unusual_parameters(self, model: nn.Module, frozen: bool) -> None:
        """A weight that is shared, frozen or computed from others cannot be moved in one place only."""
        owners: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        named = dict(model.named_parameters(remove_duplicate=False))
        for name in self.parameters:
            if name not in named:
                raise Unsuitable(f"{name!r} is not a plain parameter of the model (parametrised or computed weights)")
            if len(owners[id(named[name])]) > 1:
                raise Unsuitable(f"{name!r} is shared ({', '.join(owners[id(named[name])])}) and cannot move alone")
            if not named[name].is_floating_point():
                raise Unsuitable(f"{name!r} is of {named[name].dtype}; only real parameters can be moved")
            if not named[name].requires_grad and not frozen:
                raise Unsuitable(f"{name!r} is frozen (requires_grad=False); it is moved only with frozen=True")
        others = [value for name, value in (*named.items(), *model.named_buffers()) if name not in self.parameters]
        for name in sorted(overlaps({name: named[name] for name in self.parameters}, others)):
            raise Unsuitable(f"another tensor of the model shares the memory of {name!r}, which cannot move alone")

    def matrices(self, point: Point, names: Collection[str] | None = None) -> dict[str, Tensor]:
        first, second = self._rows(point)
        makers: dict[str, Callable[[], Tensor]] = {
            "incoming_covariance": lambda: product(first, first.mT),
            "outgoing_covariance": lambda: product(second.mT, second),
        }
        if self.second in point.activations:
            features = self._features(point)
            makers["feature_covariance"] = lambda: product(features.mT, features)
        if self.first_weight in point.gradients and self.second_weight in point.gradients:
            first_gradient, second_gradient = self._rows(point, point.gradients)
            makers["incoming_gradient_covariance"] = lambda: product(first_gradient, first_gradient.mT)
            makers["outgoing_gradient_covariance"] = lambda: product(second_gradient.mT, second_gradient)
            makers["outgoing_moment"] = lambda: product(second.mT, second_gradient)
            makers["incoming_moment"] = lambda: product(first_gradient, first.mT)
        return {name: make() for name, make in makers.items() if names is None or name in names}

    def moments(self, point: Point) -> dict[str, Tensor]:
        if self.first_weight not in point.gradients or self.second_weight not in point.gradients:
            return {}
        (first, second), (first_gradient, second_gradient) = self._rows(point), self._rows(point, point.gradients)
        return {
            "outgoing_moment": product(second.mT, second_gradient),
            "incoming_moment": product(first_gradient, first.mT),
        }

    def diagonals(self, point: Point) -> dict[str, Tensor]:
        first, second = self._rows(point)
        found = {
            "incoming_covariance": _products(first, first, -1),
            "outgoing_covariance": _products(second, second, -2),
        }
        if self.second in point.activations:
            features = self._features(point)
            found["feature_covariance"] = _products(features, features, -2)
        if self.first_weight in point.gradients and self.second_weight in point.gradients:
            first_gradient, second_gradient = self._rows(point, point.gradients)
            found["incoming_gradient_covariance"] = _products(first_gradient, first_gradient, -1)
            found["outgoing_gradient_covariance"] = _products(second_gradient, second_gradient, -2)
            found["outgoing_moment"] = _products(second, second_gradient, -2)
            found["incoming_moment"] = _products(first_gradient, first, -1)
        return found

    def slopes(self, point: Point) -> Tensor | None:
        """Derivatives of the activation between the layers, `(*batch, samples, width)`; None where they are not known.

        Without a known activation they are the ratio of its outputs to its inputs, which is right for positively
        homogeneous activations, those of rescalings.
        """
        if not self.is_dense or self.first not in point.activations:
            return None
        before = product(point.activations[self.first], point.parameters[self.first_weight].mT)
        if self.first_bias is not None:
            before = before + point.parameters[self.first_bias].unsqueeze(-2)
        activation = getattr(self, "activation", None)
        if activation is not None:
            return slope(activation, before)
        after = point.activations.get(self.second)
        if after is None or after.shape != before.shape:
            return None
        still = before.abs() <= torch.finfo(before.dtype).tiny
        return torch.where(still, 1.0, after / torch.where(still, 1.0, before))

    def _features(self, point: Point) -> Tensor:
        """Inputs of the second layer, `(*batch, samples, width)`."""
        features = point.activations[self.second]
        if self._repeats > 1:
            features = features.unflatten(-1, (self.width, self._repeats)).mT.flatten(-3, -2)
        return features

    def _rows(self, point: Point, tensors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """V as `(*batch, width, inputs)` and U as `(*batch, outputs, width)`, or tensors shaped like them."""
        tensors = point.parameters if tensors is None else tensors
        first, second = tensors[self.first_weight], tensors[self.second_weight]
        if self._first_ndim > 2:
            first = first.flatten(1 - self._first_ndim)
        if self._second_ndim > 2:
            second = second.movedim(1 - self._second_ndim, -1).flatten(-self._second_ndim, -2)
        if self._repeats > 1:
            second = second.unflatten(-1, (self.width, self._repeats)).mT.flatten(-3, -2)
        return first, second


def _products(left: Tensor, right: Tensor, along: int) -> Tensor:
    """Inner products of the rows (`along` -1) or columns (-2) of two matrices."""
    return (left * right).sum(along)
