"""The two symmetries of an attention head: query with key, value with output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metateleport.groups import GeneralLinear
from metateleport.symmetries.axes import AxisSymmetry, Leg
from metateleport.symmetries.base import Unsuitable

__all__ = ["AttentionQK", "AttentionVO"]


class AttentionQK(AxisSymmetry):
    r"""$GL(d)$ between the queries and keys of a head of size $d$, exact.

    $$(W_Q, b_Q) \mapsto (A W_Q, A b_Q), \qquad (W_K, b_K) \mapsto (A^{-\top} W_K, A^{-\top} b_K),$$

    so that $q^\top k$ stays. Query heads that share a key head (grouped-query attention) move by one $A$. With a
    rotary embedding $A$ has to commute with the rotations: the group is `PlaneScaling`, of dimension $d$.
    """

    kind = "attention QK"

    @classmethod
    def of_heads(cls, model: nn.Module, query: str, key: str, heads: int) -> list[AttentionQK]:
        """The symmetries of an attention written by hand: one for each head, whose rows stand together.

        Args:
            model: the module that holds the layers; it is read, not kept.
            query: name of the linear layer of all queries, head after head.
            key: name of that of the keys.
            heads: number of heads.

        Raises:
            Unsuitable: if a name is unknown, a layer is not linear, or the sizes do not fit.

        Example:
            >>> model = nn.ModuleDict({name: nn.Linear(6, 8) for name in ("query", "key")})
            >>> AttentionQK.of_heads(model, "query", "key", heads=2)[1]
            AttentionQK(query.weight[4:8], query.bias, key.weight, key.bias; GeneralLinear(4), exact)
        """
        layers = _layers(model, cls.kind, query, key)
        sizes = {name: layer.out_features for name, layer in layers.items()}
        return [
            cls(
                GeneralLinear(places.shape[1]),
                [*_outgoing(query, layers[query], places), *_outgoing(key, layers[key], places, dual=True)],
                outputs=[Leg(query, places, -1), Leg(key, places, -1, dual=True)],
            )
            for places in _places(cls.kind, sizes, heads)
        ]


class AttentionVO(AxisSymmetry):
    r"""$GL(d)$ between the values of a head of size $d$ and the output layer, exact.

    $$(W_V, b_V) \mapsto (B W_V, B b_V), \qquad W_O \mapsto W_O B^{-1}.$$

    Attention mixes positions, not features. Query heads that share a value head move by one $B$, which acts on each
    of their parts of $W_O$.
    """

    kind = "attention VO"

    @classmethod
    def of_heads(cls, model: nn.Module, value: str, out: str, heads: int) -> list[AttentionVO]:
        """The symmetries of an attention written by hand: one for each head, whose rows stand together.

        Args:
            model: the module that holds the layers; it is read, not kept.
            value: name of the linear layer of all values, head after head.
            out: name of the linear layer that takes the mixed values in.
            heads: number of heads.

        Raises:
            Unsuitable: if a name is unknown, a layer is not linear, or the sizes do not fit.

        Example:
            >>> model = nn.ModuleDict({"value": nn.Linear(6, 8, bias=False), "out": nn.Linear(8, 6)})
            >>> AttentionVO.of_heads(model, "value", "out", heads=2)[0]
            AttentionVO(value.weight[0:4], out.weight; GeneralLinear(4), exact)
        """
        layers = _layers(model, cls.kind, value, out)
        sizes = {value: layers[value].out_features, out: layers[out].in_features}
        return [
            cls(
                GeneralLinear(places.shape[1]),
                [*_outgoing(value, layers[value], places), Leg(f"{out}.weight", places, 1, dual=True)],
                inputs=[Leg(out, places, -1)],
                outputs=[Leg(value, places, -1)],
            )
            for places in _places(cls.kind, sizes, heads)
        ]


def _layers(model: nn.Module, kind: str, *names: str) -> dict[str, nn.Linear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        if name not in layers:
            known = ", ".join(map(repr, layers)) or "none"
            raise Unsuitable(f"{kind}: {name!r} is no linear layer of the model; it has {known}")
    return {name: layers[name] for name in names}


def _places(kind: str, sizes: dict[str, int], heads: int) -> list[Tensor]:
    """Where the coordinates of each head stand, `(1, size)`."""
    width = next(iter(sizes.values()))
    if heads < 1 or any(size != width or size % heads for size in sizes.values()):
        told = ", ".join(f"{name!r} has {size}" for name, size in sizes.items())
        raise Unsuitable(f"{kind}: {told} features, which are not {heads} heads of one size in both")
    return list(torch.arange(width).reshape(heads, 1, width // heads))


def _outgoing(name: str, layer: nn.Linear, places: Tensor, dual: bool = False) -> list[Leg]:
    legs = [Leg(f"{name}.weight", places, 0, dual)]
    return legs if layer.bias is None else [*legs, Leg(f"{name}.bias", places, 0, dual)]
