"""What is known of other programs' names for our keys, values and verbs: an extension's, or nothing."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dpo_dist.config.extensions import hook
from dpo_dist.foundation.errors import ConfigError

ON, OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
"""Words for a switch."""


class Advice:
    """No knowledge: no name is another program's."""

    def equivalents(self, name: str, table: str) -> tuple[Any, ...]:
        """Return the meanings of another program's name in a table, such as `keys`, `values`, `verbs`."""
        return ()

    def is_foreign(self, name: str) -> bool:
        """Return whether an option is known as another program's."""
        return False

    def foreign_file(self, content: Mapping[str, Any], file: Path) -> ConfigError | None:
        """Return the error for another program's file; None if it is none."""
        return None

    def advice_on(self, name: str, value: str) -> str:
        """Return what to advise on another program's option `name`, or `name=value`; "" if nothing."""
        return ""

    def find_advice(self, key: str, value: str) -> str:
        """Return the advice on a key with this value, or on a key of the same meaning; "" if none."""
        return ""

    def as_sources(self, value: Any) -> Any:
        """Return another program's list of datasets as sources; other values as they are."""
        return value


@cache
def advice() -> Advice:
    """Return what is known."""
    extension = hook("advice")
    return Advice() if extension is None else extension()
