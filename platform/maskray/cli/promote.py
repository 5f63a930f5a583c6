"""`maskray promote`: a version of a registered model becomes its champion, or does not, and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from maskray.config.load import load_as
from maskray.config.promotion import PromotionConfig

if TYPE_CHECKING:  # a wrong command line must not wait for torch
    from maskray.publish.decisions import Decision

REFUSED = 3
"""Exit code: nothing went wrong, and the champion is still the old one."""


def add(commands: Any) -> None:
    """Tell the parser of it."""
    parser = commands.add_parser("promote", help="make a version of a registered model its champion, if it is better")
    parser.add_argument("--config", required=True, type=Path, help="YAML of the promotion")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. challenger=3")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--rollback", action="store_true", help="bring the champion before this one back")
    other.add_argument("--show", action="store_true", help="all decisions; an alias that is behind them is mended")
    parser.set_defaults(command=_promote)


def _promote(arguments: argparse.Namespace) -> int:
    config = load_as(PromotionConfig, arguments.config, arguments.set)
    from maskray.publish import promotion

    console = Console(highlight=False)
    if arguments.show:
        history, champion = promotion.show(config)
        if history:
            console.print(_table(history), markup=False)
        console.print(f"@{config.alias} of {config.model}: {_named(champion)}", markup=False)
        return 0
    decision = promotion.rollback(config) if arguments.rollback else promotion.promote(config)
    if decision is None:  # said already
        return 0
    console.print(f"{config.model}, {decision}.", markup=False)
    console.print(f"@{config.alias}: {_named(decision.champion)}", markup=False)
    return REFUSED if decision.kind == "refused" else 0


def _named(champion: str | None) -> str:
    return f"version {champion}" if champion is not None else "none yet"


def _table(history: list[Decision]) -> Table:
    table = Table()
    for heading in ("decision", "", "version", "score", "gain", "champion", "by"):
        table.add_column(heading)
    for d in history:
        compared = d.comparison
        gained = compared.gain if compared is not None else None
        table.add_row(
            str(d.number),
            d.kind.replace("_", " "),
            d.version,
            f"{compared.score:.2%}" if compared is not None else "",
            f"{100 * gained.mean:+.2f} ({100 * gained.low:+.2f} to {100 * gained.high:+.2f})" if gained else "",
            d.champion or "",
            d.decided_by,
        )
    return table
