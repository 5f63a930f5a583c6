"""Any number of workers up to the groups of a step: the same views with the same weights, and as much work for each."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maskray.config.models import ObjectiveConfig, RandomMask
from maskray.config.schema import WholeImage
from maskray.data.plan import share, shared_rounds
from maskray.data.spec import StreamSpec
from maskray.data.stream import Unit, steps


def spec(k, group_rows, views, total):
    return StreamSpec(
        path="nowhere",
        version="none",
        seed=0,
        image_size=(2, 2),
        channels=1,
        crop=WholeImage(),
        flip_probability=0.0,
        views_per_image=views,
        mask=RandomMask(),
        objective=ObjectiveConfig(),
        grid_HW=(2, 2),
        num_row_groups=5,
        group_rows=group_rows,
        groups_per_step=k,
        total_steps=total,
    )


def unit(position, n):
    """A row group whose every third view has no image; its keys say position and view."""
    weights = (np.arange(n) + position) % 3 != 0
    return Unit(
        position,
        np.full((n, 1, 2, 2), position % 256, dtype=np.uint8),
        np.ones((n, 2, 2), dtype=np.bool_),
        weights.astype(np.float32),
        [f"{position}/{i}" for i in range(n)],
    )


def walked(stream, world, start, micro_batch):
    """Steps of each rank."""
    return [
        list(
            steps(
                (
                    unit(p, stream.views_per_group)
                    for t in range(start, stream.total_steps)
                    for p in share(t, stream.groups_per_step, rank, world)
                ),
                stream,
                rank,
                world,
                start,
                micro_batch,
            )
        )
        for rank in range(world)
    ]


@st.composite
def cases(draw):
    k, group_rows, views = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    total = draw(st.integers(1, 4))
    n = group_rows * views
    sizes = [None, *(d for d in range(1, n + 1) if n % d == 0), *(n * i for i in range(2, k + 2))]
    stream = spec(k, group_rows, views, total)
    return stream, draw(st.integers(1, k)), draw(st.integers(0, total - 1)), draw(st.sampled_from(sizes))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_number_of_workers_trains_on_the_same(case):
    stream, world, start, micro_batch = case
    ranks = walked(stream, world, start, micro_batch)
    k, n = stream.groups_per_step, stream.views_per_group
    for number in range(start, stream.total_steps):
        mine = [rank[number - start] for rank in ranks]
        assert {step.number for step in mine} == {number}
        # Each position once, on one worker, whatever the start.
        assert sorted(p for step in mine for p in step.positions) == list(range(number * k, (number + 1) * k))
        # What counts is what one worker would count.
        counted = Counter(
            (key, float(w))
            for step in mine
            for b in step.batches
            for key, w in zip(b.keys, b.weights_B, strict=True)
            if w
        )
        wanted = Counter(
            (key, float(w))
            for p in range(number * k, (number + 1) * k)
            for key, w in zip(unit(p, n).keys, unit(p, n).weights_N, strict=True)
            if w
        )
        assert counted == wanted
        # As many passes of the same size on each: nobody waits for another's gradients for ever.
        assert len({tuple(len(b.keys) for b in step.batches) for step in mine}) == 1
        assert sum(len(b.keys) for b in mine[0].batches) == shared_rounds(k, world) * n


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.data())
def test_the_split_of_a_step_does_not_hang_on_where_a_run_was_resumed(step, k, data):
    world = data.draw(st.integers(1, k))
    shares = [share(step, k, rank, world) for rank in range(world)]
    assert sorted(p for s in shares for p in s) == list(range(step * k, (step + 1) * k))
    assert all(p % world == rank for rank, s in enumerate(shares) for p in s)
    assert max(map(len, shares)) == shared_rounds(k, world)
    assert min(map(len, shares)) >= max(1, shared_rounds(k, world) - 1)
