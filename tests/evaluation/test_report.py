"""Pages of results: made of cards and evaluations alone, the same for the same, and frank."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import edited as edit_card

from metateleport import cli
from metateleport.checkpoint import CheckpointError, load_checkpoint, shipped_checkpoints
from metateleport.evaluation import BASELINES, EvaluationError, evaluate, record_result, report_of, write_report
from metateleport.evaluation.pages import Entry, write_pages
from metateleport.evaluation.pages.section import found_in
from metateleport.evaluation.pages.write import BEGIN, END
from metateleport.evaluation.words import number
from metateleport.families import load_family

ROOT = Path(__file__).resolve().parents[2]
MARKED = f"before\n{BEGIN}\nold\n{END}\nbehind\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a shipped checkpoint without its other meta-seeds' weights, which pages do not need."""
    path = tmp_path / "mine"
    shutil.copytree(ROOT / "checkpoints" / "leaky_mlp_stays", path, ignore=shutil.ignore_patterns("meta_seeds"))
    return path


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """The JSON of a small evaluation without a checkpoint."""
    family = load_family("leaky_mlp", {"width": 3})
    methods = [BASELINES["gd"].make(lr=1e-3), BASELINES["adam"].make(lr=1e6)]
    write_report(tmp_path / "small.json", report_of(evaluate(family, methods, tasks=2, steps=14)))
    return tmp_path / "small.json"


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def first(card: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(card["results"].values()))
    return found


class TestRepository:
    @pytest.fixture
    def copied(self, tmp_path: Path) -> Path:
        shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
        shutil.copy(ROOT / "docs" / "choose.md", tmp_path / "docs" / "choose.md")
        return tmp_path

    def test_its_pages_are_those_of_its_cards(self, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        before = {path: path.read_bytes() for path in copied.rglob("*.*") if path.is_file()}
        checkpoints = [load_checkpoint(path) for path in (ROOT / "checkpoints").iterdir() if path.is_dir()]
        written = write_pages(copied / "docs" / "results", checkpoints, extract_in=copied / "docs" / "choose.md")
        assert written.changed == [], "run: metateleport report --extract docs/choose.md"
        assert {path: path.read_bytes() for path in copied.rglob("*.*") if path.is_file()} == before
        assert not written.strangers
        assert set(written.files) == set(before)

    def test_the_extract_is_short_and_its_figures_are_the_cards(self) -> None:
        text = (ROOT / "docs" / "choose.md").read_text()
        lines = text[text.index(BEGIN) : text.index(END)].splitlines()
        assert len(lines) <= 25
        rows = [line for line in lines if line.startswith("| [")]
        cards = [json.loads(path.read_text()) for path in (ROOT / "checkpoints").glob("*/card.json")]
        assert len(rows) == sum(bool(card["results"]) for card in cards)
        for row in rows:
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            read = re.match(r"\[(\w+)\]\((results/\w+\.md)\).*, at (\d+)$", cells[0])
            assert read is not None
            name, page, mark = read.groups()
            assert (ROOT / "docs" / page).is_file()
            card = json.loads((ROOT / "checkpoints" / name / "card.json").read_text())
            shown = [
                [number(each["methods"][method]["median_loss"][mark]) for method in each["methods"]]
                + [number(each["meta_seeds"]["worst"]["learned"]["median_loss"][mark])]
                for each in card["results"].values()
                if str(each["steps"]) == mark and "learned" in each["methods"]
            ]
            # Where no step was learned alone, that cell is empty.
            alone = any("learned/step-only" in each["methods"] for each in card["results"].values())
            assert cells[1:-1].count("") == (not alone)
            figures = {cell.split(" ")[0] for cell in cells[1:-1] if cell}
            assert any(figures <= set(each) for each in shown)

    def test_links_lead_to_what_is_there(self) -> None:
        for page in (ROOT / "docs" / "results").glob("*.md"):
            text = page.read_text()
            headings = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            }
            for link in re.findall(r"\]\(([^)]+)\)", text):
                if link.startswith("#"):
                    assert link[1:] in headings
                else:
                    assert (page.parent / link).is_file(), f"{page.name} links to {link}"


