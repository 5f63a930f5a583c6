"""The best of a sweep in the registry: its own encoder, under the sweep's name for it, before the gate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskray import offering
from maskray.config.load import merge, parse
from maskray.config.schema import RunConfig
from maskray.config.sweep import SweepConfig
from maskray.on_ray.sweep import trial
from maskray.sweeping import life, preparing
from maskray.sweeps import record
from maskray.sweeps.record import Result


def result_of(of: preparing.Prepared, number: int, status: record.Status, value: float | None) -> Result:
    return Result(of.trials[number], status, 12, 1.0, value)


@pytest.fixture
def prepared(tiny: Callable[..., RunConfig], runs: Path) -> preparing.Prepared:
    run = tiny(probe={"draws": 2, "figure_images": 1}).model_dump(mode="json")
    promotion = {"gate": {"bootstrap_draws": 200}}
    raw: dict[str, Any] = {"name": "swept", "base": run, "space": {"mask.ratio": [0.5, 0.75]}, "seeds": [0, 1]}
    return preparing.prepare(
        parse(SweepConfig, merge(raw, {"register_best": {"name": "found", "promotion": promotion}}))
    )


def test_the_best_is_of_the_best_point_the_seed_that_came_out_best(prepared: preparing.Prepared):
    ratios = [(each.point["mask.ratio"], each.seed) for each in prepared.trials]
    assert ratios == [(0.5, 0), (0.5, 1), (0.75, 0), (0.75, 1)]
    found = [("finished", 0.6), ("finished", 0.7), ("finished", 0.95), ("failed", None)]
    results = {each.trial.key: each for each in (result_of(prepared, i, *said) for i, said in enumerate(found))}
    best = offering.best_trial(prepared.config, results)
    assert best is results[prepared.trials[1].key]
    assert offering.best_trial(prepared.config, {}) is None
    failed = result_of(prepared, 0, "failed", None)
    assert offering.best_trial(prepared.config, {failed.trial.key: failed}) is None


@pytest.mark.filterwarnings("ignore::Warning:mlflow")
def test_a_trial_becomes_a_version_and_goes_through_the_gate(
    prepared: preparing.Prepared, monkeypatch: pytest.MonkeyPatch
):
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.tune, "report", told.append)  # Tune is not here
    with life.begun(prepared) as run_id:
        sweep = trial.Sweep(prepared.folder, prepared.store, run_id, "probe/knn", 600.0, prepared.code)
        asked = trial.Asked(prepared.trials[0], prepared.space.run_config(prepared.trials[0]).model_dump(mode="json"))
        trial.run({trial.ASKED: asked.dump()}, sweep)
        results = life.finish(prepared, run_id)
    assert told[-1][trial.ENDED]
    best = offering.best_trial(prepared.config, results)
    assert best is not None
    place = (prepared.space, prepared.folder, prepared.store, prepared.code)
    first = offering.register(*place, best)
    assert first is not None
    assert (first.model, first.version) == ("found", "1")
    assert first.decision is not None
    assert first.decision.kind == "promoted"
    client = prepared.store.client()
    version = client.get_model_version("found", "1")
    assert version.run_id == best.run_id
    assert str(client.get_model_version_by_alias("found", "champion").version) == "1"
    assert client.get_run(best.run_id).data.tags["mlflow.source.name"] == "maskray sweep"
    again = offering.register(*place, best)  # as a resumed sweep does
    assert again is not None
    assert again.version == "1"

    plain = prepared.config.model_copy(update={"register_best": None})
    monkeypatch.setattr(prepared.space, "config", plain)
    assert offering.register(*place, best) is None
