"""MLflow's UI on what the command line left there: a run, a sweep and a registered model, looked at in a browser."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from browser import CHROMIUM, Ui, opened
from conftest import TINY
from maskray.config.load import merge
from maskray.tracking.mlflow_runs import PARENT_TAG
from team import Team

pytestmark = [pytest.mark.services, pytest.mark.ray]


STEPS = 40
SHOTS = os.environ.get("MASKRAY_SHOTS")
"""Where screenshots stay, for people to look at."""


@dataclass
class Left:
    """What the commands left in MLflow."""

    experiment: str
    run: Run
    parent: Run
    children: Mapping[str, Run]
    """By name."""


@pytest.fixture(scope="module")
def left(team: Team, digits: Path) -> Iterator[Left]:
    """A run, and a sweep of four trials of which two come to nothing; the best encoder is promoted."""
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        base = merge(
            TINY,
            {
                "data": {"path": str(digits), "cache_folder": str(folder / "cache")},
                "optim": {"steps": STEPS},
                "training": {"checkpoint_steps": 10, "probe_steps": 20},
                "probe": {"draws": 2, "cpus": 0},
                "cluster": {"embedded_cpus": 2},
                "storage": {"path": str(folder / "runs")},
                "tracking": {"uri": team.server.uri, "register_as": "tiny"},
            },
        )
        command(folder, "pretrain", base)
        sweep = {
            "name": "ratio_x_rate",
            "base": merge(base, {"training": {"probe_steps": None}}),
            "space": {"mask.ratio": [0.5, 0.75], "optim.base_lr": [0.01, 1e30]},
            "seeds": [0],
            "register_best": {"name": "tiny", "promotion": {"data": {"path": str(digits)}}},
        }
        command(folder, "sweep", sweep, "--rate", "1e9")
        client = MlflowClient(team.server.uri)
        experiment = client.get_experiment_by_name("maskray").experiment_id
        runs = client.search_runs([experiment])
        children = {run.info.run_name: run for run in runs if PARENT_TAG in run.data.tags}
        (parent,) = [run for run in runs if run.info.run_name.startswith("ratio_x_rate")]
        (run,) = [run for run in runs if run.info.run_name.startswith("tiny")]
        yield Left(experiment, run, parent, children)


def command(folder: Path, name: str, config: Mapping[str, Any], *options: str) -> None:
    """As a user types it."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))} | {
        "PYTHONPATH": str(Path(__file__).parents[2] / "platform"),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, "-m", "maskray.cli", name, "--config", str(path), *options]
    done = subprocess.run(line, cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=900)
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def ui(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    pytest.importorskip("playwright", reason="pip install 'maskray[services]'")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    shots = Path(SHOTS) if SHOTS else tmp_path_factory.mktemp("shots")
    shots.mkdir(parents=True, exist_ok=True)
    with opened(team.server.uri, shots) as ui:
        yield ui
        assert ui.problems == []


def test_the_runs_and_the_sweep_with_its_trials_below_it(left: Left, ui: Ui) -> None:
    from playwright.sync_api import expect

    ui.open(f"/experiments/{left.experiment}/runs", left.parent.info.run_name)
    ui.shoot("runs")
    expect(ui.page.get_by_role("link", name=left.run.info.run_name)).to_be_visible()
    row = ui.page.locator("[role=gridcell]", has_text=left.parent.info.run_name).first
    row.locator("button[data-component-id$='runnamecellrenderer.tsx_46']").click()  # trials are folded at first
    assert len(left.children) == 4
    for name in left.children:
        expect(ui.page.get_by_role("link", name=name, exact=True)).to_be_visible()
    ui.shoot("runs_nested")


def test_a_run_says_what_it_is_and_shows_its_curves(left: Left, ui: Ui) -> None:
    from playwright.sync_api import expect

    place = f"/experiments/{left.experiment}/runs/{left.run.info.run_id}"
    ui.open(place, "About this run")
    expect(ui.page.get_by_test_id("key-value-Status")).to_contain_text("Finished")
    ui.shoot("run")
    ui.open(f"{place}/model-metrics", "grad_norm")
    plots = ui.page.locator("[data-testid=experiment-view-compare-runs-card] svg.main-svg")
    plots.nth(8).wait_for(state="attached")  # some of them for each curve
    ui.shoot("run_curves")


def test_a_run_shows_what_it_paints_step_by_step(left: Left, ui: Ui) -> None:
    place = f"/experiments/{left.experiment}/runs/{left.run.info.run_id}"
    ui.open(f"{place}/model-metrics", "pretrain/reconstruction")
    assert min(ui.picture_widths()) > 0
    ui.shoot("run_pictures")
    ui.open(f"{place}/artifacts/figures/pretrain/reconstruction-step-{STEPS:06d}.png", "reconstruction")
    assert max(ui.picture_widths()) > 400
    ui.shoot("run_figure")


def test_the_sweep_names_its_trials_and_shows_its_report(left: Left, ui: Ui) -> None:
    from playwright.sync_api import expect

    place = f"/experiments/{left.experiment}/runs/{left.parent.info.run_id}"
    ui.open(place, "About this run")
    expect(ui.page.get_by_test_id("key-value-Status")).to_contain_text("Finished")
    ui.shoot("sweep")
    link = ui.page.get_by_role("link", name="Report", exact=True).get_attribute("href")
    assert link is not None
    ui.open(link.partition("#")[2], "report/report.html")
    frame = ui.page.frame_locator("iframe")
    frame.locator("h1").first.wait_for()
    expect(frame.locator("h1").first).to_contain_text("ratio_x_rate")
    ui.shoot("sweep_report")


def test_a_trial_that_came_to_nothing_says_why(left: Left, ui: Ui) -> None:
    from playwright.sync_api import expect

    for name, run in left.children.items():
        failed = "1e+30" in name
        ui.open(f"/experiments/{left.experiment}/runs/{run.info.run_id}", "About this run")
        expect(ui.page.get_by_test_id("key-value-Status")).to_contain_text("Failed" if failed else "Finished")
        if failed:
            expect(ui.page.get_by_text("not finite").first).to_be_visible()
        ui.shoot("trial_failed" if failed else "trial")


def test_the_registered_model_has_its_alias_and_card(left: Left, ui: Ui) -> None:
    from playwright.sync_api import expect

    ui.open("/models", "tiny")
    expect(ui.page.get_by_test_id("model-list-table")).to_contain_text("champion")
    ui.shoot("models")
    ui.open("/models/tiny", "champion")
    expect(ui.page.get_by_test_id("model-version-table")).to_contain_text("champion")
    ui.shoot("model")
    ui.open("/models/tiny/versions/2", "champion")
    ui.shoot("model_version")
    expect(ui.page.get_by_test_id("note-view-outer-container").locator("h1, h2").first).to_be_visible()
