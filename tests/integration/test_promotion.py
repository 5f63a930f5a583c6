"""Promotions at once, promotions that are killed, and one through a server: real processes, MLflow, files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from maskray import cli
from maskray.cli.promote import REFUSED
from maskray.config.schema import TrackingConfig
from maskray.data.storage import Storage
from maskray.errors import CheckpointError
from maskray.models.encoder import load_encoder
from maskray.publish.decisions import Decision, Records
from maskray.publish.promotion import promote
from maskray.publish.registry import ModelCard, register_encoder
from maskray.publish.versions import RegisteredModel
from maskray.tracking.mlflow_store import Store, open_store
from mlflow_server import Server
from registered import MODEL, WIDTHS, Registered

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registered(store: Store, tmp_path: Path, digits: Path) -> Registered:
    return Registered(store, tmp_path, digits)


def history(registered: Registered) -> list[Decision]:
    return Records(Storage(registered.folder / "promotions"), MODEL, "champion").load()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------------------------ the race

RACE = """
import multiprocessing, sys
import torch
from maskray.config.promotion import PromotionConfig
from maskray.publish import promotion

config = PromotionConfig.model_validate_json(sys.argv[1])

def contend(number, barrier):
    torch.set_num_threads(1)
    _, probe = promotion.open_set(config)
    waited = []
    def judge(encoder):
        correct = probe(encoder)
        if not waited:  # all have seen that there is no champion, and judged themselves
            waited.append(barrier.wait(120))
        return correct
    promotion.promote(config.model_copy(update={"challenger": number}), judge=judge)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # imports once: they are most of the time
    barrier = context.Barrier(len(sys.argv) - 2)
    processes = [context.Process(target=contend, args=(number, barrier)) for number in sys.argv[2:]]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
"""


def test_of_eight_that_promote_at_once_one_is_champion_and_all_is_recorded(registered: Registered):
    numbers = [registered.add(width) for width in WIDTHS]
    command = [sys.executable, "-c", RACE, registered.config().model_dump_json(), *numbers]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    decisions = history(registered)
    assert [d.number for d in decisions] == list(range(1, 9))
    assert sorted(d.version for d in decisions) == sorted(numbers)  # each was decided on, once
    champion, promoted = None, []
    for decision in decisions:
        assert decision.champion_before == champion  # nobody was compared with a champion that was none any more
        compared = decision.comparison
        assert compared is not None
        if champion is not None:
            own, other = compared.rows_of(decision.version), compared.rows_of(champion)
            assert compared.gain is not None
            assert compared.gain.mean == pytest.approx(float(np.mean(own) - np.mean(other)))
            assert (decision.kind == "promoted") == (compared.gain.low > 0)
        champion = decision.version if decision.kind == "promoted" else champion
        assert decision.champion == champion
        promoted += [decision.version] if decision.kind == "promoted" else []
    assert [d.comparison.gain is None for d in decisions] == [True] + [False] * 7
    assert registered.champion == champion == promoted[-1]
    for decision in decisions:
        tags = registered.client.get_model_version(MODEL, decision.version).tags
        assert {k: v for k, v in tags.items() if k.startswith("maskray.champion")} == {
            f"maskray.champion.{decision.number}": str(decision)
        }


# ----------------------------------------------------------------------------------------------------------- the kills

KILLED = """
import os, signal, sys
from maskray import cli
from maskray.publish.versions import RegisteredModel

setattr(RegisteredModel, sys.argv[1], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
cli.main(["promote", "--config", sys.argv[2]])
"""


@pytest.mark.parametrize(
    ("moment", "mended_by"), [("point", ["--show"]), ("announce", ["--set", "challenger=1"])], ids=["alias", "tags"]
)
def test_a_promotion_killed_after_its_record_is_carried_out_by_the_next_call(
    registered: Registered, tmp_path: Path, moment: str, mended_by: list[str], capsys: pytest.CaptureFixture[str]
):
    old, new = registered.add(8), registered.add(64)
    promote(registered.config(old))
    path = tmp_path / "promote.yaml"
    path.write_text(yaml.safe_dump(registered.config().model_dump(mode="json")))
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, str(path)], env=environment(), timeout=240)
    assert killed.returncode == -9
    assert [d.kind for d in history(registered)] == ["promoted", "promoted"]
    assert registered.champion == (old if moment == "point" else new)
    assert "maskray.champion.2" not in registered.client.get_model_version(MODEL, new).tags
    assert cli.main(["promote", "--config", str(path), *mended_by]) in (0, REFUSED)
    assert registered.champion == new
    assert registered.client.get_model_version(MODEL, new).tags["maskray.champion.2"].startswith("decision 2, promoted")
    assert f"version {new}" in capsys.readouterr().out


def test_the_command_says_what_was_decided_and_by_its_exit_code_too(
    registered: Registered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, bad = registered.add(64), registered.add(8)
    path = tmp_path / "promote.yaml"
    path.write_text(yaml.safe_dump(registered.config().model_dump(mode="json")))
    command = ["promote", "--config", str(path)]
    assert cli.main([*command, "--set", f"challenger={good}"]) == 0
    assert cli.main(command) == REFUSED
    said = " ".join(capsys.readouterr().out.split())
    assert "decision 1, promoted: version 1 names 76.85% of the 324 held-out rows" in said
    assert f"decision 2, refused: version {bad} names 45.06%" in said
    assert "whose lower end is not above 0" in said
    assert cli.main([*command, "--rollback"]) == cli.USER_MISTAKE
    assert "no earlier champion" in capsys.readouterr().err
    assert cli.main([*command, "--show"]) == 0
    shown = capsys.readouterr().out
    assert "promoted" in shown
    assert "@champion of tiny: version 1" in shown
    job = [sys.executable, str(ROOT / "jobs" / "promote.py"), *command[1:], "--set", "challenger=nobody"]
    done = subprocess.run(job, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == cli.USER_MISTAKE
    assert "Found: nobody" in " ".join(done.stderr.split())


# ----------------------------------------------------------------------------------------------------- through a server


@pytest.fixture
def server(mlflow_tables: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copy(mlflow_tables, tmp_path / "server.db")
    started = Server(tmp_path, tmp_path / "server.db")
    started.start()
    yield started
    started.kill()


def test_models_that_a_server_keeps_are_promoted(server: Server, tmp_path: Path, digits: Path):
    registered = Registered(open_store(TrackingConfig(uri=server.uri), "unused"), tmp_path, digits)
    for width in (8, 64):
        folder = registered.encoder(width)
        run = registered.client.create_run(registered.store.experiment_id)
        card = ModelCard(step=1, description="{model_id}, version {version}", files={"lineage.json": b"{}"})
        number = register_encoder(server.uri, run.info.run_id, folder, MODEL, card)
        decision = promote(registered.config(number))
        assert decision is not None
        assert (decision.kind, registered.champion) == ("promoted", number)
    model = RegisteredModel(server.uri, MODEL)
    version = model.find("@champion")
    assert model.encoder(version).width == load_encoder(folder).width == 64
    described = registered.client.get_model_version(MODEL, "2").description
    source = registered.client.get_model_version(MODEL, "2").source
    assert described == f"{source.removeprefix('models:/')}, version 2"
    note = registered.client.get_run(version.run_id).data.tags["mlflow.note.content"]
    assert "decision 2, promoted" in note
    shutil.rmtree(tmp_path / "artifacts")
    with pytest.raises(CheckpointError, match="files of models:/tiny/2 are gone"):
        model.encoder(version)
    assert json.loads((tmp_path / "promotions" / "tiny@champion" / "000002.json").read_bytes())["version"] == "2"
