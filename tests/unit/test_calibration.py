"""How long a step takes here."""

import time
from collections.abc import Callable

import pytest

from maskray.calibration import seconds_per_step
from maskray.config.schema import RunConfig
from maskray.errors import CheckpointError

pytestmark = pytest.mark.alone  # it times steps


def test_a_few_real_steps_are_timed_and_nothing_is_left_of_them(tiny: Callable[..., RunConfig], tmp_path):
    config = tiny(optim={"steps": 10**6, "warmup_steps": 10**5}, training={"probe_at": [3], "probe_steps": 4})
    start = time.perf_counter()
    one = seconds_per_step(config)
    whole = time.perf_counter() - start
    assert 0 < 8 * one < whole
    assert not (tmp_path / "runs").exists()


def test_a_step_of_twice_the_images_takes_longer(tiny: Callable[..., RunConfig]):
    model = {"width": 64, "depth": 4, "decoder": {"width": 64, "depth": 4}}
    few, many = (tiny(model=model, optim={"global_batch": each}) for each in (64, 512))
    assert seconds_per_step(many) > 2 * seconds_per_step(few)


def test_a_run_that_cannot_be_is_no_faster_for_it(tiny: Callable[..., RunConfig], tmp_path):
    with pytest.raises(CheckpointError, match="nothing"):
        seconds_per_step(tiny(init_from=str(tmp_path / "nothing")))
