"""A checkpoint is whole, or it is not there; and it belongs to one run."""

import json
import logging
import tempfile
from dataclasses import replace

import pytest
import torch
import yaml

from maskray.config.load import dump
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, StorageError
from maskray.training import checkpoint, folders
from maskray.training.checkpoint import CONFIG, FILES, OPTIMIZER, STATE, WEIGHTS, Facts, HostCopy

CPU = torch.device("cpu")
FACTS = Facts(
    step=3,
    fingerprint="0123456789abcdef",
    world_size=2,
    threads=1,
    packages={"torch": "2.0"},
    pending_metrics=[["pretrain/loss", 0.5, 1700000000000, 3], ["pretrain/grad_norm", None, 1700000000000, 3]],
    matmul_rates={"cpu, threads 1": 1e9},
    skipped=[1],
    recent_losses=[0.1, 1 / 3],
)


@pytest.fixture
def optimiser():
    """Name of the one that was trained with; tests that go over all of them give it."""
    return "adamw"


@pytest.fixture
def trained(rig, optimiser):
    r = rig(optim={"name": optimiser})
    for number in range(3):
        r.step(number, [r.batch(number)])
    return r


@pytest.fixture
def folder(trained, tmp_path):
    folder = tmp_path / "step_000000003-local"
    folder.mkdir()
    HostCopy(trained.model, trained.optimizer, FACTS, dump(trained.config)).write(folder)
    return folder


def restore(folder, r, fingerprint=FACTS.fingerprint, skip_steps=(1,)):
    return checkpoint.restore(folder, r.model, r.optimizer, fingerprint, skip_steps)


def change_state(folder, **changes):
    state = json.loads((folder / STATE).read_text()) | changes
    (folder / STATE).write_text(json.dumps({k: v for k, v in state.items() if v is not ...}))


@pytest.mark.parametrize("optimiser", ["adamw", "lamb"])
def test_what_is_restored_is_equal_to_the_bit_and_trains_on_as_before(folder, trained, rig, same, optimiser):
    other = rig(seed=5, optim={"name": optimiser})
    assert restore(folder, other) == FACTS
    same(other.weights(), trained.weights())
    same(other.moments(), trained.moments())
    for number in range(3, 6):
        trained.step(number, [trained.batch(number)])
        other.step(number, [other.batch(number)])
    same(other.weights(), trained.weights())
    same(other.moments(), trained.moments())


@pytest.mark.parametrize("optimiser", ["adamw", "lamb"])
def test_the_flag_still_stops_updates_after_a_restore(folder, trained, rig, same, optimiser):
    other = rig(optim={"name": optimiser})
    restore(folder, other)
    broken = other.model.decoder_pred.weight.register_hook(lambda grad: grad * float("nan"))
    other.step(3, [other.batch(3)])
    broken.remove()
    other.step(4, [other.batch(4)])
    same(other.weights(), trained.weights())


def test_a_checkpoint_says_all_of_itself(folder, trained):
    assert {f.name for f in folder.iterdir()} == {*FILES, STATE}
    state = json.loads((folder / STATE).read_text())
    assert (state["schema_version"], state["step"], state["fingerprint"]) == (2, 3, FACTS.fingerprint)
    assert set(state["files"]) == set(FILES)
    assert (folder / CONFIG).read_text() == dump(trained.config)
    assert yaml.safe_load((folder / CONFIG).read_text())["name"] == "tiny"
    assert set(torch.load(folder / OPTIMIZER, weights_only=True)) == {"state", "param_groups"}
    assert checkpoint.is_whole(folder)


def test_a_copy_does_not_move_with_the_model(trained, tmp_path, rig, same):
    copy, weights, moments = HostCopy(trained.model, trained.optimizer, FACTS, ""), trained.weights(), trained.moments()
    trained.step(3, [trained.batch(3)])  # training goes on while another thread writes
    copy.write(tmp_path)
    other = rig()
    restore(tmp_path, other)
    same(other.weights(), weights)
    same(other.moments(), moments)


# -------------------------------------------------------------------------------------------------------------- damage


