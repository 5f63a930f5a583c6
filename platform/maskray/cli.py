"""The command line. Thin: it reads arguments, calls one function, and shows what comes back."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress
from rich.table import Table

from maskray.config.load import json_schema, load, parse
from maskray.config.schema import IngestConfig, RunConfig, TrackingConfig
from maskray.errors import MaskrayError, TrainingError

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.evaluation.judgement import Judgement
    from maskray.launch import Summary

USER_MISTAKE, RUN_FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 2 for a mistake of the user's, 1 for a run that failed."""
    parsed = _parser().parse_args(arguments)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    logging.getLogger("maskray").setLevel(logging.INFO if parsed.verbose else logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(parsed.command(parsed))
    except MaskrayError as error:
        return _say(f"{_KINDS.get(type(error).__name__, 'Error')}: {error}", USER_MISTAKE)
    except TrainingError as error:
        return _say(f"The run failed: {error}", RUN_FAILED)
    except KeyboardInterrupt:
        return _say("Stopped. The same command goes on from the latest checkpoint.", INTERRUPTED)
    except _Terminated:
        return _say("Terminated. The same command goes on from the latest checkpoint.", TERMINATED)


def pretrain_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/pretrain.py`."""
    return main(["pretrain", *(sys.argv[1:] if arguments is None else arguments)])


def ingest_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/ingest.py`."""
    return main(["ingest", *(sys.argv[1:] if arguments is None else arguments)])


_ENVIRONMENT = {  # read by MLflow when it is imported
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The tracker tries again by itself, and a run that is being stopped has no two minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
_KINDS = {
    "ConfigError": "Config",
    "DataError": "Dataset",
    "CheckpointError": "Checkpoint",
    "ClusterError": "Cluster",
    "TrackingError": "MLflow",
    "StorageError": "Storage",
    "UnreachableError": "Storage",
    "RunConflictError": "Already running",
}


class _Terminated(BaseException):
    """SIGTERM: closes what is open on its way out."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _say(message: str, code: int) -> int:
    sys.stderr.write(textwrap.fill(message, width=100, break_long_words=False, break_on_hyphens=False) + "\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="maskray", description="Masked autoencoders on Ray.")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ingest = commands.add_parser("ingest", help="turn images into a dataset of shards")
    ingest.add_argument("source", help="a folder of images (class subfolders give labels), or `digits`")
    ingest.add_argument("destination", help="folder or URI of the dataset")
    for name, field in IngestConfig.model_fields.items():
        if not field.is_required():
            flag = "--" + name.replace("_", "-")
            ingest.add_argument(flag, default=field.default, metavar="N", help=f"{field.description} [{field.default}]")
    ingest.add_argument("--address", help="a running Ray cluster; otherwise threads of this machine")
    ingest.set_defaults(command=_ingest)

    pretrain = commands.add_parser("pretrain", help="pretrain a masked autoencoder")
    pretrain.add_argument("--config", required=True, type=Path, help="YAML of the run")
    pretrain.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seed=1")
    pretrain.add_argument("--launcher", choices=("ray", "torch"), default="ray", help="torch: no Ray, or torchrun")
    pretrain.set_defaults(command=_pretrain)

    schema = commands.add_parser("schema", help="JSON Schema of the YAML, for editors")
    schema.set_defaults(command=_schema)

    interface = commands.add_parser("ui", help="MLflow's UI on the embedded store")
    interface.add_argument("--storage", default="runs", help="the folder that `storage.path` names [runs]")
    interface.add_argument("--port", default="5000")
    interface.set_defaults(command=_ui)
    return parser


def _ingest(arguments: argparse.Namespace) -> int:
    from maskray.data.ingest import ingest, thread_mapper

    given = {name: getattr(arguments, name) for name in IngestConfig.model_fields}
    config = parse(IngestConfig, given, origin="ingest")
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        tasks = {p: progress.add_task(p, total=None, visible=False) for p in ("verify", "check", "write")}

        def show(done: int, total: int, phase: str) -> None:
            progress.update(tasks[phase], completed=done, total=total, visible=True)

        address = arguments.address or os.environ.get("RAY_ADDRESS")
        if address:
            from maskray.config.schema import ClusterConfig
            from maskray.on_ray.cluster import check_ingest, connected
            from maskray.on_ray.ingest import ray_mapper

            with connected(ClusterConfig(address=address)):
                check_ingest(config)
                manifest = ingest(config, ray_mapper(), show)
        else:
            manifest = ingest(config, thread_mapper(os.cpu_count() or 1), show)
    rows = {name: split.rows for name, split in manifest.splits.items()}
    Console().print(
        f"{config.destination}: {rows['train']} images to train on, {rows['held_out']} held out, "
        f"{manifest.num_quarantined} set aside, {len(manifest.class_names)} classes, fingerprint {manifest.fingerprint}"
    )
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.set)
    from maskray.launch import finished, launch, prepare, refuse_if_running

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
        _show(summary, config)
    return 0


def _schema(_arguments: argparse.Namespace) -> int:
    sys.stdout.write(json_schema(RunConfig))
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    from maskray.tracking.mlflow_store import open_store

    uri = open_store(TrackingConfig(), str(Path(arguments.storage).absolute())).uri
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    return subprocess.call([*command, "--port", arguments.port, "--workers", "1"])


def _show(summary: Summary, config: RunConfig) -> None:
    console = Console()
    if summary.already_finished:
        console.print(
            "This run is finished: nothing to do. To train on from it, start a run of another name with "
            f"--set init_from={config.storage.path}/{summary.run_name}/<checkpoint>.\n"
        )
    facts = Table.grid(padding=(0, 3))
    facts.add_row("run", f"{summary.run_name}, {summary.steps} steps in {summary.seconds:.0f} s")
    facts.add_row("loss", f"{summary.first_loss:.4f} first, {summary.last_loss:.4f} last")
    facts.add_row("MLflow run", f"{summary.run_id} (experiment {config.tracking.experiment})")
    facts.add_row("model", f'models:/{summary.model_name}/{summary.model_version} for mlflow.pyfunc.load_model("…")')
    embedded = config.tracking.uri is None
    interface = f"{_program()} ui --storage {shlex.quote(config.storage.path)}"
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


def _program() -> str:
    """What to type for this program: its name where the shell finds it, else the path that it was started by."""
    if shutil.which("maskray"):
        return "maskray"
    started_by = sys.argv[0]
    return started_by if Path(started_by).name == "maskray" else f"{sys.executable} -m maskray.cli"


def _accuracies(judged: Judgement) -> Table:
    table = Table(title=f"Accuracy of a linear probe on {judged.num_test} held-out images", title_justify="left")
    columns = {"before pretraining": judged.before, "after": judged.after, "raw pixels": judged.pixels}
    shown = {heading: scores for heading, scores in columns.items() if scores is not None}
    table.add_column("labels")
    for heading in shown:
        table.add_column(heading, justify="right")
    few = [f"{100 * s.few_labels.mean:.1f} ± {100 * s.few_labels.std:.1f} %" for s in shown.values()]
    table.add_row(f"{judged.labels_per_class} a class, mean ± std of the draws", *few)
    table.add_row(f"all {judged.num_train:,}", *(f"{100 * s.all_labels:.1f} %" for s in shown.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
