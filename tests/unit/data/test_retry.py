"""What may pass is tried again, a bounded number of times and seconds; what will not pass is not."""

import logging
from types import SimpleNamespace

import pytest

from maskray.data import retry
from maskray.data.retry import RETRIES, Patience, persistently


class PassingError(OSError):
    pass


class Attempts:
    """Fails with each of `errors`, then gives "done"; the clock goes forward by the sleeps and by `seconds` a try."""

    def __init__(self, monkeypatch, *errors, seconds=0.0):
        self.errors, self.seconds, self.made, self.now, self.slept = list(errors), seconds, 0, 1000.0, []
        monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self):
        self.made += 1
        self.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    def run(self, **patience):
        return persistently("read a/b", self, lambda e: isinstance(e, PassingError), Patience(**patience))


def test_what_passes_is_tried_again_and_said_and_counted(monkeypatch, caplog):
    attempts, before = Attempts(monkeypatch, PassingError("busy"), PassingError("busy")), RETRIES.count
    with caplog.at_level(logging.WARNING):
        assert attempts.run(tries=5) == "done"
    assert RETRIES.count - before == 2
    assert [r.message.partition(" in ")[0] for r in caplog.records] == [
        "Cannot read a/b (busy): try 2 of 5",
        "Cannot read a/b (busy): try 3 of 5",
    ]


def test_what_tasks_tried_again_is_counted_for_whom_they_work():
    before = RETRIES.count
    RETRIES.add(3)
    RETRIES.add(0)
    assert RETRIES.count - before == 3


def test_what_will_not_pass_is_raised_at_once(monkeypatch, caplog):
    attempts = Attempts(monkeypatch, PassingError("busy"), PermissionError("no"))
    with pytest.raises(PermissionError):
        attempts.run()
    assert attempts.made == 2
    other = Attempts(monkeypatch, KeyError("ours"))
    with pytest.raises(KeyError):
        other.run()
    assert other.made == 1


def test_tries_are_bounded(monkeypatch):
    attempts = Attempts(monkeypatch, *(PassingError(str(n)) for n in range(9)))
    with pytest.raises(PassingError, match="3"):
        attempts.run(tries=4)
    assert (attempts.made, len(attempts.slept)) == (4, 3)


def test_seconds_are_bounded(monkeypatch):
    attempts = Attempts(monkeypatch, *(PassingError() for _ in range(99)), seconds=7.0)
    with pytest.raises(PassingError):
        attempts.run(tries=99, total_seconds=30, first_wait_seconds=1, longest_wait_seconds=1)
    assert attempts.made == 4  # a fifth would begin after 28 seconds of tries and at least two of waits


def test_waits_double_up_to_the_longest_and_differ():
    patience = Patience(first_wait_seconds=1, longest_wait_seconds=8)
    for failures, longest in enumerate((1, 2, 4, 8, 8, 8), start=1):
        waits = {patience.wait_seconds(failures) for _ in range(50)}
        assert len(waits) > 40
        assert all(longest / 2 <= wait <= longest for wait in waits)
