"""How the benchmarks measure and report: sides in turn, medians, a table on the screen and a line of JSON a figure."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

PACKAGES = (
    *("torch", "torchvision", "torchcodec", "pillow", "pyarrow", "ray", "webdataset", "litdata", "datasets"),
    *("timm", "lightly", "transformers"),
)


def arguments(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="of each side (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to which a line is added for each figure")
    return parser


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each side in turn, `repeats` times: what slows the machine for a while then slows all of them."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            values[name].append(side())
    return values


def ratios(values: Sequence[float], of: Sequence[float]) -> list[float]:
    """Turn by turn: the machine was the most alike within one."""
    return [value / other for value, other in zip(values, of, strict=True)]


class Report:
    """The figures of one benchmark.

    Args:
        name: of the benchmark.
        path: file for the lines of JSON, or None.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self._name, self._path = name, path
        self._table = Table("figure", "median", "lowest", "highest", "unit", "needed", title=name)
        self._load = os.getloadavg()[0]

    def add(
        self,
        figure: str,
        values: Sequence[float],
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """A figure measured `len(values)` times, and what it must reach."""
        median = statistics.median(values)
        met = (at_least is None or median >= at_least) and (at_most is None or median <= at_most)
        needed = f"≥ {at_least:g}" if at_least is not None else f"≤ {at_most:g}" if at_most is not None else ""
        shown = [f"{v:,.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in (median, min(values), max(values))]
        self._table.add_row(figure, *shown, unit, f"{needed} {'met' if met else 'MISSED'}" if needed else "")
        line = {
            "benchmark": self._name,
            "figure": figure,
            "median": median,
            "values": list(values),
            "unit": unit,
            **({"needed": needed, "met": met} if needed else {}),
            "date": date.today().isoformat(),
            "machine": machine() | {"load_before": round(self._load, 1)},
            "versions": versions(),
        }
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def note(self, text: str) -> None:
        """Something that the table's reader must know."""
        self._table.caption = f"{self._table.caption}\n{text}" if self._table.caption else text

    def show(self) -> None:
        """Print the table."""
        Console(width=max(120, Console().width)).print(self._table)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Of the packages that are measured, where they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
