"""The use of CPU, memory and GPU by a run, under the names that MLflow's page of system metrics shows."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

__all__ = ["SystemMetrics"]

_EVERY = 10.0
_MEGABYTE = 1e6


class SystemMetrics:
    """Logs the use of the machine every ten seconds, in a thread of its own, from the first thing that is logged on.

    Args:
        log: called with metrics and the number of the sample.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None]) -> None:
        self._log, self._stop = log, threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to log; a second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="metateleport-system", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()

    def _work(self) -> None:
        import psutil

        process, number = psutil.Process(), 0
        psutil.cpu_percent()
        process.cpu_percent()
        while not self._stop.wait(_EVERY if number else 1.0):
            memory = psutil.virtual_memory()
            found = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(),
                "system/process_cpu_percentage": process.cpu_percent(),
                "system/process_memory_megabytes": process.memory_info().rss / _MEGABYTE,
                "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
                "system/system_memory_usage_percentage": memory.percent,
                **_gpu(),
            }
            self._log(found, number)
            number += 1


def _gpu() -> dict[str, float]:
    """Memory of the GPUs that this process uses; nothing is set up to find out."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"system/gpu_{index}_memory_usage_megabytes"] = (total - free) / _MEGABYTE
        found[f"system/gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
    return found
