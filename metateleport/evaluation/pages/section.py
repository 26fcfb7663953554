"""A page's section on one evaluation: sentences, tables and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metateleport.evaluation.pages.entry import Entry
from metateleport.evaluation.pages.markdown import called, listed, ratio_cell, table
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.words import AGAINST, KINDS, ahead_or_behind, number, opening_of, over_seeds, verdict_of

__all__ = ["found_in", "section"]


def section(entry: Entry, title: str, picture: str | None = None) -> list[str]:
    """The lines of the section.

    Args:
        entry: the evaluation.
        title: title of the section.
        picture: name of the evaluation's picture, if there is one.
    """
    lines = [f"## {title}", "", " ".join(found_in(entry)), ""]
    if picture is not None:
        lines += [f"![loss by gradient evaluations and by seconds]({picture})", ""]
    lines += [*_medians(entry), *_ratios(entry), *_beside(entry), *_target(entry), *_rules(entry), *_conditions(entry)]
    return lines


def found_in(entry: Entry) -> list[str]:
    """The sentences on an evaluation: the teleport's effect, the rivals, and what diverged."""
    said = []
    if REFERENCE in entry.methods:
        said += _brought(entry)
        said += ahead_or_behind(entry.rivals, max(1, len(entry.seeds)))
    return [*said, *_failures(entry)]


def _brought(entry: Entry) -> list[str]:
    against, marks = entry.against, entry.marks
    if entry.parts:
        return ["Parts of the basis are left out, one run each; nothing is trained anew."]
    if not against and entry.rivals:
        return ["No run of the attribution is beside it."]
    if not against:
        return ["The learned method ran alone: does it go on, and does it stay at the loss that it has reached?"]
    if entry.moves_by == "none":
        return ["No teleport is learned here; all gain is the step's."]
    verdicts = [verdict_of(entry.moves_by, against, place) for place in range(len(marks))]
    if verdicts[-1] == "unknown":
        return ["The effect of the teleport was not measured here."]
    said = [f"At {marks[-1]} gradient evaluations {opening_of(entry.moves_by, against)} ({KINDS[entry.moves_by]})."]
    before = [
        f"at {mark} {opening_of(entry.moves_by, against, place)}"
        for place, mark in enumerate(marks[:-1])
        if verdicts[place] != verdicts[-1]
    ]
    return said + ([f"Earlier the verdict differs: {'; '.join(before)}."] if before else [])


def _failures(entry: Entry) -> list[str]:
    """A sentence that says which methods diverged and on how many tasks, or that none did."""
    tasks, seeds = int(entry.result["tasks"]), len(entry.seeds)
    lost = []
    for name, method in entry.methods.items():
        worst = entry.result.get("meta_seeds", {}).get("worst", {}).get(name)
        count, of = (worst["diverged"], tasks * seeds) if worst else (method["diverged"], tasks)
        if count:
            lost.append(f"{called(name, entry.moves_by).strip('*')} on {count} of {of}")
    if lost:
        return [f"Diverged{', over all meta-seeds' if seeds else ''}: {', '.join(lost)} tasks."]
    return [f"No run diverged{f' with any of {seeds} meta-seeds' if seeds else ''}."]


def _medians(entry: Entry) -> list[str]:
    accurate = any("held_out_accuracy" in method for method in entry.methods.values())
    header = [f"median {entry.measure} at", *map(str, entry.marks), *(["held-out accuracy"] if accurate else [])]
    header += ["diverged", "seconds", "largest drift"]
    rows = []
    for name, method in entry.methods.items():
        row = [called(name, entry.moves_by), *(number(entry.median(name, mark)) for mark in entry.marks)]
        if accurate:
            accuracy = method.get("held_out_accuracy")
            row.append(f"{accuracy[str(entry.steps)]:.1%}" if accuracy else "")
        drift = method.get("drift_max")
        seconds = number(method["seconds"]) + ("" if method.get("stacked", True) else " (task by task)")
        row += [str(method["diverged"] or ""), seconds, number(drift) if drift else ""]
        rows.append(row)
        if name == REFERENCE and entry.seeds:
            count = str(entry.result["meta_seeds"]["worst"][name]["diverged"] or "")
            for which, lost in ((max, count), (min, "")):
                medians = [number(which(entry.of_seeds(name, mark))) for mark in entry.marks]
                words = f"the {'worst' if which is max else 'best'} of {len(entry.seeds)} meta-seeds"
                rows.append([words, *medians, *([""] * accurate), lost, "", ""])
    return table(header, rows)


def _ratios(entry: Entry) -> list[str]:
    compared = {**entry.against, **entry.left_out, **entry.rivals}
    if not compared:
        return []
    timed = any("seconds" in each for each in compared.values())
    header = [f"{entry.measure} over the learned one's at", *map(str, entry.marks)]
    rows = []
    for name, each in compared.items():
        best = over_seeds(each)
        ratios = best["gradient_evaluations"]
        cells = [ratio_cell(ratio) for ratio in ratios]
        if timed:
            cells.append(ratio_cell(best["seconds"]) if "seconds" in best else "")
        rows.append([called(name, entry.moves_by), *cells])
        if "worst" in ratios[-1]:
            worst = [f"{ratio_cell(ratio['worst'])} (seed {ratio['worst']['seed']})" for ratio in ratios]
            rows.append(["- for the worst meta-seed", *worst, *([""] * timed)])
    return table([*header, *(["at equal seconds"] if timed else [])], rows)