class TestSameForTheSame:
    @pytest.mark.slow(seconds=2)
    def test_twice_gives_the_same_bytes_pictures_too(self, checkpoint: Path, result: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_pages(tmp_path / name, [load_checkpoint(checkpoint)], [result])
        files = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert files == ["README.md", "mine.md", "mine.png", "none-small.png", "none.md"]
        for name in files:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_another_figure_on_the_card_is_another_page_picture_and_extract(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "README.md").write_text(MARKED)

        def written() -> list[str]:
            done = write_pages(tmp_path / "out", [load_checkpoint(checkpoint)], extract_in=tmp_path / "README.md")
            return [path.name for path in done.changed]

        assert written() == ["mine.png", "mine.md", "README.md", "README.md"]
        text = (tmp_path / "README.md").read_text()
        assert text.startswith(f"before\n{BEGIN}\n")
        assert text.endswith(f"{END}\nbehind\n")
        assert "(out/mine.md)" in text
        assert written() == []
        edit_card(
            checkpoint,
            lambda card: first(card)["methods"]["learned"]["median_loss"].update({"100": 0.123456}),
        )
        assert written() == ["mine.png", "mine.md", "README.md", "README.md"]
        assert "| 0.123 |" in (tmp_path / "README.md").read_text()
        assert "old" not in text

    def test_a_picture_of_another_drawing_is_drawn_anew_and_others_stay(self, checkpoint: Path, tmp_path: Path) -> None:
        write_pages(tmp_path, [load_checkpoint(checkpoint)])
        (tmp_path / "mine.png").write_bytes(b"something else")
        assert [path.name for path in write_pages(tmp_path, [load_checkpoint(checkpoint)]).changed] == ["mine.png"]

    def test_pages_of_nothing_that_was_given_are_named(self, checkpoint: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        write_pages(out, [load_checkpoint(checkpoint)])
        (out / "by-hand.md").write_text("# mine")
        checkpoint.rename(tmp_path / "other")
        written = write_pages(out, [load_checkpoint(tmp_path / "other")])
        assert [path.name for path in written.strangers] == ["mine.md"]


class TestWords:
    def entry(self, *intervals: tuple[float, float, float], moves_by: str = "stays", lost: int = 0) -> Entry:
        def method(ratios: list[dict[str, float]]) -> dict[str, Any]:
            beside = {"paired_ratios_to_learned": ratios} if ratios else {}
            return {"median_loss": {"12": 2.0, "30": 1.0}, "diverged": 0, "seconds": 1.0, **beside}

        ratios = [
            {"at": at, "ratio": ratio, "low": low, "high": high}
            for at, (ratio, low, high) in zip((12, 30), intervals, strict=True)
        ]
        methods = {"learned": method([]), "learned/step-only": method(ratios), "adam": method(ratios)}
        methods["learned"]["diverged"] = lost
        return Entry("t", {}, {"steps": 30, "tasks": 8, "methods": methods}, moves_by, "a card")

    def test_what_helps_is_said_with_its_interval(self) -> None:
        said = found_in(self.entry((3, 2, 4), (5, 4, 6)))
        assert said[0].startswith("At 30 gradient evaluations the teleport divides the loss by 5 [4, 6] (a teleport")
        assert said[1].endswith("leave out 1, ahead of adam (12, 30).")
        assert said[-1] == "No run diverged."

    def test_what_brings_nothing_or_does_harm_is_said(self) -> None:
        assert "the teleport brings nothing here" in found_in(self.entry((1, 0.5, 2), (1.1, 0.9, 1.4)))[0]
        harm = found_in(self.entry((3, 2, 4), (0.5, 0.4, 0.6), lost=3))
        assert "At 30 gradient evaluations the teleport does harm here" in harm[0]
        assert harm[1] == "Earlier the verdict differs: at 12 the teleport divides the loss by 3 [2, 4]."
        assert "behind adam (30)" in harm[2]
        assert harm[3] == "Diverged: learned on 3 of 8 tasks."

    def test_without_a_teleport_the_step_has_the_merit(self) -> None:
        assert "all gain is the step's" in found_in(self.entry((3, 2, 4), (5, 4, 6), moves_by="none"))[0]


class TestCards:
    def test_a_result_recorded_today_is_read_with_all_that_is_new(self, checkpoint: Path, tmp_path: Path) -> None:
        edit_card(checkpoint, lambda card: card.update(results={}, meta_seeds=[]))
        command = ["evaluate", str(checkpoint), "digits", "--set", "samples=64", "--set", "hidden=4"]
        methods = "learned,learned/teleport-off,learned/step-only,adam"
        assert cli.main([*command, "--tasks", "2", "--steps", "3", "--no-track", "--card", "--methods", methods]) == 0
        write_pages(tmp_path / "out", [load_checkpoint(checkpoint)])
        page = (tmp_path / "out" / "mine.md").read_text()
        assert "## digits, never trained on" in page
        assert "| at equal seconds |" in page
        assert "| held-out accuracy |" in page
        assert "were not recorded" not in page

    def test_both_forms_of_a_result_come_to_the_same_page(self, checkpoint: Path, tmp_path: Path) -> None:
        write_pages(tmp_path / "a", [load_checkpoint(checkpoint)])

        def today(card: dict[str, Any]) -> None:
            for key, each in card["results"].items():
                name, _, rest = key.partition("(")
                pairs = dict(pair.split("=") for pair in rest.rpartition(")")[0].split(", "))
                each["task"] = {"name": name, "settings": pairs}

        edit_card(checkpoint, today)
        write_pages(tmp_path / "b", [load_checkpoint(checkpoint)])
        assert (tmp_path / "a" / "mine.md").read_text() == (tmp_path / "b" / "mine.md").read_text()

    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            (lambda card: first(card).pop("methods"), "there is no 'methods'"),
            (lambda card: first(card)["methods"]["learned"]["median_loss"].pop("30"), "there is no '30'"),
            (lambda card: first(card)["methods"]["adam"].update(seconds="fast"), "could not convert"),
            (lambda card: first(card)["methods"]["adam"]["paired_ratios_to_learned"].pop(), "other numbers"),
            (lambda card: card["results"].update({"odd": dict(first(card))}), "its key is not TASK"),
            (lambda card: card.update(results=[]), "results is a table"),
            (lambda card: first(card)["methods"]["adam"].update(seconds=10**400), "adam.seconds is a finite number"),
            (lambda card: first(card).update(conditions=[]), "conditions is a table"),
            (lambda card: first(card)["conditions"].pop("threads"), "cannot be shown.*there is no 'threads'"),
            (lambda card: card.update(limits=3), "limits is a list"),
            (lambda card: card.update(versions=["1"]), "versions is a table"),
        ],
    )
    def test_a_bad_result_is_named_and_nothing_written(
        self, checkpoint: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], said: str
    ) -> None:
        edit_card(checkpoint, edit)
        with pytest.raises((CheckpointError, EvaluationError), match=said) as caught:
            write_pages(tmp_path / "out", [load_checkpoint(checkpoint)])
        assert checkpoint.name in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_a_card_without_results_has_a_page_that_says_so(self, checkpoint: Path, tmp_path: Path) -> None:
        edit_card(checkpoint, lambda card: card.update(results={}))
        write_pages(tmp_path / "out", [load_checkpoint(checkpoint)])
        assert "On this card no evaluation is recorded" in (tmp_path / "out" / "mine.md").read_text()


