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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from maskray.config.load import json_schema, load, parse
from maskray.config.schema import IngestConfig, RunConfig, TrackingConfig
from maskray.errors import MaskrayError, TrainingError
from maskray.models.parameter_names import FORMATS

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.data.mapper import Mapper
    from maskray.data.overview import Overview
    from maskray.evaluation.judgement import Judgement
    from maskray.launch import Summary

PLAIN_SECONDS = 5.0
SHOWN_ROWS, SHEET_PICTURES = 20, 24
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
_ADDRESS = "a running Ray cluster; otherwise threads of this machine"
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
    ingest.add_argument("source", help="images: a folder, tars, zips, a table or Parquet, here or s3://…; or `digits`")
    ingest.add_argument("destination", help="folder or URI of the dataset")
    for name, field in IngestConfig.model_fields.items():
        if not field.is_required():  # those that are not given take the defaults, or what the dataset was made with
            kind: dict[str, Any] = {"action": "store_true"} if field.annotation is bool else {"metavar": "N"}
            about = field.description if field.annotation is bool else f"{field.description} [{field.default}]"
            ingest.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=about, **kind)
    ingest.add_argument("--address", help=_ADDRESS)
    ingest.set_defaults(command=_ingest)

    data = commands.add_parser("data", help="look at a dataset, check it, clean it up")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    show = verbs.add_parser("show", help="counts, classes, sizes, channels, statistics, what was set aside, versions")
    show.add_argument("--version", help="fingerprint of a version [the newest]")
    show.add_argument("--sheet", default="contact-sheet.png", help="PNG of some pictures [contact-sheet.png]")
    show.set_defaults(command=_data_show)
    check = verbs.add_parser("check", help="compare every checksum of every version; exit code 2 if one is wrong")
    check.set_defaults(command=_data_check)
    gc = verbs.add_parser("gc", help="remove versions that no run or registered model needs: says first what would go")
    gc.add_argument("--delete", action="store_true", help="do it")
    gc.add_argument("--storage", help="where the runs are kept, whose datasets are in use, or `none` [runs]")
    gc.add_argument(
        "--tracking-uri",
        help="MLflow, whose runs' and models' datasets are in use, or `none` [the one beside the runs]",
    )
    gc.set_defaults(command=_data_gc)
    for verb in (show, check, gc):
        verb.add_argument("dataset", help="folder or URI of the dataset")
    for verb in (show, check):
        verb.add_argument("--address", help=_ADDRESS)

    pretrain = commands.add_parser("pretrain", help="pretrain a masked autoencoder")
    pretrain.add_argument("--config", required=True, type=Path, help="YAML of the run")
    pretrain.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seed=1")
    pretrain.add_argument("--launcher", choices=("ray", "torch"), default="ray", help="torch: no Ray, or torchrun")
    pretrain.set_defaults(command=_pretrain)

    export = commands.add_parser("export", help="write a model under the names that others read")
    export.add_argument("source", help="folder or URI of a checkpoint, or of an encoder")
    export.add_argument("destination", help="where: a .pth file for mae, a folder for the others")
    export.add_argument(
        "--as",
        required=True,
        choices=FORMATS,
        dest="format",
        help="the MAE authors' code, Hugging Face's transformers, or timm (the encoder alone)",
    )
    export.set_defaults(command=_export)

    schema = commands.add_parser("schema", help="JSON Schema of the YAML, for editors")
    schema.set_defaults(command=_schema)

    interface = commands.add_parser("ui", help="MLflow's UI on the embedded store")
    interface.add_argument("--storage", default="runs", help="the folder that `storage.path` names [runs]")
    interface.add_argument("--port", default="5000")
    interface.set_defaults(command=_ui)
    return parser


