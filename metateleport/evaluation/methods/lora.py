"""Optimizers made for low-rank adapters: LoRA+, Riemannian-preconditioned AdamW and LoRA-RITE."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metateleport.evaluation.methods.schedule import DECAYS
from metateleport.evaluation.methods.scheduled import Scheduled
from metateleport.evaluation.rival import Choice, Lattice, Rival
from metateleport.evaluation.trajectory import Method
from metateleport.torchvision import define_operators

__all__ = ["RIVALS", "Riemannian", "lora_plus", "lora_rite", "riemannian"]


def lora_plus(model: nn.Module, lr: float, ratio: float) -> torch.optim.Optimizer:
    """PEFT's LoRA+: AdamW with a step size for B that is `ratio` times A's.

    Args:
        model: a stack of tasks or a model, with PEFT's names.
        lr: step size of A.
        ratio: that of B over it.

    Source: Hayou et al., ICML 2024 (arXiv 2402.12354).
    """
    made: torch.optim.Optimizer = _peft().create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio
    )
    return made


class Riemannian(torch.optim.AdamW):
    r"""PEFT's Riemannian-preconditioned AdamW on stacks of matrices, which PEFT's own leaves as they are.

    $$G_A \mapsto (B^\top B + \epsilon I)^{-1} G_A, \qquad G_B \mapsto G_B (A A^\top + \epsilon I)^{-1},$$

    and then AdamW's step, without weight decay.

    Args:
        pairs: A, `(..., rank, features)`, and B, `(..., features, rank)`, of every adapter.
        others: further parameters, which AdamW alone steps.
        lr: step size.
        reg: $\epsilon$.

    Source: Zhang and Pilanci, ICML 2024 (arXiv 2402.02347).
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], others: Sequence[Tensor], lr: float, reg: float) -> None:
        super().__init__([*itertools.chain(*pairs), *others], lr=lr, weight_decay=0.0)
        self.pairs, self.reg = tuple(pairs), reg

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for down, up in self.pairs:
            if down.grad is None or up.grad is None:
                continue
            down.grad = self._inverse(up.mT @ up) @ down.grad
            up.grad = up.grad @ self._inverse(down @ down.mT)
        super().step()

    def _inverse(self, matrix: Tensor) -> Tensor:
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.pinv(matrix + self.reg * eye)


def riemannian(model: nn.Module, lr: float, reg: float = 1e-2) -> torch.optim.Optimizer:
    """The Riemannian-preconditioned AdamW on a stack of tasks or a model with PEFT's names."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    pairs = [(value, named[name.replace("lora_A", "lora_B")]) for name, value in named.items() if "lora_A" in name]
    others = [value for name, value in named.items() if "lora_A" not in name and "lora_B" not in name]
    return Riemannian(pairs, others, lr, reg)


def lora_rite(model: nn.Module, lr: float, beta2: float = 0.999) -> torch.optim.Optimizer:
    """LoRA-RITE of `pytorch_optimizer`.

    Args:
        model: one task's model; its trained parameters have to be pairs of A, `(rank, features)`, and B.
        lr: step size.
        beta2: memory of the second moments.

    Source: Yen et al., ICLR 2025 (arXiv 2410.20625).
    """
    from pytorch_optimizer import LoRARite

    trained = [value for value in model.parameters() if value.requires_grad]
    made: torch.optim.Optimizer = LoRARite(trained, lr=lr, betas=(0.9, beta2))
    return made


def _peft() -> Any:
    # PEFT imports torchvision where it is installed.
    define_operators()
    return importlib.import_module("peft.optimizers")


def _lora_plus(**settings: Any) -> Method:
    return Scheduled("lora+", lora_plus, **settings)


def _riemannian(**settings: Any) -> Method:
    return Scheduled("riemannian", riemannian, **settings)


def _lora_rite(**settings: Any) -> Method:
    return Scheduled("lora-rite", lora_rite, stacked=False, **settings)


_DECAY = {"decay": Choice(DECAYS)}

RIVALS = (
    Rival(
        "lora+",
        _lora_plus,
        Lattice(-4, -1),
        {**_DECAY, "ratio": Choice((8, 3, 16))},
        on_request=True,
        fair=True,
        needs="LoRA pair",
        library="peft",
        extra="lora",
    ),
    Rival(
        "riemannian",
        _riemannian,
        Lattice(-4, -1),
        {**_DECAY, "reg": Choice((1e-2, 1e-4))},
        on_request=True,
        fair=True,
        needs="LoRA pair",
    ),
    Rival(
        "lora-rite",
        _lora_rite,
        Lattice(-4, -1),
        {**_DECAY, "beta2": Choice((0.999, 0.95))},
        tasks=8,
        on_request=True,
        fair=True,
        needs="LoRA pair",
        library="pytorch_optimizer",
        extra="second-order",
    ),
)
