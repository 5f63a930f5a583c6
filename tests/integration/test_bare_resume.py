"""torchrun without Ray: workers in processes of their own, one killed with SIGKILL, and the command run again."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskray.config.load import dump
from maskray.pretrain import pretrain
from maskray.tracking.base import MemoryStore, MemoryTracker
from maskray.training.checkpoint import OPTIMIZER, WEIGHTS
from maskray.training.context import LocalContext

PACKAGE = str(Path(__file__).parents[2] / "platform")
PATIENCE_SECONDS = 120
STEPS, CHECKPOINT_STEPS = 20, 4

# Trains the runs of the folders one after another: a launch costs seconds of imports in each process.
WORKER = """
import json, os, signal, sys
from pathlib import Path

import torch.distributed as dist

from maskray.config.load import load
from maskray.pretrain import pretrain
from maskray.tracking.base import MemoryTracker
from maskray.training.context import LocalContext

victim, moment, *folders = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()


class Doomed(MemoryTracker):
    def log(self, metrics, step):
        super().log(metrics, step)
        if (folder.name, rank, step) == ("killed", int(victim), int(moment)):
            os.kill(os.getpid(), signal.SIGKILL)


for folder in map(Path, folders):
    tracker = Doomed()
    config = load(folder / "config.yaml")
    context = LocalContext(folder / "run", config.data, rank=rank, world_size=dist.get_world_size())
    pretrain(config, context, tracker)
    losses = [(p.step, p.value) for p in tracker.store.points if p.key == "pretrain/loss"]
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))
dist.destroy_process_group()
"""


def torchrun(place: Path, workers: int, *folders: Path, victim: int = -1, moment: int = -1) -> int:
    """Launch the runs of the folders; the exit code. What it says goes to a file."""
    (place / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    environment = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
    with (place / "output.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, str(place / "worker.py"), str(victim), str(moment), *map(str, folders)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        return process.wait(PATIENCE_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass
class Left:
    """What a run has left in its folder."""

    folder: Path

    def checkpoints(self) -> list[str]:
        return sorted(f.name for f in (self.folder / "run").iterdir() if f.suffix != ".partial")

    def state(self):
        folder = self.folder / "run" / self.checkpoints()[-1]
        return load_file(folder / WEIGHTS), torch.load(folder / OPTIMIZER, weights_only=True)["state"]

    def ledger(self):
        """(rank, step) → positions and keys; a step that was trained twice must have been the same."""
        out = {}
        for path in (self.folder / "ledger").iterdir():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                assert out.setdefault((int(path.stem), entry["step"]), entry) == entry
        return out

    def losses(self, rank: int = 0) -> dict[int, float]:
        return dict(json.loads((self.folder / f"losses-{rank}.json").read_text()))


def configured(tiny, folder, workers=1, *, shard=False):
    training = {"log_steps": 1, "checkpoint_steps": CHECKPOINT_STEPS, "ledger": str(folder / "ledger"), "shard": shard}
    return tiny(
        optim={"steps": STEPS, "clip_norm": 0.5},
        # Wide enough for several places in a bucket: on a toy DDP adds everything in one order anyway.
        model={"width": 64, "depth": 2, "heads": 4, "decoder": {"width": 32, "depth": 2, "heads": 4}},
        training=training,
        cluster={"workers": workers},
        probe={"figure_images": 1},
    )


def losses_of_one(tiny, folder):
    """The losses of the same run in this process alone."""
    store = MemoryStore()
    try:
        config = configured(tiny, folder)
        pretrain(config, LocalContext(folder / "run", config.data), MemoryTracker(store))
    finally:
        torch.use_deterministic_algorithms(False)
    return {p.step: p.value for p in store.points if p.key == "pretrain/loss"}


# a + b = b + a: of two workers the order of a sum cannot show.
@pytest.mark.parametrize(("workers", "shard"), [(2, False), (3, False), (2, True)])
def test_a_killed_worker_changes_nothing(tiny, tmp_path, workers, shard):
    quiet, killed = Left(tmp_path / "quiet"), Left(tmp_path / "killed")
    for run in (quiet, killed):
        run.folder.mkdir()
        (run.folder / "config.yaml").write_text(dump(configured(tiny, run.folder, workers, shard=shard)))
    output = tmp_path / "output.log"

    assert torchrun(tmp_path, workers, quiet.folder, killed.folder, victim=workers - 1, moment=10) != 0
    assert (quiet.folder / "losses-0.json").exists(), output.read_text()[-4000:]
    assert [name[:14] for name in killed.checkpoints()] == ["step_000000004", "step_000000008"]
    assert torchrun(tmp_path, workers, killed.folder) == 0, output.read_text()[-4000:]

    weights, moments = quiet.state()
    mine, other = killed.state()
    assert all(torch.equal(mine[name], weights[name]) for name in weights)
    assert all(torch.equal(other[i][name], moments[i][name]) for i in moments for name in moments[i])
    assert killed.ledger() == quiet.ledger()
    assert list(killed.losses()) == list(range(9, STEPS + 1))  # from the checkpoint of step 8 on
    assert killed.losses() == {step: loss for step, loss in quiet.losses().items() if step > 8}

    for rank in range(1, workers):
        assert quiet.losses(rank) == quiet.losses()
    alone = losses_of_one(tiny, tmp_path / "alone")
    assert list(alone) == list(range(1, STEPS + 1))
    assert quiet.losses() == pytest.approx(alone, rel=1e-5)
    assert alone[STEPS] < alone[1]
