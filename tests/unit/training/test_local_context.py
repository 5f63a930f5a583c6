"""The context of bare torch: folders that appear whole, and only the newest are kept."""

import json

import pytest

from maskray.config.resolve import resolve
from maskray.config.schema import DataConfig
from maskray.data.shards import Dataset
from maskray.data.spec import StreamSpec
from maskray.training import checkpoint, folders
from maskray.training.checkpoint import STATE, WEIGHTS, Facts, HostCopy
from maskray.training.context import LocalContext

DATA = DataConfig(path="not read here")


@pytest.fixture
def snapshot(rig):
    r = rig()

    def at(step):
        return HostCopy(r.model, r.optimizer, Facts(step, "0" * 16, 1, 1, {}, []), "").write

    return at


def steps_in(context):
    return sorted(folders.step_of(f.name) for f in context.run_folder.iterdir() if f.suffix != ".partial")


def newest(context):
    with context.latest_checkpoint() as folder:
        return None if folder is None else checkpoint.read_facts(folder).step


def test_no_checkpoint_yet(tmp_path):
    assert newest(LocalContext(tmp_path / "never made", DATA)) is None


@pytest.mark.parametrize(("keep", "kept"), [(1, [100]), (2, [12, 100]), (9, [4, 8, 12, 100])])
def test_the_newest_are_kept(tmp_path, snapshot, keep, kept):
    context = LocalContext(tmp_path, DATA, keep_checkpoints=keep)
    for step in (4, 8, 12, 100):
        assert context.report(step, snapshot(step), probed=False) == 0.0
    assert steps_in(context) == kept
    assert newest(context) == 100


@pytest.mark.parametrize(("keep", "kept"), [(1, [8, 100]), (2, [4, 8, 100]), (3, [4, 8, 16, 100])])
def test_the_best_by_their_probe_are_kept_then_the_newest_and_the_newest_of_all(tmp_path, snapshot, keep, kept):
    scores = {4: 0.5, 8: 0.7, 12: None, 16: 0.2}

    def probe(folder):
        score = scores[folders.step_of(folder.name)]
        (folder / folders.PROBE).write_text(json.dumps({"score": score}))

    context = LocalContext(tmp_path, DATA, keep_checkpoints=keep, probe=probe)
    for step in (4, 8, 12, 16, 100):
        context.report(step, snapshot(step), probed=step in scores)
    assert steps_in(context) == kept
    assert newest(context) == 100


def test_what_was_passed_over_keeps_no_place(tmp_path, snapshot):
    context = LocalContext(tmp_path, DATA, keep_checkpoints=1)
    context.report(8, snapshot(8), probed=False)
    damaged = tmp_path / folders.folder_name(10, "local")
    damaged.mkdir()
    assert newest(context) == 8
    context.report(9, snapshot(9), probed=False)
    assert newest(context) == 9
    assert steps_in(context) == [9]


def test_a_step_that_is_trained_again_replaces_its_checkpoint(tmp_path, snapshot):
    context = LocalContext(tmp_path, DATA)
    for _ in range(2):
        context.report(4, snapshot(4), probed=False)
    assert steps_in(context) == [4]


def test_other_ranks_write_nothing(tmp_path):
    context = LocalContext(tmp_path / "run", DATA, rank=1, world_size=2)
    assert context.report(4, None, probed=False) == 0.0
    assert not context.run_folder.exists()


def test_a_write_that_breaks_off_leaves_the_last_checkpoint(tmp_path, snapshot):
    context = LocalContext(tmp_path, DATA, keep_checkpoints=1)
    context.report(4, snapshot(4), probed=False)

    def breaks_off(folder):
        snapshot(8)(folder)
        (folder / STATE).unlink()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        context.report(8, breaks_off, probed=False)
    assert (newest(context), steps_in(context)) == (4, [4])
    context.report(8, snapshot(8), probed=False)
    assert (newest(context), steps_in(context)) == (8, [8])
    assert [f.suffix for f in tmp_path.iterdir()] == [""]


def test_a_damaged_checkpoint_is_passed_over(tmp_path, snapshot):
    context = LocalContext(tmp_path, DATA, keep_checkpoints=3)
    for step in (4, 8, 12):
        context.report(step, snapshot(step), probed=False)
    (tmp_path / folders.folder_name(12, "local") / WEIGHTS).write_bytes(b"")
    (tmp_path / folders.folder_name(8, "local") / STATE).unlink()
    assert newest(context) == 4


@pytest.mark.parametrize("cache", ["auto", "none", "host", "device"])
def test_it_gives_a_ranks_units_from_a_step_on(tmp_path, tiny, cache):
    config = tiny(optim={"steps": 3}, data={"cache": cache})
    dataset = Dataset.open(config.data.path)
    spec = StreamSpec.of(config, resolve(config, dataset.facts()), dataset)
    context = LocalContext(tmp_path, config.data, rank=1, world_size=2)
    with context.units(spec, 1) as units:
        assert [unit.position for unit in units] == [5, 7, 9, 11]
