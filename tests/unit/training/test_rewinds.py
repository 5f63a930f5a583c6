"""The record of what a run leaves out, and the way back that it keeps."""

import gc
import json
import weakref

import pytest

from maskray.data.storage import Storage
from maskray.errors import BadStepError, CheckpointError
from maskray.training import rewinds
from maskray.training.rewinds import REWINDS, Rewind


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def bad(step, seen_at=None, reason="non_finite"):
    return BadStepError(f"bad at {step}", step, seen_at or step + 2, reason)


class Training:
    """A run that meets what it is told to, one after another, and keeps what it was asked to train."""

    def __init__(self, run, *ends):
        self.run, self.ends = run, list(ends)
        self.asked, self.told, self.on_record = [], [], []

    def __call__(self, config):
        self.asked.append(config.training.skip_steps)
        self.on_record.append([each.step for each in rewinds.read(self.run)])
        if self.ends:
            raise self.ends.pop(0)

    def go(self, config, newest_step=lambda: 4):
        tell = lambda known: self.told.append([each.step for each in known])  # noqa: E731
        return rewinds.until_trained(config, self.run, self, newest_step, tell)


@pytest.fixture
def run(place):
    """The folder of a run, on a disk and in a bucket."""
    return Storage(place)


def test_a_run_goes_back_and_on_without_what_was_bad(tiny, run, caplog):
    training = Training(run, bad(7, seen_at=8), bad(5, reason="spike"))
    config = training.go(tiny(training={"skip_steps": [9, 2]}))
    assert training.asked == [(2, 9), (2, 7, 9), (2, 5, 7, 9)]
    assert config.training.skip_steps == (2, 5, 7, 9)
    assert training.on_record == [[], [7], [7, 5]]  # before it trains again
    assert training.told == [[], [7], [7, 5]]
    first, second = rewinds.read(run)
    assert (first.step, first.reason, first.message, first.seen_at, first.back_to) == (
        7,
        "non_finite",
        "bad at 7",
        8,
        4,
    )
    assert (second.step, second.reason) == (5, "spike")
    assert first.text() == "from step 8 back to step 4, and on without step 7 of the plan (non finite)"
    assert first.text() in caplog.text
    assert "bad at 7" in caplog.text


def test_it_goes_back_so_often_in_its_life_and_then_stops_with_what_it_met(tiny, run, caplog):
    config = tiny(training={"rewinds": 2})
    training = Training(run, bad(1), Killed())
    with pytest.raises(Killed):
        training.go(config)
    training = Training(run, bad(3), bad(6))
    with pytest.raises(BadStepError, match=r"^bad at 6$"):
        training.go(config)
    assert training.asked == [(1,), (1, 3)]
    assert [each.step for each in rewinds.read(run)] == [1, 3]
    assert "has gone back 2 times already: training.rewinds" in caplog.text
    training = Training(run, bad(6))
    with pytest.raises(BadStepError, match=r"^bad at 6$"):  # and when it is launched again
        training.go(config)
    assert Training(run, bad(6)).go(tiny(training={"rewinds": 3})).training.skip_steps == (1, 3, 6)


def test_without_a_way_back_nothing_is_written(tiny, run):
    with pytest.raises(BadStepError):
        Training(run, bad(1)).go(tiny(training={"rewinds": 0}))
    assert not run.exists(REWINDS)


@pytest.mark.parametrize("error", [Killed(), ValueError("other"), CheckpointError("other")])
def test_other_ends_are_left_alone(tiny, run, error):
    with pytest.raises(type(error)):
        Training(run, error).go(tiny())
    assert not run.exists(REWINDS)


def test_what_was_trained_before_is_gone_before_it_trains_again(tiny, tmp_path):
    """A model and its optimiser: two of them may not fit the device."""
    held = []

    def train(_config):
        gc.collect()
        assert [each() for each in held] == [None] * len(held)
        model = type("Model", (), {})()
        held.append(weakref.ref(model))
        if len(held) < 3:
            raise bad(len(held))

    rewinds.until_trained(tiny(), Storage(tmp_path), train, lambda: 0, lambda known: None)
    assert len(held) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[1]",
        b"3",
        b"{}",
        b'{"schema_version": 99, "rewinds": []}',
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "rewinds": 3}',
        b'{"schema_version": 1, "rewinds": [{"step": 3}]}',
        b'{"schema_version": 1, "rewinds": [3]}',
        json.dumps({"schema_version": 1, "rewinds": [Rewind("3", "spike", "", 4, 0, "").__dict__]}).encode(),
        json.dumps({"schema_version": 1, "rewinds": [Rewind(-3, "spike", "", 4, 0, "").__dict__]}).encode(),
    ],
)
def test_a_record_that_cannot_be_read_is_not_taken_for_none(tiny, tmp_path, content):
    run = Storage(tmp_path)
    run.write_bytes(REWINDS, content)
    training = Training(run)
    with pytest.raises(
        CheckpointError, match=r"^rewinds\.json: the record .*Found: .*rewinds\.json .*training\.skip_s"
    ):
        training.go(tiny())
    assert training.asked == []
