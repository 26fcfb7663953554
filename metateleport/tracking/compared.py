"""Evaluations that MLflow has, side by side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metateleport.tracking.store import TrackingError, connect, database_of, reason_of, tracking_uri

__all__ = ["Compared", "compare", "draw_compared"]

_MOST = 1000


@dataclasses.dataclass(frozen=True)
class Compared:
    """One method of one evaluation.

    Args:
        task: the task family, which is the experiment.
        checkpoint: the checkpoint that was evaluated.
        method: the method's name.
        figures: `final_median`, `final_log10_median`, `final_ratio_to_learned`, `diverged`, `seconds`, as far as known.
        settings: of the evaluation: `tasks`, `steps`, `seed`, `dtype` and those of the task.
        evaluation: what the runs of one evaluation have in common.
        run: the run's id.
        when: when it began, as UTC.
    """

    task: str
    checkpoint: str
    method: str
    figures: Mapping[str, float]
    settings: Mapping[str, str]
    evaluation: str
    run: str
    when: str

    def table(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


_FIGURES = (
    "final_median",
    "final_log10_median",
    "final_ratio_to_learned",
    "final_held_out_accuracy",
    "diverged",
    "seconds",
    "drift_max",
)


def compare(task: str | None = None) -> list[Compared]:
    """All methods of all evaluations, the best first; those of one task and one set of settings stand together.

    Args:
        task: the task family; all if not given.

    Raises:
        TrackingError: if the store cannot be read, or has no evaluation of the task.
    """
    uri = tracking_uri()
    database = database_of(uri)
    if database is not None and not database.exists():
        raise TrackingError(
            f"there are no runs at {database}: run evaluate in this folder first, or set MLFLOW_TRACKING_URI"
        )
    client = connect(uri)
    try:
        named = {each.experiment_id: each.name for each in client.search_experiments()}
        wanted = [key for key, name in named.items() if task is None or name == task]
        runs = _pages(client, wanted, "tags.kind = 'method'") if wanted else []
        # Versions before 0.3.0 tagged the method alone.
        older = _pages(client, wanted, "tags.method != '' AND tags.evaluation != ''") if wanted else []
    except Exception as error:
        raise TrackingError(f"MLflow's store {uri} cannot be read ({reason_of(error)})") from error
    by_id = {each.info.run_id: each for each in (*runs, *older)}
    found = [_compared(named[each.info.experiment_id], each) for each in by_id.values()]
    if not found:
        known = sorted({name for name in named.values() if name != "Default"})
        what = f"no evaluation on {task!r}" if task else "no evaluation"
        raise TrackingError(
            f"{uri} has {what}: make one with metateleport evaluate"
            + (f"; there are experiments {', '.join(known)}" if known else "")
        )
    return sorted(found, key=_order)


def _order(each: Compared) -> tuple[Any, ...]:
    settings = sorted((key, value) for key, value in each.settings.items())
    return each.task, str(settings), each.figures.get("final_median", float("inf")), each.checkpoint, each.method


def _pages(client: Any, experiments: Sequence[str], query: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(list(experiments), query, max_results=_MOST, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


def _compared(task: str, run: Any) -> Compared:
    parameters, tags = run.data.params, run.data.tags
    settings = {
        name: parameters[name]
        for name in sorted(parameters)
        if name in ("tasks", "steps", "seed", "dtype") or name.startswith("task.")
    }
    return Compared(
        task=task,
        checkpoint=parameters.get("checkpoint", "none"),
        method=tags.get("method", parameters.get("method", "?")),
        figures={name: run.data.metrics[name] for name in _FIGURES if name in run.data.metrics},
        settings=settings,
        evaluation=tags.get("evaluation", ""),
        run=run.info.run_id,
        when=time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.info.start_time / 1000)),
    )


def draw_compared(rows: Sequence[Compared], path: Path) -> None:
    """Draws the medians along the evaluations of every row, as decimal logarithms.

    Args:
        rows: what `compare` gave.
        path: the png, svg or pdf to write.

    Raises:
        TrackingError: if the curves cannot be read.
    """
    from metateleport.evaluation.style import LINES, bare, colours_of, new_figure, save, suptitle

    client = connect(tracking_uri())
    figure = new_figure(9, 5)
    axes = figure.subplots()
    colours = colours_of(dict.fromkeys(each.method for each in rows))
    checkpoints = list(dict.fromkeys(each.checkpoint for each in rows))
    logarithmic = all("final_log10_median" in each.figures for each in rows)
    for each in rows:
        name = "log10_loss_median" if logarithmic else "loss_median"
        try:
            history = client.get_metric_history(each.run, name)
        except Exception as error:
            raise TrackingError(f"the curve of the run {each.run} cannot be read ({reason_of(error)})") from error
        points = sorted({point.step: point.value for point in history}.items())
        if points:
            # Checkpoints are told apart by markers, methods by colours.
            marker = "osD^vP*X"[checkpoints.index(each.checkpoint) % 8] if len(checkpoints) > 1 else None
            axes.plot(
                *zip(*points, strict=True),
                color=colours[each.method],
                linestyle=LINES.get(each.method.partition("/")[2], "-"),
                marker=marker,
                markevery=max(1, len(points) // 8),
                markersize=4,
                label=each.method if len(checkpoints) == 1 else f"{each.method} ({each.checkpoint})",
            )
    axes.set(xlabel="gradient evaluations", ylabel=("log10 of the " if logarithmic else "") + "median loss")
    bare(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    suptitle(figure, f"{rows[0].task}: {len({each.evaluation for each in rows})} evaluations")
    save(figure, path)
