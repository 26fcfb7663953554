"""The report of the benchmark of meta-training, as text and as a page of the docs."""

from __future__ import annotations

from typing import Any

__all__ = ["page_of", "table_of"]

_CALM = 0.9

_TARGETS = {
    ("equivariant", "lr+tele", "float64"): 4.0,
    ("equivariant", "lr+tele", "float32"): 8.0,
    ("tensor", "update+tele", "float64"): 10.0,
    ("equivariant", "update+tele", "float64"): 3.0,
}
"""How many times the source's speed the largest stack shall have, by networks, mode and dtype."""


def table_of(report: dict[str, Any]) -> str:
    """The report as text."""
    machine, settings, ratios = report["conditions"], report["settings"], report["ratios"]
    head = (
        "microseconds per task-step",
        "meta-gradient",
        "min-max",
        "CPU time",
        "meta-step",
        "stacked/single",
        "ours/source",
        "operations",
        "kept MB",
    )
    rows = [head]
    for case in report["cases"]:
        both = [ratios[kind].get(case["name"]) for kind in ("stacked_over_single", "ours_over_source")]
        gradient = case["meta_gradient"]
        rows.append(
            (
                case["name"],
                f"{gradient['median']:.0f}",
                f"{gradient['min']:.0f}-{gradient['max']:.0f}",
                f"{case['cpu']['median']:.0f}",
                f"{case['meta_step']['median']:.0f}",
                *("" if ratio is None else f"{ratio['median']:.3f}" for ratio in both),
                f"{case['counts']['operations']:.0f}",
                f"{case['counts']['kept_bytes'] / 1e6:.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(both))
        for both in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines += [
        "",
        f"{settings['rounds']} rounds; width {settings['width']}, unroll {settings['unroll']}; "
        f"ratios are of the meta-gradient's {'CPU' if ratios['basis'] == 'cpu' else 'wall-clock'} time; "
        "all are medians over rounds",
        f"{machine['device']} on {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, Python {machine['python']}, CPU share {machine['cpu_share']:.2f}",
    ]
    if machine["device"] == "cpu" and machine["cpu_share"] < _CALM:
        lines.append("the machine was busy with other programs: CPU time is nearer than the others to a calm machine's")
    lines += [_told(peak) for peak in report["peaks"]]
    return "\n".join(lines)


def _told(peak: dict[str, Any]) -> str:
    together = "all in one graph" if peak["at_once"] is None else f"{peak['at_once']} in one graph"
    return (
        f"{peak['name']}, {together}: at most {peak['megabytes']:.0f} MB of memory in a process, "
        f"{peak['before']:.0f} MB before"
    )


def _reached(report: dict[str, Any]) -> list[str]:
    """A line for each target that was measured."""
    largest, lines = max(report["settings"]["tasks"]), []
    for case in report["cases"]:
        target = _TARGETS.get((case["network"], case["mode"], case["dtype"]))
        ratio = report["ratios"]["ours_over_source"].get(case["name"])
        if target is not None and ratio is not None and case["tasks"] == largest:
            faster = 1 / ratio["median"]
            said = "met" if faster >= target else "not met"
            lines.append(
                f"- `{case['network']}`, `{case['mode']}`, {case['dtype']}: {faster:.1f} times the source's speed; the "
                f"target, {target:g}, is {said}."
            )
    return lines


def page_of(report: dict[str, Any]) -> str:
    """The report as a page of the docs."""
    machine, settings, ratios = report["conditions"], report["settings"], report["ratios"]
    times = "CPU time" if ratios["basis"] == "cpu" else "wall-clock time"
    lines = [
        "# What meta-training costs",
        "",
        "`python -m benchmarks.meta_training --page docs/meta-training-costs.md` writes this page. The task is the "
        "source paper's regression: two layers of equal width with LeakyReLU between them. A task-step is one inner "
        "step on one task; its time is that of the meta-gradient, forward passes, inner steps and meta-backward pass.",
        "",
        "`source` is the loop of the source's code, which follows one task at a time; `roof` is that loop batched by "
        "hand over the largest stack; `floor` is stacked gradient descent without networks. `equivariant` and `tensor` "
        "are this library's networks, `flat` the paper's in this library's loop. How many times faster than the source "
        "is told of one task, where both follow one, and of a stack. Operations, waits for the device and matrices "
        "that are factorised do not depend on the machine; nor do the bytes that graphs keep for the backward pass.",
        "",
        f"Medians and ranges of {settings['rounds']} rounds, all cases in turn, in {times}; width {settings['width']}, "
        f"unroll {settings['unroll']}; {machine['device']} on {machine['cpu']}, {machine['threads']} thread, torch "
        f"{machine['torch']}, Python {machine['python']}; {100 * machine['cpu_share']:.0f} % of the wall-clock time "
        "was this program's.",
        "",
        "| networks | mode | tasks | dtype | microseconds a task-step | times the source's speed (range) | operations "
        "an inner step | waits | matrices factorised a task-step | MB kept |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        ratio, counts = ratios["ours_over_source"].get(case["name"]), case["counts"]
        faster = (
            "" if ratio is None else f"{1 / ratio['median']:.1f} ({1 / ratio['max']:.1f} to {1 / ratio['min']:.1f})"
        )
        time = case["cpu" if ratios["basis"] == "cpu" else "meta_gradient"]["median"]
        lines.append(
            f"| {case['network']} | {case['mode']} | {case['tasks']} | {case['dtype']} | {time:.0f} | {faster} | "
            f"{counts['operations']:.0f} | {counts['waits']:.0f} | {counts['factorised_per_task_step']:.1f} | "
            f"{counts['kept_bytes'] / 1e6:.1f} |"
        )
    lines += ["", *_reached(report), *(f"- {_told(peak)}." for peak in report["peaks"])]
    if machine["device"] == "cpu":
        lines += ["", "On a GPU: not run."]
    return "\n".join(lines).rstrip() + "\n"
