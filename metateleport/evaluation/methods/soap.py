"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, one for every task of a stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metateleport.evaluation.methods.schedule import DECAYS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.trajectory import Method

__all__ = ["RIVALS", "soap"]


def soap(model: nn.Module, lr: float, precondition_frequency: int = 10) -> torch.optim.Optimizer:
    """SOAP of `pytorch_optimizer` on a module's trained parameters, without weight decay.

    Raises:
        ImportError: if `pytorch_optimizer` is not installed.

    Source: Vyas et al., ICLR 2025 (arXiv 2409.11321).
    """
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise ImportError("soap needs pytorch_optimizer: pip install 'metateleport[second-order]'") from error
    trained = [value for value in model.parameters() if value.requires_grad]
    made: torch.optim.Optimizer = SOAP(trained, lr=lr, weight_decay=0.0, precondition_frequency=precondition_frequency)
    return made


def _soap(**settings: Any) -> Method:
    return Scheduled("soap", soap, stacked=False, **settings)


RIVALS = (
    Rival(
        "soap",
        _soap,
        Lattice(-4, -1),
        {"decay": Choice(DECAYS), "precondition_frequency": Choice((10, 1))},
        tasks=8,
        on_request=True,
        fair=True,
        library="pytorch_optimizer",
        extra="second-order",
    ),
)
