"""Text of `--help` and `--help KEY`: sections, presets and keys, as the schema and `conf/` declare them."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dpo_dist.config.keys import Key, all_keys, section_meanings
from dpo_dist.config.loss_kinds import KINDS, LossKind, kinds_using
from dpo_dist.config.messages import is_within, preset_names, unknown_key, unknown_name


def usage(
    command: str, about: str, options: Mapping[str, str], folders: Sequence[Path], own: Collection[str]
) -> str:
    """Return the text of `--help`.

    Args:
        command: the beginning of the command line: `accelerate launch -m dpo_dist.train`.
        about: text about the verb, with an example.
        options: each option with its meaning.
        folders: the folders of configuration groups.
        own: keys and sections that the verb reads.
    """
    groups = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    chosen = {"experiment": "run", "reference": "reference.mode"}  # a key that tells whether a preset is read
    groups = [group for group in groups if chosen.get(group, group) in own]
    presets = {group: ", ".join(preset_names(group, folders)) for group in groups}
    return "\n".join(
        [
            f"usage: {command} [KEY=VALUE ...] [GROUP=PRESET ...] [+experiment=NAME] [OPTION ...]",
            *([f"\n{about.strip()}"] if about else []),
            "\nsections (--help SECTION lists its keys, --help KEY explains one, e.g. --help loss.beta):",
            *_columns(
                {name: text for name, text in section_meanings().items() if name in own and "." not in name}
            ),
            "\npresets (GROUP=PRESET, +experiment=NAME):",
            *(f"  {group}: {names}" for group, names in presets.items() if names),
            "\noptions:",
            *_columns(options),
            "\nexit codes: 0 completed, 1 bug or findings of the doctor, 2 configuration or data error,",
            "3 diverged; the same command resumes after 69 lost process, 75 stopped with a checkpoint\n",
        ]
    )


def explain(key: str, folders: Sequence[Path], own: Collection[str] = ()) -> str:
    """Return the text of `--help KEY` for a key, a section or a group of presets.

    Args:
        key: `loss.beta`, `loss`, `data.train.weight` (also `data.train[0].weight`), `experiment`.
        folders: the folders of configuration groups.
        own: keys that are suggested first.

    Raises:
        ConfigError: there is no such key.
    """
    name = re.sub(r"\[\d*\]", "", key.removeprefix("+"))
    keys = {full.replace("[]", ""): row for full, row in all_keys().items()}
    below = {full: row for full, row in keys.items() if full != name and is_within(full, name)}
    presets = preset_names(name, folders) if re.fullmatch(r"\w+", name) else []
    if name not in keys and not below and not presets:
        mapping, _, last_part = name.rpartition(".")
        kind = keys[mapping].of if mapping in keys else None
        raise unknown_key(name, own=own) if kind is None else unknown_name(last_part, mapping, kind)
    lines = (
        _facts(keys[name])
        if name in keys
        else [f"{name}: {section_meanings().get(name, 'a group of presets')}"]
    )
    if below:
        lines += [
            "",
            f"keys of {name} (default):",
            *_columns({row.name: _short(row) for row in below.values()}),
        ]
    if presets:
        plus = "+" if name == "experiment" else ""
        lines += ["", f"presets: {plus}{name}=" + "|".join(presets)]
    return "\n".join(lines) + "\n"


def _facts(row: Key) -> list[str]:
    facts = {
        "meaning": row.meaning,
        "type": row.type_words,
        "default": row.default_words or "none, it must be set",
        "verbs": ", ".join(row.verbs),
        "digest": "part of the run's digest: another value is another run"
        if row.defines_result
        else "not part of the run's digest: a run can be resumed with another value",
    }
    section, _, option = row.name.rpartition(".")
    kinds = kinds_using(option) if section == "loss" else []
    if kinds:
        facts["kinds"] = "all" if len(kinds) == len(KINDS) else ", ".join(kinds)
    lines = [row.name, *(f"  {label + ':':<10}{text}" for label, text in facts.items())]
    if row.type is LossKind:
        lines += ["", "kinds (formulas in the notation of docs/losses.md):"]
        lines += _columns({kind: f"{facts.source}: {facts.formula}" for kind, facts in KINDS.items()})
    return lines


def _short(row: Key) -> str:
    return f"{row.meaning} ({row.default_words or 'must be set'})"


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(len(name) for name in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]
