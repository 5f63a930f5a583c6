"""What the gauges of a run are set to, by what it logs. That Prometheus finds it is in `integration`."""

import math
import threading
import time
from contextlib import closing

import pytest

from maskray.on_ray import gauges
from maskray.on_ray.gauges import Gauges

LOGGED = {
    "pretrain/loss": 0.5,
    "pretrain/lr": 1e-3,
    "throughput/images_per_second": 640.0,
    "throughput/mfu": 0.25,
    "throughput/data_wait_fraction": 0.125,
    "throughput/checkpoint_wait_seconds": 2.0,
    "throughput/views_without_image": 3,
}


class Kept(dict):
    """Stands where Ray's gauges are made: what each was set to, by its name and tags."""

    def __call__(self, name: str) -> "Setting":
        return Setting(self, name)


class Setting:
    def __init__(self, kept: Kept, name: str) -> None:
        self._kept, self._name = kept, name

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert type(value) is float
        self._kept[self._name, *tags.values()] = value


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    kept = Kept()
    monkeypatch.setattr(gauges, "_gauge", kept)
    monkeypatch.setattr(gauges, "_interval_seconds", lambda: 0.02)
    return kept


def shows(kept: Kept, expected: dict) -> None:
    """They are set to this anew, and to nothing else."""
    kept.clear()
    until = time.monotonic() + 10
    while (now := dict(kept)) != expected and time.monotonic() < until:
        time.sleep(0.01)
    assert now == expected


def test_all_that_is_logged_is_shown_again_and_again_until_the_end(kept: Kept):
    with closing(Gauges("tiny-0")) as shown:
        shown.started()
        shown.log(10, LOGGED)
        shown.probed({"probe/knn": 0.75, "probe/all_labels": 0.5})
        expected = {
            ("maskray_step", "tiny-0"): 10.0,
            ("maskray_loss", "tiny-0"): 0.5,
            ("maskray_images_per_second", "tiny-0"): 640.0,
            ("maskray_mfu", "tiny-0"): 0.25,
            ("maskray_data_wait_fraction", "tiny-0"): 0.125,
            ("maskray_checkpoint_wait_seconds", "tiny-0"): 2.0,
            ("maskray_views_without_image_total", "tiny-0"): 3.0,
            ("maskray_restarts_total", "tiny-0"): 0.0,
            ("maskray_probe_accuracy", "tiny-0", "knn"): 0.75,
            ("maskray_probe_accuracy", "tiny-0", "all_labels"): 0.5,
        }
        shows(kept, expected)
        shows(kept, expected)  # Ray would have dropped them by now
    for thread in threading.enumerate():
        if thread.name == "maskray-gauges":
            thread.join(10)
            assert not thread.is_alive()
    shows(kept, {})


def test_totals_are_those_of_all_starts_of_the_workers(kept: Kept):
    views, restarts, step = "maskray_views_without_image_total", "maskray_restarts_total", "maskray_step"
    logged = {"throughput/views_without_image": 3}
    with closing(Gauges("tiny-0")) as shown:
        shown.started()
        shows(kept, {(restarts, "tiny-0"): 0.0, (step, "tiny-0"): 0.0})
        shown.log(10, logged)
        shown.log(20, logged)
        shown.started()  # from a checkpoint at step 10
        shown.log(20, logged)
        shows(kept, {(views, "tiny-0"): 6.0, (restarts, "tiny-0"): 1.0, (step, "tiny-0"): 20.0})
        shown.log(30, logged)
        shows(kept, {(views, "tiny-0"): 9.0, (restarts, "tiny-0"): 1.0, (step, "tiny-0"): 30.0})


def test_what_is_not_finite_leaves_what_was_there(kept: Kept):
    with closing(Gauges("tiny-0")) as shown:
        shown.log(10, {"pretrain/loss": 0.5, "throughput/mfu": 0.25})
        shown.log(20, {"pretrain/loss": math.inf, "throughput/mfu": math.nan})
        shows(
            kept, {("maskray_loss", "tiny-0"): 0.5, ("maskray_mfu", "tiny-0"): 0.25, ("maskray_step", "tiny-0"): 20.0}
        )


def test_where_ray_is_gone_it_is_said_once_and_nobody_else_hears_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def gone(name: str) -> None:
        raise RuntimeError("Ray is not there")

    monkeypatch.setattr(gauges, "_gauge", gone)
    monkeypatch.setattr(gauges, "_interval_seconds", lambda: 0.02)
    with closing(Gauges("tiny-0")) as shown:
        for step in range(1, 6):
            shown.log(step, LOGGED)
            time.sleep(0.02)
    assert caplog.text.count("no longer reach Prometheus") == 1
    assert not any(thread.name == "maskray-gauges" for thread in threading.enumerate())


def test_several_runs_in_one_process_share_rays_gauges():
    """As trials do. Ray's own gauges, without a cluster: nothing hears of them."""
    with closing(Gauges("one")), closing(Gauges("other")):
        assert gauges._gauge("maskray_step") is gauges._gauge("maskray_step")
        gauges._gauge("maskray_step").set(1.0, {"run": "one"})
        with pytest.raises(ValueError, match="metric"):
            gauges._gauge("maskray_probe_accuracy").set(1.0, {"run": "one"})
