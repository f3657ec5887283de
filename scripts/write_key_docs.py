"""Write the tables of docs/: keys and losses from dpo_dist/config.

Run `make docs` after a change of a key or of a kind of loss.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_dist.config.keys import FIRST_KEYS, Key, all_keys, key_rows, section_meanings
from dpo_dist.config.losses import KINDS, KindFacts, LossConfig
from dpo_dist.foundation.fields import schema_fields

ROOT = Path(__file__).resolve().parents[1]
CELL = 160
"""Most characters of a cell, a phrase; the rest of a longer text is a sentence below the table."""
MODIFIERS = {"ld_alpha", "weighting"}
"""Options of nearly all kinds: docs/losses.md has them below the table, not in each row."""
DIGEST = "†"
"""The mark of a key that is part of the run's digest."""
OTHER_TYPES = {"loss.kind": "one of the [kinds](losses.md)", "loss.terms[].kind": "as `loss.kind`"}


def pages() -> dict[Path, str]:
    """Return the whole text of every page with a table, which is between its markers."""
    tables = {"losses": _loss_table(), "configuration": _key_tables()}
    return {
        page: _with_table(page, tables[page.stem]) for page in (ROOT / "docs" / f"{n}.md" for n in tables)
    }


def _with_table(page: Path, table: str) -> str:
    before, marker, after = re.split(r"(<!-- table: [^\n]*-->\n\n)", page.read_text())
    _, end, rest = after.rpartition("\n<!-- end of table -->")
    return f"{before}{marker}{table}{end}{rest}"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    first, *others = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([first, f"|{'---|' * len(heading)}\n", *others])


def _loss_table() -> str:
    heading = ("kind", "loss of a pair", "options", "reference", "source")
    return _table(heading, (_loss_row(kind, facts) for kind, facts in KINDS.items()))


def _loss_row(kind: str, facts: KindFacts) -> tuple[str, ...]:
    """Return a kind's row; in the formula, each option has its default after it."""
    defaults = {f"loss.{name}": field.default for name, field in schema_fields(LossConfig).items()}
    own = {} if facts.options is None else schema_fields(facts.options)
    defaults |= {f"loss.options.{name}": field.default for name, field in own.items()}
    formula = re.sub(r"`(loss[\w.]+)`", lambda found: f"{found[0]} ({defaults[found[1]]:g})", facts.formula)
    names = [*sorted(facts.uses - MODIFIERS), *(f"options.{name}" for name in own)]
    options = ", ".join(f"`{name}`" for name in names)
    return f"`{kind}`", formula, options or "-", "yes" if facts.needs_reference else "-", facts.source


def _key_tables() -> str:
    """Return a table of the keys of most commands, and one of the others of each section."""
    # Repetitions: these have the keys of data.train[], and the options of kinds are in the table of losses.
    left_out = ("data.eval[]", "evaluation.data[]", "loss.terms[].options.", "loss.options.")
    keys = [key for key in key_rows() if not key.name.startswith(left_out) and key.name not in FIRST_KEYS]
    parts = ["## Most used\n", *_keys_table([all_keys()[name] for name in FIRST_KEYS])]
    sections = {name: text for name, text in section_meanings().items() if "." not in name}
    for section, meaning in sections.items():
        if rows := [key for key in keys if key.name.startswith(f"{section}.")]:
            parts += [f"## `{section}`\n", f"{meaning}\n", *_keys_table(rows)]
    return "\n".join(parts)


def _keys_table(rows: Sequence[Key]) -> list[str]:
    """Return the table of these keys, and the sentences below it."""
    heading = ("key", "type and bounds", "default", "meaning")
    table = _table(
        heading,
        (
            (
                f"`{key.name}`{DIGEST if key.defines_result else ''}",
                _type(key),
                f"`{key.default_words}`" if key.default_words and key.default is not None else "",
                _phrase(key.meaning)[0],
            )
            for key in rows
        ),
    )
    notes = [f"- `{key.name}`: {rest}" for key in rows if (rest := _phrase(key.meaning)[1])]
    return [table, "\n".join([*notes, ""])] if notes else [table]


def _type(key: Key) -> str:
    """Return the type in few words: the page says how a list is written, and null that it is one."""
    words = OTHER_TYPES.get(key.name, key.type_words).removeprefix("a ").replace(" in brackets: [a,b]", "")
    return re.sub(",? or null", "", words) if key.default is None else words


def _phrase(meaning: str) -> tuple[str, str]:
    """Return a meaning's beginning, of at most `CELL` characters, and the rest for below the table."""
    if len(meaning) <= CELL:
        return meaning, ""
    for mark in (". ", "; ", ": "):
        beginning = meaning[: CELL + 1].rpartition(mark)[0]
        if beginning:
            rest = meaning[len(beginning) + len(mark) :]
            return beginning + ("." if mark == ". " else " ..."), rest
    raise AssertionError(f"the first sentence of this meaning is too long for a cell: {meaning}")


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
