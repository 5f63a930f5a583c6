"""`maskray export`: a model as others open it, and the proof that they can."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from maskray.config.schema import TrackingConfig

FORMATS = ("mae", "hf", "timm", "onnx", "pt2")
"""`foreign.EXPORT_FORMATS`, which a wrong command line must not wait for."""


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("export", help="write a model as others open it, and prove that it is the same")
    parser.add_argument("source", help="folder or URI of a checkpoint or an encoder, or models:/NAME/VERSION, @ALIAS")
    parser.add_argument("destination", help="where: a .pth file for mae, a folder for the others")
    parser.add_argument(
        "--as",
        required=True,
        choices=FORMATS,
        dest="format",
        help="the MAE authors' code, Hugging Face's transformers, timm (the encoder), ONNX or torch.export (features)",
    )
    parser.add_argument("--storage", default="runs", help="the folder that `storage.path` names, for models:/ [runs]")
    parser.add_argument("--tracking-uri", help="MLflow's, for models:/ [the one beside the runs]")
    parser.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from maskray.publish.foreign import export
    from maskray.publish.named import tag_version
    from maskray.publish.subject import open_subject

    tracking = TrackingConfig(uri=arguments.tracking_uri)
    subject = open_subject(arguments.source, tracking, arguments.storage, "source")
    done = export(subject, arguments.destination, arguments.format)
    console = Console(highlight=False)
    for line in (done.how_to_open, f"It takes {done.takes}.", f"Proof: {done.proof}."):
        console.print(line, soft_wrap=True, markup=False)
    tag = f"maskray.export.{arguments.format}"
    if tag_version(subject.name, tag, str(done.proof), tracking, arguments.storage):
        console.print(f"Noted with {subject.name}.", soft_wrap=True, markup=False)
    return 0
