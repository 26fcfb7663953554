"""learn2learn's own meta-learners, which teleporting ones are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metateleport.fewshot.learn2learn import learn2learn

__all__ = ["maml", "meta_curvature", "meta_sgd"]


def maml(model: nn.Module, lr: float, first_order: bool = False) -> Any:
    r"""Model-agnostic meta-learning: $w \leftarrow w - \eta\, G$ from a start that is meta-learned.

    Args:
        model: the model at the start.
        lr: $\eta$.
        first_order: take the gradients of the inner loop as constants.

    Returns:
        A `learn2learn.algorithms.MAML`.

    Raises:
        MissingLearn2Learn: if learn2learn is not installed.

    Example:
        >>> sum(value.numel() for value in maml(nn.Linear(3, 2), lr=0.1).parameters())
        8

    Source: Finn, Abbeel and Levine, ICML 2017 (arXiv 1703.03400), algorithm 1.
    """
    return learn2learn().algorithms.MAML(model, lr=lr, first_order=first_order)


def meta_sgd(model: nn.Module, lr: float, first_order: bool = False) -> Any:
    r"""Meta-SGD: a learning rate for every parameter is meta-learned too, $w \leftarrow w - \alpha \circ G$.

    Args:
        model: the model at the start.
        lr: the initial value of every entry of $\alpha$.
        first_order: take the gradients of the inner loop as constants.

    Returns:
        A `learn2learn.algorithms.MetaSGD`.

    Raises:
        MissingLearn2Learn: if learn2learn is not installed.

    Example:
        >>> sum(value.numel() for value in meta_sgd(nn.Linear(3, 2), lr=0.1).parameters())
        16

    Source: Li, Zhou, Chen and Li, 2017 (arXiv 1707.09835), equation 1.
    """
    return learn2learn().algorithms.MetaSGD(model, lr=lr, first_order=first_order)


def meta_curvature(model: nn.Module, lr: float, first_order: bool = False) -> Any:
    r"""Meta-Curvature: $W \leftarrow W - \eta\, M_{\text{out}}\, G\, M_{\text{in}}$ with meta-learned matrices, a
    preconditioner that is the same for all tasks.

    Args:
        model: the model at the start; its parameters are vectors, matrices or kernels of 2d convolutions.
        lr: $\eta$.
        first_order: take the gradients of the inner loop as constants.

    Returns:
        A `learn2learn.algorithms.GBML` with a `MetaCurvatureTransform` for every parameter.

    Raises:
        MissingLearn2Learn: if learn2learn is not installed.

    Example:
        >>> sum(value.numel() for value in meta_curvature(nn.Linear(3, 2), lr=0.1).parameters())
        23

    Source: Park and Oliva, NeurIPS 2019 (arXiv 1902.03356), section 3.
    """
    found = learn2learn()
    dtype = next(model.parameters()).dtype
    before = torch.get_default_dtype()
    try:
        # The transforms make their identities in the default dtype.
        torch.set_default_dtype(dtype)
        return found.algorithms.GBML(
            model, transform=found.optim.MetaCurvatureTransform, lr=lr, first_order=first_order, adapt_transform=False
        )
    finally:
        torch.set_default_dtype(before)
