"""What pretraining is worth on one dataset: every evaluation of a list, over seeds of the whole of it, in one table.

    python tests/benchmarks/worth.py --config configs/pretrain/digits.yaml --evaluate configs/evaluate/digits.yaml \
        --evaluate configs/evaluate/digits_finetune.yaml --set data.path=runs/data/digits

Each seed is a pretraining of its own, and draws labels and heads of its own; so is the network before training, which
is also the one that is trained from scratch. All in this process, on bare torch; the time is that of the CPU.
"""

from __future__ import annotations

import resource
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from measure import Report, arguments
from rich.console import Console
from rich.table import Table

from maskray import appraisal
from maskray.bare import BareLauncher
from maskray.config.evaluation import EvaluateConfig
from maskray.config.load import load, load_as
from maskray.launch import finished, launch
from maskray.preparing import prepare

COLUMNS = {"model": "pretrained", "untrained": "untrained, or from scratch", "raw pixels": "raw pixels"}


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--config", required=True, type=Path, help="YAML of the pretraining")
    parser.add_argument("--evaluate", action="append", required=True, type=Path, help="YAML of evaluations; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the pretraining")
    parser.add_argument("--storage", default="runs/worth", help="where runs are kept (default: %(default)s)")
    given = parser.parse_args()
    report = Report(f"worth, {given.config.stem}", given.json)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for seed in range(given.repeats):
        start = spent()
        run = load(given.config, [*given.set, f"seed={seed}", f"storage.path={given.storage}", "data.stream=local"])
        prepared = prepare(run)
        if finished(prepared) is None:
            launch(prepared, BareLauncher())
            seconds["pretraining"].append(spent() - start)
        with BareLauncher().newest_checkpoint(prepared) as checkpoint:
            for path in given.evaluate:
                start = spent()
                place = [f"model={checkpoint}", f"data.path={run.data.path}", f"storage.path={given.storage}"]
                config = load_as(EvaluateConfig, path, [*place, f"seed={seed}"])
                for score in appraisal.appraise_here(appraisal.prepare(config)).scores:
                    found[score.evaluation, score.features].append(score.accuracy)
                seconds[path.stem].append(spent() - start)
    for (evaluation, features), accuracies in found.items():
        report.add(f"{evaluation}: {COLUMNS[features]}", [100 * each for each in accuracies], "%")
    for what, values in seconds.items():
        report.add(f"CPU time of {what}, a seed", values, "s")
    Console(width=140).print(_table(found, given.repeats))
    report.show()


def _table(found: dict[tuple[str, str], list[float]], seeds: int) -> Table:
    table = Table("evaluation", *COLUMNS.values(), title=f"Accuracy in %, mean ± std of {seeds} seeds")
    for evaluation in dict.fromkeys(evaluation for evaluation, _ in found):
        cells = []
        for features in COLUMNS:
            each = [100 * accuracy for accuracy in found.get((evaluation, features), [])]
            cells.append(f"{mean(each):.1f} ± {stdev(each) if len(each) > 1 else 0:.1f}" if each else "")
        table.add_row(evaluation, *cells)
    return table


def spent() -> float:
    """Seconds of CPU of this process, its threads and what it has started."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in times)


if __name__ == "__main__":
    main()
