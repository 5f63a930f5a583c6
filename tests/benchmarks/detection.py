"""Faster R-CNN on a pretrained transformer and on the same from scratch: python tests/benchmarks/detection.py

A set that is made on the spot (`tests/cutouts.py`): handwritten digits pasted on photographs, of known boxes. A small
transformer is pretrained on 2,000 canvases without labels, through maskray's own `pretrain`; then 160 other canvases
with boxes are trained on, and 100 with digits that were never seen judge. One core.

What must come out: the pretrained one's AP over the thresholds .50 to .95 is at least 0.5. What moves it: seeds
(`--repeats`), the passes over the labels, and the rate: `--rate 0.1` is too much from scratch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import Report, arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "platform"))

import cutouts
from maskray.appraisal import appraise_here, prepare
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import parse
from maskray.config.schema import IngestConfig, RunConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.pretrain import pretrain
from maskray.tracking.base import MemoryTracker
from maskray.training.context import LocalContext

SIDE, UNLABELLED, TRAIN, VAL = 96, 2000, 160, 100
SMALL = {"pyramid_width": 32, "head_width": 64, "proposals": 64, "sampled_boxes": 32}


def main() -> None:
    """Print the table; exit code 1 where what must come out does not."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, default=600, help="of pretraining (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=24, help="of each detector (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.06, help="base_lr of each detector (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(f"detection: {TRAIN} canvases of {SIDE} px, {options.epochs} epochs, one core", options.json)
    with tempfile.TemporaryDirectory(prefix="maskray-") as temporary:
        folder = Path(temporary)
        start = time.process_time()
        model = _pretrained(folder / "pretraining", options.steps)
        report.add(f"pretraining, {options.steps} steps", [time.process_time() - start], "CPU s")
        for part, (name, num) in enumerate({"train": TRAIN, "val": VAL}.items()):
            cutouts.write(folder / name, num, seed=0, side=SIDE, part=part)
        is_met = _compared(folder, model, options, report)
    report.show()
    sys.exit(not is_met)


def _compared(folder: Path, model: Path, options: argparse.Namespace, report: Report) -> bool:
    found: dict[str, list[float]] = {}
    for seed in range(options.repeats):
        told: dict[str, list[float]] = {}

        def tell(done: int, total: int, phase: str, told: dict[str, list[float]] = told) -> None:
            del done, total
            told.setdefault(phase.split(", ")[1], []).append(time.process_time())

        appraisal = appraise_here(prepare(_evaluation(folder, model, options, seed)), tell)
        for score in appraisal.detections:
            times = told[score.features]
            found.setdefault(f"{score.features}: AP", []).append(score.precision.ap)
            found.setdefault(f"{score.features}: AP50", []).append(score.precision.ap50)
            found.setdefault(f"{score.features}: AP75", []).append(score.precision.ap75)
            found.setdefault(f"{score.features}: training", []).append(times[-1] - times[0])
        for name, png in appraisal.figures.items() if options.out is not None else ():
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{name}_{seed}.png").write_bytes(png)
    for name, values in found.items():
        needed = 0.5 if name == "model: AP" else None
        report.add(name, values, "CPU s" if name.endswith("training") else "", at_least=needed)
    return sorted(found["model: AP"])[len(found["model: AP"]) // 2] >= 0.5


def _pretrained(folder: Path, steps: int) -> Path:
    """A checkpoint's folder."""
    cutouts.write(folder / "canvases", UNLABELLED, seed=7, side=SIDE)
    source, destination = str(folder / "canvases" / "images"), str(folder / "data")
    ingest(
        IngestConfig(source=source, destination=destination, group_rows=16, held_out_fraction=0.02), thread_mapper(1)
    )
    config = parse(
        RunConfig,
        {
            "name": "cutouts",
            "data": {
                "path": destination,
                "image_size": SIDE,
                "crop": {"kind": "whole"},
                "flip_probability": 0,
                "normalize": "dataset",
                "stream": "local",
                "cache_folder": str(folder / "cache"),
            },
            "model": {
                "patch": 8,
                "width": 96,
                "depth": 4,
                "heads": 3,
                "decoder": {"width": 64, "depth": 1, "heads": 2},
            },
            "optim": {"global_batch": 64, "steps": steps, "warmup_steps": steps // 10, "base_lr": 1e-3},
            "training": {"checkpoint_steps": steps, "log_steps": 50, "threads": 1},
        },
    )
    context = LocalContext(folder / "runs", config.data)
    pretrain(config, context, MemoryTracker())
    with context.latest_checkpoint() as checkpoint:
        assert checkpoint is not None
        return checkpoint


def _evaluation(folder: Path, model: Path, options: argparse.Namespace, seed: int) -> EvaluateConfig:
    data = {
        name: {"annotations": str(folder / name / "annotations.json"), "images": str(folder / name / "images")}
        for name in ("train", "val")
    }
    recipe = {
        "epochs": options.epochs,
        "batch": 8,
        "base_lr": options.rate,
        "weight_decay": 0.05,
        "layer_decay": 0.8,
        "drop_path": 0,
    }
    detection = {"kind": "detection", "image_size": SIDE, "flip_probability": 0, **data, **recipe, **SMALL}
    plain = {"name": "cutouts", "model": str(model), "evaluations": [detection], "seed": seed}
    return parse(EvaluateConfig, plain | {"storage": {"path": str(folder / "runs")}})


if __name__ == "__main__":
    main()
