"""What is known of other trainers: their names for our keys, values and verbs, and advice on the rest."""

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.text import first_few
from dpo_dist.kit import run_keys, strip_indices

_OFF = ("false", "no", "off", "0")
"""Words for a switch that is off."""


@cache
def other_trainers() -> dict[str, Any]:
    """Return the tables of other_trainers.yaml, whose head says which sections become rows of `advice`."""
    tables = own_table(Path(__file__).with_suffix(".yaml"))
    rows = tables.pop("both")
    rows += [{"write": words, "names": names} for words, names in tables.pop("words").items()]
    for kind, facts in {"advice": {}, "switches": {"is_switch": True}}.items():
        rows += [{"text": text, "names": names} | facts for text, names in tables.pop(kind).items()]
    return tables | {"advice": rows}


@cache
def _table(section: str) -> dict[str, tuple[Any, ...]]:
    """Return for each name that other trainers use its meanings in a section."""
    rows = other_trainers()[section]
    rows_with_names = rows.items() if isinstance(rows, dict) else [(row, row["names"]) for row in rows]
    meanings = defaultdict[str, tuple[Any, ...]](tuple)
    for meaning, names in rows_with_names:
        for name in names.split():
            meanings[name] += (meaning,)
    return meanings


def equivalents(name: str, table: str) -> tuple[Any, ...]:
    """Return the meanings of another trainer's name, or of its last part, in a table.

    Tables: `keys`; `sources`: keys in an entry of `data.train`; `values`; `methods`: other ways of training;
    `verbs`; `advice`: its rows.
    """
    plain = name.lower().replace("-", "_")
    key, equals, value = plain.partition("=")  # whose value may be a file: its last part is no name
    return _table(table).get(plain) or _table(table).get(key.rpartition(".")[2] + equals + value, ())


class Answer(NamedTuple):
    """What to do about another trainer's option, and the words of a command that do it."""

    text: str
    words: tuple[str, ...] = ()


def answer_on(name: str, value: str) -> Answer | None:
    """Return the answer to another trainer's option `name`, or `name=value`; None if there is none."""

    def filled(text: str) -> str:
        return text.replace("[{value}]", f"[{value.strip('[]') or '...'}]").replace("{value}", value or "...")

    rows = equivalents(name, "advice")
    if not rows:
        return None
    row = rows[0]
    written = row.get("write", "")
    if value.lower() in _OFF and "=" not in name and written and "{value}" not in written:
        return Answer("not needed: it is off")
    text = row.get("text", f"write {written}")
    return Answer(filled(text), tuple(map(filled, shlex.split(written))))


def is_switch(name: str) -> bool:
    """Return whether nothing is needed for another trainer's option that is false."""
    return any(row.get("is_switch") for row in equivalents(name, "advice"))


def is_foreign(name: str) -> bool:
    """Return whether an option is known as another trainer's."""
    return bool(equivalents(name, "keys") or equivalents(name, "advice"))


_METHODS = {"loss", "loss.kind", "loss.terms[].kind", "stage", "rl", "rlhf_type"}
"""Keys whose value may name another way of training."""


def find_answer(key: str, value: str) -> Answer | None:
    """Return the answer to a key with this value, or to a key of the same meaning; None if there is none."""
    names = (key, *equivalents(key, "keys"))
    answers = (answer_on(f"{name}={value}", value) for name in names)
    answer = next(filter(None, answers), None)
    methods = equivalents(value, "methods")
    if answer is None and methods and not _METHODS.isdisjoint(map(strip_indices, names)):
        return Answer(methods[0])
    return answer


def as_sources(value: Any) -> Any:
    """Return the `datasets` of another trainer as sources: paths, splits and names of fields."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) and "path" in entry for entry in value):
        return value
    sources = []
    for entry in value:
        path = entry.get("data_files") or entry["path"]
        kept = ["name", "data_dir", "revision", "weight", "limit"]
        is_file = re.fullmatch(r"\.[a-z]{2,7}", Path(str(path)).suffix)  # org/name-v1.5 has such a suffix
        if not is_file:
            kept.append("split")
        source = {"path": path} | {name: entry[name] for name in kept if entry.get(name)}
        kind = entry.get("type")
        fields = {**entry, **kind} if isinstance(kind, dict) else entry
        columns = dict[str, Any]()
        for key, column in fields.items():
            name = key.removeprefix("field_")
            if name not in (key, column):
                columns[name] = column
        if columns:
            source["fields"] = _fields(columns, is_pair=str(kind).endswith(".default"))
        sources.append(source)
    return sources


def _fields(columns: dict[str, Any], *, is_pair: bool) -> dict[str, Any]:
    """Return the `fields` of a source for the columns that axolotl's `field_NAME` name."""
    sides = {"chosen", "rejected"}
    if "completion" in columns or ("messages" in columns and not is_pair and sides.isdisjoint(columns)):
        return {"completion": columns.pop("messages", None)} | columns
    prompt = columns.pop("messages", "prompt")
    return {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"} | columns


_FOREIGN_KEYS = 5
"""With fewer foreign keys, advice on each key is better than a conversion."""


def foreign_file(content: Mapping[str, Any], file: Path) -> ConfigError | None:
    """Return the error for another trainer's file; None if the file has only a few foreign keys."""
    names = [name for name in map(str, content) if is_foreign(name) and name not in run_keys()]
    if len(names) < _FOREIGN_KEYS:
        return None
    target = shlex.quote(str(file.with_name(f"{file.stem}_converted.yaml")))
    return ConfigError(
        f"this file has {len(names)} keys of another trainer",
        where=str(file),
        got=first_few(names),
        remedy=f"dpo-dist convert {shlex.quote(str(file))} {target} translates the file; then train {target}",
    )


def advice_on(key: str, value: str) -> str:
    """Return what to do about another trainer's option without a key of the same meaning; "" for others."""
    answer = find_answer(key, value)
    if answer is None and key not in (*run_keys(), "experiment") and not equivalents(key, "keys"):
        answer = answer_on(key, value)
    return answer.text if answer else ""
