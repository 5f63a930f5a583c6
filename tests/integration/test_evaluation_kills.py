"""kill -9 of `maskray evaluate` in the middle of a fine-tuning: the same command ends as if nobody had killed it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from maskray.appraisal import appraise_here, prepare
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import parse
from maskray.training.folders import step_of

pytestmark = pytest.mark.alone  # a kill must come in time

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 120
STEPS = 40


@pytest.fixture
def asked(digits, digits_encoder, tmp_path):
    tune = {"kind": "finetune", "labels_per_class": [5], "label_shares": [], "draws": 1, "checkpoint_steps": 4}
    return {
        "name": "digits",
        "model": str(digits_encoder),
        "data": {"path": str(digits)},
        "evaluations": [tune | {"epochs": 1, "least_steps": STEPS, "base_lr": 0.02}],
        "storage": {"path": str(tmp_path / "runs")},
    }


def start(asked, folder):
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(asked))
    command = [sys.executable, "-m", "maskray.cli", "evaluate", "--config", str(folder / "evaluate.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1"}
    with (folder / "output.log").open("ab") as log:
        options = {"env": environment, "stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen([*command, "--launcher", "torch", "--out", str(folder / "out")], **options)


def number(folder):
    """Of the newest checkpoint."""
    found = [step_of(p.name) for p in folder.glob("runs/evaluations/digits-*/step_*") if p.suffix != ".partial"]
    return max(found, default=0)


def test_a_driver_that_is_killed_changes_nothing(asked, tmp_path):
    for moment in (12, STEPS + 9):  # in the middle of the first, and of the second
        process = start(asked, tmp_path)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while number(tmp_path) < moment:
            assert process.poll() is None, (tmp_path / "output.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert moment <= number(tmp_path) < 2 * STEPS, "the kill came too late"
        assert not (tmp_path / "out/digits.json").exists()
    process = start(asked, tmp_path)
    assert process.wait(PATIENCE_SECONDS) == 0, (tmp_path / "output.log").read_text()[-3000:]
    quiet = appraise_here(prepare(parse(EvaluateConfig, asked | {"storage": {"path": str(tmp_path / "quiet")}})))
    assert json.loads((tmp_path / "out/digits.json").read_text()) == json.loads(quiet.dump())