def _ingest(arguments: argparse.Namespace) -> int:
    from maskray.data.ingest import ingest

    given = {name: getattr(arguments, name) for name in IngestConfig.model_fields if hasattr(arguments, name)}
    config = parse(IngestConfig, given, origin="ingest")
    with _mapper(arguments.address, config) as mapper, _Bar() as bar:
        manifest = ingest(config, mapper, bar.update)
    rows = {name: split.rows for name, split in manifest.splits.items()}
    brought = manifest.origins[-1]
    added = f" ({brought.rows} of them new, {brought.skipped} were there)" if len(manifest.origins) > 1 else ""
    Console(highlight=False).print(
        f"{config.destination}: {rows['train']} images to train on, {rows['held_out']} held out{added}, "
        f"{manifest.num_quarantined} bad and {manifest.num_duplicates} duplicate ones set aside, "
        f"{len(manifest.class_names)} classes, fingerprint {manifest.fingerprint}",
        soft_wrap=True,
    )
    return 0


@contextmanager
def _mapper(address: str | None, config: IngestConfig | None = None) -> Iterator[Mapper]:
    """Who does the jobs: Ray where there is an address (and all nodes see an ingest's places), else threads."""
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        from maskray.data.mapper import thread_mapper

        yield thread_mapper(os.cpu_count() or 1)
        return
    from maskray.config.schema import ClusterConfig
    from maskray.on_ray.cluster import check_ingest, connected
    from maskray.on_ray.ingest import ray_mapper

    with connected(ClusterConfig(address=address)):
        if config is not None:
            check_ingest(config)
        yield ray_mapper()


def _data_show(arguments: argparse.Namespace) -> int:
    from maskray import figures
    from maskray.data.overview import overview, samples
    from maskray.data.shards import Dataset

    dataset = Dataset.open(arguments.dataset, arguments.version)
    with _mapper(arguments.address) as mapper, _Bar() as bar:
        found = overview(dataset, mapper, bar.update)
    console = Console(highlight=False)
    for table in _overview_tables(found):
        console.print(table)
    chosen = samples(dataset, SHEET_PICTURES, figures.TILE)
    title = f"{dataset.storage.uri}: {len(chosen)} of {dataset.num_rows():,} images"
    png = figures.contact_sheet([s.image_HWC for s in chosen], [(s.key, s.label) for s in chosen], title=title)
    Path(arguments.sheet).write_bytes(png)
    console.print(f"{len(chosen)} of the pictures: {Path(arguments.sheet).absolute()}", soft_wrap=True)
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from maskray.data.check import check

    with _mapper(arguments.address) as mapper, _Bar() as bar:
        shards = check(arguments.dataset, mapper, bar.update)
    size = sum(shard.size for shard in shards)
    Console(highlight=False).print(f"{len(shards)} shards of {size / 1e6:,.1f} MB: every checksum is right")
    return 0


def _data_gc(arguments: argparse.Namespace) -> int:
    from maskray.data.garbage import delete_garbage, find_garbage
    from maskray.data.storage import Storage
    from maskray.in_use import datasets_in_use

    storage = Storage(arguments.dataset)
    in_use = datasets_in_use(arguments.storage, arguments.tracking_uri, for_deletion=arguments.delete)
    garbage = find_garbage(storage, in_use.fingerprints)
    console = Console(highlight=False)
    named = f", or named by {' or '.join(in_use.asked)}" if in_use.asked else ""
    console.print(f"Kept: {', '.join(garbage.kept)} (the newest{named})", soft_wrap=True)
    for who in in_use.not_asked:
        console.print(f"Not asked: {who}", soft_wrap=True)
    for name, size in garbage.files.items():
        console.print(f"  {name}  {size:,} bytes", soft_wrap=True)
    total = f"{len(garbage.versions)} versions, {len(garbage.files)} files of {sum(garbage.files.values()):,} bytes"
    if arguments.delete:
        delete_garbage(storage, garbage)
        console.print(f"Removed: {total}")
    else:
        console.print(f"Nothing was removed. With --delete: {total}")
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


def _export(arguments: argparse.Namespace) -> int:
    from maskray.publish.foreign import export

    said = export(arguments.source, arguments.destination, arguments.format)
    Console(highlight=False).print(said, soft_wrap=True, markup=False)
    return 0


