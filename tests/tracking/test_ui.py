"""MLflow's UI for the project's store: it starts, shows what there is in a real browser, and ends cleanly."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from learned_cases import shape_of
from serving_cases import free

from metateleport.checkpoint import save_checkpoint
from metateleport.learned import MetaOptimizer
from metateleport.tracking import Run, TrackedTraining, promote, tracking_uri

pytest.importorskip("mlflow")

PICTURES = os.environ.get("METATELEPORT_SCREENSHOTS")
"""A folder to keep the screenshots in, for the docs."""


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


def something(folder: Path) -> str:
    """A training with a promoted checkpoint; the id of its run."""
    card = {
        "name": "mine",
        "mode": "lr+tele",
        "family": {"name": "leaky_mlp", "settings": {"width": 4}},
        "training": {"runs": {"learned": {"meta_steps": 3, "validation": -1.5, "seconds": 1.0, "validations": []}}},
    }
    path = save_checkpoint(folder / "mine", MetaOptimizer(shape_of("lr+tele", hidden=4)), None, card)
    with Run("leaky_mlp", "mine", {"outer.seed": 0}, {"kind": "train"}) as run:
        tracked = TrackedTraining(run)
        for step in range(1, 60):
            run.log({"learned/log10_loss": -0.1 * step}, step)
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
    run_id = something(tmp_path)
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
            pages = {
                "runs": (f"#/experiments/{experiment}/runs?{view}", "mine"),
                "run": (f"#/experiments/{experiment}/runs/{run_id}?{view}", "final/validation"),
                "curves": (f"#/experiments/{experiment}/runs/{run_id}/model-metrics?{view}", "log10_loss"),
                "compare": (f"#/compare-runs?runs=[%22{run_id}%22]&experiments=[%22{experiment}%22]&{view}", "mine"),
                "registry": (f"#/models/mine?{view}", "champion"),
            }
            for name, (path, shown) in pages.items():
                browser.get("about:blank")
                browser.get(f"{url}/{path}")
                until = time.monotonic() + 60
                while shown not in browser.page_source:
                    assert time.monotonic() < until, (name, browser.page_source[-2000:])
                    time.sleep(0.5)
                time.sleep(2.0)
                browser.save_screenshot(str(folder / f"ui-{name}.png"))
    finally:
        browser.quit()