class TestEvaluations:
    def test_they_stand_on_their_checkpoints_page_with_their_curves(self, checkpoint: Path, tmp_path: Path) -> None:
        out = [
            "--tasks",
            "2",
            "--steps",
            "13",
            "--no-track",
            "--meta-seeds",
            "best",
            "--json",
            str(tmp_path / "a.json"),
        ]
        methods = "learned,learned/teleport-off,gd"
        assert cli.main(["evaluate", str(checkpoint), "leaky_mlp", "--methods", methods, *out]) == 0
        write_pages(tmp_path / "out", [load_checkpoint(checkpoint)], [tmp_path / "a.json"])
        page = (tmp_path / "out" / "mine.md").read_text()
        assert "](mine-a.png)" in page
        assert "From a.json." in page
        assert (tmp_path / "out" / "mine-a.png").stat().st_size > 10_000

    def test_what_diverged_is_said(self, result: Path, tmp_path: Path) -> None:
        write_pages(tmp_path / "out", [], [result])
        page = (tmp_path / "out" / "none.md").read_text()
        assert "Diverged: adam on 2 of 2 tasks." in page
        assert "This page has evaluations only" in page

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda path: path.unlink(), "cannot be read: No such file"),
            (lambda path: path.write_text(path.read_text()[:50]), "truncated or not JSON"),
            (lambda path: path.write_text("[1]"), "not a result that metateleport evaluate"),
            (lambda path: path.write_text('{"schema": 1}'), "not a result that metateleport evaluate"),
            (
                lambda path: edited(path, lambda report: report.update(schema=0)),
                "of schema 0, and this version reads 1",
            ),
            (lambda path: edited(path, lambda report: report.pop("conditions")), "there is no 'conditions'"),
            (lambda path: edited(path, lambda report: report["methods"]["gd"].pop("median")), "there is no 'median'"),
            (lambda path: path.write_text("[" * 100_000), "truncated or not JSON"),
            (lambda path: edited(path, lambda report: report["methods"]["gd"].pop("q75")), "there is no 'q75'"),
            (lambda path: edited(path, lambda report: report["methods"]["gd"]["q25"].pop()), "cannot be shown"),
            (
                lambda path: edited(path, lambda report: report["methods"]["gd"].update(seconds_along=[])),
                "cannot be shown",
            ),
        ],
    )
    def test_a_bad_file_is_named_and_nothing_written(
        self, result: Path, tmp_path: Path, spoil: Callable[[Path], Any], said: str
    ) -> None:
        spoil(result)
        with pytest.raises(EvaluationError, match=said) as caught:
            write_pages(tmp_path / "out", [], [result])
        assert result.name in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_record_result_needs_nothing_but_the_report(self, checkpoint: Path, result: Path) -> None:
        record_result(checkpoint, json.loads(result.read_text()), "a command")
        card = json.loads((checkpoint / "card.json").read_text())
        entry = list(card["results"].values())[-1]
        assert entry["command"] == "a command"
        assert entry["task"]["settings"]["width"] == 3


