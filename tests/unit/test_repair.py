"""A run's folder, broken in every way that is known, and what is made of it. The next launch is the judge."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from maskray import cli, launch
from maskray.bare import BareLauncher
from maskray.config.load import dump
from maskray.config.schema import RunConfig
from maskray.data import lease
from maskray.data.storage import TEMPORARY, Storage
from maskray.errors import CheckpointError, ConfigError, RunConflictError, UnreachableError
from maskray.on_ray import record
from maskray.on_ray.stream import SNAPSHOT
from maskray.preparing import DATASET, FINISHED, prepare
from maskray.pretrain import pretrain
from maskray.repair.case import Case, Finding, State, run_of
from maskray.repair.mending import repair
from maskray.tracking import mlflow_runs
from maskray.tracking.base import MemoryTracker
from maskray.training import courses, rewinds
from maskray.training.checkpoint import CONFIG, OPTIMIZER, STATE, WEIGHTS
from maskray.training.context import LocalContext
from maskray.training.folders import step_of

STEPS = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the run that each test has a copy of."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def config(tiny: Callable[..., RunConfig]) -> RunConfig:
    return tiny(storage={"keep_checkpoints": 8}, probe={"enabled": False})


@pytest.fixture
def run(config: RunConfig, runs: Path, trained: Path) -> Path:
    """A run that was trained, and whose driver died before it could say so: three checkpoints, on Ray's record."""
    kept = trained / "run"
    if not kept.exists():
        named = prepare(config).config
        pretrain(named, LocalContext(kept, named.data, keep_checkpoints=8), MemoryTracker())
    prepared = prepare(config)
    run = Path(prepared.run.uri)
    shutil.copytree(kept, run)
    for folder in run.glob("step_*-local"):
        folder.rename(folder.with_name(folder.name.replace("local", "0a1b2c3d")))
    record.make_again(prepared.run, folders(run))
    (run / launch.LAUNCHER).write_text("ray")
    (run / DATASET).write_text(prepared.dataset.manifest.fingerprint)
    return run


def folders(run: Path) -> list[str]:
    return sorted(f.name for f in run.glob("step_*"))


def to_torch(run: Path) -> None:
    """The same run, trained by bare torch."""
    (run / SNAPSHOT).unlink()
    (run / launch.LAUNCHER).write_text("torch")
    for folder in run.glob("step_*"):
        folder.rename(folder.with_name(folder.name.replace("0a1b2c3d", "local")))


def mended(run: Path, **options: object) -> list[Finding]:
    """What is found and done. A dry run before says the same, and changes nothing."""
    before = contents(run)
    told = list(repair(Case(Storage(run), dry_run=True, **options)))
    assert contents(run) == before
    done = list(repair(Case(Storage(run), **options)))
    assert done == told
    return done


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_where_nothing_is_wrong_nothing_is_done(run: Path):
    before = contents(run)
    assert mended(run) == []
    assert contents(run) == before


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b'{"ray_version": "2', "it is cut short: "),
        (b'{"ray_version": "2.1"}', "this version of Ray writes it otherwise: "),
        (b"[]", "this version of Ray writes it otherwise: "),
        (None, "there is none"),
    ],
)
def test_a_record_that_is_torn_or_missing_is_made_again(run: Path, content: bytes | None, why: str):
    (run / SNAPSHOT).unlink() if content is None else (run / SNAPSHOT).write_bytes(content)
    finding = only(mended(run))
    assert (finding.state, finding.what) == (State.MENDED, SNAPSHOT)
    assert finding.why.startswith(why)
    assert finding.done == f"made again from what is whole; the run goes on from {folders(run)[-1]}"
    found = record.read(Storage(run))
    assert found is not None
    assert (sorted(found.names), found.newest) == (folders(run), folders(run)[-1])
    assert mended(run) == []


def test_a_checkpoint_that_was_deleted_by_hand(run: Path):
    *_, newest = folders(run)
    shutil.rmtree(run / newest)
    finding = only(mended(run))
    assert finding.why == f"it lists folders that are not there: {newest}"
    assert record.read(Storage(run)).newest == folders(run)[-1]
    assert mended(run) == []


