"""Rates from counts, and a rate of the device that is measured."""

import pytest
import torch

from maskray.data.retry import RETRIES
from maskray.training import throughput
from maskray.training.throughput import Meter, matmul_rate


@pytest.fixture
def clock(monkeypatch):
    """clock.now is what the meter reads."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_rates_are_those_of_the_interval(clock):
    meter = Meter(global_batch=256, world_size=2, train_flops_per_image=1e6, device_flops=1e9, _start=clock.now)
    meter.steps, meter.data_wait_seconds, meter.checkpoint_wait_seconds = 10, 1.0, 0.5
    RETRIES.add(3)
    clock.now += 4
    assert meter.read() == pytest.approx(
        {
            "throughput/images_per_second": 640,
            "throughput/data_wait_seconds": 1.0,
            "throughput/data_wait_fraction": 0.25,
            "throughput/checkpoint_wait_seconds": 0.5,
            "throughput/storage_retries": 3,
            "throughput/mfu": 320 * 1e6 / 1e9,  # of one of the two devices
        }
    )
    meter.steps = 1
    clock.now += 1
    second = meter.read()
    assert second["throughput/images_per_second"] == pytest.approx(256)
    assert second["throughput/data_wait_seconds"] == second["throughput/checkpoint_wait_seconds"] == 0
    assert second["throughput/storage_retries"] == 0


def test_an_interval_of_no_time_divides_by_nothing(clock):
    meter = Meter(256, 1, 1e6, 1e9, _start=clock.now)
    meter.steps = 1
    assert meter.read()["throughput/images_per_second"] > 0


def test_an_interval_whose_steps_were_all_left_out_has_no_rate(clock):
    """Of 0 images/s: how long a run took is what is divided by it."""
    meter = Meter(256, 1, 1e6, 1e9, _start=clock.now - 1)
    assert meter.read().keys() & {"throughput/images_per_second", "throughput/mfu"} == set()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_devices_rate_is_measured(precision, monkeypatch):
    monkeypatch.setattr(throughput, "_MATMUL_SECONDS", 0.01)
    monkeypatch.setitem(throughput._MATMUL_SIZE, "cpu", 128)
    assert matmul_rate(torch.device("cpu"), precision) > 1e6
