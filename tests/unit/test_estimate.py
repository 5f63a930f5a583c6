"""What a run will take, by its dataset or without one."""

import pytest

from maskray import cli
from maskray.config.load import dump
from maskray.errors import ConfigError
from maskray.estimate import estimate

GROUP = 16  # rows of the digits' row groups


def test_with_a_dataset_durations_and_padding_are_the_plan_s(tiny):
    found = estimate(tiny(optim={"steps": None, "epochs": 3, "global_batch": 80}, cluster={"workers": 3}))
    num_groups = round(found.length.views / found.length.passes / GROUP)
    assert found.length.group_rows == GROUP
    assert found.length.passes == pytest.approx(3, abs=80 / GROUP / num_groups)
    assert found.waste == pytest.approx(1 / 6)  # five groups in two rounds of three workers
    assert found.micro_batch == 2 * GROUP


def test_without_a_dataset_a_run_in_steps_is_known_and_one_in_passes_is_not(tiny, tmp_path):
    data = {"path": str(tmp_path / "nowhere")}
    in_steps, in_passes = (estimate(tiny(data=data, optim=o)) for o in ({}, {"steps": None, "epochs": 3}))
    assert (in_steps.length.views, in_steps.length.passes) == (12 * 64, None)
    assert (in_passes.length.views, in_passes.length.passes) == (None, 3)


def test_hours_are_operations_by_the_rate_of_the_workers_that_do_not_wait(tiny):
    found = estimate(tiny(optim={"global_batch": 80}, cluster={"workers": 3}))
    seconds = 1000 * found.training_flops / (3 * 1e9 * 5 / 6)
    assert found.hours(1000, 1e9) == pytest.approx(seconds / 3600)


def test_cores_decode_as_many_images_as_the_workers_take_and_fewer_large_ones(tiny, tmp_path):
    nowhere = {"path": str(tmp_path / "nowhere")}
    found = estimate(tiny(data=nowhere))
    rate = 2500 * found.training_flops  # a second
    assert found.images_per_second(rate) == pytest.approx(2500)
    assert found.decoding_cores(rate) == 3
    large = estimate(tiny(data=nowhere | {"image_size": 448}))
    assert large.decoding_cores(2500 * large.training_flops) == 10


def test_what_is_decoded_once_takes_no_cores(tiny, tmp_path):
    assert estimate(tiny()).decoding_cores(1e12) is None, "the digits fit, and are kept decoded"
    assert estimate(tiny(data={"cache": "none"})).decoding_cores(1e12) is not None
    kept = tiny(data={"path": str(tmp_path / "nowhere"), "cache": "host", "stream": "local"})
    assert estimate(kept).decoding_cores(1e12) is None


def test_operations_are_the_mean_of_the_ratios_and_memory_that_of_the_costliest(tiny):
    ratios = [0.25, 0.75]
    both = estimate(tiny(mask={"ratio": ratios}))
    apart = [estimate(tiny(mask={"ratio": ratio})) for ratio in ratios]
    assert both.training_flops == pytest.approx(sum(each.training_flops for each in apart) / 2)
    assert both.memory == apart[0].memory


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, ("parameters", "decoder", "768 images in steps of 64", "padding 0%", "time")),
        (
            {"data": {"path": "nowhere"}, "optim": {"steps": None, "epochs": 3}},
            ("3 passes", "each million images", "CPU cores for", "fewer in cluster."),
        ),
    ],
)
def test_the_command_says_it(tiny, tmp_path, capsys, sections, words):
    path = tmp_path / "run.yaml"
    path.write_text(dump(tiny(**sections)))
    assert cli.main(["estimate", "--config", str(path), "--gpus", "2", "--rate", "1e9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("data", [{}, {"path": "nowhere"}])
def test_a_worker_has_no_more_than_its_share_and_none_has_nothing(tiny, data):
    found = estimate(tiny(data=data, cluster={"workers": 4}, training={"micro_batch": 64}))
    assert found.micro_batch == 64 // 4
    with pytest.raises(ConfigError, match=r"cluster\.workers: more workers"):
        estimate(tiny(data=data, cluster={"workers": 65}))


def test_recomputed_activations_take_less(tiny):
    whole, part = (estimate(tiny(training={"recompute_activations": again})).memory for again in (False, True))
    assert part.activations < whole.activations
    assert part.weights == whole.weights


@pytest.mark.parametrize(
    ("option", "value"), [("--rate", "0"), ("--rate", "nan"), ("--rate", "1000"), ("--gpus", "0"), ("--gpus", "1000")]
)
def test_a_number_that_makes_no_sense_is_refused(tiny, tmp_path, capsys, option, value):
    path = tmp_path / "run.yaml"
    path.write_text(dump(tiny()))
    assert cli.main(["estimate", "--config", str(path), option, value]) == cli.USER_MISTAKE
    assert "found" in capsys.readouterr().err.lower()