def test_all_checkpoints_deleted_by_hand(run: Path):
    for name in folders(run):
        shutil.rmtree(run / name)
    assert only(mended(run)).done.endswith("no checkpoint is left, and the run begins anew")
    assert record.read(Storage(run)) == record.Record([], None)


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        (WEIGHTS, lambda path: path.unlink(), f"{WEIGHTS} is missing"),
        (OPTIMIZER, lambda path: os.truncate(path, 100), f"{OPTIMIZER} has 100 bytes, "),
        (CONFIG, lambda path: path.write_bytes(path.read_bytes()[::-1]), f"{CONFIG} has as many bytes as were written"),
        (STATE, lambda path: path.write_text("{"), f"{STATE} cannot be read"),
        (STATE, lambda path: path.unlink(), f"there is no {STATE}"),
        (STATE, lambda path: path.write_text('{"schema_version": 2, "files": {}}'), f"{CONFIG} is not in {STATE}"),
    ],
)
def test_a_damaged_checkpoint_is_left_out_and_kept(run: Path, name: str, damage: Callable[[Path], object], why: str):
    before, newest = folders(run)[-2:]
    damage(run / newest / name)
    folder, of_record = mended(run)
    assert folder.what == newest
    assert folder.why.startswith(why)
    assert of_record.why == f"it lists what is not whole: {newest}"
    assert of_record.done.endswith(f"goes on from {before}")
    assert (run / newest).exists()
    assert record.read(Storage(run)).newest == before
    record.settle(Storage(run))  # the next launch
    assert folders(run)[-1] == before


@pytest.mark.parametrize("content", [b"", None])
def test_what_may_have_been_a_checkpoint_is_kept_where_no_record_says_otherwise(run: Path, content: bytes | None):
    *_, newest = folders(run)
    (run / newest / STATE).unlink()
    (run / SNAPSHOT).unlink() if content is None else (run / SNAPSHOT).write_bytes(content)
    folder, _ = mended(run)
    assert (folder.state, folder.what) == (State.NOTED, newest)
    assert (run / newest).exists()


@pytest.mark.parametrize("newest_is_kept", [True, False])
def test_a_checkpoint_of_bare_torch_that_has_lost_its_last_file_is_kept(run: Path, newest_is_kept: bool):
    """Its name says that it was finished, and that of the other that it was not."""
    to_torch(run)
    *_, newest = folders(run)
    (run / newest / STATE).unlink()
    if not newest_is_kept:
        (run / newest).rename(run / f"{newest}.partial")
    finding = only(mended(run))
    assert finding.state == (State.NOTED if newest_is_kept else State.MENDED)
    assert (newest in folders(run)) == newest_is_kept
    assert not (run / f"{newest}.partial").exists()


@pytest.mark.parametrize("launcher", ["torch", "ray"])
@pytest.mark.parametrize("there", ["nothing", "damaged", "whole"])
def test_a_whole_checkpoint_that_bare_torch_had_no_time_to_name(run: Path, launcher: str, there: str):
    """The launcher that is to go on, too, says what is its newest."""
    to_torch(run)
    *before, newest = folders(run)
    wanted = (run / newest / WEIGHTS).read_bytes()
    shutil.copytree(run / newest, run / f"{newest}.partial")
    if there == "nothing":
        shutil.rmtree(run / newest)
    elif there == "damaged":
        (run / newest / WEIGHTS).write_bytes(b"damaged")
    finding, *others = mended(run, launcher=launcher)
    assert (finding.state, finding.what) == (State.MENDED, f"{newest}.partial")
    assert finding.done == ("removed" if there == "whole" else f"renamed to {newest}")
    assert [each.what for each in others] == ([] if launcher == "torch" else [launch.LAUNCHER, SNAPSHOT])
    assert folders(run) == [*before, newest]
    assert (run / newest / WEIGHTS).read_bytes() == wanted
    with LocalContext(run, None).latest_checkpoint() as found:
        assert found == run / newest
    assert mended(run) == []


def test_a_checkpoint_without_a_name_that_has_trained_on_a_bad_step_gets_none(run: Path):
    to_torch(run)
    *_, before, newest = folders(run)
    (run / newest).rename(run / f"{newest}.partial")
    rewinds._write(Storage(run), [rewinds.Rewind(step_of(newest) - 1, "non_finite", "", 12, step_of(before), "")])
    assert only(mended(run)).done == "removed"
    assert folders(run)[-1] == before


def test_what_never_was_a_checkpoint_is_removed_and_what_is_not_ours_stays(run: Path):
    *_, newest = folders(run)
    unfinished = f"step_{STEPS + 4:09d}-ffffffff"
    shutil.copytree(run / newest, run / unfinished)
    shutil.copytree(run / newest, run / f"{newest}.backup")
    (run / unfinished / STATE).unlink()
    (run / newest / f"{TEMPORARY}0-{WEIGHTS}").write_bytes(b"half")
    temporary, folder = mended(run)
    assert temporary.what == f"{newest}/{TEMPORARY}0-{WEIGHTS}"
    assert (folder.what, folder.done) == (unfinished, "removed: it never was a checkpoint")
    record.settle(Storage(run))
    assert (run / f"{newest}.backup").exists()
    assert mended(run) == []


