"""What every mask keeps: exact counts, equal bits in numpy and torch, drawn by key and by nothing else."""

import re
from typing import get_args

import numpy as np
import pytest
import torch

from maskray import draws, masking
from maskray.config.models import (
    BlockMask,
    GridMask,
    InverseBlockMask,
    Mask,
    ObjectiveConfig,
    PixelMask,
    RandomMask,
)
from maskray.errors import ConfigError

KINDS = get_args(get_args(Mask)[0])
EXACT = [kind for kind in KINDS if kind is not GridMask]
"""Those that can have any ratio."""
MASKS = {
    **{kind.model_fields["kind"].default: kind() for kind in KINDS},
    "block, rolled": BlockMask(roll=True),
    "inverse block, rolled": InverseBlockMask(roll=True),
    "random, unit of 2": RandomMask(unit=2),
    "block, unit of 2 × 1": BlockMask(unit=(2, 1), sides=(1, 2), roll=True),
    "grid, unit of 2": GridMask(unit=2),
    "inverse block, unit of 2": InverseBlockMask(unit=2),
}
EVEN = ["random", "grid", "pixels", "block, rolled", "inverse block, rolled", "random, unit of 2", "grid, unit of 2"]
"""Those that hide every cell equally often."""
GRIDS = [(4, 4), (8, 8), (12, 12), (4, 12)]
ROWS = np.array([0, 1, 2, 77, 2**31 + 5, 2**40 + 3])


def drawn(mask, grid_HW, *, seed=3, pass_=0, rows=ROWS, view=0, xp=np):
    rows = rows if xp is np else torch.from_numpy(rows)
    (num_visible,) = masking.visible_counts(mask, grid_HW)
    return masking.draw(mask, grid_HW, num_visible, seed=seed, pass_=pass_, rows=rows, view=view, xp=xp)


@pytest.fixture(params=MASKS)
def mask(request):
    return MASKS[request.param]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(
    ("grid_HW", "ratio", "visible"),
    [
        ((2, 5), 0.9, 1),  # int(10 * (1 - 0.9)) is 0 in floating point
        ((10, 10), 0.9, 10),  # and int(100 * (1 - 0.9)) is 9
        ((14, 14), 0.9, 19),
        ((14, 14), 0.75, 49),
        ((7, 7), 0.6, 19),
        ((7, 7), 0.75, 12),
        ((4, 4), 0.75, 4),
        ((1, 2), 0.5, 1),
    ],
)
def test_the_number_of_visible_cells_is_exact_at_float_edges(kind, grid_HW, ratio, visible):
    mask = kind(ratio=ratio)
    assert masking.visible_counts(mask, grid_HW) == (visible,)
    assert (drawn(mask, grid_HW).sum(axis=(1, 2)) == visible).all()


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(("grid_HW", "ratio"), [((4, 4), 0.99), ((14, 14), 0.995), ((7, 7), 0.98), ((1, 2), 0.6)])
def test_a_ratio_that_hides_everything_is_refused_and_the_highest_that_does_not_is_named(kind, grid_HW, ratio):
    with pytest.raises(ConfigError, match=r"mask\.ratio") as raised:
        masking.visible_counts(kind(ratio=ratio), grid_HW)
    highest = float(re.search(r"at most ([\d.]+)", str(raised.value))[1])
    assert masking.visible_counts(kind(ratio=highest), grid_HW) == (1,)


@pytest.mark.parametrize("kind", EXACT)
def test_the_smallest_ratio_hides_a_cell(kind):
    assert masking.visible_counts(kind(ratio=1e-6), (14, 14)) == (195,)


@pytest.mark.parametrize("kind", [*EXACT, GridMask])
def test_an_image_of_one_cell_is_refused(kind):
    with pytest.raises(ConfigError, match=r"mask\.ratio.*one cell.*larger images"):
        masking.visible_counts(kind(ratio=0.5), (1, 1))


