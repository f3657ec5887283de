"""Names of types that modules of several rooms use, and the values of nested fields."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fields: TypeAlias = Mapping[str, Any]
"""Fields of a JSON object or of a table's row, by name."""
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
"""A name for annotations: transformers takes seconds to import."""
ProgressOf: TypeAlias = Callable[[str, str], AbstractContextManager[Callable[..., None]]]
"""Makes from a title and a unit a context that yields a progress function, as `Console.progress` does."""


class CheckReport(NamedTuple):
    """What `--check` found in order: a verdict, and facts, each with its key or other label ("" for none)."""

    facts: Sequence[tuple[str, str]]
    verdict: str = "check passed: everything that needs no weights and no GPU is in order"
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the report for programs."""
        facts = [{"about": label.strip(), "text": text} for label, text in self.facts]
        return {"verdict": self.verdict, "facts": facts, "hint": self.hint, "text": str(self)}

    def __str__(self) -> str:
        lines = (f"{label + ':':<14} {text}" if label else text for label, text in self.facts)
        return "\n".join([self.verdict, *(f"  {line}" for line in [*lines, self.hint] if line)]) + "\n"


def dotted_items(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of mappings inside of mappings, with their keys joined by dots."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_tree(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of keys as mappings in mappings: `{loss: {beta: 0.2}}`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        reduce(lambda at, section: at.setdefault(section, {}), sections, tree)[name] = value
    return tree