def test_a_whole_checkpoint_that_the_record_does_not_know(run: Path):
    """Uploaded, and the controller killed before it knew."""
    *before, newest = folders(run)
    (run / SNAPSHOT).unlink()
    record.make_again(Storage(run), before)
    assert only(mended(run)).why == f"it does not know of {newest}, newer and whole"
    assert record.read(Storage(run)).newest == newest


def test_a_checkpoint_that_has_trained_on_a_bad_step_is_left_out(run: Path):
    """As a launch has it: whoever wrote it was lost before it was on record, and the run went back."""
    *before, newest = folders(run)
    (run / SNAPSHOT).unlink()
    record.make_again(Storage(run), before)
    bad = step_of(before[-1]) + 1
    rewinds._write(Storage(run), [rewinds.Rewind(bad, "non_finite", "", bad + 1, step_of(before[-1]), "")])
    finding = only(mended(run))
    assert (finding.state, finding.what) == (State.NOTED, newest)
    (run / SNAPSHOT).write_bytes(b"")
    _, of_record = mended(run)
    assert of_record.done.endswith(f"goes on from {before[-1]}")
    assert record.read(Storage(run)).newest == before[-1]
    assert folders(run) == [*before, newest]


@pytest.mark.parametrize("began_with", ["ray", "torch"])
def test_bare_torch_is_not_handed_a_checkpoint_that_has_trained_on_a_bad_step(
    run: Path, config: RunConfig, began_with: str
):
    if began_with == "torch":
        to_torch(run)
    *_, before, newest = folders(run)
    bad = step_of(before) + 1
    rewinds._write(Storage(run), [rewinds.Rewind(bad, "non_finite", "", bad + 1, step_of(before), "")])
    kept = contents(run / newest)
    finding = next(each for each in mended(run, launcher="torch") if each.what == newest)
    assert finding.state == State.MENDED
    assert contents(run / f"left-out-{newest}") == kept
    assert mended(run) == []
    summary = launch.launch(prepare(config), BareLauncher())
    assert summary.steps == STEPS
    assert (run / f"left-out-{newest}").exists()


@pytest.mark.parametrize("in_vain", [1, 2])
def test_a_record_that_a_store_does_not_give_is_not_torn(run: Path, in_vain: int):
    """Once: it answers again before the record would be written."""
    before, asked = (run / SNAPSHOT).read_bytes(), 0

    class Away(Storage):
        def read_bytes(self, name: str) -> bytes:
            nonlocal asked
            asked += name == SNAPSHOT
            if name == SNAPSHOT and asked == in_vain:
                raise UnreachableError("cannot read", found=name)
            return super().read_bytes(name)

    with pytest.raises(UnreachableError):
        list(repair(Case(Away(run))))
    assert (run / SNAPSHOT).read_bytes() == before


def test_nothing_is_deleted_where_no_checkpoint_is_whole(run: Path):
    for name in folders(run):
        (run / name / WEIGHTS).write_bytes(b"damaged")
    (run / folders(run)[0] / STATE).unlink()
    before = contents(run)
    *of_folders, of_record = mended(run)
    assert {f.state for f in of_folders} == {of_record.state} == {State.LEFT}
    assert "restore a checkpoint from a copy" in of_record.done
    assert contents(run) == before


def test_the_last_good_checkpoint_is_not_removed_by_a_record_of_damaged_ones(run: Path):
    """At a launch, too, which reads what is on record alone."""
    *before, newest = folders(run)
    record.make_again(Storage(run), before)
    for name in before:
        (run / name / WEIGHTS).write_bytes(b"damaged")
    record.settle(Storage(run))
    assert folders(run) == [newest]
    assert record.read(Storage(run)) == record.Record([newest], newest)


def test_a_record_whose_newest_is_not_in_its_list(run: Path):
    raw = json.loads((run / SNAPSHOT).read_text())
    raw["latest_checkpoint_result"]["checkpoint_dir_name"] = "step_000000099-aaaaaaaa"
    (run / SNAPSHOT).write_text(json.dumps(raw))
    assert "is not in its list" in only(mended(run)).why
    assert record.read(Storage(run)).newest == folders(run)[-1]


# ---------------------------------------------------------------------------------------------------- lease, launcher


