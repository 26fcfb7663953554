"""MLflow's UI for the project's store: it starts, shows what there is in a real browser, and ends cleanly."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from learned_cases import shape_of
from serving_cases import free

from metateleport.checkpoint import save_checkpoint
from metateleport.learned import MetaOptimizer
from metateleport.tracking import Run, TrackedTraining, promote, tracking_uri
from metateleport.tracking.conditions import conditions

pytest.importorskip("mlflow")

PICTURES = os.environ.get("METATELEPORT_SCREENSHOTS")
"""A folder to keep the screenshots in, for the docs."""

_ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"


@contextlib.contextmanager
def ui(log: Path) -> Iterator[str]:
    """The address of `metateleport ui`, which is ended by Ctrl-C afterwards and leaves no process behind."""
    port = free()
    command = [sys.executable, "-m", "metateleport.cli", "ui", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri()}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        until = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) <= 2
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
        assert "Traceback" not in log.read_text(), log.read_text()
        assert "workflowType=machine_learning" in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()


def something(folder: Path, name: str = "mine", slope: float = 0.1) -> str:
    """A training with a promoted checkpoint; the id of its run."""
    card = {
        "name": name,
        "mode": "lr+tele",
        "family": {"name": "leaky_mlp", "settings": {"width": 4}},
        "training": {"runs": {"learned": {"meta_steps": 3, "validation": -1.5, "seconds": 1.0, "validations": []}}},
    }
    path = save_checkpoint(folder / name, MetaOptimizer(shape_of("lr+tele", hidden=4)), None, card)
    with Run("leaky_mlp", name, {"outer.seed": 0}, {"kind": "train", **conditions()}) as run:
        tracked = TrackedTraining(run)
        losses = {"meta_losses": [0.0], "validations": [], "openness": [], "searched": []}
        for step in range(1, 60):
            losses["meta_losses"] = [2.0 - slope * step * (1 + 0.1 * math.sin(step))]
            if step % 5 == 0:
                losses["validations"].append([step, 1.5 - slope * step])
            tracked("learned", SimpleNamespace(meta_step=step, skipped=0, seconds=0.1 * step, **losses))
        tracked.finish(path)
    promote(path, alias="champion")
    assert run.id is not None
    return run.id


@pytest.mark.slow(seconds=60)
def test_it_starts_and_ends_cleanly(tmp_path: Path) -> None:
    something(tmp_path)
    with ui(tmp_path / "log") as url, urllib.request.urlopen(url, timeout=30) as page:
        assert b"MLflow" in page.read()


@pytest.mark.slow(seconds=120)
def test_what_a_browser_shows(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium is not installed: apt-get install chromium chromium-driver")
    selenium: Any = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    from selenium import webdriver

    assert selenium
    other, run_id = something(tmp_path, "stays", 0.2), something(tmp_path)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for each in ("--headless=new", "--no-sandbox", "--window-size=1400,900", "--disable-dev-shm-usage"):
        options.add_argument(each)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    folder = Path(PICTURES) if PICTURES else tmp_path
    try:
        with ui(tmp_path / "log") as url:
            from metateleport.tracking.store import connect

            experiment = connect(tracking_uri()).get_run(run_id).info.experiment_id
            view = "workflowType=machine_learning"
            both = f"runs=[%22{run_id}%22,%22{other}%22]&experiments=[%22{experiment}%22]"
            own = f"#/experiments/{experiment}/runs/{run_id}"
            pages = {
                "runs": (f"#/experiments/{experiment}/runs?{view}", "stays"),
                "live": (f"#/experiments/{experiment}/runs?compareRunsMode=CHART&{view}", "log10_loss"),
                "run": (f"{own}?{view}", "final/validation"),
                "curves": (f"{own}/model-metrics?{view}", "log10_loss"),
                "compare": (
                    f"#/compare-runs?{both}&{view}",
                    "stays",
                ),
                "plot": (
                    f"{own}/artifacts/plots/training.png?{view}",
                    "training.png",
                ),
                "registry": (f"#/models/mine?{view}", "champion"),
            }
            for name, (path, shown) in pages.items():
                browser.get("about:blank")
                browser.get(f"{url}/{path}")
                until = time.monotonic() + 60
                while shown not in browser.page_source:
                    assert time.monotonic() < until, (name, browser.page_source[-2000:])
                    time.sleep(0.5)
                for button in browser.find_elements("css selector", _ASSISTANT):
                    button.click()
                # Charts are drawn when their points have come.
                time.sleep(4.0)
                browser.save_screenshot(str(folder / f"ui-{name}.png"))
    finally:
        browser.quit()
