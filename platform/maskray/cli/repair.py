"""`maskray repair`: what is wrong in a run's folder, mended."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maskray.config.load import load
from maskray.errors import ConfigError

if TYPE_CHECKING:  # a wrong command line must not wait for torch and Ray
    from maskray.repair.case import Case, Finding

_STYLES = {"noted": "green", "mended": "yellow", "left": "bold red"}


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("repair", help="explain and mend what is wrong in a run's folder")
    parser.add_argument("run", nargs="?", metavar="RUN_FOLDER", help="below storage.path, local or s3://bucket/…")
    parser.add_argument("--config", type=Path, help="YAML of the run, instead of its folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seed=1")
    parser.add_argument("--launcher", choices=("ray", "torch"), help="hand the run over to this one [it stays]")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.set_defaults(command=_repair)


def refuse_unclear_run(arguments: argparse.Namespace) -> None:
    """A folder or a config says which run.

    Raises:
        ConfigError: neither is given, or both are.
    """
    if (arguments.run is None) == (arguments.config is None):
        raise ConfigError(
            "say which run", found="both" if arguments.run else "nothing", allowed="a folder, or --config"
        )


def _repair(arguments: argparse.Namespace) -> int:
    refuse_unclear_run(arguments)
    config = None if arguments.config is None else load(arguments.config, arguments.set)
    from maskray.data.storage import Storage
    from maskray.repair.case import Case, State, run_of
    from maskray.repair.mending import repair

    case = Case(Storage((arguments.run or ".").rstrip("/")), dry_run=arguments.dry_run, launcher=arguments.launcher)
    if config is not None:
        case.config, case.run = run_of(config)
    console, counts = Console(highlight=False, markup=False), Counter[State]()
    for finding in repair(case):
        counts[finding.state] += 1
        _show(console, finding, dry_run=case.dry_run)
    console.print(_ending(case, counts.total()))
    return 1 if counts[State.LEFT] or (case.dry_run and counts[State.MENDED]) else 0


def _ending(case: Case, findings: int) -> str:
    if case.is_finished:
        then = "the run is finished"
    elif case.newest is not None:
        then = f"the next launch goes on from {case.newest}"
    else:
        then = "the next launch begins anew" if not case.folders else "no checkpoint is whole"
    said = f"{findings} finding{'s' * (findings != 1)}" if findings else "nothing is wrong"
    return f"{case.run.uri}: {said}; {then}{'. Nothing was changed: a dry run' * case.dry_run}"


def _show(console: Console, finding: Finding, *, dry_run: bool) -> None:
    """One line, or more where the terminal is narrow."""
    line = Table.grid(padding=(0, 2))
    line.add_column(style=_STYLES[finding.state], width=len("mended"))
    line.add_column(overflow="fold")
    would = "would be " * (dry_run and finding.state == "mended")
    line.add_row("to do" if would else finding.state, f"{finding.what}: {finding.why} → {would}{finding.done}")
    console.print(line)
