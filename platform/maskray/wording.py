"""Numbers and values as people read them."""

from __future__ import annotations

import json
from typing import Any

_PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float, unit: str = "") -> str:
    """Three digits, a prefix and the unit: `86.4 M`, `1.2 TFLOP`."""
    rounded = float(f"{number:.3g}")  # 999,600 is 1 M, not 1e+03 k
    size, letter = prefix(rounded)
    return f"{rounded / size:.3g} {letter}{unit}".strip()


def prefix(number: float) -> tuple[float, str]:
    """The size and the letter of the largest unit that is not more: 1e12 and `T`."""
    return next((pair for pair in _PREFIXES if number >= pair[0]), (1.0, ""))


def value(of_config: Any) -> str:
    """A value as the YAML could have it: `0.75`, `null`, `[3, 7]`, `random`."""
    if isinstance(of_config, float):
        return f"{of_config:g}"
    return of_config if isinstance(of_config, str) else json.dumps(of_config, ensure_ascii=False)
