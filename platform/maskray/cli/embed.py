"""`maskray embed`: a whole collection of images to a table of embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from maskray.cli.progress import Bar
from maskray.config.embedding import EmbedConfig
from maskray.config.load import load_as


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("embed", help="embed all images of a dataset, folder or bucket: a Parquet table")
    parser.add_argument("--config", required=True, type=Path, help="YAML that says which encoder, images and place")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. batch=64")
    parser.add_argument("--launcher", choices=("ray", "torch"), default="ray", help="torch: threads of this process")
    parser.add_argument("--figures", type=int, default=0, metavar="N", help="images like N of them, and a map, as PNG")
    parser.set_defaults(command=_embed)


def _embed(arguments: argparse.Namespace) -> int:
    config = load_as(EmbedConfig, arguments.config, arguments.set)
    from maskray.embedding import table

    prepared = table.prepare(config)  # what is wrong is said before a cluster is started
    console = Console(highlight=False)
    if prepared.is_finished:
        console.print("These embeddings are finished: nothing to do.")
    with Bar() as bar:
        if prepared.is_finished or arguments.launcher == "torch":
            manifest = table.embed_here(prepared, bar.update)
        else:
            from maskray.on_ray.cluster import connected
            from maskray.on_ray.embed import embed

            with connected(config.cluster):
                manifest = embed(prepared, bar.update)
    bad = f", {manifest['undecodable']} images cannot be decoded (_undecodable.parquet)" * bool(manifest["undecodable"])
    console.print(
        f"{prepared.storage.uri}: {manifest['rows']:,} embeddings of {prepared.encoder.width} values in "
        f"{len(manifest['parts'])} files{bad}, by {manifest['encoder_name']}",
        soft_wrap=True,
    )
    if arguments.figures > 0:
        from maskray.embedding import sights

        for place in sights.draw(prepared, arguments.figures):
            console.print(f"look at it: {place}", soft_wrap=True)
    return 0