def test_a_ratio_that_was_calculated_is_the_decimal_that_was_meant():
    assert masking.visible_counts(RandomMask(ratio=0.1 * 3), (1, 10)) == (7,)
    assert masking.num_target(ObjectiveConfig(predict_fraction=0.1 * 3), (1, 20), 10) == 3


def test_the_ratios_that_a_grid_is_said_to_have_are_accepted():
    with pytest.raises(ConfigError) as raised:
        masking.visible_counts(GridMask(ratio=0.6), (7, 7))
    named = [float(ratio) for ratio in re.findall(r"0\.\d+", str(raised.value).partition("Allowed")[2])]
    assert len(named) > 2
    for ratio in named:
        assert masking.visible_counts(GridMask(ratio=ratio), (7, 7))


@pytest.mark.parametrize("grid_HW", GRIDS)
def test_every_image_hides_the_same_number(mask, grid_HW):
    visible = drawn(mask, grid_HW, rows=np.arange(200))
    assert visible.shape == (200, *grid_HW)
    assert visible.dtype == bool
    assert (visible.sum(axis=(1, 2)) == masking.visible_counts(mask, grid_HW)[0]).all()


@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("kind", EXACT)
def test_counts_hold_at_extreme_ratios(kind, ratio):
    visible = drawn(kind(ratio=ratio), (14, 14), rows=np.arange(300))
    assert (visible.sum(axis=(1, 2)) == masking.visible_counts(kind(ratio=ratio), (14, 14))[0]).all()


@pytest.mark.parametrize("grid_HW", GRIDS)
def test_numpy_and_torch_draw_equal_bits(mask, grid_HW):
    views = np.arange(len(ROWS)) % 3
    in_numpy = drawn(mask, grid_HW, pass_=7, view=views)
    in_torch = drawn(mask, grid_HW, pass_=7, view=torch.from_numpy(views), xp=torch)
    assert in_torch.dtype == torch.bool
    np.testing.assert_array_equal(in_numpy, in_torch.numpy())


def test_a_mask_does_not_depend_on_the_batch_it_is_drawn_in(mask):
    whole = drawn(mask, (8, 8))
    for i, row in enumerate(ROWS):
        np.testing.assert_array_equal(whole[i], drawn(mask, (8, 8), rows=np.array([row]))[0])


@pytest.mark.parametrize("change", [{"seed": 4}, {"pass_": 1}, {"view": 1}, {"rows": ROWS + 1}])
def test_each_part_of_the_key_changes_the_mask(mask, change):
    base = drawn(mask, (8, 8))
    np.testing.assert_array_equal(base, drawn(mask, (8, 8)))
    other = drawn(mask, (8, 8), **change)
    differ = [(a != b).any() for a, b in zip(base, other, strict=True)]
    # Shapes have but few places and sizes here: two may be the same.
    assert all(differ) if isinstance(mask, RandomMask | PixelMask) and mask.unit == (1, 1) else any(differ)


def test_no_global_generator_is_read_or_moved(mask):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the legacy generator is what must not move)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = drawn(mask, (8, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()  # noqa: NPY002
    torch.manual_seed(1)
    np.testing.assert_array_equal(first, drawn(mask, (8, 8)))


@pytest.mark.parametrize("name", EVEN)
def test_every_cell_is_hidden_equally_often(name):
    visible = drawn(MASKS[name], (8, 8), rows=np.arange(20_000))
    # Standard deviation of a share over 20,000 images is 0.003.
    np.testing.assert_allclose(visible.mean(axis=0), 0.25, atol=0.015)


def test_a_unit_is_hidden_or_shown_as_one():
    visible = drawn(RandomMask(unit=(2, 4)), (8, 8), rows=np.arange(50))
    units = visible.reshape(50, 4, 2, 2, 4).transpose(0, 1, 3, 2, 4).reshape(50, 8, 8)
    assert (units.all(-1) | ~units.any(-1)).all()


def test_a_unit_that_does_not_divide_the_grid_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"mask\.unit.*\[1, 2, 7, 14\]"):
        masking.visible_counts(RandomMask(unit=4), (14, 14))


def test_a_ratio_that_no_grid_has_is_refused_with_those_that_work():
    with pytest.raises(ConfigError, match=r"mask\.ratio.*0\.75"):
        masking.visible_counts(GridMask(ratio=0.6), (14, 14))


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 49), (0.5, 98), (0.25, 147), (0.9286, 14)])
def test_a_regular_grid_shows_one_of_every_few_or_hides_it(ratio, visible):
    mask = GridMask(ratio=ratio)
    assert masking.visible_counts(mask, (14, 14)) == (visible,)
    for each in drawn(mask, (14, 14), rows=np.arange(20)):
        pattern = each if ratio >= 0.5 else ~each
        rows, columns = pattern.any(1).nonzero()[0], pattern.any(0).nonzero()[0]
        assert len(set(np.diff(rows))) <= 1
        assert len(set(np.diff(columns))) <= 1
        assert pattern.sum() == len(rows) * len(columns)


