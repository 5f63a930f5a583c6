"""The command line. Thin: it reads arguments, calls one function, and shows what comes back.

Each module is a group of commands, and tells the parser of them by its `add`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.logging import RichHandler

from maskray.cli import data, doctor, embed, estimate, evaluate, export, masks, pretrain, promote, submit, sweep
from maskray.config.embedding import EmbedConfig
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import json_schema
from maskray.config.promotion import PromotionConfig
from maskray.config.schema import RunConfig, TrackingConfig
from maskray.config.section import Section
from maskray.config.sweep import SweepConfig
from maskray.errors import MaskrayError, TrainingError

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
        kind = next((_KINDS[each.__name__] for each in type(error).__mro__ if each.__name__ in _KINDS), "Error")
        return _say(f"{kind}: {error}", USER_MISTAKE)
    except TrainingError as error:
        return _say(f"The run failed: {error}", RUN_FAILED)
    except KeyboardInterrupt:
        return _say(f"Stopped. {parsed.again}", INTERRUPTED)
    except _Terminated:
        return _say(f"Terminated. {parsed.again}", TERMINATED)


def pretrain_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/pretrain.py`."""
    return main(["pretrain", *(sys.argv[1:] if arguments is None else arguments)])


def ingest_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/ingest.py`."""
    return main(["ingest", *(sys.argv[1:] if arguments is None else arguments)])


def evaluate_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/evaluate.py`."""
    return main(["evaluate", *(sys.argv[1:] if arguments is None else arguments)])


def embed_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/embed.py`."""
    return main(["embed", *(sys.argv[1:] if arguments is None else arguments)])


def sweep_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/sweep.py`."""
    return main(["sweep", *(sys.argv[1:] if arguments is None else arguments)])


def promote_main(arguments: Sequence[str] | None = None) -> int:
    """`jobs/promote.py`."""
    return main(["promote", *(sys.argv[1:] if arguments is None else arguments)])


_ENVIRONMENT = {  # read by Ray and MLflow when they are imported
    # A thread of Ray's own that goes on after our cluster's end would start another, or join what it finds.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # of each run that a server is told to have ended, in between
    # The tracker tries again by itself, and a run that is being stopped has no two minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
_SCHEMAS: dict[str, type[Section]] = {
    "pretrain": RunConfig,
    "embed": EmbedConfig,
    "evaluate": EvaluateConfig,
    "promote": PromotionConfig,
    "sweep": SweepConfig,
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
    parser.set_defaults(again="The same command goes on where it stopped.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    data.add(commands)
    doctor.add(commands)
    embed.add(commands)
    estimate.add(commands)
    evaluate.add(commands)
    export.add(commands)
    masks.add(commands)
    pretrain.add(commands)
    promote.add(commands)
    submit.add(commands)
    sweep.add(commands)
    schema = commands.add_parser("schema", help="JSON Schema of the YAML, for editors")
    schema.add_argument("kind", nargs="?", choices=tuple(_SCHEMAS), default="pretrain", help="of config [pretrain]")
    schema.set_defaults(command=_schema)

    interface = commands.add_parser("ui", help="MLflow's UI on the embedded store")
    interface.add_argument("--storage", default="runs", help="the folder that `storage.path` names [runs]")
    interface.add_argument("--port", default="5000")
    interface.set_defaults(command=_ui)
    return parser


def _schema(arguments: argparse.Namespace) -> int:
    sys.stdout.write(json_schema(_SCHEMAS[arguments.kind]))
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    from maskray.tracking.mlflow_store import open_store

    uri = open_store(TrackingConfig(), str(Path(arguments.storage).absolute())).uri
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    return subprocess.call([*command, "--port", arguments.port, "--workers", "1"])
