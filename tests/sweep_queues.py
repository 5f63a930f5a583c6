"""Searches that are gone through without a training: spaces, and trials that end with what is said of them."""

from maskray.config.load import fingerprint, parse
from maskray.config.sweep import SweepConfig
from maskray.sweeps.record import Result, Trial

UNIFORM = {"kind": "uniform", "low": 0.0, "high": 1.0}
SPACE = {
    "x": UNIFORM,
    "lr": {"kind": "loguniform", "low": 1e-4, "high": 1.0},
    "n": {"kind": "randint", "low": 1, "high": 8},
    "kind": {"kind": "choice", "values": ["a", "b"]},
}
# Keys before what their conditions are about, and a condition on an axis that has one itself.
CONDITIONAL = {
    "deep": {**UNIFORM, "when": {"b": [2, 3]}},
    "b": {"kind": "randint", "low": 1, "high": 3, "when": {"kind": "b"}},
    "kind": {"kind": "choice", "values": ["a", "b"]},
    "x": UNIFORM,
}


def sweep(space, seeds=(0,), **sections) -> SweepConfig:
    return parse(SweepConfig, {"name": "s", "base": {}, "space": space, "seeds": list(seeds), **sections})


def optuna(space=SPACE, points=20, seeds=(0,), search=(), **sections) -> SweepConfig:
    return sweep(space, seeds, search={"kind": "optuna", "points": points, "startup": 5, **dict(search)}, **sections)


def make(point, seed) -> Trial:
    return Trial(fingerprint([dict(point), seed]), point, seed, 90, 1e7, 1e9, 0, 0)


def end(trial, value=0.5, status="finished", steps=90) -> Result:
    return Result(trial, status, steps, 1.0, value)


def quality(trial) -> float:
    """Best at x = 0.3 of kind b."""
    return 1 - abs(trial.point["x"] - 0.3) - (0.2 if trial.point["kind"] == "a" else 0) + 1e-3 * trial.seed


def drain(queue, value=quality, most=10**6) -> list[Result]:
    """One trial after another, to the end or up to some."""
    found = []
    while len(found) < most and (trial := queue.next()) is not None:
        found.append(end(trial, value(trial)))
        queue.tell(found[-1])
    return found


def by_key(results) -> dict[str, Result]:
    return {result.trial.key: result for result in results}


def points_of(results) -> list[dict]:
    return [dict(result.trial.point) for result in results]
