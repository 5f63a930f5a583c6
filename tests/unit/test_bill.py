"""What `maskray sweep --dry-run` says of a sweep before anything is started."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskray import cli
from maskray.calibration import seconds_per_step
from maskray.config.load import merge
from maskray.config.schema import RunConfig
from maskray.sweeping import preparing
from maskray.tracking.mlflow_store import DATABASE

Bill = Callable[..., str]


@pytest.fixture
def bill(
    tiny: Callable[..., RunConfig], tmp_path: Path, mlflow_tables: Path, capsys: pytest.CaptureFixture[str]
) -> Bill:
    """Of a sweep of the tiny run, as one line: `bill("--rate", "1e9", seeds=[0])`."""
    (tmp_path / "runs").mkdir()
    shutil.copy(mlflow_tables, tmp_path / "runs" / DATABASE)

    def say(*arguments: str, base: dict[str, Any] | None = None, **keys: Any) -> str:
        run = merge(tiny().model_dump(mode="json"), base or {})
        raw = {"name": "swept", "base": run, "space": {"mask.ratio": [0.5, 0.75]}, "seeds": [0, 1], **keys}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(raw))
        assert cli.main(["sweep", "--config", str(path), "--dry-run", *arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    return say


def test_it_says_so_before_it_times_steps(
    bill: Bill, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    said_before: list[str] = []

    def timed(config: RunConfig) -> float:
        said_before.extend(caplog.messages)
        return seconds_per_step(config)

    monkeypatch.setattr(preparing, "seconds_per_step", timed)
    assert re.search(r" worker-hours at \S+ .?FLOP/s: .* one after another$", bill())
    assert said_before == ["Timing a few steps of mask.ratio=0.5"]
    caplog.clear()
    assert " worker-hours at 1 GFLOP/s: " in bill("--rate", "1e9")
    assert caplog.messages == []


def test_of_gpus_it_says_that_hours_are_not_known_without_a_rate(bill: Bill):
    base = {"cluster": {"gpus_per_worker": 1}}
    assert bill(base=base).endswith(
        "in all, if none is stopped; hours are not known: give --rate, the FLOP/s that a GPU reaches, such as 4e14"
    )
    said = bill("--rate", "4e14", base=base)
    assert " accelerator-hours at 400 TFLOP/s: " in said
    assert "not known" not in said


def test_it_says_that_the_space_has_fewer_points_than_were_asked_for(bill: Bill):
    space = {"mask.ratio": {"kind": "choice", "values": [0.5, 0.75]}, "model.decoder.depth": [1, 2]}
    said = bill("--rate", "1e9", space=space, search={"kind": "random", "points": 3})
    assert "8 trials (2 seeds a point); 2 of 3 points drawn: the space has no more; " in said
    assert "the space has no more" not in bill("--rate", "1e9", space=space, search={"kind": "random", "points": 2})
