"""Who goes on at a rung: as Ray Tune would have it, and remembered."""

import json
import logging
import math
import tempfile
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import MedianStoppingRule
from ray.tune.schedulers.async_hyperband import _Bracket

from maskray.config.sweep import Asha, Median, NoStopping
from maskray.data.storage import Storage
from maskray.errors import CheckpointError, ConfigError, StorageError
from maskray.sweeps.record import Trial
from maskray.sweeps.stopping import Ladder, Rung, refuse_idle_rungs, rungs

NAN = math.nan


def trial(steps=100, flops_per_step=1e9) -> Trial:
    return Trial("k", {}, 0, steps, flops_per_step / 64, flops_per_step, 0, 0)


# --------------------------------------------------------------------------------------------------------------- rungs


@pytest.mark.parametrize(
    ("stopping", "steps", "expected"),
    [
        (NoStopping(), 100, []),
        (Asha(first=5e9), 100, [(0, 5e9, 5), (1, 15e9, 15), (2, 45e9, 45)]),
        (Asha(first=5, unit="steps"), 45, [(0, 5, 5), (1, 15, 15)]),  # the end is none
        (Asha(first=5, unit="steps"), 46, [(0, 5, 5), (1, 15, 15), (2, 45, 45)]),
        (Asha(first=10, unit="steps", reduction=1.5), 30, [(0, 10, 10), (1, 15, 15), (2, 22.5, 22)]),
        (Median(first=30e9), 90, [(0, 30e9, 30), (1, 60e9, 60)]),
        (Median(first=30, unit="steps"), 91, [(0, 30, 30), (1, 60, 60), (2, 90, 90)]),
        (Median(first=100e9), 100, []),
        (Asha(first=1e8, reduction=2), 5, [(3, 8e8, 1), (4, 16e8, 2), (5, 32e8, 3)]),  # 0.1, 0.2, 0.4, 0.8, 1.6, 3.2
        (Asha(first=1e9, reduction=1.25), 4, [(1, 1.25e9, 1), (4, 2.44140625e9, 2), (5, 3.0517578125e9, 3)]),
    ],
)
def test_rungs_of_a_trial(stopping, steps, expected):
    assert rungs(stopping, trial(steps)) == [Rung(*each) for each in expected]


def test_trials_that_cost_differently_have_spent_the_same_at_a_rung():
    shallow, deep = trial(1000, 1.1e9), trial(310, 3.5e9)
    for one, other in zip(rungs(Asha(first=20e9), shallow), rungs(Asha(first=20e9), deep), strict=True):
        assert (one.index, one.amount) == (other.index, other.amount)
        assert abs(one.step * 1.1e9 - one.amount) <= 1.1e9 / 2
        assert abs(other.step * 3.5e9 - other.amount) <= 3.5e9 / 2


FIRST, UNIT = st.floats(0.01, 50), st.sampled_from(["flops", "steps"])


@given(
    stopping=st.one_of(
        st.builds(Asha, first=FIRST, reduction=st.floats(1.01, 6), unit=UNIT),
        st.builds(Median, first=FIRST, unit=UNIT),
    ),
    steps=st.integers(1, 200),
    per_step=st.floats(0.5, 20),
)  # fmt: skip
def test_rungs_are_strictly_inside_and_of_those_at_one_step_the_last(stopping, steps, per_step):
    def amount(k):
        return stopping.first * (stopping.reduction**k if isinstance(stopping, Asha) else k + 1)

    expected, k = {}, 0
    while (step := round(amount(k) / (per_step if stopping.unit == "flops" else 1))) < steps:
        expected[step] = Rung(k, amount(k), step)
        k += 1
    assert rungs(stopping, trial(steps, per_step)) == [rung for step, rung in expected.items() if step > 0]


def test_a_unit_that_was_not_meant_takes_no_time():
    found = rungs(Median(first=100), trial(20, 1e9))
    assert [rung.step for rung in found] == list(range(1, 20))
    assert found[0].amount == 1.5e9 - 100  # the last below a step and a half


