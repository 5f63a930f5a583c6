"""Which trial is next: all of a list once, and what Optuna asks for by what it was told."""

import json
import logging
from collections import Counter
from statistics import fmean

import pytest
from optuna.trial import TrialState

from maskray.config.load import parse
from maskray.config.sweep import SweepConfig
from maskray.data.storage import Storage
from maskray.errors import ConfigError
from maskray.sweeps.search import open_queue
from maskray.sweeps.space import Space
from sweep_queues import CONDITIONAL, SPACE, UNIFORM, by_key, drain, end, make, optuna, points_of, quality, sweep

# ---------------------------------------------------------------------------------------------------------------- list

GRID = [{"x": x, "n": n} for x in (1, 2) for n in (3, 4)]


def listed(tmp_path, points=GRID, results=(), seeds=(5, 6)):
    config = sweep({"x": [1, 2], "n": [3, 4]}, seeds)
    return open_queue(config, points, make, by_key(results), Storage(tmp_path))


def test_one_seed_sees_all_of_the_space_before_the_next(tmp_path):
    found = drain(listed(tmp_path), lambda _: 0.5)
    assert [(r.trial.point, r.trial.seed) for r in found] == [(p, s) for s in (5, 6) for p in GRID]


def test_many_may_run_at_once_and_all_are_given_out_once(tmp_path):
    queue = listed(tmp_path)
    assert not queue.is_done
    trials = [queue.next() for _ in range(8)]
    assert len({trial.key for trial in trials}) == 8
    assert queue.is_done
    assert queue.next() is None
    queue.tell(end(trials[0]))
    assert queue.next() is None


def test_of_a_resumed_list_those_that_failed_are_tried_again(tmp_path):
    finished, pruned, failed = (make(GRID[i], 5) for i in range(3))
    results = [end(finished), end(pruned, status="pruned", steps=30), end(failed, None, "failed", 3)]
    found = drain(listed(tmp_path, results=results), lambda _: 0.5)
    assert [(r.trial.point, r.trial.seed) for r in found] == [(p, 5) for p in GRID[2:]] + [(p, 6) for p in GRID]


def test_a_list_that_is_on_record_is_done_at_once(tmp_path):
    queue = listed(tmp_path, results=[end(make(p, s)) for p in GRID for s in (5, 6)])
    assert queue.is_done
    assert queue.next() is None


def test_points_that_are_the_same_run_are_one(tmp_path):
    found = drain(listed(tmp_path, [*GRID, dict(GRID[0])]), lambda _: 0.5)
    assert Counter(r.trial.key for r in found).most_common(1)[0][1] == 1
    assert len(found) == 8


def test_of_a_list_a_point_that_cannot_be_run_is_an_error_before_anything_starts(tmp_path):
    def refuse(point, seed):
        if point["n"] == 4:
            raise ConfigError("no such run", key="n", found=4)
        return make(point, seed)

    with pytest.raises(ConfigError, match="no such run"):
        open_queue(sweep({"n": [3, 4]}), GRID, refuse, {}, Storage(tmp_path))


# -------------------------------------------------------------------------------------------------------------- Optuna


def test_each_kind_of_axis_gives_its_values(tmp_path):
    values = ["a", 1, 1.0, True, None, [1, 2], {"kind": "whole", "size": [1, 2]}]
    space = {**SPACE, "any": {"kind": "choice", "values": values}}
    points = points_of(drain(open_queue(optuna(space, 60, search={"startup": 60}), None, make, {}, Storage(tmp_path))))
    assert len(points) == 60
    for point in points:
        assert list(point) == list(space)
        assert 0 <= point["x"] <= 1
        assert 1e-4 <= point["lr"] <= 1
        assert (type(point["x"]), type(point["lr"]), type(point["n"])) == (float, float, int)
    assert {point["n"] for point in points} >= {1, 8}
    assert {json.dumps(point["any"]) for point in points} == {json.dumps(value) for value in values}
    assert 20 < sum(point["lr"] < 1e-2 for point in points) < 40  # half of what is drawn


def test_an_axis_is_there_where_its_condition_holds(tmp_path):
    points = points_of(drain(open_queue(optuna(CONDITIONAL, 40), None, make, {}, Storage(tmp_path))))
    for point in points:
        assert list(point) == [key for key in CONDITIONAL if key in point]
        expected = {"kind", "x"} | ({"b"} if point["kind"] == "b" else set())
        assert set(point) == expected | ({"deep"} if point.get("b") in (2, 3) else set())
    assert {len(point) for point in points} == {2, 3, 4}


