"""Runs without a fault, which those with one are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from launches import Launches
from outages import Outage, steps_again

LOG_STEPS = 2
MOST_SECONDS, MOST_LOSS_GAP = 30.0, 1e-4


class Quiet(NamedTuple):
    """What a run without a fault ends with."""

    weights: str
    ledger: dict[tuple[int, int], tuple]
    losses: dict[int, float]


@pytest.fixture(scope="module")
def known() -> dict[tuple[int, int], Quiet]:
    """Runs without a fault, by number of workers and of steps."""
    return {}


@pytest.fixture
def quiet(launches: Callable[..., Launches], known: dict[tuple[int, int], Quiet]) -> Callable[..., Quiet]:
    """What a run of so many workers ends with; it is trained once for all tests of a file."""

    def trained(workers: int, steps: int = 40) -> Quiet:
        if (workers, steps) not in known:
            run = launches(f"quiet-{workers}", workers, optim={"steps": steps})
            assert run.finish(run.start()) == 0, run.output()
            known[workers, steps] = ending(run)
        return known[workers, steps]

    return trained


def ending(run: Launches) -> Quiet:
    return Quiet(run.final_weights(), run.ledger(), run.metrics("pretrain/loss"))


def check_against(run: Launches, wanted: Quiet) -> None:
    """To the bit; MLflow holds one run, each step once; no image was skipped or repeated."""
    found = ending(run)
    assert found.ledger == wanted.ledger
    assert found.weights == wanted.weights
    assert found.losses == wanted.losses
    check_complete(run)


def check_complete(run: Launches) -> None:
    """One run in MLflow, with each step once; each image of the plan once."""
    assert run.status() == "FINISHED"
    trained = run.steps_trained()
    for key in ("pretrain/loss", "pretrain/lr"):
        assert run.metric_steps(key) == list(range(LOG_STEPS, len(trained) + 1, LOG_STEPS))
    positions = [p for _, each in trained.values() for p in each]
    assert positions == list(range(len(positions))), "an image was skipped or repeated"


def note(
    case: str, workers: str, run: Launches, wanted: Quiet, seconds: float | None, weights: str = "quiet run"
) -> Outage:
    """A row of the table, which must hold what is promised."""
    found = run.metrics("pretrain/loss")
    gap = max(abs(value - wanted.losses[step]) for step, value in found.items())
    outage = Outage(case, workers, None if seconds is None else round(seconds, 1), steps_again(run), weights, gap)
    outage.note()
    assert gap <= MOST_LOSS_GAP
    assert seconds is None or seconds <= MOST_SECONDS
    return outage
