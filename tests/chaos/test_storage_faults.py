"""An object store that throttles, and one that is away while checkpoints go there and shards are read from it."""

import time
from collections.abc import Callable

import pytest

from launches import Launches
from maskray.on_ray.stream import registered_step
from maskray.tracking.mlflow_store import DATABASE
from object_store import FaultyProxy
from outages import seconds_to_train, wait_for

from .conftest import check_against, note

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 80
AWAY_SECONDS = 30.0
THROTTLED = 0.3


@pytest.fixture
def in_bucket(launches, digits_in_bucket: str, bucket: str, proxy: FaultyProxy) -> Callable[[str], Launches]:
    """A run of two workers whose dataset and folder lie in a bucket, behind a proxy that may fail."""

    def make(name: str) -> Launches:
        run = launches(
            name,
            2,
            data={"path": digits_in_bucket},
            optim={"steps": STEPS},
            storage={"path": f"{bucket}/{name}"},
        )
        run.storage = f"{bucket}/{name}"
        return run

    return make


def tracked_here(run: Launches) -> tuple[str, str]:
    """Options of a launch: its MLflow is the store in its folder."""
    return "--set", f"tracking.uri=sqlite:///{run.folder}/runs/{DATABASE}"


def test_an_object_store_that_throttles(in_bucket, quiet, proxy: FaultyProxy):
    wanted = quiet(2, STEPS)
    run = in_bucket("throttled")
    process = run.start(*tracked_here(run))
    run.wait_for_step(process, 5)
    proxy.forget()
    proxy.shares = {"throttle": THROTTLED}
    assert run.finish(process) == 0, run.output()
    assert proxy.faults["throttle"] > THROTTLED / 2 * proxy.requests.total(), "else this test shows nothing"
    proxy.shares = {}
    check_against(run, wanted)
    assert note(f"{THROTTLED:.0%} of requests throttled", "2", run, wanted, None).steps_again == 0


def test_an_object_store_that_is_away(in_bucket, quiet, proxy: FaultyProxy):
    wanted = quiet(2, STEPS)
    run = in_bucket("away")
    process = run.start(*tracked_here(run))
    run.wait_for_step(process, 23)  # a checkpoint is to go there now
    on_record = registered_step(run.kept())
    proxy.forget()
    proxy.shares = {"away": 1.0}
    time.sleep(AWAY_SECONDS)
    assert {"GET", "HEAD"} & set(proxy.requests), "no shard was asked for"
    assert {"PUT", "POST"} & set(proxy.requests), "nothing was to be written"
    assert run.last_step() < STEPS - 1, "it had ended before the store was back"
    proxy.shares = {}
    start = time.monotonic()
    seconds_to_train(run, [])
    wait_for(lambda: registered_step(run.kept()) > on_record, run)
    seconds = time.monotonic() - start
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    note(f"object store away for {AWAY_SECONDS:.0f} s", "2", run, wanted, seconds)