def _beside(entry: Entry) -> list[str]:
    """The table of the other methods' losses over those of one that is not learned."""
    found = entry.result.get("against")
    if found is None:
        return []
    rows = []
    for name, each in found["others"].items():
        cells = [ratio_cell(ratio) for ratio in each["gradient_evaluations"]]
        # Losses that were measured now and then tell nothing of a time between.
        known = ratio_cell(each["seconds"]) if "seconds" in each else "not measured"
        timed = known if each.get("stacked", True) else "task by task"
        rows.append([called(name, entry.moves_by), *cells, timed])
    header = [f"{entry.measure} over that of {found['method']} at", *map(str, entry.marks), "at equal seconds"]
    return table(header, rows)


def _rules(entry: Entry) -> list[str]:
    """A sentence on how rivals were tuned, and the settings that were chosen."""
    rules = entry.result.get("rules", {"rivals": "library"})
    if rules["rivals"] != "fair":
        return [
            "Rivals are tuned on training tasks for the loss at the end (held-out where there is such a loss), without "
            "schedules, each until the best of its grid lies inside. Fair rules are those of `--rivals fair`.",
            "",
        ]
    aim = f" {rules['target']}" if rules["measure"] in ("target", "seconds") else ""
    lines = [
        f"Rivals under fair rules: {rules['trials']} trials each on {rules['tasks']} training tasks, for the "
        f"{rules['criterion']}{aim}, schedules included. The settings chosen:",
        "",
    ]
    for name, method in entry.methods.items():
        if "chosen" in method:
            chosen = {key: str(value) for key, value in method["chosen"].items()}
            lines.append(f"- {called(name, entry.moves_by)}: {listed(chosen)}")
    return [*lines, ""]


def _target(entry: Entry) -> list[str]:
    target = entry.result.get("target")
    if target is None:
        return []
    method, _, at = str(target["target"]).rpartition("@")
    lines = [*_needed(entry, target, f"to the loss that {method} has at {at}")]
    if "and_accuracy" in target:
        lines += _needed(entry, target["and_accuracy"], f"to that loss and {method}'s held-out accuracy at {at}")
    return lines


def _needed(entry: Entry, found: Mapping[str, Any], goal: str) -> list[str]:
    accurate = any("held_out_accuracy" in each for each in found["methods"].values())
    over = found.get("ratios_to_learned", {})
    header = [goal, "evaluations", "seconds", "tasks that miss it", *(["accuracy there"] if accurate else [])]
    header += ["evaluations over the learned one's", "worst meta-seed", "seconds over the learned one's"]
    header += ["the learned one's accuracy minus this"] if accurate else []
    rows = []
    for name, each in found["methods"].items():
        row = [called(name, entry.moves_by), number(each["evaluations"]), number(each["seconds"])]
        row.append(str(each["censored"] or ""))
        if accurate:
            row.append(f"{each['held_out_accuracy']:.1%}" if "held_out_accuracy" in each else "")
        ratio = over.get(name, {})
        best = ratio.get("meta_seeds", ratio)
        worst = best.get("evaluations", {}).get("worst")
        row += [ratio_cell(best["evaluations"]) if best else "", ratio_cell(worst) if worst else ""]
        row.append(ratio_cell(best["seconds"]) if best else "")
        if accurate:
            row.append(_gain(best["held_out_accuracy"]) if "held_out_accuracy" in best else "")
        rows.append(row)
    return table(header, rows)


def _gain(gain: Mapping[str, float]) -> str:
    shown = "{:+.2%} [{:+.2%}, {:+.2%}]".format(*(gain[key] for key in ("difference", "low", "high")))
    return f"**{shown}**" if gain["low"] > 0 or gain["high"] < 0 else shown


def _conditions(entry: Entry) -> list[str]:
    result, known = entry.result, entry.result["conditions"]
    where = known["device"] if known.get("accelerator", "none") == "none" else known["accelerator"]
    threads, jobs = int(known["threads"]), int(known.get("jobs", 1))
    said = [
        f"{result['tasks']} held-out tasks of `{entry.task}` ({listed(entry.settings)})",
        f"run seed {result['seed']}",
        str(result["dtype"]),
        f"{where}, {known['machine']}, {threads} thread{'s' if threads > 1 else ''}"
        + (f", {jobs} processes side by side" if jobs > 1 else ""),
        f"Python {known['python']}, torch {known['torch']}, numpy {known['numpy']}",
    ]
    lines = ["; ".join(said) + f". From {entry.source}."]
    if any(name in AGAINST for name in entry.methods) and "seconds" not in next(iter(entry.against.values()), {}):
        lines.append("Ratios at equal seconds were not recorded.")
    if "command" in result:
        lines += ["", "```", str(result["command"]), "```"]
    return [*lines, ""]
