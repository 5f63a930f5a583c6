"""`maskray sweep`: many points of one run's config, judged and compared."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maskray.cli.rate import rate_of
from maskray.config.sweep import LOSS, RandomSearch, load_sweep
from maskray.wording import short, time_of

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.sweeping.preparing import Prepared
    from maskray.sweeps.record import Result, Trial

_MOST_ROWS, _MOST_POINTS = 40, 20


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("sweep", help="mask ratio, decoder, target: which is best for these images")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the sweep")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. seeds=[0]")
    parser.add_argument("--dry-run", action="store_true", help="check all, show what it will take, and stop")
    parser.add_argument(
        "--rate", type=float, metavar="FLOP/s", help="what a worker reaches, for hours [timed, where it is a CPU]"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the last sweep of this name, if there is one")
    again.add_argument("--new", action="store_true", help="begin another sweep of this name, beside the last")
    again.add_argument("--report", action="store_true", help="the report of what has ended so far, and no more")
    parser.set_defaults(command=_sweep, again="With --resume the same command goes on where it stopped.")


def _sweep(arguments: argparse.Namespace) -> int:
    config = load_sweep(arguments.config, arguments.set)
    rate = rate_of(arguments.rate)
    from maskray import offering
    from maskray.sweeping import life, preparing

    console = Console(highlight=False)
    if arguments.report:
        console.print(life.report_of(config), soft_wrap=True)
        return 0
    commit = os.environ.get("MASKRAY_COMMIT")
    prepared = preparing.prepare(config, resume=arguments.resume, new=arguments.new, commit=commit)
    console.print(_bill(prepared))
    console.print(_total(prepared, rate))
    if arguments.dry_run:
        return 0
    from maskray.on_ray.cluster import connected
    from maskray.on_ray.sweep import tune

    def show(result: Result, ended: Counter[str]) -> None:
        counts = ", ".join(f"{number} {status}" for status, number in sorted(ended.items()))
        said = result.reason if result.value is None else _shown(result.value, config.objective.metric)
        console.print(f"{sum(ended.values())}/{prepared.num_trials} ({counts})  {result.trial.name}: {said}")

    with connected(prepared.space.base.cluster):
        tune.concurrency_of(prepared)  # what is wrong is said before anything is begun
        with life.begun(prepared) as run_id:
            prepared = preparing.measured(prepared, tune.measure)
            tune.run(prepared, run_id, show)
            results = life.finish(prepared, run_id)
    _show_end(console, prepared, results)
    best = offering.best_trial(config, results)
    place = (prepared.space, prepared.folder, prepared.store, prepared.code)
    if best is not None and (registered := offering.register(*place, best)) is not None:
        said = "" if registered.decision is None else f", {registered.decision}"
        console.print(f"registered: version {registered.version} of {registered.model}{said}", soft_wrap=True)
    return int(life.has_failed(config, results))


def _show_end(console: Console, prepared: Prepared, results: Mapping[str, Result]) -> None:
    """The points, the best first, and where to read on."""
    from maskray.sweeps.measure import measure_of
    from maskray.sweeps.ranking import judged, ranked
    from maskray.sweeps.record import REPORT
    from maskray.sweeps.report import PAGE
    from maskray.sweeps.tables import points

    config, base = prepared.config, prepared.space.base
    found = ranked(config, results)
    measure = measure_of(config, base, found)
    told = points(config, found, judged(config, found), measure)
    table = Table(title=told.heading, title_justify="left", caption=told.words, caption_justify="left")
    for head in told.heads:
        table.add_column(head.words, justify="right" if head.is_number else "left")
    for row in told.rows[:_MOST_POINTS]:
        table.add_row(*(cell.words for cell in row.cells))
    console.print(table)
    console.print(f"report: {prepared.folder.join(REPORT, PAGE)}, and in MLflow's run {prepared.name}", soft_wrap=True)


def _shown(value: float, metric: str) -> str:
    return f"{value:.4f}" if metric == LOSS else f"{100 * value:.1f} %"


def _bill(prepared: Prepared) -> Table:
    """What each point will take."""
    axes = list(prepared.config.space)
    table = Table(title=f"{prepared.name}, judged by {prepared.config.objective.metric}", title_justify="left")
    for heading in (*axes, "steps", "FLOP a step", "FLOP", "encoder", "decoder"):
        table.add_column(heading, justify="right")
    points = list(_points(prepared).values())
    is_known = not prepared.space.unmeasured()
    for each in points[:_MOST_ROWS]:
        table.add_row(
            *(_value(each, axis) for axis in axes),
            f"{each.steps:,}" if is_known else "as timed",
            short(each.flops_per_step),
            short(each.flops) if is_known else "as timed",
            short(each.encoder_parameters),
            short(each.decoder_parameters),
        )
    if len(points) > _MOST_ROWS:
        table.caption = f"and {len(points) - _MOST_ROWS} more points"
    return table


def _total(prepared: Prepared, rate: float | None) -> str:
    """What all of it will take."""
    from maskray.sweeping.preparing import measured_rate

    seeds, cluster = len(prepared.config.seeds), prepared.space.base.cluster
    left = prepared.num_trials - sum(each.status != "failed" for each in prepared.results.values())
    mean = sum(each.flops for each in prepared.trials) / len(prepared.trials)
    words = [f"{prepared.num_trials} trials ({seeds} seed{'' if seeds == 1 else 's'} a point)"]
    words += _missing(prepared)
    words += [f"{left} of them left"] if left < prepared.num_trials else []
    if prepared.space.unmeasured():
        assert prepared.config.budget is not None
        assert prepared.config.budget.accelerator_seconds is not None
        seconds = prepared.config.budget.accelerator_seconds
        words += [f"{seconds:g} s of training each: a few steps of every point are timed before the first trial"]
        return "; ".join([*words, f"{time_of(left * seconds / cluster.workers / 3600)} one after another"])
    words += [f"{short(left * mean, 'FLOP')} in all, if none is stopped"]
    if rate is None and not cluster.gpus_per_worker:
        rate = measured_rate(prepared)
    if rate is None:
        return "; ".join([*words, "hours are not known: give --rate, the FLOP/s that a GPU reaches, such as 4e14"])
    unit = "accelerator-hours" if cluster.gpus_per_worker else "worker-hours"
    hours = left * mean / rate / 3600
    words += [f"{hours:.3g} {unit} at {short(rate, 'FLOP/s')}: {time_of(hours)} one after another"]
    return "; ".join(words)


def _missing(prepared: Prepared) -> list[str]:
    """Points that were asked for and that the space does not have."""
    search, drawn = prepared.config.search, prepared.space.num_drawn
    if not isinstance(search, RandomSearch) or drawn == search.points:
        return []
    return [f"{drawn} of {search.points} points drawn: the space has no more"]


def _points(prepared: Prepared) -> dict[tuple[str, ...], Trial]:
    return {tuple(_value(each, axis) for axis in prepared.config.space): each for each in prepared.trials}


def _value(trial: Trial, axis: str) -> str:
    from maskray.sweeps.record import shown

    return shown(trial.point[axis]) if axis in trial.point else "-"
