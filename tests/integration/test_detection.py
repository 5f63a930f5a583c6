"""Two processes train one detector; on a pretrained encoder it finds what it should, beside the same from scratch."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cutouts
from maskray.config.evaluation import CocoData, DetectionEvaluation
from maskray.config.models import SparseConvConfig, VitConfig
from maskray.evaluation.detection.course import Detection
from maskray.evaluation.detection.outcome import open_sets
from maskray.models.encoder import Encoder, encoder_only
from maskray.models.normalize import Normalize

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "detection.py"
PACKAGE = str(Path(__file__).parents[2] / "platform")
SIDE = 64
MODELS = {"vit": VitConfig(patch=(8, 8), width=32, depth=1, heads=2), "ResNet": SparseConvConfig(name="resnet18")}
WORKER = """
import pickle, sys
from pathlib import Path

import torch
import torch.distributed as dist

from maskray.training.context import LocalWorkerContext

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
folder = Path(sys.argv[1])
for name, asked in pickle.loads((folder / "asked").read_bytes()).items():
    course = asked("model", LocalWorkerContext(folder / "run", rank=rank, world_size=world_size))
    for number in range(course.total_steps):
        course.step(number)
    torch.save({"state": course.state(), "result": course.result()}, folder / f"{name}-{rank}-of-{world_size}.pt")
dist.destroy_process_group()
"""


def detection(folder: Path, kind: str, **values) -> Detection:
    data = {
        name: CocoData(annotations=str(folder / name / "annotations.json"), images=str(folder / name / "images"))
        for name in ("train", "val")
    }
    sizes = {"image_size": SIDE, "pyramid_width": 16, "head_width": 32, "proposals": 32, "sampled_boxes": 16}
    config = DetectionEvaluation(**data, **sizes, base_lr=3e-2, layer_decay=1, **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = encoder_only(MODELS[kind], (SIDE, SIDE), 3)
    encoder = Encoder(model, Normalize([0.4] * 3, [0.25] * 3), (SIDE, SIDE), MODELS[kind])
    return Detection(config, *open_sets(config), {"model": encoder}, seed=0)


def trained(folder: Path, name: str, processes: int) -> list[dict]:
    """What each process has in the end."""
    paths = [folder / f"{name}-{rank}-of-{processes}.pt" for rank in range(processes)]
    return [torch.load(each, weights_only=True) for each in paths]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_train_one_detector_though_one_may_have_no_image(tmp_path):
    for part, (name, num) in enumerate({"train": 6, "val": 5}.items()):
        cutouts.write(tmp_path / name, num, seed=0, side=SIDE, part=part)
        (tmp_path / name / "images" / "00002.png").write_bytes(b"no image")
    asked = {
        "alone in a step": detection(tmp_path, "vit", batch=1, epochs=0.5),
        "alone in a step, ResNet": detection(tmp_path, "ResNet", batch=1, epochs=0.5),
        "shared": detection(tmp_path, "vit", batch=4, epochs=2, masks=True),
    }
    (tmp_path / "asked").write_bytes(pickle.dumps(asked))
    (tmp_path / "worker.py").write_text(WORKER)
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1"}
        command = [*launch, str(tmp_path / "worker.py"), str(tmp_path)]
        subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    for name in asked:
        one, other = trained(tmp_path, name, 2)
        assert same(one["state"]["detector"], other["state"]["detector"])
        assert one["result"] == other["result"]
        assert one["result"]["num_images"] == 4
        assert list(one["result"]["set_aside"]["evaluations.val"]) == [1]
        (quiet,) = trained(tmp_path, name, 1)
        is_same = same(one["state"]["detector"], quiet["state"]["detector"])
        assert is_same == name.startswith("alone")  # the first has each step's image; losses are means over a share
    # In a checkpoint too, which the first writes alone.
    assert list(one["state"]["set_aside"]["evaluations.train"]) == [1]
    assert one["state"]["has_learned"]


@pytest.mark.slow
def test_average_precision_on_pasted_cut_outs_is_at_least_a_half(tmp_path):
    lines = tmp_path / "lines.jsonl"
    subprocess.run([sys.executable, SCRIPT, "--json", lines, "--out", tmp_path], check=True, timeout=1500)
    found = {line["figure"]: line["median"] for line in map(json.loads, lines.read_text().splitlines())}
    assert found["model: AP"] >= 0.5
    assert found["untrained: AP"] > 0.3
    assert (tmp_path / "detection_model_0.png").exists()
