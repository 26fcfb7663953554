"""One evaluation as pages show it, read from a card or from a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metateleport.checkpoint import Checkpoint
from metateleport.evaluation.card import result_of
from metateleport.evaluation.marks import marks
from metateleport.evaluation.paired import REFERENCE
from metateleport.evaluation.report import SCHEMA
from metateleport.evaluation.run import EvaluationError
from metateleport.evaluation.words import ABLATED, AGAINST, KINDS, interval
from metateleport.families import TRAINING_LOSS

__all__ = ["Entry", "entries_of", "moves_by_of", "read_report", "text", "told"]

_KEY = re.compile(
    r"(?P<name>[^(]+)\((?P<settings>.*)\), \d+ gradient evaluations(, parts of the basis left out)?(, rivals.*)?"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One evaluation: medians at the marks, ratios and conditions.

    Args:
        task: name of the task family.
        settings: the family's settings, as text.
        result: a result in the form of `metateleport.evaluation.card.result_of`, with its `command` if it is known.
        moves_by: how the learned method uses group elements: `stays`, `undone`, `both` or `none`.
        source: where the evaluation was read from, in words.
        report: the whole report, if it was read from a JSON file.
    """

    task: str
    settings: Mapping[str, str]
    result: Mapping[str, Any]
    moves_by: str
    source: str
    report: Mapping[str, Any] | None = None

    @property
    def steps(self) -> int:
        """The budget: gradient evaluations that each method could spend on each task."""
        return int(self.result["steps"])

    @property
    def marks(self) -> list[int]:
        """The numbers of gradient evaluations at which there are figures."""
        return marks(self.steps)

    @property
    def measure(self) -> str:
        """Name of the measure that tasks are judged by."""
        return str(self.result.get("measure", TRAINING_LOSS))

    @property
    def methods(self) -> Mapping[str, Any]:
        """The results by method name."""
        methods: Mapping[str, Any] = self.result["methods"]
        return methods

    @property
    def seeds(self) -> Sequence[Mapping[str, Any]]:
        """The results of each meta-seed; empty if there is only one."""
        seeds: Sequence[Mapping[str, Any]] = self.result.get("meta_seeds", {}).get("seeds", ())
        return seeds

    @property
    def attributed(self) -> bool:
        """Whether runs of the attribution are among the methods."""
        return any(name in AGAINST and not self._rival(name) for name in self.methods) and not self.parts

    @property
    def parts(self) -> bool:
        """Whether parts of the basis were left out."""
        return any(name.startswith(ABLATED) for name in self.methods)

    def median(self, method: str, mark: int) -> float:
        """A method's median at a mark."""
        return float(self.methods[method]["median_loss"][str(mark)])

    def of_seeds(self, method: str, mark: int) -> list[float]:
        """A learned method's medians at a mark, for every meta-seed; empty if there is only one."""
        return [float(each["methods"][method]["median_loss"][str(mark)]) for each in self.seeds]

    def compared(self, names: Sequence[str]) -> dict[str, Any]:
        """The ratios to the learned method by name, in the form of `metateleport.evaluation.compared.compared`.

        Args:
            names: names of the methods; those without ratios are left out.
        """
        over = self.result.get("meta_seeds", {}).get("ratios_to_learned", {})
        found = {}
        for name in names:
            entry = self.methods[name]
            ratios = entry.get(f"paired_ratios_to_{REFERENCE}")
            if ratios is None:
                continue
            timed = {"seconds": entry["ratio_at_equal_seconds"]} if "ratio_at_equal_seconds" in entry else {}
            found[name] = {"gradient_evaluations": ratios, **timed}
            if name in over:
                found[name]["meta_seeds"] = {"gradient_evaluations": over[name], **timed}
        return found

    @property
    def against(self) -> dict[str, Any]:
        """The ratios of the runs of the attribution."""
        return self.compared([name for name in self.methods if name in AGAINST and not self._rival(name)])

    @property
    def rivals(self) -> dict[str, Any]:
        """The ratios of the rivals, hand-designed teleports included."""
        return self.compared([name for name in self.methods if self._rival(name)])

    def _rival(self, name: str) -> bool:
        return name.partition("/")[0] != REFERENCE

    @property
    def left_out(self) -> dict[str, Any]:
        """The ratios of the runs that leave out a part of the basis."""
        return self.compared([name for name in self.methods if name.startswith(ABLATED)])

    def check(self) -> None:
        """Checks everything that pages show.

        Raises:
            KeyError, TypeError, ValueError: if something is missing or of another type.
        """
        for name, entry in self.methods.items():
            numbers = [float(entry["diverged"]), float(entry["seconds"])]
            numbers += [self.median(name, mark) for mark in self.marks]
            if name.partition("/")[0] == REFERENCE:
                numbers += [value for mark in self.marks for value in self.of_seeds(name, mark)]
            if not all(math.isfinite(value) for value in numbers):
                raise ValueError(f"a figure of {name} is not finite")
        for each in (*self.against.values(), *self.rivals.values(), *self.left_out.values()):
            for ratios in (each, each.get("meta_seeds", each)):
                if [int(ratio["at"]) for ratio in ratios["gradient_evaluations"]] != self.marks:
                    raise ValueError("its ratios are at other numbers of evaluations than its medians")
                for ratio in ratios["gradient_evaluations"]:
                    interval(ratio)
        missing = [key for key in ("tasks", "seed", "dtype", "conditions") if key not in self.result]
        if missing:
            raise KeyError(missing[0])
        if self.moves_by not in (*KINDS, "none"):
            raise ValueError(f"the use of group elements {self.moves_by!r} is not known")


