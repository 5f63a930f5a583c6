"""What a sweep found, as one page that needs nothing beside it: no other file, no network, no script but its own.

MLflow shows it in a frame of its own, where links to other files lead nowhere; so its figures are in it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from maskray.config.schema import RunConfig
from maskray.config.sweep import SweepConfig
from maskray.data.storage import Storage
from maskray.figures.canvas import SHARP
from maskray.sweeps import sentences, tables
from maskray.sweeps.drawing import Drawing, Scene, draw
from maskray.sweeps.measure import Names, measure_of
from maskray.sweeps.ranking import judged, ranked
from maskray.sweeps.record import REPORT, Result

PAGE = "report.html"
_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Report:
    """The page, and its figures by themselves."""

    html: str
    figures: Mapping[str, bytes]
    """PNGs by name, without its ending."""


def build(
    config: SweepConfig,
    base: RunConfig,
    results: Mapping[str, Result],
    painted: Callable[[str], Mapping[str, Any] | None],
) -> Report:
    """The report of all trials that have ended so far.

    Args:
        config: of the sweep.
        base: the run that its space is laid over.
        results: by key of the trial.
        painted: what is kept of a trial's painting, as `record.painted` gives it, by key.
    """
    points = ranked(config, results)
    verdict, measure, names = judged(config, points), measure_of(config, base, points), Names(config)
    scene = None if verdict is None else Scene(config, base, points, verdict, measure, names)
    drawings = [] if scene is None else draw(scene, painted)
    html = (
        _environment()
        .get_template(_TEMPLATE)
        .render(
            title=config.name,
            about=sentences.about(config, base),
            alerts=sentences.alerts(config, verdict),
            answer=None if scene is None else sentences.answer(scene),
            nothing=sentences.nothing(points),
            tiles=sentences.tiles(config, base, points),
            drawings=[_shown(each) for each in drawings],
            tables=[]
            if not points
            else [tables.points(config, points, verdict, measure), tables.trials(config, points, measure)],
            method=sentences.method(config, points, verdict, measure),
        )
    )
    return Report(html, {each.name: each.png for each in drawings})


def write(report: Report, sweep: Storage) -> None:
    """Put it into the folder of the sweep, in place of an older one. The page is written last."""
    folder = sweep.child(REPORT)
    files = {f"{name}.png": png for name, png in report.figures.items()} | {PAGE: report.html.encode()}
    for name, content in files.items():
        folder.write_bytes(name, content)
    for name in set(folder.list_names()) - files.keys():
        folder.delete(name)


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _shown(drawing: Drawing) -> dict[str, Any]:
    width = int.from_bytes(drawing.png[16:20], "big")  # a PNG's header begins with it
    return {
        "heading": drawing.heading,
        "alt": f"{drawing.heading}. {drawing.caption}".strip(),
        "base64": base64.b64encode(drawing.png).decode(),
        "width": width // SHARP,
    }
