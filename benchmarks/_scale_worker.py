"""One process of `benchmarks.scale`, as torchrun starts it: some meta-steps, what they took and what they exchanged."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metateleport.families import load_family
from metateleport.learned import MetaOptimizer
from metateleport.training import FamilySettings, MetaTrainer, Ranks, Recipe, ValidationSettings, joined
from metateleport.training.outer import ESTIMATORS

__all__ = ["main"]

_WARM = 2


class _Counted(MetaTrainer):
    """A training that notes seconds, CPU seconds and bytes of every meta-step, and does not validate."""

    def __init__(self, recipe: Recipe, meta: MetaOptimizer, ranks: Ranks) -> None:
        family = load_family(recipe.family.name, recipe.family.settings)
        super().__init__(recipe, family, meta, ranks=ranks)
        self.steps: list[dict[str, float]] = []

    def _meta_step(self, *arguments: Any) -> None:
        sent: list[tuple[int, float]] = []
        own = dist.all_reduce

        def counted(values: Tensor, *rest: Any) -> Any:
            began = time.perf_counter()
            done = own(values, *rest)
            sent.append((values.numel() * values.element_size(), time.perf_counter() - began))
            return done

        dist.all_reduce = counted  # type: ignore[assignment]
        began, cpu = time.perf_counter(), time.process_time()
        try:
            super()._meta_step(*arguments)
        finally:
            dist.all_reduce = own
        self.steps.append(
            {
                "seconds": time.perf_counter() - began,
                "cpu": time.process_time() - cpu,
                "bytes": sum(size for size, _ in sent),
                "exchanges": len(sent),
                "waited": sum(seconds for _, seconds in sent),
            }
        )

    def _validate(self) -> None:
        self.progression.validations.append([self.progression.meta_step, 0.0])


def main(settings: dict[str, Any], folder: Path) -> None:
    """Takes the meta-steps and writes what they took.

    Args:
        settings: `estimator`, settings of the outer loop, `width` and `meta_steps`.
        folder: where each rank writes its figures.
    """
    torch.set_num_threads(1)
    kind = ESTIMATORS[settings["estimator"]]
    own = {name: value for name, value in settings["outer"].items() if name in kind.names()}
    outer = kind(meta_steps=settings["meta_steps"] + _WARM, blind=0.0, device="cpu", **own)
    family = FamilySettings("leaky_mlp", {"width": settings["width"], "distribution": "normal"})
    recipe = Recipe(family, teleport=None, outer=outer, validation=ValidationSettings(2, outer.meta_steps or 1))
    torch.manual_seed(0)
    meta = MetaOptimizer(recipe.networks(()))
    with joined() as ranks:
        trainer = _Counted(recipe, meta, ranks)
        trainer.run()
        found = {
            "steps": trainer.steps[_WARM:],
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "weights": sum(each.numel() for each in meta.parameters()),
        }
        (folder / f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