def moves_by_of(checkpoint: Checkpoint) -> str:
    """How a checkpoint uses group elements: `stays`, `undone`, `both` or `none`."""
    learned = checkpoint.learned
    # A rule of factors steps in gauges of its own.
    stays, undone = learned.teleporter is not None, learned.gauge is not None or learned.rule.reads_factors
    return {(True, True): "both", (True, False): "stays", (False, True): "undone"}.get((stays, undone), "none")


def entries_of(checkpoint: Checkpoint) -> list[Entry]:
    """The evaluations on a checkpoint's card.

    Raises:
        EvaluationError: if one cannot be read.
    """
    moves_by, found = moves_by_of(checkpoint), []
    results = checkpoint.card.get("results", {})
    for key, result in results.items() if isinstance(results, Mapping) else [("results", results)]:
        try:
            name, settings = _task(key, result)
            entry = Entry(name, settings, result, moves_by, f"the card of {checkpoint.name}")
            entry.check()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{checkpoint.path}: the card's result {key!r} cannot be read ({told(error)}): record it again with "
                "metateleport evaluate --card"
            ) from error
        found.append(entry)
    return found


def read_report(path: Path) -> tuple[str, Entry]:
    """An evaluation that `metateleport evaluate --json` wrote.

    Returns:
        The name of its checkpoint, and the evaluation.

    Raises:
        EvaluationError: if the file is missing, is not an evaluation, or is of another version.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is truncated or not JSON ({error})") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if not isinstance(report, dict) or "methods" not in report:
        raise EvaluationError(f"{path} is not a result that metateleport evaluate --json wrote")
    if schema != SCHEMA:
        raise EvaluationError(
            f"{path} is a result of schema {schema!r}, and this version reads {SCHEMA}: evaluate again, or use the "
            "version of metateleport that wrote it"
        )
    try:
        moves_by = report["attribution"].get(REFERENCE, {}).get("gauge", "none")
        settings = {name: text(value) for name, value in report["task"]["settings"].items()}
        entry = Entry(report["task"]["name"], settings, result_of(report), moves_by, path.name, report)
        entry.check()
        return str(report["checkpoint"]), entry
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EvaluationError(f"{path} is a result with something missing ({told(error)}): evaluate again") from error


def _task(key: str, result: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Name and settings of a card's result; older cards have them only in the key."""
    if "task" in result:
        return str(result["task"]["name"]), {name: text(value) for name, value in result["task"]["settings"].items()}
    read = _KEY.fullmatch(key)
    if read is None:
        raise ValueError("its key is not TASK(SETTINGS), STEPS gradient evaluations")
    pairs = [pair.partition("=") for pair in read["settings"].split(", ") if pair]
    return read["name"], {name: text(value) for name, _, value in pairs}


def text(value: Any) -> str:
    """A setting as text, as on the command line, for comparing and printing.

    Example:
        >>> text(None), text(True), text(10.0)
        ('none', 'true', '10')
    """
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    text = {"True": "true", "False": "false"}.get(text, text)
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def told(error: Exception) -> str:
    """What is wrong with an input, for people, of the error that came of it."""
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)
