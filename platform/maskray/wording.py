"""Numbers as people read them."""

from __future__ import annotations

_PREFIXES = (
    (1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"),
)  # fmt: skip


def short(number: float, unit: str = "") -> str:
    """Three digits, a prefix and the unit: `86.4 M`, `1.2 TFLOP`."""
    rounded = float(f"{number:.3g}")  # 999,600 is 1 M, not 1e+03 k
    size, letter = prefix(rounded)
    return f"{rounded / size:.3g} {letter}{unit}".strip()


def prefix(number: float) -> tuple[float, str]:
    """The size and the letter of the largest unit that is not more: 1e12 and `T`."""
    return next((pair for pair in _PREFIXES if number >= pair[0]), (1.0, ""))


def time_of(hours: float) -> str:
    """`2.5 h`, or in a unit below."""
    units = ((1, "h"), (60, "min"), (3600, "s"))
    per_hour, unit = next((pair for pair in units if hours * pair[0] >= 1), units[-1])
    number = hours * per_hour
    return f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.3g} {unit}"
