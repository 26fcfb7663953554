"""Modules that tests write as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Written(nn.Module):
    """A module whose forward pass is given as a function."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor, **keywords: Tensor) -> Any:
        return self.function(self, *inputs, **keywords)
