"""`maskray evaluate`: what a model is worth, in one table."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maskray.cli.progress import Bar
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import load_as
from maskray.errors import StorageError

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.publish.appraised import Appraisal

_REASONS = 5
OF_FEATURES = ("model", "untrained", "raw pixels")


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser(
        "evaluate", help="what a model is worth: neighbours, probes, fine-tuning, detection, reconstructions"
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML that says which model, data and evaluations")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seed=1")
    parser.add_argument("--launcher", choices=("ray", "torch"), default="ray", help="torch: threads of this process")
    parser.add_argument("--out", type=Path, help="folder for the table as JSON and the figures as PNG")
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    config = load_as(EvaluateConfig, arguments.config, arguments.set)
    from maskray import appraisal

    prepared = appraisal.prepare(config)  # what is wrong is said before a cluster is started
    if arguments.out is not None:
        _make(arguments.out)
    with Bar("steps") as bar:
        if arguments.launcher == "torch":
            found = appraisal.appraise_here(prepared, bar.update)
        else:
            from maskray.on_ray.cluster import connected
            from maskray.on_ray.evaluate import appraise

            with connected(config.cluster):
                found = appraise(prepared, bar.update)
    show(found)
    if arguments.out is not None:
        (arguments.out / f"{found.name}.json").write_text(found.dump())
        for name, png in found.figures.items():
            (arguments.out / f"{name}.png").write_bytes(png)
    run_id = appraisal.record(prepared, found)  # last: what it may refuse hides nothing
    kept = f"in MLflow's run {run_id}" if run_id is not None else "not in MLflow, which has no run of it"
    Console(highlight=False).print(f"{found.model}: {kept}", soft_wrap=True)
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "results cannot be written there", key="--out", found=f"{folder} ({error.strerror})", fix="give a folder"
        ) from error


def show(found: Appraisal) -> None:
    """The tables."""
    console = Console(highlight=False)
    if found.scores:
        console.print(_accuracies(found))
    if found.likenesses:
        console.print(_likenesses(found))
    if found.detections:
        console.print(_detections(found))
    if found.undecodable:
        console.print(f"{len(found.undecodable)} images cannot be decoded, and count for nothing")
    for reason, count in Counter(each.reason for each in found.set_aside).most_common(_REASONS):
        console.print(f"detection: {count} annotations or images set aside: {reason}")
    if len({each.reason for each in found.set_aside}) > _REASONS:
        console.print(f"detection: {len(found.set_aside)} set aside in all; each is in the JSON")


def _accuracies(found: Appraisal) -> Table:
    title = f"Accuracy in % on {found.num_test:,} held-out images; below it, the 95 % interval over such images"
    table = Table(title=title, title_justify="left")
    kinds = [each for each in OF_FEATURES if any(score.features == each for score in found.scores)]
    table.add_column("evaluation")
    for kind in kinds:
        table.add_column(kind, justify="right")
    cells: dict[str, dict[str, str]] = {}
    for score in found.scores:
        drawn = "" if score.std_of_draws is None else f" ± {100 * score.std_of_draws:.1f}"
        ends = f"[dim]{100 * score.low:.1f} to {100 * score.high:.1f}[/dim]"
        cells.setdefault(score.evaluation, {})[score.features] = f"{100 * score.accuracy:.1f}{drawn}\n{ends}"
    notes = {score.evaluation: score.note for score in found.scores if score.features == "model" and score.note}
    for name, row in cells.items():
        note = f"\n[dim]{notes[name]}[/dim]" if name in notes else ""
        table.add_row(name + note, *(row.get(kind, "") for kind in kinds))
    return table


def _likenesses(found: Appraisal) -> Table:
    borrowed = any(each.uses_target_statistics for each in found.likenesses)
    note = "; each painted cell's mean and std are the original's" if borrowed else ""
    table = Table(title=f"Reconstruction of hidden cells{note}", title_justify="left")
    for heading in ("ratio", "loss", "PSNR of hidden pixels, dB", "SSIM, hidden cells painted"):
        table.add_column(heading, justify="right")
    for each in found.likenesses:
        table.add_row(f"{each.ratio:g}", f"{each.loss:.4f}", f"{each.psnr:.2f}", f"{each.ssim:.3f}")
    return table


def _detections(found: Appraisal) -> Table:
    first = found.detections[0]
    title = (
        f"Average precision in % on {first.num_images:,} images with {first.num_objects:,} objects, "
        f"after {first.num_steps:,} steps; untrained: from scratch"
    )
    table = Table(title=title, title_justify="left")
    kinds = list(dict.fromkeys(each.features for each in found.detections))
    table.add_column("of")
    for kind in kinds:
        table.add_column(kind, justify="right")
    rows: dict[str, dict[str, str]] = {}
    for score in found.detections:
        each = score.precision
        values = {"AP": each.ap, "AP50": each.ap50, "AP75": each.ap75}
        sizes = {"small": each.ap_small, "medium": each.ap_medium, "large": each.ap_large}
        values |= {f"AP, {size} objects": value for size, value in sizes.items() if value is not None}
        for name, value in values.items():
            rows.setdefault(f"{each.of}: {name}", {})[score.features] = f"{100 * value:.1f}"
    for name, row in rows.items():
        table.add_row(name, *(row.get(kind, "") for kind in kinds))
    return table