def test_a_condition_that_asks_for_true_does_not_hold_at_one(tmp_path):
    space = {"switch": {"kind": "choice", "values": [1, True]}, "x": {**UNIFORM, "when": {"switch": True}}}
    queue = open_queue(optuna(space, 12), None, make, {}, Storage(tmp_path))
    points = points_of(drain(queue, lambda _: 0.5))
    assert {(str(point["switch"]), "x" in point) for point in points} == {("1", False), ("True", True)}


def test_seeds_of_a_point_are_given_before_the_next_is_asked_for(tmp_path):
    queue = open_queue(optuna(points=3, seeds=(4, 7)), None, make, {}, Storage(tmp_path))
    trials = [queue.next() for _ in range(6)]
    assert [trial.seed for trial in trials] == [4, 7] * 3
    assert [trials[i].point for i in (0, 2, 4)] == [trials[i].point for i in (1, 3, 5)]
    assert queue.is_done
    assert queue.next() is None


def test_it_goes_where_it_is_better(tmp_path):
    found = drain(open_queue(optuna(points=60), None, make, {}, Storage(tmp_path)))
    first, last = ([quality(result.trial) for result in part] for part in (found[:10], found[-20:]))
    assert fmean(last) > fmean(first) + 0.2
    assert sum(point["kind"] == "b" for point in points_of(found[-20:])) > 15


def test_it_goes_where_there_is_less_of_what_is_to_be_less(tmp_path):
    config = optuna(points=60, objective={"metric": "pretrain/loss", "direction": "min", "forced": True})
    found = drain(open_queue(config, None, make, {}, Storage(tmp_path)), lambda trial: -quality(trial))
    assert fmean(quality(r.trial) for r in found[-20:]) > fmean(quality(r.trial) for r in found[:10]) + 0.2


def test_several_at_once_are_at_different_places(tmp_path):
    ranges = []
    for seed in range(8):
        queue = open_queue(
            optuna(CONDITIONAL, 40, search={"seed": seed}), None, make, {}, Storage(tmp_path / str(seed))
        )
        drain(queue, most=25)
        xs = [queue.next().point["x"] for _ in range(8)]
        ranges.append(max(xs) - min(xs))
    assert fmean(ranges) > 0.55  # 0.38 where those that run are not looked at


def test_another_seed_asks_for_others_and_the_same_for_the_same(tmp_path):
    one, same, other = (
        points_of(drain(open_queue(optuna(points=12, search={"seed": seed}), None, make, {}, Storage(tmp_path / name))))
        for name, seed in (("a", 2**62 + 1), ("b", 2**62 + 1), ("c", 1))
    )  # fmt: skip
    assert one == same
    assert not any(point in other for point in one)


# ------------------------------------------------------------------------------------------------ Optuna: what is told


def told(tmp_path, results, stopping=None):
    """What Optuna knows of a point whose seeds ended so: each (status, value) or (status, value, steps)."""
    config = optuna(points=1, seeds=range(len(results)), stopping=stopping or {"kind": "none"})
    queue = open_queue(config, None, make, {}, Storage(tmp_path))
    for status, value, *steps in results:
        trial = queue.next()
        assert queue._study.trials[0].state == TrialState.RUNNING
        queue.tell(end(trial, value, status, *steps))
    return queue._study.trials[0]


def test_a_point_is_told_the_mean_over_its_seeds(tmp_path):
    known = told(tmp_path, [("finished", 0.25), ("finished", 0.5), ("finished", 0.75)])
    assert (known.state, known.value) == (TrialState.COMPLETE, 0.5)


def test_those_that_failed_are_left_out(tmp_path):
    known = told(tmp_path / "a", [("finished", 0.25), ("failed", None), ("finished", 0.75), ("failed", 0.9)])
    assert (known.state, known.value) == (TrialState.COMPLETE, 0.5)
    known = told(tmp_path / "b", [("finished", float("nan")), ("finished", 0.75)])
    assert (known.state, known.value) == (TrialState.COMPLETE, 0.75)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_where_nothing_is_known_it_failed(tmp_path, value):
    known = told(tmp_path, [("failed", None), ("finished", value)])
    assert (known.state, known.values) == (TrialState.FAIL, None)


ASHA = {"kind": "asha", "first": 10e9, "reduction": 3}  # at 10 and 30 of 90 steps


def test_where_all_were_pruned_it_is_told_at_which_rungs(tmp_path):
    known = told(tmp_path, [("pruned", 0.5, 30), ("pruned", 0.25, 10), ("pruned", 0.75, 30), ("failed", None, 2)], ASHA)
    assert known.state == TrialState.PRUNED
    assert known.intermediate_values == {0: 0.25, 1: 0.625}


