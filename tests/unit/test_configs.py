"""What the headers of the pretraining configs promise, by the arithmetic that a launch does."""

import re
from pathlib import Path

import pytest

from maskray.config.load import load
from maskray.config.schema import RunConfig
from maskray.estimate import estimate
from maskray.on_ray import probe, room

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
HARDWARE = re.compile(r"^# hardware: (?:(?P<gpus>\d+) GPUs? of \d+ GB, )?(?P<cpus>\d+) CPU cores?\b", re.MULTILINE)
RATE = re.compile(r"^# time: .* at (?P<rate>\de\d+) FLOP/s", re.MULTILINE)
ON_GPUS = [path for path in CONFIGS if RATE.search(path.read_text())]


def decodes_on_ray(config: RunConfig) -> bool:
    """Of a dataset that is not there, which may be too large for the workers."""
    return config.data.stream == "ray" or (config.data.stream == "auto" and config.data.cache == "auto")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_launch_fits_the_hardware_of_the_header_and_leaves_a_core_for_a_job_s_driver(path: Path):
    header, config = HARDWARE.search(path.read_text()), load(path, [])
    assert header, "hardware: N GPUs of M GB, N CPU cores"
    asked = room.bundles(config.cluster, probe.bundles(config), streams_on_ray=decodes_on_ray(config))
    drivers = 1 if config.cluster.gpus_per_worker else 0  # small ones are not for a cluster of others
    assert sum(bundle["CPU"] for bundle in asked) + drivers <= int(header["cpus"])
    assert sum(bundle.get("GPU", 0) for bundle in asked) == int(header["gpus"] or 0)


def test_there_are_configs_for_gpus():
    assert len(ON_GPUS) >= 9


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda p: p.stem)
def test_images_are_decoded_as_fast_as_the_time_of_the_header_wants(path: Path):
    config, rate = load(path, []), RATE.search(path.read_text())
    assert rate
    cores = estimate(config).decoding_cores(float(rate["rate"]))
    assert (cores is None) == (config.data.cache == "device")
    assert cores is None or cores <= config.cluster.data_cpus