def refusal(folder, r):
    before = r.weights()
    with pytest.raises(CheckpointError) as caught:
        restore(folder, r)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), r.weights().values(), strict=True))
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        ("flipped", "has as many bytes as were written, and others"),
        ("cut", r"has {fewer} bytes, {size} were written"),
        ("gone", "is missing"),
    ],
)
def test_a_damaged_file_is_named(folder, trained, name, damage, flaw):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).unlink()
    if damage != "gone":
        (folder / name).write_bytes(content if damage == "flipped" else content[:-1])
    flaw = flaw.format(fewer=len(content) - 1, size=len(content))
    assert refusal(folder, trained) == (
        f"a file of the checkpoint is missing or damaged. Found: {folder / name} ({flaw}). "
        "What to do: use an earlier checkpoint; `maskray repair RUN_FOLDER` takes a run back to one."
    )
    assert not checkpoint.is_whole(folder)
    assert checkpoint.flaws(folder) == [f"{name} {flaw}"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"\x00" * 40,
        b"\xff\xfe",
        b"[1]",
        b"3",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "files": 3}',
    ],
)
def test_a_state_that_says_nothing_makes_no_checkpoint(folder, trained, content):
    (folder / STATE).unlink()
    if content is not None:
        (folder / STATE).write_bytes(content)
    assert refusal(folder, trained) == (
        f"a folder without a readable state.json is no checkpoint. Found: {folder}. "
        "What to do: use an earlier checkpoint."
    )
    assert not checkpoint.is_whole(folder)


@pytest.mark.parametrize("changes", [{"step": ...}, {"files": ...}, {"unknown": 1}])
def test_a_state_with_other_fields_makes_no_checkpoint(folder, trained, changes):
    change_state(folder, **changes)
    assert "without a readable state.json is no checkpoint" in refusal(folder, trained)


def test_a_state_that_lists_too_little_makes_no_checkpoint(folder, trained):
    files = json.loads((folder / STATE).read_text())["files"]
    change_state(folder, files={k: v for k, v in files.items() if k != WEIGHTS})
    assert f"missing or damaged. Found: {folder / WEIGHTS}" in refusal(folder, trained)


@pytest.mark.parametrize("version", [0, 3, None])
def test_another_schema_version_is_refused_by_name_and_kept(folder, trained, version):
    change_state(folder, schema_version=version)
    assert refusal(folder, trained) == (
        f"schema_version: the checkpoint has another schema version. Found: {version} in {folder}. Allowed: 1 or 2. "
        "What to do: continue it with the maskray that wrote it, or start a new run with init_from."
    )
    assert checkpoint.is_whole(folder)  # else a run would silently go on from an older one


def test_a_checkpoint_of_schema_version_1_left_nothing_out(folder, trained):
    change_state(folder, schema_version=1, skipped=..., recent_losses=...)
    assert checkpoint.is_whole(folder)
    assert restore(folder, trained, skip_steps=(3, 7)) == replace(FACTS, skipped=[], recent_losses=[])


@pytest.mark.parametrize("skip_steps", [(1,), (1, 3), (1, 99)])
def test_steps_from_the_checkpoint_on_may_be_left_out(folder, trained, skip_steps):
    assert restore(folder, trained, skip_steps=skip_steps).skipped == [1]


