"""Repair a command by the sentences of an error, as its user does."""

import re

from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.foundation.remedies import COMMAND_LINE


def words_to_write(remedy: str) -> list[str]:
    """The words KEY=VALUE of what a remedy proposes first, without a shell's quotes."""
    words = list[str]()
    for token in re.findall(r"'[^']*'\S*|[^\s']+", remedy):
        word = token.rstrip(",;:?)").strip("'")
        if re.match(r"\+?[\w.]+=", word):
            words.append(word)
        if words and (token == "or" or token[-1] in ",;:"):
            break
    return words


def key_of(word: str) -> str:
    """The key of a word of a command."""
    return word.partition("=")[0].lstrip("+")


_CHOSEN_BY = {"loss": "loss.kind", "parallelism": "parallelism.kind", "reference": "reference.mode"}
"""The key that would win over a preset, by the preset's group."""


def repaired(words: list[str], error: DpoDistError) -> list[str]:
    """A command after what the remedies of an error propose first."""
    left = list(words)
    written = list[str]()
    for part in error.parts or (error,):
        remedy = part.remedy
        place = part.where.removeprefix(f"{COMMAND_LINE}: ")
        is_word = place != part.where
        at_fault = [word for word in left if (word in place.split() if is_word else key_of(word) == place)]
        name = re.match(r"did you mean ([^\s=]+)\?", remedy)
        key = re.match(r"remove ([\w.]+)", remedy)
        if name:
            wrong = key_of(at_fault[0]) if is_word else part.got.partition(" ")[0] or place
            at_fault = at_fault or [word for word in left if wrong in word]
            proposed = [at_fault[0].replace(wrong, name[1])]
        elif key and key[1] in map(key_of, left):
            at_fault = [word for word in left if key_of(word) == key[1]]
            proposed = []
        else:
            proposed = words_to_write(remedy)
        if proposed or key or re.search("remove it|not needed", remedy):
            left = [word for word in left if word not in at_fault]
        written += proposed
    keys = {key_of(word) for word in written}
    keys |= {_CHOSEN_BY[group] for group in keys & _CHOSEN_BY.keys()}
    return [*(word for word in left if key_of(word) not in keys), *dict.fromkeys(written)]