@pytest.mark.parametrize("content", [b"", b"[1]", None])
def test_a_lease_that_nobody_has(run: Path, content: bytes | None):
    gone = replace(lease.Holder.this_process(), pid=2**22 - 1, process_started=1.0)
    (run / lease.LEASE).write_bytes(json.dumps(asdict(gone)).encode() if content is None else content)
    finding = only(mended(run))
    assert finding.what == lease.LEASE
    assert not (run / lease.LEASE).exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_run_that_is_running_is_refused(run: Path, dry_run: bool):
    (run / SNAPSHOT).write_bytes(b"")
    with lease.hold(Storage(run), run.name), pytest.raises(RunConflictError, match="is running already"):
        list(repair(Case(Storage(run), dry_run=dry_run)))
    assert (run / SNAPSHOT).read_bytes() == b""


@pytest.mark.parametrize("content", [b"", b"slurm", None])
def test_a_launcher_that_is_not_said_is_who_wrote_the_checkpoints(run: Path, content: bytes | None):
    (run / launch.LAUNCHER).unlink() if content is None else (run / launch.LAUNCHER).write_bytes(content)
    assert only(mended(run)).done == "written anew: ray, who wrote the checkpoints"
    assert (run / launch.LAUNCHER).read_text() == "ray"
    to_torch(run)
    (run / launch.LAUNCHER).unlink()
    assert only(mended(run)).done.startswith("written anew: torch")


def test_a_run_is_handed_over_and_goes_on_to_the_same_bits_though_its_last_word_is_torn(run: Path, config: RunConfig):
    *_, newest = folders(run)
    wanted = hashlib.sha256((run / newest / WEIGHTS).read_bytes()).hexdigest()
    shutil.rmtree(run / newest)
    with pytest.raises(CheckpointError, match=r"maskray repair .*--launcher torch"):
        launch.launch(prepare(config), BareLauncher())
    assert [f.what for f in mended(run, launcher="torch")] == [launch.LAUNCHER, SNAPSHOT]
    summary = launch.launch(prepare(config), BareLauncher())
    *_, newest = folders(run)
    assert (step_of(newest), newest.endswith("-local")) == (STEPS, True)
    assert hashlib.sha256((run / newest / WEIGHTS).read_bytes()).hexdigest() == wanted
    (run / FINISHED).write_bytes((run / FINISHED).read_bytes()[:50])
    assert "judges and registers again" in only(mended(run)).done
    again = launch.launch(prepare(config), BareLauncher())
    assert not again.already_finished
    assert (again.steps, again.model_version, again.run_id) == (STEPS, summary.model_version, summary.run_id)
    assert [f.what for f in mended(run, launcher="ray")] == [launch.LAUNCHER, SNAPSHOT]
    assert record.read(Storage(run)).newest == newest


# --------------------------------------------------------------------------------------------- what is beside them


def test_the_dataset_that_a_run_reads_is_named_again(run: Path):
    named = (run / DATASET).read_bytes()
    (run / DATASET).unlink()
    assert only(mended(run)).what == DATASET
    assert (run / DATASET).read_bytes() == named


def test_a_list_of_skipped_steps_that_cannot_be_read_is_explained_and_kept(run: Path):
    (run / rewinds.REWINDS).write_text("{")
    finding = only(mended(run))
    assert finding.state == State.LEFT
    assert "training.skip_steps=[]" in finding.done
    assert (run / rewinds.REWINDS).exists()


def test_the_word_of_another_version_stays_and_so_does_one_without_checkpoints(run: Path):
    (run / FINISHED).write_text('{"schema_version": 99}')
    assert only(mended(run)).state == State.NOTED
    (run / FINISHED).write_text("{")
    for name in folders(run):
        shutil.rmtree(run / name)
    (run / SNAPSHOT).unlink()
    assert only(mended(run)).state == State.LEFT
    assert (run / FINISHED).exists()


def running(config: RunConfig) -> tuple[mlflow_runs.Store, str]:
    prepared = prepare(config)
    return prepared.store, mlflow_runs.ensure_run(prepared.store, launch.card(prepared))


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_mlflow_takes_for_running_is_closed_with_the_truth(run: Path, config: RunConfig, finished: bool):
    if finished:
        done = launch.Summary(run.name, "1", "x", STEPS, 1.0, 1.0, 0.5, None, "tiny", "1")
        (run / FINISHED).write_bytes(done.dump())
    store, run_id = running(config)
    finding = only(mended(run))
    assert finding.what == "MLflow"
    status = "FINISHED" if finished else "KILLED"
    assert finding.done.startswith(f"closed: {status}")
    assert store.client().get_run(run_id).info.status == status
    assert mended(run) == []


