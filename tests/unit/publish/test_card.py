import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from maskray import launch
from maskray.bare import BareLauncher
from maskray.config.load import load
from maskray.config.schema import RunConfig
from maskray.evaluation.judgement import Judgement, Scores
from maskray.evaluation.logistic import Accuracy
from maskray.models.build import weightless_model
from maskray.models.cost import cost
from maskray.preparing import prepare
from maskray.publish.card import CONFIG, FIGURE, LINEAGE, Lineage, markdown
from maskray.publish.registry import MAX_DESCRIPTION
from maskray.publish.release import TrainedRun, gather, training_seconds

JUDGED = Judgement(
    before=Scores(Accuracy(0.478, 0.025), 0.87, 0.49),
    after=Scores(Accuracy(0.719, 0.03), 0.889, 0.802),
    pixels=Scores(Accuracy(0.832, 0.029), 0.972, 0.981),
    labels_per_class=5,
    k=20,
    num_train=1473,
    num_test=324,
)
CODE = {
    "python": "3.12.1",
    "version.torch": "2.15.0",
    "maskray.sources": "f00d",
    "mlflow.source.git.commit": "0123456789" * 4,
    "git.uncommitted_changes": "yes",
}


@pytest.fixture
def run(tiny: Callable[..., RunConfig], runs: Path) -> TrainedRun:
    prepared = prepare(tiny(cluster={"workers": 2, "cpus_per_worker": 1.5}))
    return TrainedRun(prepared.config, prepared.plan, prepared.dataset, prepared.store, "run-1", CODE)


@pytest.fixture
def lineage(run: TrainedRun) -> Lineage:
    # Steps 0 to 4 at 128 images/s, 4 to 12 at 32: 64 · 4 / 128 + 64 · 8 / 32 seconds.
    return gather(run, [(2, 1.5), (12, 0.25)], [(4, 128.0), (12, 32.0)], JUDGED)


def test_costs_are_those_of_the_whole_run(run: TrainedRun, lineage: Lineage):
    trained = lineage.trained
    assert (trained.steps, trained.views) == (12, 12 * 64)
    assert trained.seconds == 2 + 16
    assert (trained.hours, trained.hours_of) == (18 * 2 * 1.5 / 3600, "core")
    assert trained.flops == 768 * cost(weightless_model(run.config), 4).training_flops
    assert trained.passes == pytest.approx(768 / (run.plan.num_row_groups * 16))


def test_hours_of_accelerators(run: TrainedRun):
    config = run.config.model_copy(
        update={"cluster": run.config.cluster.model_copy(update={"gpus_per_worker": 1.0, "workers": 4})}
    )
    trained = gather(replace(run, config=config), [(12, 1.0)], [(12, 64.0)], None).trained
    assert (trained.hours, trained.hours_of) == (12 * 4 / 3600, "accelerator")


def test_steps_that_a_killed_run_repeated_count_once():
    """MLflow keeps the first value of each step; the stretch after a resume begins at a step that was logged before."""
    assert training_seconds([(10, 100.0), (20, 50.0), (25, 10.0)], 20) == 2 + 4 + 10


def test_programs_read_it(lineage: Lineage):
    raw = json.loads(lineage.dump())
    assert raw["schema_version"] == 1
    assert raw["seeds"] == {"run": 0}
    assert raw["mask"] == {"ratio": 0.75, "unit": [1, 1], "kind": "random"}
    assert raw["code"]["mlflow.source.git.commit"] == CODE["mlflow.source.git.commit"]
    assert raw["data"]["fingerprint"] == lineage.data.fingerprint
    assert (raw["data"]["train_rows"], raw["data"]["held_out_rows"]) == (1473, 324)
    found = {(s["measure"], s["of"]): s for s in raw["scores"]}
    few, every = found["probe/few_labels", "after"], found["probe/all_labels", "pixels"]
    assert (few["value"], few["std"], every["value"], every["std"]) == (0.719, 0.03, 0.972, None)
    assert (every["low"], every["high"]) == pytest.approx((0.94806, 0.98532), abs=1e-5)  # Wilson's, of 315 in 324
    assert lineage.tags()["maskray.commit"] == CODE["mlflow.source.git.commit"]
    assert lineage.tags()["maskray.views"] == "768"


def test_people_read_it(lineage: Lineage):
    said = markdown(lineage)
    lines = said.splitlines()
    assert lines[0].startswith("tiny-")
    assert "|  | before pretraining | after | raw pixels |" in lines
    (few,) = [line for line in lines if "probe/few_labels" in line]
    assert few.endswith("| 47.8 ± 2.5 % (42.5 to 53.3) | 71.9 ± 3.0 % (66.8 to 76.5) | 83.2 ± 2.9 % (78.9 to 87.0) |")
    assert "Accuracy on 324 held-out images" in said
    assert 'load_model("models:/tiny/{version}")' in said
    assert f"commit `{CODE['mlflow.source.git.commit']}`, with uncommitted changes" in said
    assert "0.015 core hours on 2 workers" in said
    for file in (LINEAGE, CONFIG, FIGURE):
        assert file in said


def test_what_is_not_known_is_said(run: TrainedRun):
    said = markdown(gather(replace(run, code={}), [(12, 1.0)], [(12, 64.0)], None))
    assert "Not known: the probe was off or failed, or the dataset has no labels or no held-out images." in said
    assert "commit `unknown`" in said


def test_the_longest_card_fits_into_mlflow(lineage: Lineage):
    data = replace(lineage.data, place="s3://" + "a long prefix/" * 50)
    code = CODE | {f"version.package{number}": "1.2.3.post4+cu130" for number in range(20)}
    mask = {"kind": "inverse_block", "ratio": [0.1234] * 8, "unit": [1, 1], "aspect": [0.3, 3.3], "roll": True}
    long = replace(lineage, data=data, code=code, mask=mask, init_from="s3://" + "x" * 300, init_digest="0" * 64)
    assert len(markdown(long)) < MAX_DESCRIPTION


def test_a_run_that_is_registered_carries_its_lineage(tiny: Callable[..., RunConfig], runs: Path):
    prepared = prepare(tiny())
    summary = launch.launch(prepared, BareLauncher())
    client = prepared.store.client()
    version = client.get_model_version("tiny", summary.model_version)
    beside = Path(version.source.removeprefix("file://"))
    raw = json.loads((beside / LINEAGE).read_bytes())
    assert (raw["run"], raw["run_id"]) == (summary.run_name, summary.run_id)
    assert raw["trained"]["views"] == 12 * 64
    assert 0 < raw["trained"]["seconds"] < summary.seconds
    assert (raw["first_loss"], raw["last_loss"]) == (summary.first_loss, summary.last_loss)
    assert raw["code"] == dict(prepared.code)
    assert load(beside / CONFIG) == prepared.config
    assert (beside / FIGURE).read_bytes().startswith(b"\x89PNG")
    assert version.tags["maskray.run"] == summary.run_name
    assert version.tags["dataset"] == prepared.dataset.manifest.fingerprint
    assert f'load_model("models:/tiny/{summary.model_version}")' in version.description
    model_id = beside.parent.name
    assert f"logged-models/{model_id}/artifacts/files?artifact_file_path={FIGURE}" in version.description
    assert client.get_run(summary.run_id).data.metrics["probe/all_labels"] == summary.judgement.after.all_labels