@pytest.mark.parametrize(
    ("stopping", "message"),
    [
        (Asha(first=100), r"^stopping\.first: the first rung is before a trial's first step\. Found: 100 flops\. "
                          r"Allowed: from 3e\+09 flops, a step, to below 1e\+11.* another stopping\.unit than flops"),
        (Asha(first=0.5, unit="steps"), r"before a trial's first step\. Found: 0\.5 steps\. Allowed: from 1 steps"),
        (Median(first=1e11), r"^stopping\.first: no trial is ever judged.*Found: 1e\+11 flops"),
        (Asha(first=100, unit="steps"), r"no trial is ever judged.*Found: 100 steps\. .* to below 100, a whole trial"),
        (Asha(first=99.8, unit="steps"), r"no trial is ever judged"),  # which is at 100 steps
    ],
)  # fmt: skip
def test_rungs_at_which_nobody_is_judged_are_refused(stopping, message):
    with pytest.raises(ConfigError, match=message):
        refuse_idle_rungs(stopping, [trial(100, 1e9), trial(30, 3e9)])


def test_other_rungs_are_taken():
    for stopping in (NoStopping(), Asha(first=3e9), Median(first=50, unit="steps")):
        refuse_idle_rungs(stopping, [trial(100, 1e9), trial(30, 3e9)])  # steps: the short one is never judged
    refuse_idle_rungs(Asha(first=1), [])


# ---------------------------------------------------------------------------------------------------------- Ray Tune's


class TuneTrial(NamedTuple):
    trial_id: str


class NothingWaits:
    """What a scheduler asks of the controller: whether trials are waiting for a place."""

    def get_live_trials(self) -> list[TuneTrial]:
        return []


VALUES = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, -0.0, 0.1, 0.2, 0.3, 0.5]))
DIRECTIONS = st.sampled_from(["max", "min"])


@settings(deadline=None)
@given(
    reports=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 3), VALUES, st.booleans()), max_size=40, unique_by=lambda r: r[:2]
    ),
    reduction=st.sampled_from([1.5, 2, 2.5, 3, 4, 7]),
    direction=DIRECTIONS,
)
def test_asha_decides_as_tunes_does_for_any_order_of_reports(reports, reduction, direction):
    stopping = Asha(first=7e9, reduction=reduction)
    bracket = _Bracket(7e9, 7e9 * reduction**3 * 1.1, reduction, 0, stop_last_trials=False)
    ladder = rungs(stopping, trial(10**12, 1e3))[:4]
    assert [rung.amount for rung in ladder] == [milestone for milestone, _ in reversed(bracket._rungs)]
    sign = 1 if direction == "max" else -1
    with tempfile.TemporaryDirectory() as folder:
        ours = Ladder(stopping, direction, Storage(folder))
        for number, rung, value, reopen in reports:
            if reopen:
                ours = Ladder(stopping, direction, Storage(folder))
            theirs = bracket.on_result(TuneTrial(str(number)), ladder[rung].amount, sign * value)
            assert ours.goes_on(str(number), rung, value) == (theirs == "CONTINUE")


@settings(deadline=None)
@given(
    reports=st.lists(st.tuples(st.integers(0, 6), VALUES, st.booleans()), max_size=40),
    min_trials=st.integers(1, 4),
    direction=DIRECTIONS,
)
def test_the_median_rule_decides_as_tunes_does_where_nothing_waits(reports, min_trials, direction):
    stopping = Median(first=5, unit="steps", min_trials=min_trials)
    theirs = MedianStoppingRule("step", "value", direction, grace_period=5, min_samples_required=min_trials)
    at, stopped = [0] * 7, set()
    with tempfile.TemporaryDirectory() as folder:
        ours = Ladder(stopping, direction, Storage(folder))
        for number, value, reopen in reports:
            if number in stopped:
                continue
            if reopen:
                ours = Ladder(stopping, direction, Storage(folder))
            result = {"step": 5 * (at[number] + 1), "value": value}
            goes_on = theirs.on_trial_result(NothingWaits(), TuneTrial(str(number)), result) == "CONTINUE"
            assert ours.goes_on(str(number), at[number], value) == goes_on
            at[number] += 1
            stopped |= set() if goes_on else {number}