def _schema(_arguments: argparse.Namespace) -> int:
    sys.stdout.write(json_schema(RunConfig))
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    from maskray.tracking.mlflow_store import open_store

    uri = open_store(TrackingConfig(), str(Path(arguments.storage).absolute())).uri
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    return subprocess.call([*command, "--port", arguments.port, "--workers", "1"])


class _Bar:
    """How far a command is: a live bar a phase, or a plain line now and then where nobody watches."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        unit = TextColumn("{task.fields[unit]}  {task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._began: tuple[int, float] = (0, 0.0)
        self._said = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, done: int, total: int, phase: str) -> None:
        """What was done before the first word of a phase has no part in its rate."""
        now, unit = time.monotonic(), "shards" if phase == "verify" else "images"
        if phase not in self._tasks:
            self._began, self._said = (done, now), now
            self._tasks[phase] = self._live.add_task(phase, total=total, completed=done, unit=unit, rate="")
        first, start = self._began
        rate = f"{(done - first) / (now - start):,.0f} {unit}/s" if done > first else ""
        self._live.update(self._tasks[phase], completed=done, rate=rate)
        if self._live.disable and (now - self._said >= PLAIN_SECONDS or (done == total and done > first)):
            self._said = now
            self._console.print(f"{phase}: {done:,} of {total:,} {unit}  {rate}".rstrip(), soft_wrap=True)


def _overview_tables(found: Overview) -> Iterator[Table]:
    manifest = found.manifest
    facts = Table.grid(padding=(0, 3))
    for name, split in manifest.splits.items():
        size = sum(shard.size for shard in split.shards) / 1e6
        facts.add_row(name.replace("_", " "), f"{split.rows:,} images, {len(split.shards)} shards, {size:,.1f} MB")
    facts.add_row("channels", f"{manifest.channels}, row groups of {manifest.group_rows}")
    facts.add_row("mean", ", ".join(f"{value:.4f}" for value in manifest.mean))
    facts.add_row("std", ", ".join(f"{value:.4f}" for value in manifest.std))
    facts.add_row("set aside", f"{manifest.num_quarantined} bad, {manifest.num_duplicates} duplicates")
    facts.add_row("fingerprint", manifest.fingerprint)
    yield facts
    if found.classes:
        rows = [(name, counts["train"], counts["held_out"]) for name, counts in found.classes.items()]
        yield _counts_table("Classes", ("class", "train", "held out"), rows)
    sides = [(f"{side:,} to {2 * side - 1:,}", count) for side, count in found.short_sides.items()]
    yield _counts_table("Short side in pixels", ("pixels", "images"), sides)
    yield _counts_table("Channels of the pictures as they came", ("channels", "images"), list(found.channels.items()))
    if found.reasons:
        yield _counts_table("Set aside", ("reason", "images"), list(found.reasons.items()))
    versions = [
        (v.fingerprint, sum(split.rows for split in v.splits.values()), v.origins[-1].source) for v in found.versions
    ]
    yield _counts_table("Versions, oldest first", ("fingerprint", "images", "added from"), versions)


def _counts_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> Table:
    """Rows of a name and numbers; a bar behind the first of them, and no more rows than a screen has."""
    table = Table(title=title, title_justify="left")
    most = max((row[1] for row in rows), default=1) or 1
    for index, column in enumerate(columns):
        numbers = bool(rows) and isinstance(rows[0][index], int) and index > 0
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    table.add_column("")
    for row in rows[:SHOWN_ROWS]:
        cells = [f"{cell:,}" if isinstance(cell, int) else escape(str(cell)) for cell in row]
        table.add_row(*cells, "█" * round(20 * row[1] / most))
    if len(rows) > SHOWN_ROWS:
        table.caption = f"and {len(rows) - SHOWN_ROWS:,} more"
    return table


def _show(summary: Summary, config: RunConfig) -> None:
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
