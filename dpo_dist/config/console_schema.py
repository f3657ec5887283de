"""The keys of `console`: form and frequency of what a verb prints; see `schema`."""

from dataclasses import dataclass
from enum import StrEnum

from dpo_dist.config.fields import key

ConsoleStyle = StrEnum("ConsoleStyle", ["auto", "plain", "json"])


@dataclass(frozen=True)
class ConsoleConfig:
    """Messages and progress on the screen."""

    style: ConsoleStyle = key(
        ConsoleStyle.auto,
        "`auto`: a live line on a terminal, else `plain`; `plain`: lines with date and time; `json`: JSON "
        "objects, one a line, on standard output.",
    )
    seconds: float = key(
        30.0, "Seconds between two lines about progress, in the log and in plain output.", above=0
    )
