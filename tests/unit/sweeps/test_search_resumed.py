"""A search that is resumed: it asks for what one that nobody interrupted would, by what is on record."""

import json
from collections import Counter

import pytest
from optuna.trial import TrialState

from maskray.config.load import fingerprint
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, StorageError
from maskray.sweeps.record import Result
from maskray.sweeps.search import open_queue
from sweep_queues import CONDITIONAL, SPACE, by_key, drain, end, make, optuna, points_of


@pytest.mark.parametrize("space", [SPACE, CONDITIONAL])
def test_a_resumed_search_goes_on_as_one_that_was_not_interrupted(tmp_path, space):
    config = optuna(space, 14, seeds=(0, 1))
    whole = drain(open_queue(config, None, make, {}, Storage(tmp_path / "whole")))
    assert len(whole) == 28
    for num in (0, 1, 2, 9, 10, 13, 20, 27, 28):
        folder = Storage(tmp_path / str(num))
        begun = drain(open_queue(config, None, make, {}, folder), most=num)
        kept = {key: Result.load(result.dump(), "") for key, result in by_key(begun).items()}
        rest = drain(open_queue(config, None, make, kept, folder))
        assert begun == whole[:num]
        assert rest == whole[num:]


def test_what_was_begun_and_has_not_ended_is_given_out_again(tmp_path):
    config, folder = optuna(points=12, seeds=(0, 1)), Storage(tmp_path)
    queue = open_queue(config, None, make, {}, folder)
    ended = drain(queue, most=14)
    running = [queue.next() for _ in range(3)]  # both of one point, one of the next
    ended.append(end(running[1], 0.5))
    failed = end(ended.pop(0).trial, None, "failed")
    resumed = open_queue(config, None, make, by_key([*ended, failed]), folder)
    again = [resumed.next() for _ in range(4)]
    assert [t.key for t in again[:3]] == [failed.trial.key, running[0].key, running[2].key]
    assert (again[3].point, again[3].seed) == (running[2].point, 1)
    assert [trial.state for trial in resumed._study.trials] == [
        TrialState.RUNNING, *[TrialState.COMPLETE] * 6, TrialState.RUNNING, TrialState.RUNNING
    ]  # fmt: skip
    rest = [end(trial) for trial in again]
    for result in rest:
        resumed.tell(result)
    rest += drain(resumed)
    keys = {result.trial.key for result in (*ended, *rest)}
    assert len(keys) == len(ended) + len(rest) == 24
    assert len({fingerprint(point) for point in points_of([*ended, *rest])}) == 12


def test_a_point_is_on_record_before_it_is_given_out(place):
    folder = Storage(place)
    queue = open_queue(optuna(points=3, seeds=(0, 1)), None, make, {}, folder)
    given = []
    for _ in range(6):
        given.append(queue.next())
        asked = json.loads(folder.read_bytes("asked.json"))
        assert asked["schema_version"] == 1
        assert asked["points"] == [dict(trial.point) for trial in given[::2]]
    assert open_queue(optuna(points=3, seeds=(0, 1)), None, make, {}, folder).next().key == given[0].key


def test_a_point_that_cannot_be_recorded_is_not_given_out(tmp_path):
    queue = open_queue(optuna(), None, make, {}, Storage(tmp_path / "sweep"))
    (tmp_path / "sweep").touch()  # a file, where the folder should be
    with pytest.raises(StorageError, match=r"asked\.json"):
        queue.next()
    (tmp_path / "sweep").unlink()
    trial = queue.next()
    assert json.loads((tmp_path / "sweep" / "asked.json").read_text())["points"] == [trial.point]


def test_results_count_though_the_list_of_points_is_lost(tmp_path):
    config, folder = optuna(points=8), Storage(tmp_path)
    begun = drain(open_queue(config, None, make, {}, folder), most=6)
    folder.delete("asked.json")
    resumed = open_queue(config, None, make, by_key(begun), folder)
    assert Counter(trial.value for trial in resumed._study.trials) == Counter(r.value for r in begun)
    rest = drain(resumed)
    assert len(rest) == 2
    assert not {r.trial.key for r in rest} & set(by_key(begun))
    assert len(json.loads(folder.read_bytes("asked.json"))["points"]) == 8


def test_more_points_may_be_asked_for_later(tmp_path):
    folder = Storage(tmp_path)
    begun = drain(open_queue(optuna(points=4), None, make, {}, folder))
    assert open_queue(optuna(points=3), None, make, by_key(begun), folder).is_done
    assert len(drain(open_queue(optuna(points=6), None, make, by_key(begun), folder))) == 2


@pytest.mark.parametrize(
    "content", [b"", b'{"schema_version": 1, "points": [{"x": 0.', b"[]", b"{}", b'{"schema_version": 2, "points": []}',
                b'{"schema_version": 1, "points": [3]}', b'{"schema_version": 1, "points": ["x"]}']
)  # fmt: skip
def test_a_list_that_cannot_be_read_is_named(tmp_path, content):
    Storage(tmp_path).write_bytes("asked.json", content)
    with pytest.raises(
        CheckpointError, match=r"cannot be read\. Found: .*/asked\.json \(.*What to do: restore the file"
    ):
        open_queue(optuna(), None, make, {}, Storage(tmp_path))


GOOD = {"x": 0.5, "lr": 0.1, "n": 3, "kind": "a"}


@pytest.mark.parametrize(
    ("point", "key"),
    [
        ({**GOOD, "x": 1.5}, "x"),
        ({**GOOD, "x": "0.5"}, "x"),
        ({**GOOD, "lr": 1e-5}, "lr"),
        ({**GOOD, "n": 9}, "n"),
        ({**GOOD, "n": 3.0}, "n"),
        ({**GOOD, "n": True}, "n"),
        ({**GOOD, "kind": "c"}, "kind"),
        ({**GOOD, "other": 1}, "other"),
        ({"lr": 0.1, "n": 3, "kind": "a"}, "x"),
    ],
)
def test_a_point_of_another_space_is_refused(tmp_path, point, key):
    def keep(*points):
        content = json.dumps({"schema_version": 1, "points": points})
        Storage(tmp_path).write_bytes("asked.json", content.encode())

    keep(GOOD)
    assert open_queue(optuna(), None, make, {}, Storage(tmp_path)).next().point == GOOD
    keep(GOOD, point)
    with pytest.raises(CheckpointError, match=rf"^space\.{key}: a point on record is none of the space\. Found: .*n="):
        open_queue(optuna(), None, make, {}, Storage(tmp_path))


def test_a_point_whose_condition_holds_no_more_is_refused(tmp_path):
    content = json.dumps({"schema_version": 1, "points": [{"kind": "a", "b": 2, "deep": 0.5, "x": 0.5}]})
    Storage(tmp_path).write_bytes("asked.json", content.encode())
    with pytest.raises(CheckpointError, match=r"^space\.b: a point on record is none of the space"):
        open_queue(optuna(CONDITIONAL), None, make, {}, Storage(tmp_path))
