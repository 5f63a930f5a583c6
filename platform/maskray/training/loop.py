"""The loop: batches in, steps done, a word to the tracker at log steps, a checkpoint now and then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from maskray.config.training import TrainingConfig
from maskray.data import stream
from maskray.data.spec import StreamSpec
from maskray.data.stream import Step, Unit, read_images
from maskray.errors import BadStepError
from maskray.tracking.base import Tracker
from maskray.training.context import RunContext, Snapshot
from maskray.training.optim import Schedule
from maskray.training.step import StepReport, TrainStep
from maskray.training.throughput import Meter


@dataclass(frozen=True)
class Parts:
    """What the loop is made of; `pretrain` builds it."""

    spec: StreamSpec
    step: TrainStep
    schedule: Schedule
    meter: Meter
    snapshot: Callable[[int], Snapshot | None]
    """A checkpoint's content after so many steps; None on all workers but the first. Each of them must ask."""
    probed: Callable[[int], bool]
    """Whether the checkpoint after so many steps is judged; the last one is not, on the way."""
    ledger: Path | None
    """File that this worker writes each step's positions and keys to."""


def run(parts: Parts, config: TrainingConfig, context: RunContext, tracker: Tracker, start_step: int) -> int:
    """Train from `start_step` to the end of the plan; the number of steps done in the run's life.

    Steps of `config.skip_steps` are read, so that the stream goes on, and dropped.

    Raises:
        BadStepError: a loss or gradient norm was not finite, or a loss leapt; no update was applied from that step on.
    """
    total, skipped = parts.spec.total_steps, frozenset(config.skip_steps)
    with context.units(parts.spec, start_step) as units:
        for step in _timed(_steps(parts, config, context, units, start_step), parts.meter):
            if step.number not in skipped:
                parts.step(step.number, step.batches)
                parts.meter.steps += 1
                _note(parts.ledger, step)
            done = step.number + 1
            due = done == total or done in config.probe_at
            if due or done % config.log_steps == 0:
                report = parts.step.report()
                _stop_if_bad(report, parts.spec, config, done, tracker)
                tracker.log(_metrics(report, parts, config, step.number), done)
            if due or done % config.checkpoint_steps == 0:
                probed = done < total and parts.probed(done)
                waited = context.report(done, parts.snapshot(done), probed=probed)
                parts.meter.checkpoint_wait_seconds += waited
    return total


def _steps(
    parts: Parts, config: TrainingConfig, context: RunContext, units: Iterator[Unit], start_step: int
) -> Iterator[Step]:
    return stream.steps(units, parts.spec, context.rank, context.world_size, start_step, config.micro_batch)


def _timed(steps: Iterator[Step], meter: Meter) -> Iterator[Step]:
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        meter.data_wait_seconds += time.perf_counter() - start
        if step is None:
            return
        yield step


def _metrics(report: StepReport, parts: Parts, config: TrainingConfig, number: int) -> dict[str, float]:
    return {
        **({} if math.isnan(report.loss) else {"pretrain/loss": report.loss, "pretrain/grad_norm": report.grad_norm}),
        "pretrain/lr": parts.schedule.lr(number),
        "pretrain/skipped_steps": len(config.skipped_before(number + 1)),
        "throughput/views_without_image": report.views_without_image,
        "pretrain/epoch": (number + 1) * parts.spec.groups_per_step / parts.spec.num_row_groups,
        **parts.meter.read(),
    }


def _stop_if_bad(report: StepReport, spec: StreamSpec, config: TrainingConfig, done: int, tracker: Tracker) -> None:
    """The flag is the same on every worker (it is made of reduced values), so all of them stop here."""
    step = report.first_bad_step
    if step is None:
        return
    what, reason, remedy = "Loss or gradient norm was not finite", "non_finite", "use training.precision: fp32"
    if report.leap is not None and config.spike is not None:
        loss, median = report.leap
        what = (
            f"The loss leapt to {loss:.4g}, from a median of {median:.4g} over the {config.spike.window} steps before,"
        )
        reason, remedy = "spike", "set training.spike.factor higher"
    first = step * spec.groups_per_step
    positions = range(first, first + spec.groups_per_step)
    dataset = spec.open_dataset()
    keys = [key for p in positions for key in read_images(spec, dataset, spec.plan.locate(p)[1]).keys]
    shown = ", ".join(keys[:4]) + (f" … {keys[-1]} ({len(keys)} images)" if len(keys) > 4 else "")
    message = (
        f"{what} at step {step} (seen at step {done}; no update was applied from that step on). The step trained on "
        f"positions {first} to {positions[-1]} of the plan: {shown}. "
        f"What to do: look at these images; lower optim.base_lr, set optim.clip_norm, or {remedy}."
    )
    tracker.event(reason, message)
    raise BadStepError(message, step, done, reason)


def _note(ledger: Path | None, step: Step) -> None:
    if ledger is not None:
        keys = [key for batch in step.batches for key, w in zip(batch.keys, batch.weights_B.tolist(), strict=True) if w]
        line = json.dumps({"step": step.number, "positions": step.positions, "keys": keys}) + "\n"
        with ledger.open("ab", buffering=0) as file:  # one write: a kill leaves a whole line or none
            file.write(line.encode())
