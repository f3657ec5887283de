"""Declare a configuration key at its dataclass field: default, bounds and meaning, in one place."""

import math
from copy import copy
from dataclasses import Field, dataclass, field
from typing import Any

_METADATA = "declared"
_LARGEST_WHOLE = 2**63 - 1
VERBS_WITH_DATA = "train precompute evaluate compare doctor pairs"
"""The programs that read preference records, for `verbs`."""
EVERY_VERB = f"{VERBS_WITH_DATA} export"
"""The programs with a configuration, for `verbs`."""


@dataclass(frozen=True)
class Bounds:
    """The numbers that a key accepts, besides being finite; for a list, each of its entries."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    other_than: float | None = None

    def contain(self, value: float) -> bool:
        """Return whether `value` is finite, fits in 64 bits if it is whole, and is within the bounds."""
        return (
            (abs(value) <= _LARGEST_WHOLE if isinstance(value, int) else math.isfinite(value))
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and value != self.other_than
        )

    def __str__(self) -> str:
        signs = {">": self.above, ">=": self.at_least, "<=": self.at_most, "<": self.below}
        parts = [f"{sign} {bound:g}" for sign, bound in signs.items() if bound is not None]
        return " and ".join(parts) or ("" if self.other_than is None else f"other than {self.other_than:g}")


@dataclass(frozen=True)
class Declaration:
    """Facts of a key besides its type and default.

    Attributes:
        meaning: one line for the user; it explains null where the key allows null.
        bounds: of a number.
        filled: whether text must not be empty.
        defines_result: whether the key is part of the run's digest.
        added: the digest has the key only at another value than its default, so that runs from before the key
            existed keep their digest.
        verbs: the verbs that use the key; None: those of its section.
        of: the dataclass of the mapping, or of each entry of the list, that the key takes.
        accepts: the accepted values in words, if a rule or a pattern narrows the type.
        pattern: regular expression that a text must match; `accepts` has it in words.
        null_means: the value that null means.
    """

    meaning: str
    bounds: Bounds = Bounds()
    filled: bool = False
    defines_result: bool = True
    added: bool = False
    verbs: tuple[str, ...] | None = None
    of: type | None = None
    accepts: str = ""
    pattern: str = ""
    null_means: Any = None


def key(
    default: Any,
    meaning: str,
    *,
    free: bool = False,
    added: bool = False,
    verbs: str | None = None,
    of: type | None = None,
    filled: bool = False,
    accepts: str = "",
    pattern: str = "",
    null_means: Any = None,
    **bounds: float,
) -> Any:
    """Return a dataclass field with its `Declaration`.

    Args:
        default: of the key.
        meaning: one line for the user.
        free: keeps the key out of the run's digest.
        verbs: the verbs that use the key, separated by spaces; None: those of its section.
        added, of, filled, accepts, pattern, null_means, **bounds: see `Declaration` and `Bounds`.
    """
    declared = Declaration(
        meaning,
        Bounds(**bounds),
        filled,
        not free,
        added,
        _names(verbs),
        of,
        accepts,
        pattern,
        null_means,
    )
    metadata = {_METADATA: declared}
    if isinstance(default, list):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, *, free: bool = False, added: bool = False, verbs: str | None = None) -> Any:
    """Return a field for the keys of the dataclass `kind`, whose docstring is their meaning."""
    declared = Declaration(kind.__doc__ or "", defines_result=not free, added=added, verbs=_names(verbs))
    return field(default_factory=kind, metadata={_METADATA: declared})


def _names(verbs: str | None) -> tuple[str, ...] | None:
    return None if verbs is None else tuple(verbs.split())


def declaration(declared: Field[Any]) -> Declaration:
    """Return what `key` or `section` declared at a field."""
    found = declared.metadata[_METADATA]
    assert isinstance(found, Declaration)
    return found
