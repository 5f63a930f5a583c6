"""`maskray ingest` and `maskray data`: pictures to a dataset, and looking at one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from maskray.cli.progress import Bar
from maskray.config.load import parse
from maskray.config.schema import IngestConfig

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.data.mapper import Mapper
    from maskray.data.overview import Overview

SHOWN_ROWS, SHEET_PICTURES = 20, 24
_ADDRESS = "a running Ray cluster; otherwise threads of this machine"


def add(commands: Any) -> None:
    """Tell the parser of them."""
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


def _ingest(arguments: argparse.Namespace) -> int:
    from maskray.data.ingest import ingest

    given = {name: getattr(arguments, name) for name in IngestConfig.model_fields if hasattr(arguments, name)}
    config = parse(IngestConfig, given, origin="ingest")
    with _mapper(arguments.address, config) as mapper, Bar() as bar:
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
    from maskray.on_ray.cluster import connected
    from maskray.on_ray.ingest import ray_mapper
    from maskray.on_ray.shared import check_ingest

    with connected(ClusterConfig(address=address)):
        if config is not None:
            check_ingest(config)
        yield ray_mapper()


def _data_show(arguments: argparse.Namespace) -> int:
    from maskray.data.overview import overview, samples
    from maskray.data.shards import Dataset
    from maskray.figures import pictures

    dataset = Dataset.open(arguments.dataset, arguments.version)
    with _mapper(arguments.address) as mapper, Bar() as bar:
        found = overview(dataset, mapper, bar.update)
    console = Console(highlight=False)
    for table in _overview_tables(found):
        console.print(table)
    chosen = samples(dataset, SHEET_PICTURES, pictures.TILE)
    title = f"{dataset.storage.uri}: {len(chosen)} of {dataset.num_rows():,} images"
    png = pictures.contact_sheet([s.image_HWC for s in chosen], [(s.key, s.label) for s in chosen], title=title)
    Path(arguments.sheet).write_bytes(png)
    console.print(f"{len(chosen)} of the pictures: {Path(arguments.sheet).absolute()}", soft_wrap=True)
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from maskray.data.check import check

    with _mapper(arguments.address) as mapper, Bar() as bar:
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
