"""The part of the console that this room uses."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Screen(Protocol):
    """Prints on rank 0; `report.console.Console` is one."""

    def say(self, text: str) -> None:
        """Print one line and log it."""

    def show(self, text: str) -> None:
        """Print one line without logging it."""

    def alarm(self, text: str) -> None:
        """Print and log an error."""

    def heartbeat(self, work: str) -> Callable[[float], None]:
        """Return a function that prints the seconds spent on `work`, once a minute."""

    def progress(self, title: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Yield a function that takes the number of units done and their total."""