# ------------------------------------------------------------------------------------------------------------ by hand


def answers(stopping, direction, values, folder, rung=0):
    ladder = Ladder(stopping, direction, Storage(folder))
    return [ladder.goes_on(f"t{i}", rung, value) for i, value in enumerate(values)]


def test_asha_lets_the_better_go_on(tmp_path):
    values = [0.5, 0.4, 0.6, 0.6, 0.55]  # the third percentile of three: of 0.5; 0.4 0.5; 0.4 0.5 0.6; 0.4 0.5 0.6 0.6
    assert answers(Asha(first=1), "max", values, tmp_path / "max") == [True, False, True, True, False]
    assert answers(Asha(first=1), "min", values, tmp_path / "min") == [True, True, False, False, False]


def test_the_median_rule_waits_for_enough_others(tmp_path):
    values = [0.5, 0.7, 0.1, 0.1, 0.5, 0.2]
    assert answers(Median(first=1), "max", values, tmp_path) == [True, True, True, False, True, False]


def test_the_median_rule_takes_the_best_of_one_and_the_means_of_the_others(tmp_path):
    ladder = Ladder(Median(first=1, min_trials=1), "max", Storage(tmp_path))
    for rung, value in enumerate([0.2, 0.4, 0.9]):
        assert ladder.goes_on("a", rung, value)
    assert ladder.goes_on("b", 0, 0.35)
    assert ladder.goes_on("b", 1, 0.0)  # 0.35 was its best; the mean of the other up to there is 0.3
    assert not ladder.goes_on("b", 2, 0.45)  # 0.5


def test_of_the_median_rule_those_that_came_less_far_are_no_others(tmp_path):
    ladder = Ladder(Median(first=1, min_trials=1), "max", Storage(tmp_path))
    assert ladder.goes_on("a", 0, 0.9)
    assert ladder.goes_on("b", 1, 0.1)
    assert not ladder.goes_on("c", 0, 0.4)  # 0.9 alone: of b nothing is known up to there


def test_of_the_median_rule_what_a_trial_had_later_is_no_matter(tmp_path):
    ladder = Ladder(Median(first=1, min_trials=1), "max", Storage(tmp_path / "best"))
    assert ladder.goes_on("a", 0, 0.5)
    assert ladder.goes_on("b", 1, 0.9)
    assert not ladder.goes_on("b", 0, 0.1)
    ladder = Ladder(Median(first=1, min_trials=2), "max", Storage(tmp_path / "others"))
    for key, rung, value in (("a", 0, 0.5), ("a", 2, 0.5), ("b", 0, 0.4), ("b", 2, 0.4)):
        assert ladder.goes_on(key, rung, value)
    assert ladder.goes_on("b", 1, 0.0)  # it is none of the others


def test_without_stopping_all_go_on(tmp_path):
    assert answers(NoStopping(), "max", [3.0, 2.0, 1.0, NAN], tmp_path) == [True] * 4


@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("stopping", [Asha(first=1), Median(first=1, min_trials=1)])
def test_what_is_no_number_is_worse_than_all_numbers(tmp_path, wrong, direction, stopping):
    assert answers(stopping, direction, [0.5, wrong, 0.5], tmp_path / "a") == [True, False, True]
    assert answers(stopping, direction, [wrong, 0.5, wrong, 0.5], tmp_path / "b") == [True, True, False, True]
    assert answers(stopping, direction, [wrong, wrong, wrong, 0.5], tmp_path / "c") == [True] * 4


def test_numbers_are_compared_among_those_that_are_none(tmp_path):
    values = [NAN, 0.1, 0.2, 0.3, 0.4, 0.5, 0.2]  # two thirds of the way: 0.3 and a bit
    assert answers(Asha(first=1), "max", values, tmp_path)[-1] is False
    assert [json.loads((tmp_path / "rungs" / f"t{i}.json").read_text())["entries"][0]["value"] for i in (0, 1)] == [
        None,
        0.1,
    ]


# -------------------------------------------------------------------------------------------------------------- record


