"""Numbers and values as people read them."""

import math
from collections.abc import Mapping

from dpo_dist.plurals import duration as in_units

_KIBI = 1024
_UNITS = ("KiB", "MiB", "GiB", "TiB")
_FEW_SECONDS = 10
_SMALL_AMOUNT = 0.1


def short(value: float) -> str:
    """Return a number with four digits, a whole one with all of them."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}"


def three(value: float) -> str:
    """Return a number with three digits: 0.5, 12.3, 1e-06."""
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """Return a share as 12 %, a small one as 0.3 %."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def duration(seconds: float) -> str:
    """Return 0.4 s, and from 10 s on what the terminal shows: 12 s, 2 min 05 s, 3 h 20 min."""
    return f"{seconds:.2g} s" if 0 < seconds < _FEW_SECONDS else in_units(seconds)


def money(amount: float) -> str:
    """Return an amount with two decimals, a small one with two digits."""
    return f"{amount:.2g}" if 0 < amount < _SMALL_AMOUNT else f"{amount:,.2f}"


def size(count: float) -> str:
    """Return a number of bytes as 1.5 GiB."""
    for unit in _UNITS:
        count /= _KIBI
        if count < _KIBI or unit == _UNITS[-1]:
            break
    return f"{count:,.1f} {unit}"


def text(value: object) -> str:
    """Return the text of a value of a configuration."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return "; ".join(map(text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
