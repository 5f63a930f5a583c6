"""The config meets the dataset."""

import pytest

from maskray.config.load import merge, parse
from maskray.config.resolve import DatasetFacts, padding_waste, resolve, worker_counts
from maskray.config.schema import PretrainClusterConfig, RunConfig
from maskray.errors import ConfigError, DataError

BASE = {
    "name": "a",
    "data": {"path": "shards", "image_size": 8, "channels": 1},
    "model": {"patch": 2, "width": 16, "depth": 1, "heads": 2, "decoder": {"width": 16, "depth": 1, "heads": 2}},
    "optim": {"global_batch": 64, "steps": 40},
}


def facts(num_row_groups=80, group_rows=16, left_over=7):
    return DatasetFacts("0123456789abcdef", group_rows, num_row_groups, num_row_groups * group_rows + left_over)


def resolved(dataset=None, /, **sections):
    return resolve(parse(RunConfig, merge(BASE, sections)), dataset or facts())


def refusal(kind, dataset=None, /, **sections):
    with pytest.raises(kind) as caught:
        resolved(dataset, **sections)
    return str(caught.value)


def test_a_step_is_whole_row_groups():
    plan = resolved(data={"views_per_image": 2}, optim={"global_batch": 96})
    assert (plan.groups_per_step, plan.views_per_group, plan.global_batch) == (3, 32, 96)
    assert plan.steps_per_pass == 80 / 3
    assert (plan.num_row_groups, plan.group_rows, plan.views_per_image) == (80, 16, 2)


@pytest.mark.parametrize(
    ("optim", "total", "warmup"),
    [
        ({"steps": 40}, 40, 2),  # 5 % of the run
        ({"steps": 9}, 9, 0),
        ({"steps": 1}, 1, 0),
        ({"steps": None, "epochs": 2}, 40, 2),
        ({"steps": None, "epochs": 0.5, "warmup_epochs": 0.25}, 10, 5),
        ({"steps": None, "epochs": 0.001}, 1, 0),
        ({"steps": 40, "warmup_epochs": 1}, 40, 20),
        ({"steps": 40, "warmup_steps": 0}, 40, 0),
        ({"steps": 40, "warmup_steps": 39}, 40, 39),
    ],
)
def test_all_durations_become_steps_once(optim, total, warmup):
    plan = resolved(optim=optim)
    assert (plan.total_steps, plan.warmup_steps) == (total, warmup)


def test_steps_that_are_left_out_are_ascending_and_each_once():
    config = parse(RunConfig, merge(BASE, {"training": {"skip_steps": [9, 2, 39, 2]}}))
    assert config.training.skip_steps == (2, 9, 39)
    assert config.training.skipped_before(9) == [2]
    assert resolve(config, facts()) == resolved()  # the plan is the same, and so is the run


@pytest.mark.parametrize(("steps", "found"), [([40], "40"), ([3, 41, 50], "[41, 50]")])
def test_steps_that_there_are_not_cannot_be_left_out(steps, found):
    assert refusal(ConfigError, training={"skip_steps": steps}) == (
        f"training.skip_steps: the run has no such step: they are counted from 0. Found: {found}. Allowed: 0 to 39."
    )


def test_not_all_steps_can_be_left_out():
    assert resolved(training={"skip_steps": list(range(39))}).total_steps == 40
    message = "training.skip_steps: no step would be left to train. Found: all 40."
    assert refusal(ConfigError, training={"skip_steps": list(range(40))}) == message


def test_more_row_groups_in_a_step_than_in_the_dataset_are_allowed():
    assert resolved(facts(num_row_groups=3)).groups_per_step == 4


def test_no_full_row_group():
    assert refusal(DataError, facts(num_row_groups=0, group_rows=64, left_over=50)) == (
        "data.path: the training split has no full row group. Found: 50 rows with group_rows 64. "
        "What to do: ingest again with group_rows of at most 50."
    )
    assert "group_rows of at most 1." in refusal(DataError, facts(num_row_groups=0, left_over=0))


