"""AdamW and its kin, which update every coordinate by itself: AdamW, NAdamW, schedule-free AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metateleport.evaluation.methods.schedule import DECAYS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.trajectory import Method

__all__ = ["RIVALS", "adamw", "nadamw"]


def adamw(model: nn.Module, lr: float, beta2: float = 0.999) -> torch.optim.Optimizer:
    """Torch's AdamW on a module's trained parameters, without weight decay."""
    return torch.optim.AdamW(_trained(model), lr=lr, betas=(0.9, beta2), weight_decay=0.0)


def nadamw(model: nn.Module, lr: float, beta2: float = 0.999) -> torch.optim.Optimizer:
    """Torch's NAdam with decoupled weight decay, which is zero here."""
    return torch.optim.NAdam(_trained(model), lr=lr, betas=(0.9, beta2), weight_decay=0.0, decoupled_weight_decay=True)


def schedule_free(model: nn.Module, lr: float, beta1: float = 0.9, warmup_steps: int = 0) -> torch.optim.Optimizer:
    """Schedule-free AdamW of `pytorch_optimizer`, judged by its averaged weights.

    Source: Defazio et al., NeurIPS 2024 (arXiv 2405.15682).
    """
    from pytorch_optimizer import ScheduleFreeAdamW

    made: torch.optim.Optimizer = ScheduleFreeAdamW(
        _trained(model), lr=lr, betas=(beta1, 0.999), warmup_steps=warmup_steps
    )
    return made


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [value for value in model.parameters() if value.requires_grad]


def _adamw(**settings: Any) -> Method:
    return Scheduled("adamw", adamw, **settings)


def _nadamw(**settings: Any) -> Method:
    return Scheduled("nadamw", nadamw, **settings)


def _schedule_free(**settings: Any) -> Method:
    return Scheduled("schedule-free-adamw", schedule_free, **settings)


_CHOICES = {"decay": Choice(DECAYS), "beta2": Choice((0.999, 0.95))}

RIVALS = (
    Rival("adamw", _adamw, Lattice(-4, -1), _CHOICES, on_request=True, fair=True),
    Rival("nadamw", _nadamw, Lattice(-4, -1), _CHOICES, on_request=True, fair=True),
    Rival(
        "schedule-free-adamw",
        _schedule_free,
        Lattice(-3, 0),
        {"warmup_steps_share": Choice((0.05, 0.0)), "beta1": Choice((0.9, 0.95, 0.8))},
        on_request=True,
        fair=True,
        library="pytorch_optimizer",
        extra="second-order",
    ),
)
