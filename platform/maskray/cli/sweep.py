"""`maskray sweep`: many points of one run's config, judged and compared."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maskray.cli.amounts import short
from maskray.config.sweep import load_sweep

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.sweeping import Prepared
    from maskray.sweeps.record import Result

_MOST_ROWS = 40


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("sweep", help="mask ratio, decoder, target: which is best for these images")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the sweep")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seeds=[0]")
    parser.add_argument("--dry-run", action="store_true", help="check all, show what it will take, and stop")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the last sweep of this name, if there is one")
    again.add_argument("--new", action="store_true", help="begin another sweep of this name, beside the last")
    parser.set_defaults(command=_sweep)


def _sweep(arguments: argparse.Namespace) -> int:
    config = load_sweep(arguments.config, arguments.set)
    from maskray import sweeping

    prepared = sweeping.prepare(
        config, resume=arguments.resume, new=arguments.new, commit=os.environ.get("MASKRAY_COMMIT")
    )
    console = Console(highlight=False)
    console.print(_bill(prepared))
    if arguments.dry_run:
        return 0
    from maskray.on_ray import sweep
    from maskray.on_ray.cluster import connected

    def show(result: Result, ended: Counter[str]) -> None:
        counts = ", ".join(f"{number} {status}" for status, number in sorted(ended.items()))
        value = result.reason if result.value is None else f"{100 * result.value:.1f} %"
        console.print(f"{sum(ended.values())}/{prepared.num_trials} ({counts})  {result.trial.name}: {value}")

    with connected(prepared.space.base.cluster), sweeping.begun(prepared) as run_id:
        prepared = sweeping.measured(prepared, sweep.measure)
        sweep.run(prepared, run_id, show)
        results = sweeping.finish(prepared, run_id)
    return int(sweeping.has_failed(config, results))


def _bill(prepared: Prepared) -> Table:
    """What the sweep will take."""
    seeds = len(prepared.config.seeds)
    per_point = {tuple(map(str, each.point.items())): each for each in prepared.trials}
    title = f"{prepared.name}: {prepared.num_trials} trials, {seeds} seeds a point"
    table = Table(title=title, title_justify="left")
    for heading in ("point", "steps", "FLOP an image step", "FLOP a trial", "encoder", "decoder"):
        table.add_column(heading, justify="left" if heading == "point" else "right")
    for each in list(per_point.values())[:_MOST_ROWS]:
        table.add_row(
            " ".join(each.name.split()[:-1]),
            f"{each.steps:,}",
            short(each.flops_per_step),
            short(each.flops),
            short(each.encoder_parameters),
            short(each.decoder_parameters),
        )
    return table
