"""What a user may have meant by a key or value that does not exist."""

import difflib
import shlex
from collections.abc import Iterable
from typing import Any, get_origin

from dpo_dist.config.aliases import IN_OTHER_WORDS, IN_SOURCE, SAME_MEANING, VALUE_NAMES, alias_of
from dpo_dist.config.keys import choices, in_words, key_types, run_keys
from dpo_dist.config.loss_kinds import LossKind
from dpo_dist.config.schema import SourceConfig
from dpo_dist.errors import ConfigError

# Below this similarity a guess misleads more people than it helps.
_ALIKE = 0.75
# A wrong guess at one of these would end the run early without a word.
_SHORTENING = frozenset({"trainer.max_steps", "trainer.stop_after_steps", "trainer.max_seconds"})
_NEARLY_EQUAL = 0.9


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """`known`, the most similar to `word` first; of dotted keys the last part counts by itself as well."""
    word = VALUE_NAMES.get(word.lower(), word)
    return sorted(known, key=lambda candidate: sum(_similarities(word, candidate)), reverse=True)


def likely(word: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that are near enough to `word` to be what was meant, the nearest first."""
    candidates = list(known)
    same = VALUE_NAMES.get(word.lower(), word.lower())
    if same in candidates:
        return [same]
    # Keys of the same section that have the word as a part: loss.alpha, loss.ld_alpha.
    section, _, last_part = word.rpartition(".")
    with_part = [
        candidate
        for candidate in candidates
        if candidate.rpartition(".")[0] == section
        and last_part in candidate.rpartition(".")[2].split("_")
        and candidate not in _SHORTENING
    ]
    if with_part and word not in candidates:
        return with_part
    for candidate in nearest(word, candidates)[:3]:
        whole, last = _similarities(word, candidate)
        likeness = last if "." in word or "." not in candidate else max(whole, last)
        elsewhere = section in candidates and candidate.rpartition(".")[0] != section
        if likeness > (_NEARLY_EQUAL if elsewhere or candidate in _SHORTENING else _ALIKE):
            return [candidate]
    return []


def _similarities(word: str, candidate: str) -> tuple[float, float]:
    """Of the whole keys and of their last parts, each of 0 to 1."""
    whole = difflib.SequenceMatcher(None, word, candidate).ratio()
    last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return whole, last


def unknown_key(key: str, value: str = "", *, where: str = "") -> ConfigError:
    """The error for a key that does not exist, with what was meant as far as that can be known.

    Args:
        key: the whole key.
        value: as it was written; empty where that is not known.
        where: the file or override that has the key.
    """
    what, where = f"there is no key {key!r}", where or key
    if key.startswith("hydra."):
        return ConfigError(
            f"{key} has no effect: Hydra only composes the configuration",
            where=where,
            remedy="remove it; run.dir or run.root says where a run writes",
        )
    known = run_keys()
    meant = alias_of(key, SAME_MEANING)
    words = alias_of(key, IN_OTHER_WORDS)
    if words is not None and meant is None:
        kind = VALUE_NAMES.get(value, value)
        remedy = (
            f"write loss={kind}" if "loss=NAME" in words and kind in [*LossKind, "sigmoid_sft"] else words
        )
        return ConfigError(what, where=where, remedy=remedy)
    if meant is not None:
        expected = f"{meant}, {in_words(known[meant])}" if in_words(known[meant]) else meant
        remedy = f"write {written(meant, value, known[meant])}"
        if meant.startswith("model.adapter."):
            remedy = f"write 'model.adapter={{{meant.rpartition('.')[2]}: {value or '...'}}}'"
        return ConfigError(what, where=where, expected=expected, remedy=remedy)
    likely_keys = likely(key, known)
    if likely_keys:
        told = " or ".join(likely_keys)
        return ConfigError(what, where=where, expected=told, remedy=f"did you mean {told}?")
    return ConfigError(what, where=where, remedy=_keys_beside(key, known))


def unknown_name(name: str, holder: str, kind: type, *, where: str) -> ConfigError:
    """The error for a name in a mapping that has no such name: a source, an adapter, a term of a loss.

    Args:
        name: as it was written.
        holder: the key of the mapping: `data.train[0]`.
        kind: the dataclass of the mapping.
    """
    what = f"there is no key '{holder}.{name}'"
    known = list(key_types(kind))
    alias = SAME_MEANING.get(f"{holder}.{name}", "").rpartition(".")[2]
    if kind is SourceConfig:
        alias = IN_SOURCE.get(name, "")
    found = [alias] if alias else likely(name, known)
    expected = f"{holder}.{found[0]}" if found else ""
    remedy = f"did you mean {' or '.join(found)}?" if found else f"the keys here are {', '.join(known)}"
    return ConfigError(what, where=where, expected=expected, remedy=remedy)


def written(key: str, value: str, hint: Any) -> str:
    """`key=value` for a shell, with `...` in place of a value that `key` cannot have."""
    if get_origin(hint) is list and value and not value.startswith("["):
        value = f"[{value}]"
    if choices(hint) and VALUE_NAMES.get(value.lower()) in choices(hint):
        value = VALUE_NAMES[value.lower()]
    if value in ("", "null", "[null]") or (choices(hint) and value not in choices(hint)):
        value = "..."
    return f"{key}=..." if value == "..." else shlex.quote(f"{key}={value}")


def _keys_beside(key: str, known: Iterable[str]) -> str:
    section = key.rpartition(".")[0]
    while section:
        below = [name for name in known if name.rpartition(".")[0] == section]
        if below:
            return f"the keys of {section} are {', '.join(name.rpartition('.')[2] for name in below)}"
        section = section.rpartition(".")[0]
    sections = [name for name in known if "." not in name]
    return f"a key is one of a section, such as loss.beta; the sections are {', '.join(sections)}"