@pytest.mark.parametrize(
    ("views", "batch", "allowed"), [(1, 65, "64 or 80"), (1, 10, "16"), (2, 80, "64 or 96"), (3, 64, "48 or 96")]
)
def test_a_global_batch_of_parts_of_row_groups(views, batch, allowed):
    assert refusal(ConfigError, data={"views_per_image": views}, optim={"global_batch": batch}) == (
        f"optim.global_batch: a step takes whole row groups of 16 images × {views} views. Found: {batch}. "
        f"Allowed: {allowed}. What to do: take one of these, or ingest again with another group_rows."
    )


def test_more_workers_than_a_step_has_row_groups():
    assert refusal(ConfigError, cluster={"workers": 5}) == (
        "cluster.workers: more workers than a step has row groups (4). Found: 5. Allowed: 1 to 4. "
        "What to do: use fewer workers, or a global batch of at least 80."
    )
    assert resolved(cluster={"workers": 4}).groups_per_step == 4
    assert resolved(cluster={"workers": 3}).groups_per_step == 4


def test_workers_that_may_become_fewer_divide_a_step():
    assert refusal(ConfigError, cluster={"workers": 3, "min_workers": 2}) == (
        "cluster.workers: workers that may become fewer must divide the row groups of a step (4). "
        "Found: 3, with cluster.min_workers 2. Allowed: 2, 4. "
        "What to do: take one of these, or set cluster.min_workers: null."
    )
    with pytest.raises(ConfigError, match="min_workers 3 must be at most workers"):
        resolved(cluster={"workers": 2, "min_workers": 3})


@pytest.mark.parametrize(
    ("workers", "least", "counts"),
    [(12, 1, [12, 6, 4, 3, 2, 1]), (12, 5, [12, 6]), (4, 4, [4]), (5, None, [5])],
)
def test_numbers_of_workers_that_a_run_may_have(workers, least, counts):
    assert worker_counts(PretrainClusterConfig(workers=workers, min_workers=least), 12) == counts


@pytest.mark.parametrize("micro_batch", [3, 12, 24, 33])
def test_a_micro_batch_across_row_groups(micro_batch):
    assert refusal(ConfigError, training={"micro_batch": micro_batch}) == (
        f"training.micro_batch: a micro-batch is whole row groups or a divisor of one (16 views). "
        f"Found: {micro_batch}. Allowed: 1, 2, 4, 8, 16, or multiples of 16."
    )


def test_batch_normalisation_takes_whole_row_groups():
    raw = merge(BASE, {"data": {"image_size": 64}, "training": {"micro_batch": 8}})
    config = parse(RunConfig, {**raw, "model": {"kind": "sparse_conv", "name": "resnet18"}})
    with pytest.raises(ConfigError) as caught:
        resolve(config, facts())
    assert str(caught.value) == (
        "training.micro_batch: batch normalisation takes its statistics over whole row groups (16 views). Found: 8. "
        "Allowed: multiples of 16. What to do: take one, or ingest again with a smaller group_rows."
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8, 16, 32, 48, 64, 128, None])
def test_micro_batches_that_fit(micro_batch):
    assert resolved(training={"micro_batch": micro_batch}).groups_per_step == 4


@pytest.mark.parametrize(
    ("optim", "key", "found"),
    [
        ({"warmup_steps": 40}, "optim.warmup_steps", "40 of 40 steps"),
        ({"warmup_epochs": 3}, "optim.warmup_epochs", "60 of 40 steps"),
    ],
)
def test_a_warm_up_as_long_as_the_run(optim, key, found):
    assert refusal(ConfigError, optim=optim) == (
        f"{key}: the warm-up must be shorter than the run. Found: {found}. Allowed: at most 39 steps."
    )


@pytest.mark.parametrize(("workers", "groups", "waste"), [(1, 4, 0), (4, 4, 0), (3, 4, 1 / 3), (3, 5, 1 / 6)])
def test_what_padding_wastes(workers, groups, waste):
    assert padding_waste(workers, groups) == pytest.approx(waste)
