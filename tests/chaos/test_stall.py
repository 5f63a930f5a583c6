"""What a checkpoint takes from the training loop while its upload, to a slow disk, goes on beside it."""

from statistics import median

import pytest

from launches import SLOW
from outages import note

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, CHECKPOINT_STEPS, BATCH = 80, 10, 128
DISK_SECONDS = 0.15
"""That each of a checkpoint's four files takes longer than it should."""


def test_a_checkpoint_stalls_training_for_less_than_a_step(launches):
    """Each step is logged, and a checkpoint is taken after its line: what it takes lies in the next interval."""
    run = launches(
        "stall",
        1,
        data={"stream": "local"},
        model={"width": 192, "depth": 8, "decoder": {"width": 128, "depth": 2}},
        optim={"steps": STEPS},
        training={"log_steps": 1, "checkpoint_steps": CHECKPOINT_STEPS},
    )
    (run.folder / SLOW).write_text(str(DISK_SECONDS))
    assert run.finish(run.start()) == 0, run.output()
    rates = run.metrics("throughput/images_per_second")
    seconds = {step: BATCH / rate for step, rate in rates.items() if step > CHECKPOINT_STEPS}
    after = [s for step, s in seconds.items() if step % CHECKPOINT_STEPS == 1]
    step = median(s for n, s in seconds.items() if n % CHECKPOINT_STEPS > 4)
    stall = median(after) - step
    waits = run.metrics("throughput/checkpoint_wait_seconds")
    found = {
        "median_step_seconds": step,
        "stall_seconds": stall,
        "longest_stall_seconds": max(after) - step,
        "wait_seconds": max(waits.values()),
        "interval_seconds": CHECKPOINT_STEPS * step,
    }
    note({"case": "checkpoint stall"} | found)
    assert CHECKPOINT_STEPS * step > 4 * DISK_SECONDS, "an upload took longer than the steps between two checkpoints"
    assert stall <= step, found