@pytest.mark.parametrize(
    ("skip_steps", "message"),
    [
        (
            (),
            "training.skip_steps: the checkpoint was made without steps that are now to be trained on. Found: [], and "
            "{} was made without [1]. What to do: add these steps to training.skip_steps, or give this run another "
            "name.",
        ),
        (
            (0, 1, 2, 5),
            "training.skip_steps: the checkpoint has been trained on steps that are now to be left out. Found: [0, 2], "
            "and {} is of step 3. Allowed: further steps from 3 on. What to do: take these steps out of "
            "training.skip_steps, or give this run another name.",
        ),
    ],
)
def test_a_checkpoint_that_was_trained_on_other_steps_is_refused(folder, trained, skip_steps, message):
    weights = {name: value.clone() for name, value in trained.model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        restore(folder, trained, skip_steps=skip_steps)
    assert str(caught.value) == message.format(folder)
    assert all(torch.equal(value, weights[name]) for name, value in trained.model.state_dict().items())


def test_another_identity_is_refused(folder, trained):
    with pytest.raises(CheckpointError) as caught:
        restore(folder, trained, fingerprint="f" * 16)
    assert str(caught.value) == (
        f"fingerprint: the checkpoint belongs to a run with another identity. Found: 0123456789abcdef in {folder}. "
        "Allowed: ffffffffffffffff. What to do: start a new run from it with init_from, or undo the change of the "
        "config."
    )


@pytest.mark.parametrize("last", [CONFIG, WEIGHTS, OPTIMIZER])
def test_a_write_that_was_interrupted_never_counts(trained, tmp_path, monkeypatch, last):
    """Killed after writing `last`, before the next file."""

    def killed(*_):
        raise KeyboardInterrupt

    stop = {CONFIG: "save_file", WEIGHTS: "torch.save", OPTIMIZER: "_digest"}[last]
    target = checkpoint.torch if stop == "torch.save" else checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(target, stop.removeprefix("torch."), killed)
        with pytest.raises(KeyboardInterrupt):
            HostCopy(trained.model, trained.optimizer, FACTS, "").write(tmp_path)
    assert (tmp_path / last).exists()
    assert not checkpoint.is_whole(tmp_path)


def test_a_folder_that_only_its_owner_may_look_into_stays_so(trained, tmp_path):
    """A temporary one, on a machine that others use too."""
    folder = tmp_path / "temporary"
    folder.mkdir(mode=0o700)
    (folder / "of-a-try-before").mkdir()
    (folder / "of-a-try-before" / WEIGHTS).touch()
    (folder / CONFIG).write_text("of a try before")
    checkpoint.fill(folder, HostCopy(trained.model, trained.optimizer, FACTS, "").write, "TMPDIR")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {f.name for f in folder.iterdir()} == {*FILES, STATE}
    assert checkpoint.is_whole(folder)


# --------------------------------------------------------------------------------------------------------------- names


def test_folder_names_sort_by_step_and_say_it():
    names = [folders.folder_name(step, "local") for step in (4, 12, 100, 123456789)]
    assert names == sorted(names)
    assert [folders.step_of(name) for name in names] == [4, 12, 100, 123456789]
    assert folders.step_of(folders.folder_name(7, "a-b")) == 7


def test_other_conditions_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        checkpoint.warn_of_differences(FACTS, FACTS)
        assert caplog.text == ""
        checkpoint.warn_of_differences(FACTS, replace(FACTS, world_size=3, threads=2, packages={"torch": "2.1"}))
    assert "not the same bits: workers 2 → 3, threads 1 → 2, torch 2.0 → 2.1" in caplog.text


def test_a_package_that_was_not_noted_then_is_no_difference(caplog):
    with caplog.at_level(logging.WARNING):
        checkpoint.warn_of_differences(FACTS, replace(FACTS, packages=FACTS.packages | {"pillow": "12.0"}))
    assert caplog.text == ""


def test_what_says_that_a_checkpoint_is_whole_is_sent_last(folder, tmp_path, monkeypatch):
    target = Storage(tmp_path / "kept" / folder.name)
    sent, write_file = [], Storage.write_file

    def noted(self, name, source):
        sent.append((name, self.list_names()))
        write_file(self, name, source)

    monkeypatch.setattr(Storage, "write_file", noted)
    checkpoint.send(folder, target, {folders.PROBE: b"{}"})
    assert sent[-1] == (STATE, sorted([*FILES, folders.PROBE]))
    assert checkpoint.is_whole(tmp_path / "kept" / folder.name)
    assert target.read_bytes(folders.PROBE) == b"{}"


def test_no_room_for_a_copy_is_said(folder, bucket, small_disk, monkeypatch):
    remote = Storage(f"{bucket}/runs/{folder.name}")
    checkpoint.send(folder, remote)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    (small_disk / "full").write_bytes(bytes(2**20 - 3 * 4096))
    with (
        pytest.raises(StorageError, match=rf"^TMPDIR: there is no room for a temporary copy of {remote.uri}\. Found: "),
        checkpoint.on_disk(remote),
    ):
        pass
    assert [f.name for f in small_disk.iterdir()] == ["full"]
    (small_disk / "full").unlink()
    with checkpoint.on_disk(remote) as here:
        assert checkpoint.is_whole(here)


def test_a_checkpoint_elsewhere_is_copied_here(folder):
    with checkpoint.on_disk(Storage(folder)) as here:
        assert here == folder
    remote = Storage(folder)
    remote.is_local = False  # as a bucket would say
    with checkpoint.on_disk(remote) as here:
        assert here != folder
        assert checkpoint.read_facts(here) == FACTS
    assert not here.exists()
