"""`maskray doctor`: what is wrong, in seconds, before a job finds out."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from maskray.config.load import load
from maskray.doctor.examination import examine
from maskray.doctor.finding import Finding, Level, Subject, counted
from maskray.errors import ConfigError

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAIL: "bold red"}
_NAME_WIDTH = 18


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("doctor", help="what is wrong, in seconds, before a job finds out")
    parser.add_argument("--config", type=Path, help="YAML of a run: dataset, storage, MLflow, room and memory for it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seed=1")
    parser.add_argument(
        "--address",
        help="of a running cluster (auto, host:port) or of its dashboard (http://host:8265) "
        "[cluster.address, RAY_ADDRESS]",
    )
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    subject = Subject()
    try:
        if arguments.config is not None:
            subject.config = load(arguments.config, arguments.set)
    except ConfigError as error:
        subject.config_error = error
    of_config = subject.config and subject.config.cluster.address
    subject.address = arguments.address or of_config or os.environ.get("RAY_ADDRESS")
    console, counts, left_out = Console(highlight=False, markup=False), Counter[Level](), list[str]()
    for name, finding in examine(subject):
        if finding is None:
            left_out.append(name)
            continue
        counts[finding.level] += 1
        _show(console, name, finding)
    if left_out:
        _show(console, "not looked at", Finding(Level.OK, ", ".join(left_out), _why(subject)), level="")
    total, warnings = counted(counts.total(), "check"), counted(counts[Level.WARNING], "warning")
    console.print(f"\n{total}: {counts[Level.FAIL]} failed, {warnings}, {counts[Level.OK]} ok")
    return 1 if counts[Level.FAIL] else 0


def _why(subject: Subject) -> str:
    if subject.config_error is not None:
        return "mend the config first"
    return "--config run.yaml" if subject.config is None else ""


def _show(console: Console, name: str, finding: Finding, level: str | None = None) -> None:
    """One line, or more where the terminal is narrow; the fix below it."""
    line = Table.grid(padding=(0, 2))
    line.add_column(width=len(Level.WARNING))
    line.add_column(width=_NAME_WIDTH)
    line.add_column(overflow="fold")
    line.add_row(finding.level if level is None else level, name, " ".join(finding.found.split()))
    line.columns[0].style = _STYLES[finding.level]
    if finding.fix:
        line.add_row("", "", f"→ {finding.fix}")
    console.print(line)
