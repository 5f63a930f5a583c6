from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from maskray.data.storage import Storage
from maskray.errors import StorageError
from maskray.evaluation.paired import Gain
from maskray.publish.decisions import (
    Comparison,
    Decision,
    EvaluationSet,
    Records,
    champions,
    packed,
    unpacked,
    yardstick,
)

SET = EvaluationSet("d16e57", 3, 10, "linear probe")
ROWS = np.array([True, False, True])
COMPARED = Comparison(SET, 2 / 3, 1 / 3, Gain(1 / 3, 0.0, 2 / 3), {"min_gain": 0.0}, 0, {"2": packed(ROWS)})


def decision(number: int, kind: str, version: str, before: str | None, after: str | None) -> Decision:
    return Decision(number, "digits", "champion", kind, version, before, after, "because", COMPARED)  # type: ignore[arg-type]


FIRST = decision(1, "promoted", "1", None, "1")
SECOND = decision(2, "promoted", "2", "1", "2")


def test_a_decision_comes_back_as_it_was(place: str):
    records = Records(Storage(place), "digits of/ours", "champion")
    assert records.load() == []
    assert records.append(FIRST)
    assert records.append(replace(SECOND, comparison=None))
    assert Records(Storage(place), "digits of/ours", "champion").load() == [FIRST, replace(SECOND, comparison=None)]
    assert Records(Storage(place), "digits of/ours", "staging").load() == []


def test_a_number_is_given_once(place: str):
    """Eight at once want each number: the one who has it knows so, and the rest know that they have not."""
    records = Records(Storage(place), "digits", "champion")
    for number in (1, 2, 3):
        candidates = [replace(FIRST, number=number, version=str(v), token=str(v)) for v in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(records.append, candidates))
        assert sum(won) == 1
        assert records.load()[-1] == candidates[won.index(True)]
    assert [d.number for d in records.load()] == [1, 2, 3]


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{}", b'{"schema_version": 99}', b'{"schema_version": 1}'])
def test_a_record_that_is_missing_or_damaged_is_named(tmp_path, content: bytes | None):
    for each in (FIRST, SECOND):
        Records(Storage(tmp_path), "digits", "champion").append(each)
    first = tmp_path / "digits@champion" / "000001.json"
    if content is None:
        first.unlink()
    else:
        first.write_bytes(content)
    with pytest.raises(StorageError, match=r"digits@champion/000001\.json.*put the file back"):
        Records(Storage(tmp_path), "digits", "champion").load()


def test_champions_are_followed_back():
    back = decision(4, "rolled_back", "1", "2", "1")
    history = [FIRST, SECOND, decision(3, "refused", "3", "2", "2"), back]
    assert champions([]) == []
    assert champions(history[:3]) == ["1", "2"]
    assert champions(history) == ["1"]
    again = decision(5, "promoted", "2", "1", "2")
    assert champions([*history, again]) == ["1", "2"]
    by_hand = decision(1, "promoted", "8", "7", "8")
    assert champions([by_hand]) == ["7", "8"]


def test_the_yardstick_is_that_of_the_newest_comparison():
    assert yardstick([]) is None
    other = replace(COMPARED, seed=7)
    history = [FIRST, replace(SECOND, comparison=other), replace(FIRST, number=3, comparison=None)]
    assert yardstick(history) == other


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 1000])
def test_rows_come_back_from_their_bits(num_rows: int):
    rows = np.random.default_rng(num_rows).random(num_rows) < 0.5
    np.testing.assert_array_equal(unpacked(packed(rows), num_rows), rows)
    assert replace(COMPARED, correct={"2": packed(ROWS)}).rows_of("1") is None
