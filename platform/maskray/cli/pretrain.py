"""`maskray pretrain`: a run, and what is said at its end."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maskray.config.load import load
from maskray.config.schema import RunConfig

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.evaluation.judgement import Judgement
    from maskray.launch import Summary


def add(commands: Any) -> None:
    """Tell the parser of it."""
    pretrain = commands.add_parser("pretrain", help="pretrain a masked autoencoder")
    pretrain.add_argument("--config", required=True, type=Path, help="YAML of the run")
    pretrain.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seed=1")
    pretrain.add_argument("--launcher", choices=("ray", "torch"), default="ray", help="torch: no Ray, or torchrun")
    pretrain.set_defaults(command=_pretrain)


def _pretrain(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.set)
    from maskray.launch import finished, launch, refuse_if_running
    from maskray.preparing import prepare

    prepared = prepare(config, os.environ.get("MASKRAY_COMMIT"))  # what is wrong is said before a cluster is started
    summary = finished(prepared)
    if summary is None and arguments.launcher == "torch":
        from maskray import bare

        summary = bare.run(prepared)
    elif summary is None:
        from maskray.on_ray.cluster import connected
        from maskray.on_ray.train import RayLauncher

        refuse_if_running(prepared)
        with connected(config.cluster):
            summary = launch(prepared, RayLauncher())
    if summary is not None:
        show(summary, config)
    return 0


def show(summary: Summary, config: RunConfig) -> None:
    """What a run came to."""
    console = Console()
    if summary.already_finished:
        console.print(
            "This run is finished: nothing to do. To train on from it, start a run of another name with "
            f"--set init_from={config.storage.path}/{summary.run_name}/<checkpoint>.\n"
        )
    facts = Table.grid(padding=(0, 3))
    if summary.is_known:
        facts.add_row("run", f"{summary.run_name}, {summary.steps} steps in {summary.seconds:.0f} s")
        facts.add_row("loss", f"{summary.first_loss:.4f} first, {summary.last_loss:.4f} last")
        facts.add_row("MLflow run", f"{summary.run_id} (experiment {config.tracking.experiment})")
        model = f"models:/{summary.model_name}/{summary.model_version}"
        facts.add_row("model", f'{model} for mlflow.pyfunc.load_model("…")')
    else:
        facts.add_row("run", f"{summary.run_name}, {summary.steps} steps; MLflow knows the rest")
    embedded = config.tracking.uri is None
    interface = f"{program()} ui --storage {shlex.quote(config.storage.path)}"
    facts.add_row("look at it", interface if embedded else summary.tracking_uri)
    console.print(facts)
    if summary.judgement is not None:
        console.print(_accuracies(summary.judgement))
        pixels = summary.judgement.pixels
        if pixels is not None and pixels.few_labels.mean > summary.judgement.after.few_labels.mean:
            console.print(
                "Raw pixels win here: on images this small and clean a linear model needs no encoder. "
                "What pretraining brought is the step from before to after."
            )


def program() -> str:
    """What to type for this program: its name where the shell finds it, else the path that it was started by."""
    if shutil.which("maskray"):
        return "maskray"
    started_by = sys.argv[0]
    return started_by if Path(started_by).name == "maskray" else f"{sys.executable} -m maskray.cli"


def _accuracies(judged: Judgement) -> Table:
    table = Table(title=f"Accuracy on {judged.num_test} held-out images, frozen features", title_justify="left")
    columns = {"before pretraining": judged.before, "after": judged.after, "raw pixels": judged.pixels}
    shown = {heading: scores for heading, scores in columns.items() if scores is not None}
    table.add_column("read by")
    for heading in shown:
        table.add_column(heading, justify="right")
    few = [f"{100 * s.few_labels.mean:.1f} ± {100 * s.few_labels.std:.1f} %" for s in shown.values()]
    table.add_row(f"logistic regression, {judged.labels_per_class} labels a class ± std of draws", *few)
    every = [f"{100 * s.all_labels:.1f} %" for s in shown.values()]
    table.add_row(f"logistic regression, all {judged.num_train:,} labels", *every)
    table.add_row(f"{judged.k} nearest neighbours", *(f"{100 * s.knn:.1f} %" for s in shown.values()))
    return table
