"""`maskray masks`: every mask on one image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from maskray.config.load import load
from maskray.errors import StorageError


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("masks", help="a picture of the config's mask, and of every other, on one image")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. mask.ratio=0.6")
    parser.add_argument("--image", type=Path, help="a picture [the dataset's first held-out image]")
    parser.add_argument("--out", type=Path, default=Path("masks.png"), help="PNG [masks.png]")
    parser.set_defaults(command=_masks)


def _masks(arguments: argparse.Namespace) -> int:
    config = load(arguments.config, arguments.set)
    from maskray.evaluation.masks import image_of, mask_figure

    png, left_out = mask_figure(config, image_of(config, arguments.image))
    try:
        arguments.out.write_bytes(png)
    except OSError as error:
        raise StorageError(
            "the picture cannot be written", key="--out", found=f"{arguments.out} ({error.strerror})", fix="give a file"
        ) from error
    console = Console(highlight=False)
    for name, why in left_out.items():
        console.print(f"left out: {name} ({why})", soft_wrap=True, markup=False)
    console.print(str(arguments.out.absolute()), soft_wrap=True, markup=False)
    return 0
