"""The words that repair a command, read out of an error's remedy, for programs."""

import re
from collections.abc import Sequence

COMMAND_LINE = "command line"
"""How `where` of an error begins that is about a word of the command: `command line: loss.betta=1`."""

_VALUE = r"(?:\{[^}]*\}|\[[^]]*\]|[^\s'\[{]*[^\s'\[{,;:?.)])"
_WORD = rf"(?:'[^']+'|\+?[a-z][\w.]*(?:\[\d+\][\w.]*)?={_VALUE})"
_ACTION = re.compile(
    r"(?:\b(?:write|set|choose|add|needs|mean)(?: the key too:| this key inside an entry:)? "
    rf"(?P<write>{_WORD}(?: {_WORD})*))"
    rf"|write dpo-dist (?P<verb>\w+(?: {_WORD})*)"
    r"|did you mean (?P<name>[^\s=]+)\?"
    r"|(?:remove|leave) (?P<remove>it\b|--?\w[\w-]*|[a-z]\w*(?:\.\w+)+)"
    r"|^(?P<drop>not needed)(?! if)"
)
_OTHER_CASES = ("or ", "else ", "in place of ", "in a command of its own ")
_EXAMPLE = re.compile(
    r"\.\.\.|<|=\[?[A-Z_/]{2,}(?![a-z\d-])|=VALUE|\b(?:pairs|held_out)\.jsonl|\bmy_loss|\./base"
)
"""Stands in a remedy for what only the user knows, unless the user has typed it."""
_CHOSEN_BY = {"loss": ("loss.kind", "loss.terms"), "reference": ("reference.mode",)}
"""By the group of a preset: the keys that would win over a preset that is written."""


def repair_of(remedy: str, where: str, got: str, typed: Sequence[str]) -> dict[str, list[str]]:
    """Return the words to `write` into a command and the words or keys to `remove` from it; empty if unknown.

    A written word takes the place of the word with its key, or of what is removed. `typed` are the words of
    the command. Of alternatives the first counts.
    """
    wrong, write, remove = _wrong_words(where, got), list[str](), list[str]()
    for clause in remedy.split("; "):
        action = None if clause.startswith(_OTHER_CASES) else _ACTION.search(clause)
        if action is None:
            continue
        kind, words = str(action.lastgroup), action[str(action.lastgroup)]
        if kind in ("write", "verb"):
            write += [word.strip("'") for word in re.findall(rf"{_WORD}|\w+", words)]
        elif kind == "name":
            _, equals, value = "".join(wrong[:1]).partition("=")
            write += [f"{words}{equals}{value}", *wrong[1:]]
        else:
            named = [] if words in ("it", "not needed") else [words]
            remove += named or wrong or re.findall(r"^[a-z][\w.]*(?=$|[, ])", where)
    examples = [found[0] for found in map(_EXAMPLE.search, write) if found]
    if any(not any(example in word for word in typed) for example in examples):
        return {"write": [], "remove": remove}
    if not wrong and any("[" in key_of(word) or "=" not in word for word in write):
        name = write[0].partition("=")[2] or write[0]
        write, remove = _replaced(name, (got.partition(" (")[0], where), typed)
    keys = {key_of(word) for word in write}
    if write:
        if "." not in where:  # a group of presets, for which a key is written: model=FOLDER
            remove += [word for word in typed if key_of(word) == where and where not in keys]
        remove += [word for word in wrong if "=" not in word or key_of(word) not in keys]
    typed_keys = [key_of(word) for word in typed]  # the last word of a key wins: none but the new one is kept
    remove += [word for word in typed if key_of(word) in keys and typed_keys.count(key_of(word)) > 1]
    remove += [key for group in _CHOSEN_BY for key in _CHOSEN_BY[group] if group in keys]
    # A word that is shown with quotes or without its secret is not the one that was typed.
    remove = [word if word in typed or key_of(word) not in typed_keys else key_of(word) for word in remove]
    return {"write": write, "remove": list(dict.fromkeys(remove))}


def key_of(word: str) -> str:
    """Return the key of a word of a command: `loss.beta=0.2`, `+experiment=qwen7b`."""
    return word.partition("=")[0].lstrip("+")


def _wrong_words(where: str, got: str) -> list[str]:
    """Return the words of the command that an error is about, if it says so."""
    place, _, line = where.partition(": ")
    if place != COMMAND_LINE:
        return re.findall(r"^([a-z][\w.]*) in \S", where)  # a key in a file
    return [line] if line and not line.startswith("-") else (line or got).split()


def _replaced(name: str, wrong: Sequence[str], typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the word of the command that has a wrong name or value, corrected, and the word to remove."""
    for text in filter(None, wrong):
        for word in typed:
            written = re.sub(rf"(?<![\w.-]){re.escape(text)}(?![\w-])", lambda _: name, word)
            if written != word:
                return [written], [word]
    return [], []
