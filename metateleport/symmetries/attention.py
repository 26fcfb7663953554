"""The two symmetries of an attention head: query with key, value with output."""

from __future__ import annotations

from metateleport.symmetries.axes import AxisSymmetry

__all__ = ["AttentionQK", "AttentionVO"]


class AttentionQK(AxisSymmetry):
    r"""$GL(d)$ between the queries and keys of a head of size $d$, exact.

    $$(W_Q, b_Q) \mapsto (A W_Q, A b_Q), \qquad (W_K, b_K) \mapsto (A^{-\top} W_K, A^{-\top} b_K),$$

    so that $q^\top k$ stays. Query heads that share a key head (grouped-query attention) move by one $A$. With a
    rotary embedding $A$ has to commute with the rotations: the group is `PlaneScaling`, of dimension $d$.
    """

    kind = "attention QK"


class AttentionVO(AxisSymmetry):
    r"""$GL(d)$ between the values of a head of size $d$ and what the output layer takes in of it, exact.

    $$(W_V, b_V) \mapsto (B W_V, B b_V), \qquad W_O \mapsto W_O B^{-1}.$$

    Attention mixes positions, not features. Query heads that share a value head move by one $B$, which acts on each
    of their parts of $W_O$.
    """

    kind = "attention VO"
