import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import KNN, tiny_config

from dino_jax.errors import UserError
from dino_jax.report.page import write_report
from dino_jax.training import loop

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "a <b>"
    loop.train(tiny_config(**KNN, evals__pictures__every_epochs=1, dino__teacher_momentum=1.0), workdir)
    return workdir


@pytest.fixture(scope="module")
def page(workdir):
    return Path(write_report(workdir)).read_text()


def test_it_shows_verdict_curves_and_pictures(page):
    assert "a &lt;b&gt;: <span class=verdict>not learning" in page
    assert "the teacher never follows the student" in page
    for title in (
        "Curves",
        "Nearest neighbors",
        "Attention",
        "Components of patches",
        "Crops",
        "Attention over the run",
        "Settings",
    ):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg") >= 10
    assert page.count("<figure>") > 12 * 6


def test_it_loads_nothing_from_elsewhere(page):
    links = re.findall(r"""(?:src|href)=["']?([^"' >]*)""", page)
    assert len(links) > 12 * 6
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in page


def test_pictures_are_shown_at_start_middle_and_end(workdir, page):
    names = sorted(path.name for path in (workdir / "pictures").iterdir())
    assert names == [
        f"{kind}-{step:09}.png" for kind in ("attention", "components", "neighbors") for step in (0, 5, 10)
    ]
    assert page.count("<p class=soft>step ") >= 9


def test_a_run_without_an_export_or_images_has_a_page_too(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy", ignore=shutil.ignore_patterns("export*", "checkpoints"))
    page = Path(write_report(copy)).read_text()
    assert "left out: " in page
    assert "<svg" in page
    with pytest.raises(UserError, match="holds no log"):
        write_report(tmp_path)


@pytest.mark.skipif(not CHROMIUM, reason="needs a browser")
def test_a_browser_shows_it_without_errors_and_without_requests(workdir, page, tmp_path):
    log = tmp_path / "net.json"
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += [f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom", (workdir / "report.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("<svg") == page.count("<svg")
    assert "CONSOLE" not in shown.stderr
    urls = {
        event["params"]["url"] for event in json.loads(log.read_text())["events"] if "url" in event.get("params", {})
    }
    assert not [url for url in urls if url.startswith("http") and "google" not in url], urls
