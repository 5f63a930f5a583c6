"""A clock that is set while a run goes on: nothing of it hangs on what time it is."""

import pytest

from launches import CLOCK
from maskray.cli import USER_MISTAKE
from outages import seconds_to_train

from .conftest import check_against, note

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HOUR_SECONDS = 3600.0
STEPS = 400
"""More than are trained while a second launch is refused."""


def test_a_clock_that_is_set_back_and_forward(launches, quiet):
    """An hour back, and the driver killed before that hour is over; then two hours on."""
    wanted = quiet(2, STEPS)
    run = launches("clock", 2, optim={"steps": STEPS})
    clock = run.folder / CLOCK
    clock.write_text("0")
    process = run.start()
    run.wait_for_step(process, 10)
    clock.write_text(str(-HOUR_SECONDS))
    run.wait_for_step(process, 16)
    assert run.finish(run.start()) == USER_MISTAKE, "a second launch was let in"
    assert "running already" in run.output()
    run.kill(process)
    process = run.start()
    seconds = seconds_to_train(run, [])
    clock.write_text(str(HOUR_SECONDS))
    assert run.finish(process) == 0, run.output()
    check_against(run, wanted)
    at = run.timestamps("pretrain/loss")
    assert max(at.values()) - min(at.values()) > HOUR_SECONDS, "the clock was not set"
    note("clock set back 1 h, SIGKILL of the driver, on 2 h", "2", run, wanted, seconds)
