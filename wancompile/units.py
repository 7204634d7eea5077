"""Numbers for people: bytes, FLOPs, seconds, shares, shapes."""

from __future__ import annotations

from collections.abc import Iterable


def nbytes(count: float) -> str:
    """Return a number of bytes with a decimal unit and three digits: `32.8 GB`."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def flops(count: float) -> str:
    """Return a number of FLOPs with a decimal unit and three digits: `1.69 PFLOP`."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def count(number: float) -> str:
    """Return a count with a decimal suffix and three digits: `16.4 B`."""
    return _scaled(number, ("", "K", "M", "B", "T")).rstrip()


def seconds(value: float) -> str:
    """Return a time in s, or in ms below one second."""
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share of 1 in percent, a dash for None."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def shape(sizes: Iterable[int]) -> str:
    """Return a shape as `1x16x21x60x104`."""
    return "x".join(map(str, sizes))


def plural(number: int, noun: str) -> str:
    """Return `1 linear`, `2 linears`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    index = 0
    # 999.5 would print as 1000 of the smaller unit.
    while abs(value) >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    if index == 0:
        return f"{value:.0f} {units[0]}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {units[index]}"
