"""`maskray export`: a model under the names that others read."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from maskray.models.parameter_names import FORMATS


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("export", help="write a model under the names that others read")
    parser.add_argument("source", help="folder or URI of a checkpoint, or of an encoder")
    parser.add_argument("destination", help="where: a .pth file for mae, a folder for the others")
    parser.add_argument(
        "--as",
        required=True,
        choices=FORMATS,
        dest="format",
        help="the MAE authors' code, Hugging Face's transformers, or timm (the encoder alone)",
    )
    parser.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from maskray.publish.foreign import export

    said = export(arguments.source, arguments.destination, arguments.format)
    Console(highlight=False).print(said, soft_wrap=True, markup=False)
    return 0
