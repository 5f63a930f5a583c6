"""The points of a sweep, and what each becomes: a run of a length, or a message that names it."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskray.config.load import merge, parse
from maskray.config.schema import IngestConfig, RunConfig
from maskray.config.sweep import SweepConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.errors import ConfigError, DataError, MaskrayError
from maskray.sweeps.space import Space, plan_of, point_key, refuse_equal_points

GRID = {"mask.ratio": [0.25, 0.5, 0.75, 0.9], "model.decoder.depth": [1, 2, 4]}
RATIOS = {"mask.ratio": [0.5, 0.75]}

Make = Callable[..., Space]


@pytest.fixture
def space(tiny: Callable[..., RunConfig]) -> Make:
    """The space of a sweep of the tiny run: `space(RATIOS, seeds=[0])`."""

    def make(
        axes: Mapping[str, Any] = RATIOS,
        base: Mapping[str, Any] | None = None,
        measured: Mapping[str, float] | None = None,
        **keys: Any,
    ) -> Space:
        run = merge(tiny().model_dump(mode="json"), base or {})
        return Space(parse(SweepConfig, {"name": "swept", "base": run, "space": axes, **keys}), measured)

    return make


# -------------------------------------------------------------------------------------------------------------- points


def test_a_grid_has_all_of_its_points_once(space: Make):
    points = space(GRID | {"model.patch": [2, 2]}).points()
    each = itertools.product(GRID["mask.ratio"], GRID["model.decoder.depth"])
    assert points == [{"mask.ratio": r, "model.decoder.depth": d, "model.patch": 2} for r, d in each]


def test_an_axis_is_there_where_its_condition_holds_and_points_without_it_are_one(space: Make):
    depth = {"values": [1, 2], "when": {"mask.ratio": 0.75}}
    width = {"values": [16, 32], "when": {"model.decoder.depth": 2}}
    axes = {"mask.ratio": [0.5, 0.75], "model.decoder.depth": depth, "model.decoder.width": width}
    assert space(axes).points() == [
        {"mask.ratio": 0.5},
        {"mask.ratio": 0.75, "model.decoder.depth": 1},
        {"mask.ratio": 0.75, "model.decoder.depth": 2, "model.decoder.width": 16},
        {"mask.ratio": 0.75, "model.decoder.depth": 2, "model.decoder.width": 32},
    ]


def test_a_condition_that_asks_for_true_does_not_hold_at_one(space: Make):
    axes = {"a.x": [1, True], "a.y": {"values": [5], "when": {"a.x": True}}, "a.z": {"values": [6], "when": {"a.x": 1}}}
    points = space(axes).points()
    assert json.dumps(points) == '[{"a.x": 1, "a.z": 6}, {"a.x": true, "a.y": 5}]'


def test_random_points_are_drawn_again_as_they_were(space: Make):
    axes = {
        "mask.ratio": {"kind": "uniform", "low": 0.5, "high": 0.9},
        "optim.base_lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
        "model.depth": {"kind": "randint", "low": 1, "high": 3},
        "model.decoder.depth": [1, 2],
    }
    points = space(axes, search={"kind": "random", "points": 50, "seed": 3}).points()
    assert points == space(axes, search={"kind": "random", "points": 50, "seed": 3}).points()
    assert points != space(axes, search={"kind": "random", "points": 50, "seed": 4}).points()
    assert len(points) == 100, "each with all of the grid"
    assert all(list(point) == list(axes) for point in points)
    assert {point["model.depth"] for point in points} == {1, 2, 3}
    assert all(0.5 <= point["mask.ratio"] <= 0.9 for point in points)
    rates = np.log10([point["optim.base_lr"] for point in points])
    assert rates.min() < -3.5 < -2.5 < rates.max()


FEW = {"a.x": {"kind": "choice", "values": [1, 2, 3]}, "a.y": {"kind": "randint", "low": 1, "high": 2}}


@pytest.mark.parametrize(("asked", "num"), [(1, 1), (5, 5), (6, 6), (7, 6), (60, 6)])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_search_has_as_many_points_as_were_asked_for_or_all_there_are(
    space: Make, asked: int, num: int, seed: int
):
    made = space(FEW, search={"kind": "random", "points": asked, "seed": seed})
    points = made.points()
    assert made.num_drawn == len(points) == len({point_key(point) for point in points}) == num


def test_the_last_of_many_points_is_found(space: Make):
    axes = {"a.x": {"kind": "randint", "low": 1, "high": 100}}
    points = space(axes, search={"kind": "random", "points": 100}).points()
    assert sorted(point["a.x"] for point in points) == list(range(1, 101))


def test_what_is_drawn_again_leaves_the_others_as_they_were(space: Make):
    few, more = (space(FEW, search={"kind": "random", "points": n}).points() for n in (3, 6))
    assert more[:3] == few


def test_a_draw_whose_condition_makes_it_no_other_point_is_made_again(space: Make):
    axes = FEW | {"a.y": {"kind": "uniform", "low": 0, "high": 1, "when": {"a.x": 3}}}
    points = space(axes, search={"kind": "random", "points": 20}).points()
    assert len(points) == 20
    assert sum(len(point) == 1 for point in points) == 2, "at 1 and at 2 there is no other"


def test_a_draw_counts_once_with_all_of_the_grid(space: Make):
    axes = {"a.x": {"kind": "choice", "values": [1, 2]}, "a.y": [1, 2, 3]}
    made = space(axes, search={"kind": "random", "points": 5})
    assert (made.num_drawn, len(made.points())) == (2, 6)
    # Where the drawn axis is not there, the grid's values are not another point.
    some = axes | {"a.x": {"kind": "choice", "values": [1, 2], "when": {"a.y": 3}}}
    made = space(some, search={"kind": "random", "points": 5})
    assert (made.num_drawn, len(made.points())) == (2, 4)


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("flops", [4e8, 1e9, 2.345e10])
def test_trials_of_all_depths_and_ratios_end_within_a_step_of_the_same_flops(space: Make, flops: float):
    made = space(GRID, budget={"flops": flops})
    trials = [made.trial(point, 0) for point in made.points()]
    assert len({trial.flops_per_step for trial in trials}) == len(trials)
    assert all(abs(trial.flops - flops) <= trial.flops_per_step / 2 for trial in trials)
    assert all(trial.steps >= 1 for trial in trials)


def test_an_image_costs_the_same_in_a_larger_batch(space: Make):
    made = space({"optim.global_batch": [32, 64]})
    small, large = (made.trial(point, 0) for point in made.points())
    assert small.flops_per_image == large.flops_per_image > 0
    assert (small.flops_per_step, large.flops_per_step) == (32 * small.flops_per_image, 64 * small.flops_per_image)
    assert space().trial({"mask.ratio": 0.5}, 0).flops_per_image > small.flops_per_image, "more of it is seen"


def test_what_a_trial_trains_is_what_its_key_and_its_length_say(space: Make):
    made = space(GRID, budget={"flops": 2e10})
    for point, seed in itertools.product(made.points(), (0, 1)):
        trial = made.trial(point, seed)
        config = made.run_config(trial, [3, 5])
        plan = plan_of(config, made.dataset)
        assert (plan.fingerprint, plan.total_steps, config.seed) == (trial.key, trial.steps, seed)
        assert config.training.probe_at == (3, 5)
        assert (*config.mask.ratio, config.model.decoder.depth) == tuple(point.values())
        # As in base, where they are 2 of 12.
        assert abs(plan.warmup_steps - trial.steps / 6) <= 0.5


def test_a_trial_never_goes_back(space: Make):
    """One that diverges ends at once."""
    made = space(base={"training": {"rewinds": 5}})
    assert made.run_config(made.trial({"mask.ratio": 0.5}, 0)).training.rewinds == 0
    with pytest.raises(ConfigError, match=r"^overrides\.training\.rewinds: .*cannot have it otherwise"):
        space(overrides={"training.rewinds": 5})


def test_a_warm_up_is_never_all_of_a_trial(space: Make):
    made = space(RATIOS, {"optim": {"warmup_steps": 11}}, budget={"steps": 1})
    config = made.run_config(made.trial({"mask.ratio": 0.5}, 0))
    assert (config.optim.steps, config.optim.warmup_steps) == (1, 0)


def test_without_a_budget_a_point_is_as_long_as_its_config_says(space: Make):
    free, bound = space({"optim.steps": [8, 20]}), space(budget={"steps": 30})
    assert [free.trial(point, 0).steps for point in free.points()] == [8, 20]
    assert [bound.trial(point, 0).steps for point in bound.points()] == [30, 30]


def test_a_budget_in_seconds_is_one_in_steps_once_they_are_timed(space: Make):
    made = space(budget={"accelerator_seconds": 3.0})
    first, second = made.points()
    assert made.unmeasured() == [first, second]
    measured = {point_key(first): 0.1}
    assert space(budget={"accelerator_seconds": 3.0}, measured=measured).unmeasured() == [second]
    made = space(budget={"accelerator_seconds": 3.0}, measured=measured | {point_key(second): 0.7})
    assert made.unmeasured() == []
    assert [made.trial(point, 0).steps for point in (first, second)] == [30, 4]
    assert made.run_config(made.trial(second, 0)).optim.steps == 4


def test_keys_are_of_what_is_learned(space: Make):
    one = space().trial({"mask.ratio": 0.5}, 0)
    assert one.key == space(overrides={"training.log_steps": 4}).trial({"mask.ratio": 0.5}, 0).key
    others = [
        space().trial({"mask.ratio": 0.5}, 1),
        space().trial({"mask.ratio": 0.75}, 0),
        space(overrides={"optim.base_lr": 0.02}).trial({"mask.ratio": 0.5}, 0),
        space(budget={"steps": 13}).trial({"mask.ratio": 0.5}, 0),
    ]
    assert len({one.key, *(trial.key for trial in others)}) == 5


def test_points_that_make_the_same_run(space: Make):
    made = space({"optim.base_lr": [1, 1.0]})
    with pytest.raises(ConfigError, match=r"^space: two of its points are the same run\. Found: .*=1 and .*=1\."):
        refuse_equal_points([made.trial(point, 0) for point in made.points()])
    refuse_equal_points([space().trial(point, seed) for point in [*space().points()] * 2 for seed in (0, 1)])


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"mask.ration": [0.5]}, r"^space: at mask\.ration=0\.5: mask\.ration: no such key\. Did you mean mask\.ratio"),
        ({"decoder_depth": [1]}, r"^space: at decoder_depth=1: .*Did you mean model\.decoder\.depth\?"),
        ({"nothing.of.it": [1]}, r"^space: at nothing\.of\.it=1: nothing: no such key\. Valid here: .*mask"),
        ({"mask.ratio": [0.5, 1.5]}, r"^space: at mask\.ratio=1\.5: mask\.ratio: ratio is a share above 0 and below 1"),
        ({"model.decoder.depth": [1, 0]}, r"^space: at model\.decoder\.depth=0: .*Allowed: greater than or equal to 1"),
        ({"model.decoder.depth": [1, "x"]}, r"^space: at model\.decoder\.depth=x: .*found 'x'\)\. Allowed: an integer"),
        ({"model.decoder.heads": [2, 3]}, r"^space: at model\.decoder\.heads=3: model\.decoder: heads 3 must divide"),
        ({"model.patch": [2, 3]}, r"^space: at model\.patch=3: data\.image_size: .*Allowed: 6 or 9"),
        ({"optim.global_batch": [64, 60]}, r"^space: at optim\.global_batch=60: optim\.global_batch: "),
        ({"training.log_steps": [1]}, r"^space\.training\.log_steps: it changes nothing that is learned"),
        ({"cluster.workers": [1, 2]}, r"^space\.cluster\.workers: .*overrides: {cluster\.workers: …}"),
        ({"name": ["a", "b"]}, r"^space\.name: it changes nothing .*What to do: leave it out"),
    ],
)  # fmt: skip
def test_points_that_no_run_has(space: Make, axes: Mapping[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        made(space, axes)


def made(space: Make, *arguments: Any, **keys: Any) -> list[str]:
    found = space(*arguments, **keys)
    return [found.trial(point, 0).key for point in found.sample()]


@pytest.mark.parametrize("search", [{"kind": "random", "points": 20}, {"kind": "optuna", "points": 5}])
def test_a_range_that_goes_too_far_is_seen_in_a_sample(space: Make, search: Mapping[str, Any]):
    axes = {"mask.ratio": {"kind": "uniform", "low": 0.5, "high": 1.5}}
    with pytest.raises(ConfigError, match=r"^space: at mask\.ratio=1\.\d+: mask\.ratio: ratio is a share"):
        made(space, axes, search=search)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base": {"optim": {"bass_lr": 1}}}, r"^base: optim\.bass_lr: no such key\. Did you mean optim\.base_lr\?"),
        ({"overrides": {"optim.bass_lr": 1}}, r"^overrides: optim\.bass_lr: no such key\. Did you mean optim\.base_lr"),
        ({"overrides": {"mask.ratio": 0.3}}, r"^overrides\.mask\.ratio: it is an axis of the space.*Found: 0\.3"),
        ({"overrides": {"data.stream": "ray"}}, r"^overrides\.data\.stream: .*Found: ray\. Allowed: local"),
        ({"overrides": {"probe.enabled": False}}, r"^objective\.metric: .*Found: probe/knn, with probe\.enabled false"),
        ({"budget": {"flops": 1000}}, r"^space: at mask\.ratio=0\.5: budget\.flops: .*Found: 1000\. .* and more"),
    ],
)  # fmt: skip
def test_sections_that_do_not_go_together(space: Make, keys: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        made(space, RATIOS, keys.pop("base", None), **keys)


def test_an_override_holds_where_an_axis_is_not(space: Make):
    axes = RATIOS | {"optim.base_lr": {"values": [0.5], "when": {"mask.ratio": 0.75}}}
    found = space(axes, overrides={"optim.base_lr": 0.25})
    rates = [found.run_config(found.trial(point, 0)).optim.base_lr for point in found.points()]
    assert rates == [0.25, 0.5]


def test_overrides_hold_for_all_points_though_a_kind_replaces_its_section(space: Make):
    axes = {"mask.kind": ["random", "block"], "model.decoder.depth": [1, 2]}
    found = space(axes, overrides={"mask.ratio": 0.5})
    masks = [found.run_config(found.trial(point, 0)).mask for point in found.points()]
    assert [(mask.kind, mask.ratio) for mask in masks] == [("random", (0.5,))] * 2 + [("block", (0.5,))] * 2


def test_a_kind_and_what_is_in_its_section_may_both_be_axes(space: Make):
    axes = {"mask.ratio": [0.5, 0.6], "mask.kind": ["random", "block"]}
    found = space(axes)
    masks = [found.run_config(found.trial(point, 0)).mask for point in found.points()]
    assert [(mask.kind, mask.ratio[0]) for mask in masks] == [
        ("random", 0.5),
        ("block", 0.5),
        ("random", 0.6),
        ("block", 0.6),
    ]


@pytest.mark.parametrize(
    ("axes", "overrides", "message"),
    [
        (RATIOS, {"seed": 3}, r"^overrides\.seed: .*list seeds"),
        (RATIOS, {"training.probe_at": [4]}, r"^overrides\.training\.probe_at: .*rungs"),
        (RATIOS | {"init_from": ["a.pth"]}, {}, r"^space\.init_from: a sweep has one dataset and one start"),
        (RATIOS | {"data.version": ["a"]}, {}, r"^space\.data\.version: a sweep has one dataset"),
    ],
)
def test_what_is_said_elsewhere(space: Make, axes: dict[str, Any], overrides: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        space(axes, overrides=overrides)


def test_the_loss_needs_no_probe(space: Make):
    objective = {"metric": "pretrain/loss", "direction": "min", "forced": True}
    assert len(made(space, RATIOS, objective=objective, overrides={"probe.enabled": False})) == 2


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures without classes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{i}.png")
    return folder


def test_a_dataset_that_cannot_be_probed(space: Make, pictures: Path, tmp_path: Path):
    def dataset(source: str, held_out: float) -> dict[str, Any]:
        place = str(tmp_path / f"held-out-{held_out}")
        config = IngestConfig(source=source, destination=place, group_rows=8, held_out_fraction=held_out)
        ingest(config, thread_mapper(1))
        return {"data": {"path": place}, "optim": {"global_batch": 16}}

    unlabelled = dataset(str(pictures), 0.2)
    with pytest.raises(DataError, match=r"^objective\.metric: .*the dataset has no class names\. .*class folders"):
        space(RATIOS, unlabelled)
    with pytest.raises(DataError, match=r"the dataset has no class names and no held-out rows\."):
        space(RATIOS, dataset(str(pictures), 0.0))
    loss = {"metric": "pretrain/loss", "direction": "min", "forced": True}
    assert len(made(space, RATIOS, unlabelled, objective=loss)) == 2


def test_a_dataset_that_is_not_there(space: Make, tmp_path: Path):
    with pytest.raises(MaskrayError, match=r"^data\.path: there is no such dataset"):
        space(RATIOS, {"data": {"path": str(tmp_path / "nothing")}})