def test_blocks_are_less_scattered_than_patches():
    """Hidden cells of blocks have hidden neighbours."""

    def share_with_hidden_right_neighbour(mask):
        hidden = ~drawn(mask, (14, 14), rows=np.arange(500))
        return (hidden[:, :, :-1] & hidden[:, :, 1:]).sum() / hidden[:, :, :-1].sum()

    assert share_with_hidden_right_neighbour(RandomMask(ratio=0.5)) == pytest.approx(0.5, abs=0.02)
    assert share_with_hidden_right_neighbour(BlockMask(ratio=0.5)) > 0.75


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_an_inverse_block_shows_one_rectangle_but_for_its_last_line(ratio):
    for visible in drawn(InverseBlockMask(ratio=ratio), (14, 14), rows=np.arange(100)):
        rows, columns = visible.any(1).nonzero()[0], visible.any(0).nonzero()[0]
        box = visible[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box[:-1].all()
        assert box.size - box.sum() < box.shape[1]


def test_a_list_of_ratios_gives_each_step_one_of_them():
    mask = RandomMask(ratio=[0.5, 0.75, 0.9])
    assert masking.visible_counts(mask, (14, 14)) == (98, 49, 19)
    chosen = [masking.choice_at(mask, 7, step) for step in range(600)]
    assert chosen == [masking.choice_at(mask, 7, step) for step in range(600)]
    assert all(count > 150 for count in np.bincount(chosen, minlength=3))
    assert {masking.choice_at(RandomMask(), 7, step) for step in range(20)} == {0}


@pytest.mark.parametrize("xp", [np, torch])
def test_a_target_is_a_part_of_the_hidden_cells(mask, xp):
    objective, rows = ObjectiveConfig(predict_fraction=0.3), np.arange(50)
    visible = drawn(mask, (8, 8), rows=rows, xp=xp)
    num = masking.num_target(objective, (8, 8), 16)
    assert num == int(48 * 0.3)
    rows = rows if xp is np else torch.from_numpy(rows)
    target = masking.draw_target(visible, num, seed=3, pass_=0, rows=rows, view=0, xp=xp)
    assert (target.reshape(50, -1).sum(1) == num).all()
    assert not (target & visible).any()
    in_numpy = masking.draw_target(np.asarray(visible), num, seed=3, pass_=0, rows=np.asarray(rows), view=0)
    np.testing.assert_array_equal(np.asarray(target), in_numpy)


def test_all_cells_may_count():
    assert masking.num_target(ObjectiveConfig(cells="all"), (8, 8), 16) == 64
    assert masking.num_target(ObjectiveConfig(), (8, 8), 16) == 48
    assert masking.num_target(ObjectiveConfig(predict_fraction=0.01), (2, 2), 2) == 1


def test_the_probe_seed_is_no_seed_of_training():
    assert draws.word(0, draws.Stream.PROBE) != draws.word(0, draws.Stream.MASK) != 0


def test_pixels_are_single():
    assert PixelMask().unit == (1, 1)