class TestCommand:
    def test_it_writes_and_says_what(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        command = ["report", "mine", "--out", "pages"]
        assert cli.main(command) == 0
        assert "wrote pages/mine.md" in capsys.readouterr().err
        assert cli.main(command) == 0
        assert "is up to date" in capsys.readouterr().err

    @pytest.mark.slow(seconds=5)
    def test_without_names_it_takes_what_is_shipped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["report"]) == 0
        assert {path.stem for path in Path("docs/results").glob("*.md")} == {*shipped_checkpoints(), "README"}

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["nowhere"], "no checkpoint 'nowhere'"),
            (["mine", "--extract", "missing.md"], "missing.md cannot be read"),
            (["mine", "--extract", "plain.md"], "has no place for an extract"),
            (["mine", "--out", "plain.md"], "is a file"),
            (["mine", "mine"], "have the same name"),
        ],
    )
    def test_bad_input_is_one_line(
        self,
        checkpoint: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        said: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "plain.md").write_text("nothing")
        assert cli.main(["report", "--out", "pages", *arguments]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1
        assert not (tmp_path / "pages").exists()

    def test_a_card_of_another_version_is_named(self, checkpoint: Path) -> None:
        edit_card(checkpoint, lambda card: card.update(schema=99))
        with pytest.raises(CheckpointError, match="of schema 99"):
            load_checkpoint(checkpoint)
