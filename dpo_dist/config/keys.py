"""Every key of a run as a row of plain facts, and the presets of its sections."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dpo_dist.config.schema import UNSET, RunConfig
from dpo_dist.config.verbs import EVERY_VERB, VERBS
from dpo_dist.foundation.fields import (
    EVERY_READER,
    Facts,
    as_written,
    describe_type,
    key_facts,
    schema_fields,
    schemas_in,
)

FIRST_KEYS = (
    *("model.path", "data.train", "data.eval", "data.eval_share", "data.max_length"),
    *("loss.kind", "loss.beta", "optim.lr", "trainer.epochs", "trainer.max_steps"),
    *("trainer.global_batch_pairs", "trainer.micro_batch_tokens", "trainer.eval_every", "trainer.save_every"),
    *("sampling.prompts", "model.dtype", "model.gradient_checkpointing", "model.adapter"),
    *("model.quantization", "parallelism.kind", "tracking.to", "run.name", "run.dir"),
)
"""The keys of most commands, which stand first in `--help` and in docs/configuration.md."""

_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class Key:
    """One key, as the schema declares it: `loss.beta`, or `data.train[].path` in the entries of a list."""

    name: str
    type: Any
    field: FieldInfo
    declared_in: Any
    defines_result: bool
    verbs: tuple[str, ...]

    @property
    def facts(self) -> Facts:
        """What the declaration says beside pydantic's field."""
        return key_facts(self.field)

    @property
    def default(self) -> Any:
        """The default; UNSET for a key that must be set."""
        default = self.field.get_default(call_default_factory=True)
        return UNSET if default is PydanticUndefined else default

    @property
    def meaning(self) -> str:
        """The text below the declaration."""
        return " ".join((self.field.description or "").split())

    @property
    def type_words(self) -> str:
        """The accepted values: `a number, > 0`, `text`."""
        if self.facts.accepts:
            return self.facts.accepts
        bounds = []
        for limit in self.field.metadata:
            for attribute, sign in _SIGNS:
                bound = getattr(limit, attribute, None)
                if bound is not None:
                    bounds.append(f"{sign} {bound:g}")
        return ", ".join(filter(None, [describe_type(self.type), " and ".join(bounds)]))

    @property
    def default_words(self) -> str:
        """The default as it is written on a command line; empty for a key that must be set."""
        if self.default == UNSET:
            return ""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


@cache
def _rows() -> list[Key]:
    """Return every key and section, in the order of the schema."""
    return list(_rows_of(RunConfig, "", True, ()))


def _rows_of(kind: Any, prefix: str, defines: bool, verbs: Collection[str]) -> Iterator[Key]:
    hints = get_type_hints(kind)
    for option, field in schema_fields(kind).items():
        hint = hints[option]
        facts = key_facts(field)
        name = prefix + option
        defining = defines and not facts.free
        used_by = _readers_of(name, facts.verbs.split() or verbs)
        yield Key(name, hint, field, kind, defining, used_by)
        below = f"{name}[]." if get_origin(hint) is list else f"{name}."
        for inner in schemas_in(hint):
            yield from _rows_of(inner, below, defining, used_by)


def _readers_of(name: str, verbs: Collection[str]) -> tuple[str, ...]:
    """Return the verbs that a key or section names, and those that name it."""
    readers_of_name = []
    for verb, row in VERBS.items():
        reads_records = row.is_configured and row.reads_data
        if name in row.reads or verb in verbs or (EVERY_READER in verbs and reads_records):
            readers_of_name.append(verb)
    return tuple(readers_of_name)


@cache
def key_rows() -> list[Key]:
    """Return every key of a run, in the schema's order; options of two losses may share a name."""
    return [row for row in _rows() if not is_dataclass(row.type)]


@cache
def all_keys() -> dict[str, Key]:
    """Return every key of a run by name, in the order of the schema, without sections."""
    return {row.name: row for row in key_rows()}


@cache
def section_meanings() -> dict[str, str]:
    """Return the meaning of each section, those inside of others too: `{"optim": "AdamW and ...", ...}`."""
    return {row.name: row.meaning for row in _rows() if is_dataclass(row.type)}


@cache
def run_keys() -> dict[str, Any]:
    """Return every key and section that a command line can set, with its type."""
    return {row.name: row.type for row in _rows() if "[]" not in row.name}


def config_dir() -> Path:
    """Return the folder with config.yaml and the groups of presets, in a wheel or a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def group_folders(own_folder: Path | None = None) -> list[Path]:
    """Return the folders of groups, in the order in which they are searched."""
    return [config_dir()] if own_folder is None else [own_folder.resolve(), config_dir()]


def preset_names(group: str, folders: Iterable[Path]) -> list[str]:
    """Return the presets of a group; `mine/ipo` is one in a folder inside."""
    names: set[str] = set()
    for folder in folders:
        files = (folder / group).rglob("*.yaml")
        names |= {file.relative_to(folder / group).with_suffix("").as_posix() for file in files}
    return sorted(names)


def to_choose(group: str, preset: str) -> str:
    """Return the word that chooses a preset: `loss=ipo`, `+experiment=quickstart`."""
    plus = "+" if group == "experiment" else ""
    return f"{plus}{group}={preset}"


def is_within(key: str, above: str) -> bool:
    """Return whether `key` is `above` or below it."""
    return key == above or key.startswith((f"{above}.", f"{above}["))


def to_unset(key: str) -> str:
    """Return the remedy that takes a key's value away."""
    word = f"{key}={as_written(all_keys()[key].default)}"
    return f"remove {key} (if a file sets it, write {shlex.quote(word)})"


@cache
def readers(name: str) -> list[str]:
    """Return the verbs that read a key, or any key of a section."""
    verbs = set[str]()
    for key, row in all_keys().items():
        if is_within(key, name):
            verbs.update(row.verbs)
    return [verb for verb in EVERY_VERB.split() if verb in verbs]


def verb_keys(verb: str, *, trains: bool = False) -> list[str]:
    """Return the keys that a verb reads, and their sections; `trains`: also the keys of a training run."""
    verbs = {verb, "train"} if trains or VERBS[verb].takes_training else {verb}
    return [name for name in run_keys() if not verbs.isdisjoint(readers(name))]


def strip_indices(where: str) -> str:
    """Return a key without numbers of entries: `data.train[].path` for `data.train[0].path`."""
    return re.sub(r"\[\d*\]|\.\d+(?=\.|$)", "[]", where)


def presets_of(keys: Collection[str], folders: Sequence[Path]) -> dict[str, list[str]]:
    """Return the presets that a verb with these keys uses, by their groups: it reads the group's key."""
    chosen = {"experiment": "run", "reference": "reference.mode"}  # others have the group's name
    groups: set[str] = set()
    for folder in folders:
        groups |= {path.name for path in folder.iterdir() if path.is_dir()}
    return {
        group: preset_names(group, folders) for group in sorted(groups) if chosen.get(group, group) in keys
    }
