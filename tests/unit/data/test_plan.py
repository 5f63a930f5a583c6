"""The plan: a permutation a pass, found anywhere in no memory."""

import tracemalloc

import numpy as np
import pytest

from maskray.data.plan import Plan, permute, share, shared_rounds
from maskray.draws import Stream

AWKWARD = [1, 2, 3, 4, 5, 16, 255, 256, 257, 1009, 65_537]


@pytest.mark.parametrize("num_row_groups", AWKWARD)
@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_every_row_group_once_a_pass(num_row_groups, seed):
    positions = np.arange(3 * num_row_groups)
    passes, groups = Plan(seed, num_row_groups).locate_many(positions)
    np.testing.assert_array_equal(passes, positions // num_row_groups)
    for pass_ in range(3):
        np.testing.assert_array_equal(np.sort(groups[passes == pass_]), np.arange(num_row_groups))


@pytest.mark.parametrize("num_row_groups", [16, 1009, 65_537])
def test_two_passes_and_two_seeds_differ(num_row_groups):
    places = np.arange(num_row_groups)
    orders = [permute(places, num_row_groups, seed, pass_) for seed in (0, 1) for pass_ in (0, 1)]
    orders.append(permute(places, num_row_groups, 0, 0, Stream.INGEST))
    for i, one in enumerate(orders):
        for other in [*orders[:i], places]:
            assert (one == other).mean() < 0.3


@pytest.mark.parametrize("num_row_groups", [2, 3])
def test_small_datasets_are_shuffled_too(num_row_groups):
    orders = {tuple(permute(np.arange(num_row_groups), num_row_groups, 0, p).tolist()) for p in range(60)}
    assert len(orders) == {2: 2, 3: 6}[num_row_groups]


def test_any_place_is_equally_likely():
    size, passes = 16, 800
    first = [int(permute(np.array([0]), size, 3, pass_)[0]) for pass_ in range(passes)]
    counts = np.bincount(first, minlength=size)
    assert abs(counts - passes / size).max() < 5 * (passes / size) ** 0.5


def test_a_position_alone_is_the_same_as_among_others():
    plan = Plan(1, 1009)
    passes, groups = plan.locate_many(np.arange(5000))
    for position in (0, 1008, 1009, 3333, 4999):
        assert plan.locate(position) == (passes[position], groups[position])


def test_a_billion_images_take_no_memory():
    plan = Plan(0, 15_625_000)
    tracemalloc.start()
    plan.locate(0)
    plan.locate(15_625_000 * 7 + 12_345_678)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("groups_per_step", [5, 8, 12])
def test_workers_share_a_step_without_rest(world_size, groups_per_step):
    for step in range(7):
        shares = [share(step, groups_per_step, rank, world_size) for rank in range(world_size)]
        wanted = list(range(step * groups_per_step, (step + 1) * groups_per_step))
        assert sorted(p for s in shares for p in s) == wanted
        rounds = shared_rounds(groups_per_step, world_size)
        assert all(rounds - 1 <= len(s) <= rounds and s for s in shares)


@pytest.mark.parametrize(("world_size", "groups_per_step"), [(1000, 1024), (1024, 1024), (1024, 5000)])
def test_a_thousand_workers_share_a_late_step(world_size, groups_per_step):
    step = 10**7
    plan, dealt = Plan(0, 15_625_000), []
    for rank in range(world_size):
        mine = share(step, groups_per_step, rank, world_size)
        assert all(position % world_size == rank for position in mine)
        dealt += mine
    assert sorted(dealt) == list(range(step * groups_per_step, (step + 1) * groups_per_step))
    passes, groups = plan.locate_many(np.array(sorted(dealt)))
    assert len(set(zip(passes.tolist(), groups.tolist(), strict=True))) == groups_per_step, "no row group twice"
