"""Loss curves of a run in fp32 and in bf16, on the same images and masks: python tests/benchmarks/precision.py

ViT-S/16 at 224 px with a decoder of 256 × 4, as in `step.py`, on photographs, through maskray's own `pretrain`: the
same plan, so step by step the same batches. The loss is compared in windows of steps, of whose mean a run's log
consists.

What must come out: over 200 steps no window's loss in bf16 is further than 1 % from that in fp32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from measure import Report, arguments
from photographs import WORK, make_files

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "platform"))

from maskray.config.load import parse
from maskray.config.schema import IngestConfig, RunConfig
from maskray.data.ingest import ingest
from maskray.data.mapper import thread_mapper
from maskray.pretrain import pretrain
from maskray.tracking.base import MemoryTracker
from maskray.training.context import LocalContext

PHOTOGRAPHS, SHORT_SIDE, WINDOW_STEPS = 500, 256, 10


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4, help="the highest (default: %(default)s)")
    options = parser.parse_args()
    dataset = _dataset(options.batch)
    wide, narrow = (_curve(dataset, precision, options) for precision in ("fp32", "bf16"))
    report = Report(f"precision: vit_s/16, 224 px, decoder 256 × 4, batch {options.batch}, cpu", options.json)
    for name, curve in (("fp32", wide), ("bf16", narrow)):
        report.note(f"{name}: " + " ".join(f"{loss:.4f}" for loss in curve))
    report.add("fp32: last window's loss / the first's", [wide[-1] / wide[0]], "×")
    apart = max(abs(b / a - 1) for a, b in zip(wide, narrow, strict=True))
    report.add("furthest apart of all windows", [apart], "", at_most=0.01)
    report.show()


def _dataset(group_rows: int) -> Path:
    files = make_files(WORK, PHOTOGRAPHS, short_side=SHORT_SIDE)
    destination = files.with_name(f"{files.name}-by-{group_rows}")
    if not (destination / "manifest.json").exists():
        config = IngestConfig(
            source=str(files), destination=str(destination), group_rows=group_rows, held_out_fraction=0.0
        )
        ingest(config, thread_mapper(2))
    return destination


def _curve(dataset: Path, precision: str, options: argparse.Namespace) -> list[float]:
    """Mean loss of each window of steps."""
    config = parse(
        RunConfig,
        {
            "name": "precision",
            "data": {"path": str(dataset), "image_size": 224, "stream": "local"},
            "model": {"width": 384, "depth": 12, "heads": 6, "decoder": {"width": 256, "depth": 4, "heads": 8}},
            "optim": {
                "global_batch": options.batch,
                "steps": options.steps,
                "warmup_steps": options.steps // 10,
                "base_lr": options.lr * 256 / options.batch,
            },
            "training": {"precision": precision, "log_steps": WINDOW_STEPS, "threads": torch.get_num_threads()},
        },
    )
    tracker = MemoryTracker()
    with tempfile.TemporaryDirectory() as folder:
        pretrain(config, LocalContext(Path(folder) / "run", config.data), tracker)
    return [point.value for point in tracker.store.points if point.key == "pretrain/loss"]


if __name__ == "__main__":
    main()
