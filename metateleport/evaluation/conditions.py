"""The conditions that a run's figures and seconds hold under."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

__all__ = ["conditions_of"]


def conditions_of(device: str) -> dict[str, Any]:
    """The hardware and the versions of this process, as reports name them.

    Args:
        device: the tasks' device, as `cpu` or `cuda`.

    Returns:
        `device`, `accelerator` (`none` on the CPU), `machine`, `threads`, and the versions `python`, `torch` and
        `numpy`.

    Example:
        >>> conditions_of("cpu")["accelerator"]
        'none'
    """
    return {
        "device": device,
        "accelerator": torch.cuda.get_device_name(device) if "cuda" in device else "none",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count() or 1} CPUs",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