def test_a_run_of_another_machine_stays_open(run: Path, config: RunConfig):
    store, run_id = running(config)
    store.client().set_tag(run_id, launch.HOST_TAG, f"not-{socket.gethostname()}")
    assert only(mended(run)).state == State.LEFT
    assert store.client().get_run(run_id).info.status == "RUNNING"


def test_the_rest_is_mended_while_mlflow_is_away(run: Path, config: RunConfig):
    away = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    (run / SNAPSHOT).write_bytes(b"")
    of_record, of_mlflow = mended(run, config=away)
    assert of_record.state == State.MENDED
    assert of_mlflow.state == State.LEFT
    assert "no MLflow answers there" in of_mlflow.why


# --------------------------------------------------------------------------------------------------------- the command


def test_a_run_in_a_bucket(run: Path, bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    target = Storage(f"{bucket}/runs").child(run.name)
    for name, content in contents(run).items():
        target.write_bytes(name, content)
    *_, before, newest = folders(run)
    target.write_bytes(f"{newest}/{WEIGHTS}", b"damaged")
    assert [(f.state, f.what) for f in repair(Case(target))] == [(State.NOTED, newest), (State.MENDED, SNAPSHOT)]
    assert record.read(target).newest == before
    assert not target.exists(lease.LEASE)
    with pytest.raises(ConfigError, match="bare torch writes to a local folder"):
        list(repair(Case(target, launcher="torch")))


def test_the_command_line(run: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.yaml").write_text(dump(config))
    by_config = ["repair", "--config", str(tmp_path / "run.yaml")]
    assert cli.main([*by_config, "--dry-run"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    (run / SNAPSHOT).write_bytes(b"{")
    assert cli.main(["repair", str(run), "--dry-run"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"to do {SNAPSHOT}: ")
    assert "would be made again" in said
    assert said.endswith(f"the next launch goes on from {folders(run)[-1]}. Nothing was changed: a dry run")
    assert (run / SNAPSHOT).read_bytes() == b"{"
    assert cli.main(by_config) == 0
    assert "mended" in capsys.readouterr().out
    (run / rewinds.REWINDS).write_text("{")
    assert cli.main(["repair", str(run)]) == 1
    assert cli.main(["repair"]) == cli.main(["repair", str(run), *by_config[1:]]) == cli.USER_MISTAKE


@pytest.mark.parametrize("place", ["sweeps/mine-1", "sweeps/mine-1/trials/0123456789abcdef"])
def test_what_belongs_to_a_sweep_is_refused(run: Path, place: str):
    """A living one holds its lease elsewhere than in a trial's folder."""
    sweep, trial = run.parent / "sweeps" / "mine-1", run.parent / "sweeps" / "mine-1" / "trials" / "0123456789abcdef"
    shutil.copytree(run, trial)
    (sweep / "dataset").write_bytes(b"")  # as a run has it
    assert mended(trial) == []  # a folder of this name is no sweep yet
    (sweep / "sweep.yaml").write_bytes(b"")
    before = contents(sweep)
    with pytest.raises(ConfigError, match=r"^RUN_FOLDER: this belongs to a sweep.*maskray sweep --config"):
        mended(run.parent / place)
    assert contents(sweep) == before


@pytest.mark.parametrize("newest_is_torn", [False, True])
def test_an_evaluation_is_refused(run: Path, newest_is_torn: bool):
    for folder in run.glob("*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    for number in (4, 8):
        (folder := run / f"step_{number:09d}-local").mkdir()
        courses.Progress([], 0, number).snapshot("0123")(folder)
    if newest_is_torn:
        (folder / STATE).write_bytes(b"")
    before = contents(run)
    with pytest.raises(ConfigError, match=r"^RUN_FOLDER: this is the folder of an evaluation.*maskray evaluate"):
        mended(run)
    assert contents(run) == before


def test_a_newer_version_that_keeps_its_config_elsewhere(run: Path):
    *_, newest = folders(run)
    state = json.loads((run / newest / STATE).read_text())
    (run / newest / STATE).write_text(json.dumps(state | {"schema_version": 99}))
    (run / newest / CONFIG).unlink()
    (run / SNAPSHOT).write_bytes(b"")
    assert only(mended(run)).done.endswith(f"goes on from {newest}")


def test_other_folders_are_refused(run: Path, config: RunConfig, tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"")
    for folder in (tmp_path / "pictures", tmp_path / "nowhere", run.parent):
        with pytest.raises(ConfigError, match="no folder of a run"):
            mended(folder)
    assert run_of(config)[1].uri == str(run)