def test_an_entry_is_in_a_file_of_its_own(place):
    ladder = Ladder(Asha(first=1), "min", Storage(place))
    assert ladder.goes_on("a", 0, 0.5)
    assert ladder.goes_on("a", 2, 0.25)
    assert not ladder.goes_on("b", 0, 0.75)
    assert Storage(place).list_names("rungs") == ["a.json", "b.json"]
    assert json.loads(Storage(place).read_bytes("rungs/a.json")) == {
        "schema_version": 1,
        "entries": [{"rung": 0, "value": 0.5, "goes_on": True}, {"rung": 2, "value": 0.25, "goes_on": True}],
    }
    again = Ladder(Asha(first=1), "min", Storage(place))
    assert not again.goes_on("c", 0, 0.6)
    assert again.goes_on("d", 2, 0.2)
    assert not again.goes_on("e", 2, 0.3)


def test_a_trial_that_comes_again_gets_the_same_answer(tmp_path, caplog):
    ladder = Ladder(Asha(first=1), "max", Storage(tmp_path))
    assert ladder.goes_on("first", 0, 0.1)
    assert not ladder.goes_on("bad", 0, 0.0)
    before = (tmp_path / "rungs" / "first.json").read_bytes()
    for better in range(9):
        ladder.goes_on(f"t{better}", 0, 0.5)
    for each in (ladder, Ladder(Asha(first=1), "max", Storage(tmp_path))):
        assert each.goes_on("first", 0, 0.1)  # though it would be stopped now
        assert not each.goes_on("bad", 0, 0.0)
    assert (tmp_path / "rungs" / "first.json").read_bytes() == before
    assert caplog.records == []


def test_the_first_value_counts(tmp_path, caplog):
    ladder = Ladder(Asha(first=1), "min", Storage(tmp_path))
    ladder.goes_on("a", 0, 0.5)
    with caplog.at_level(logging.WARNING):
        assert ladder.goes_on("a", 0, 0.25)
    assert "trial a comes to rung 0 again, with 0.25 where it had 0.5" in caplog.text
    assert ladder.goes_on("b", 0, 0.4)  # is above 0.25, and below 0.5


def test_there_is_no_answer_without_an_entry(tmp_path):
    ladder = Ladder(Asha(first=1), "max", Storage(tmp_path))
    ladder.goes_on("a", 0, 0.5)
    (tmp_path / "rungs").rename(tmp_path / "away")
    (tmp_path / "rungs").touch()  # a file, where the folder was
    with pytest.raises(StorageError, match=r"rungs/b\.json"):
        ladder.goes_on("b", 0, 0.9)
    (tmp_path / "rungs").unlink()
    (tmp_path / "away").rename(tmp_path / "rungs")
    assert ladder.goes_on("c", 0, 0.6)  # it would not be, beside 0.9
    assert Storage(tmp_path).list_names("rungs") == ["a.json", "c.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"schema_version": 1, "entries": [{"rung": 0, "va',
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"schema_version": 2, "entries": []}',
        b'{"schema_version": 1, "entries": [{"rung": 0, "value": 0.5}]}',
        b'{"schema_version": 1, "entries": [{"rung": "x", "value": 0.5, "goes_on": true}]}',
        b'{"schema_version": 1, "entries": [{"rung": 0, "value": "x", "goes_on": true}]}',
        b'{"schema_version": 1, "entries": [{"rung": 0, "value": 0.5, "goes_on": 1}]}',
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    Storage(tmp_path).write_bytes("rungs/abc.json", content)
    with pytest.raises(CheckpointError, match=r"cannot be read\. Found: .*/rungs/abc\.json \(.*What to do: restore"):
        Ladder(Asha(first=1), "max", Storage(tmp_path))


@pytest.mark.parametrize("stopping", [Asha(first=1), Median(first=1, min_trials=1)])
def test_what_says_nothing_is_passed_over(tmp_path, stopping):
    Storage(tmp_path).write_bytes("rungs/.tmp-0123-abc.json", b"{")  # as a kill leaves it
    Storage(tmp_path).write_bytes("rungs/none.json", b'{"schema_version": 1, "entries": []}')
    assert answers(stopping, "max", [0.5, 0.4], tmp_path) == [True, False]
