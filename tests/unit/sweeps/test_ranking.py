"""Which point of a sweep is the best, and which may as well be."""

import numpy as np
import pytest

from maskray.sweeps.ranking import front, judged, ranked
from maskray.sweeps.sentences import alerts
from sweep_results import accuracy, grid, results_of, sweep_config

SPACE = {"mask.ratio": [0.5, 0.75], "model.decoder.depth": [1, 2, 4]}


def by(values, default=0.5):
    """Outcomes by (ratio, depth): the values of its seeds, or what its trials ended as."""

    def outcome(point, seed):
        found = values.get((point["mask.ratio"], point["model.decoder.depth"]), default)
        one = found[seed] if isinstance(found, list) else found
        return {"status": one, "steps": 100, "reason": "why"} if isinstance(one, str) else {"value": one}

    return outcome


def points_of(values, default=0.5, **config):
    made = sweep_config(SPACE, **config)
    points = ranked(made, results_of(grid(SPACE), range(3), by(values, default)))
    return points, judged(made, points)


def places(points):
    return [(one.point["mask.ratio"], one.point["model.decoder.depth"]) for one in points]


def test_the_best_mean_comes_first_and_equal_ones_by_their_cost():
    points, verdict = points_of({(0.75, 4): [0.8, 0.81, 0.79], (0.75, 1): [0.79, 0.8, 0.81]})
    # 0.5 everywhere else: cheaper is a smaller decoder, and fewer visible cells
    assert places(points) == [(0.75, 1), (0.75, 4), (0.5, 1), (0.75, 2), (0.5, 2), (0.5, 4)]
    assert verdict.best is points[0]
    assert verdict.others[0].behind == pytest.approx(0)
    assert [one.mean for one in points[:2]] == [pytest.approx(0.8)] * 2
    assert points[0].mean == points[1].mean  # though their values were added in another order


def test_a_point_of_which_more_seeds_ran_to_their_end_comes_before_a_better_one():
    points, verdict = points_of({(0.75, 4): [0.9, "pruned", "failed"], (0.75, 1): [0.9, 0.9, "failed"]}, default=0.5)
    assert places(points)[-2:] == [(0.75, 1), (0.75, 4)]
    lucky = verdict.others[-1]
    assert lucky.behind == pytest.approx(-0.4)
    assert lucky.is_noise is False  # as much better as another is worse
    said = alerts(sweep_config(SPACE), verdict)
    assert any("better mean over fewer seeds" in each and "0.75" in each for each in said)
    assert lucky.summary is not verdict.cheapest


def test_less_is_better_of_a_loss():
    objective = {"metric": "pretrain/loss", "direction": "min", "forced": True}
    points, verdict = points_of({(0.5, 2): [0.3, 0.31, 0.32]}, objective=objective)
    assert places(points)[0] == (0.5, 2)
    assert verdict.others[0].behind == pytest.approx(0.19)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_no_number_counts_for_nothing(value):
    points, verdict = points_of({(0.75, 4): [value] * 3})
    assert places(points)[-1] == (0.75, 4)
    assert points[-1].mean is None
    assert len(verdict.others) == 4


def test_where_nothing_ran_to_its_end_there_is_no_verdict():
    config = sweep_config(SPACE)
    for values in ("failed", "pruned"):
        points = ranked(config, results_of(grid(SPACE), range(3), by({}, values)))
        assert judged(config, points) is None
        assert len(points) == 6
    assert ranked(config, {}) == []
    assert judged(config, []) is None


def test_of_one_seed_it_is_not_known_what_is_noise():
    config = sweep_config(SPACE, seeds=[0])
    points = ranked(config, results_of(grid(SPACE), range(1), accuracy))
    verdict = judged(config, points)
    assert (verdict.noise, verdict.margin, verdict.cheapest) == (None, None, verdict.best)
    assert {each.is_noise for each in verdict.others} == {None}
    assert all(each.behind >= 0 for each in verdict.others)
    assert points[0].half is None


def test_of_one_point_there_is_nothing_to_compare():
    config = sweep_config({"mask.ratio": [0.75]})
    verdict = judged(config, ranked(config, results_of(grid({"mask.ratio": [0.75]}), range(3), accuracy)))
    assert (verdict.others, verdict.margin, verdict.cheapest) == ((), None, verdict.best)


def test_the_cheapest_is_the_cheapest_of_those_within_noise():
    noise = np.array([[0.0, 0.004, -0.004], [0.003, -0.004, 0.001], [-0.002, 0.001, 0.001]])
    values = {(0.75, 4): (0.8 + noise[0]).tolist(), (0.75, 1): (0.797 + noise[1]).tolist()}
    values |= {(0.5, 1): (0.7 + noise[2]).tolist(), (0.5, 4): (0.796 + noise[1]).tolist()}
    points, verdict = points_of(values, 0.2)
    assert places([verdict.best, verdict.cheapest]) == [(0.75, 4), (0.75, 1)]
    said = {place: each.is_noise for place, each in zip(places(points[1:]), verdict.others, strict=True)}
    assert said[(0.75, 1)]
    assert said[(0.5, 4)]
    assert not said[(0.5, 1)]


def test_a_wild_bad_point_makes_no_noise_of_the_others():
    quiet = {(r, d): [0.8 - 0.05 * d, 0.801 - 0.05 * d, 0.799 - 0.05 * d] for r in (0.5, 0.75) for d in (1, 2, 4)}
    _, calm = points_of(quiet)
    _, wild = points_of(quiet | {(0.5, 4): [0.1, 0.6, 0.2]})
    assert wild.margin == pytest.approx(calm.margin, rel=0.5)
    assert [each.is_noise for each in wild.others] == [True, False, False, False, False]


def test_values_that_are_alike_and_not_equal_are_two_points():
    space = {"model.class_token": [True, False], "probe.k": [1, 2]}
    config = sweep_config(space)
    results = results_of(grid({"a": [True, 1, 1.0, "1", [1], None]}), range(2), lambda *_: {"value": 0.5})
    assert len(ranked(config, results)) == 6


def test_between_equal_means_it_is_what_an_image_costs_and_not_what_a_step_does():
    space = {"optim.global_batch": [64, 128]}
    points = ranked(sweep_config(space), results_of(grid(space), range(2), lambda *_: {"value": 0.5}))
    assert places_of(points, "optim.global_batch") == [128, 64]  # our steps all cost the same
    assert points[1].cost.flops_per_image == pytest.approx(2 * points[0].cost.flops_per_image)


def places_of(points, key):
    return [one.point[key] for one in points]


def test_the_front_is_what_no_cheaper_one_is_as_good_as():
    costs, values = [1, 2, 2, 3, 3, 4], [0.5, 0.7, 0.7, 0.6, 0.8, 0.8]
    assert front(costs, values) == [0, 1, 4]
    assert front(costs, [-value for value in values], less_is_better=True) == [0, 1, 4]
    assert front([5], [0.1]) == [0]