def test_one_that_was_pruned_counts_beside_those_that_were_not(tmp_path):
    known = told(tmp_path, [("finished", 0.75), ("pruned", 0.25, 10)], ASHA)
    assert (known.state, known.value) == (TrialState.COMPLETE, 0.5)


def test_what_is_told_twice_counts_once(tmp_path):
    queue = open_queue(optuna(points=2, seeds=(0, 1)), None, make, {}, Storage(tmp_path))
    first, second = queue.next(), queue.next()
    for result in (end(first, 0.25), end(first, 0.9), end(second, 0.75), end(second, 0.9)):
        queue.tell(result)
    assert queue._study.trials[0].value == 0.5


# ---------------------------------------------------------------------------------------------------- Optuna: refusals


def refusing(refused):
    def refuse(point, seed):
        if refused(point):
            raise ConfigError("no such run", key="n", found=point["n"])
        return make(point, seed)

    return refuse


def test_a_point_that_cannot_be_run_is_passed_over(tmp_path, caplog):
    queue = open_queue(optuna(points=20), None, refusing(lambda p: p["n"] % 2), {}, Storage(tmp_path))
    with caplog.at_level(logging.WARNING):
        found = drain(queue)
    assert len(found) == 20
    assert all(result.trial.point["n"] % 2 == 0 for result in found)
    failed = [trial for trial in queue._study.trials if trial.state == TrialState.FAIL]
    assert len(failed) == len(caplog.records) > 3
    assert "passed over, the 1. in a row: n: no such run. Found:" in caplog.text


def test_real_runs_are_asked_for_and_those_that_cannot_be_are_passed_over(tmp_path, tiny, caplog):
    space = {
        "mask.ratio": {"kind": "uniform", "low": 0.3, "high": 0.9},
        "optim.base_lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
        "model.heads": {"kind": "choice", "values": [2, 3, 4]},  # of a width of 16
        "data.crop": {"kind": "choice", "values": [{"kind": "whole"}, {"kind": "random_resized", "scale": [0.5, 1]}]},
        "model.decoder.depth": {"kind": "randint", "low": 1, "high": 3, "when": {"model.heads": [2, 4]}},
    }
    config = parse(SweepConfig, optuna(space, 8, budget={"flops": 1e9}).model_dump() | {"base": tiny().model_dump()})
    real = Space(config)
    with caplog.at_level(logging.WARNING):
        found = drain(open_queue(config, real.points(), real.trial, {}, Storage(tmp_path / "s")), lambda _: 0.5)
    assert len({result.trial.key for result in found}) == 8
    assert {point["model.heads"] for point in points_of(found)} == {2, 4}
    assert "passed over, the 1. in a row: space: at mask.ratio=" in caplog.text
    for result in found:
        assert abs(result.trial.flops - 1e9) <= result.trial.flops_per_step / 2
        run, point = real.run_config(result.trial), result.trial.point
        assert run.mask.ratio == (point["mask.ratio"],)
        assert run.data.crop.kind == point["data.crop"]["kind"]
        assert run.model.decoder.depth == point["model.decoder.depth"]


def test_fifty_of_them_in_a_row_are_an_error(tmp_path):
    asked = []
    queue = open_queue(optuna(), None, refusing(lambda p: asked.append(p) or True), {}, Storage(tmp_path))
    with pytest.raises(ConfigError, match=r"^n: no such run"):
        queue.next()
    assert len(asked) == 50
    assert not Storage(tmp_path).exists("asked.json")


def test_a_space_that_has_no_more_points_ends_the_search(tmp_path, caplog):
    space = {"kind": {"kind": "choice", "values": ["a", "b", "a"]}, "n": {"kind": "randint", "low": 1, "high": 3}}
    queue = open_queue(optuna(space, 10), None, make, {}, Storage(tmp_path))
    with caplog.at_level(logging.WARNING):
        found = drain(queue, lambda trial: trial.point["n"])
    assert sorted((p["kind"], p["n"]) for p in points_of(found)) == [(k, n) for k in "ab" for n in (1, 2, 3)]
    assert queue.is_done
    assert caplog.messages == ["the search ends after 6 of 10 points: none of 200 more was another one"]


def test_it_says_nothing_of_its_own(tmp_path, capfd):
    drain(open_queue(optuna(CONDITIONAL, 12), None, make, {}, Storage(tmp_path)))
    assert capfd.readouterr() == ("", "")
