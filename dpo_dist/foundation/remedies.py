"""What to do about an error: a sentence for people, and beside it the words by which a program does it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

COMMAND_LINE = "command line"


class ErrorPlace(str):
    """Where an error is, with the words of the command that it is about."""

    words: tuple[str, ...] = ()


class Typed(ErrorPlace):
    """The place of words of the command: `command line: loss.betta=1`."""

    def __new__(cls, *words: str) -> Self:
        """Return the place of these words."""
        place = super().__new__(cls, f"{COMMAND_LINE}: {' '.join(words)}")
        place.words = words
        return place


class InFile(ErrorPlace):
    """The place of a key in a file, which no word of the command corrects: `loss.betta in run.yaml`."""

    def __new__(cls, key: str, file: object) -> Self:
        """Return the place of a key."""
        return super().__new__(cls, f"{key} in {file}")


class AtRecords(ErrorPlace):
    """The places of records: `pairs.jsonl:3; pairs.jsonl:7`."""

    records: tuple[str, ...]

    def __new__(cls, *records: str) -> Self:
        """Return the place of records, each as `FILE:LINE`, which its reason may follow."""
        place = super().__new__(cls, "; ".join(records))
        place.records = records
        return place


@dataclass(frozen=True)
class Remedy:
    """What to do, as a sentence; beside it the words to write into the command and to remove from it.

    `write`: words, each of which takes the place of the word with its key, or of what is removed. `remove`:
    words, an option with its value as one, or keys. `unset`: words `KEY=DEFAULT` of keys whose value goes:
    the command's word is removed, or this one is written over a file's. `drops`: the words that the error is
    about are removed. `rename`: a wrong name in a word, and the right one. Of alternatives in the sentence
    the first that consists of words counts; what only the user knows is no word.
    """

    text: str
    write: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    drops: bool = False
    rename: tuple[str, str] | None = None

    @classmethod
    def to_write(cls, *words: str, verb: str = "write") -> Self:
        """Return the remedy `write KEY=VALUE`, with quotes for a shell where words need them."""
        return cls(f"{verb} {shlex.join(words)}", words)

    @classmethod
    def to_write_one_of(cls, words: Sequence[str], *, lead: str = "write") -> Self:
        """Return the remedy `write KEY=VALUE or OTHER=VALUE`, of which a program writes the first."""
        return cls(f"{lead} {' or '.join(map(shlex.quote, words))}", tuple(words[:1]))

    @classmethod
    def to_set(cls, *words: str) -> Self:
        """Return the remedy `set KEY=VALUE`."""
        return cls.to_write(*words, verb="set")

    @classmethod
    def to_remove(cls, *words: str) -> Self:
        """Return the remedy `remove WORD`."""
        return cls(f"remove {' '.join(words)}", remove=words)

    @classmethod
    def to_unset(cls, word: str) -> Self:
        """Return the remedy `remove KEY`; `word`: the key with its default, for a key that a file sets."""
        return cls(f"remove {key_of(word)} (if a file sets it, write {shlex.quote(word)})", unset=(word,))

    @classmethod
    def to_rename(cls, wrong: str, right: str) -> Self:
        """Return the remedy `did you mean RIGHT?`, which stands in the place of WRONG."""
        return cls(f"did you mean {right}?", rename=(wrong, right))

    def __str__(self) -> str:
        return self.text

    def __add__(self, more: str) -> Self:
        """Return the remedy with more text, such as an alternative."""
        return replace(self, text=self.text + more)

    def __radd__(self, before: str) -> Self:
        """Return the remedy with text before it, such as an alternative that only the user can carry out."""
        return replace(self, text=before + self.text)

    def words(self, where: str, typed: Sequence[str]) -> dict[str, list[str]]:
        """Return the words to `write` into a command and the words or keys to `remove` from it.

        `where`: the place of the error; `typed`: the words of the command.
        """
        if isinstance(where, InFile):
            return {"write": [], "remove": []}
        about = where.words if isinstance(where, ErrorPlace) else ()
        # 1. What the remedy itself says.
        # `optim.lr=0` with `drops`: this word is removed.
        write = [*self.write]
        remove = [*self.remove, *(about if self.drops else ())]
        typed_keys = [key_of(word) for word in typed]
        for word in self.unset:
            key = key_of(word)
            if key in typed_keys:
                remove.append(key)
            else:
                write.append(word)
        # `loss.betta=1` becomes loss.beta=1; a name at the key `model.path` changes in this key's word only.
        if self.rename is not None:
            # The key of a mapping, `model.adapter.rank`, is in the word of the mapping.
            words = [word for word in typed if "=" in word]
            of_key = [word for word in words if f"{where}.".startswith(f"{key_of(word)}.")]
            if about:
                write = [self._renamed(word) for word in about]
            else:  # `./model-a` alone, in no known word: the first word that has the name
                of_name = [word for word in of_key or typed if self._renamed(word) != word]
                write = [self._renamed(word) for word in of_name[:1]]
                remove = of_name[:1]
        # 2. The words that the error is about go, where a written word does not replace them by its key.
        # optim.lr=1e-4 is written for `--lr 1e-4`: both words are removed.
        keys = {key_of(word) for word in write if "=" in word}
        if write:
            remove += [word for word in about if "=" not in word or key_of(word) not in keys]
        # `--seed 512`, beside `--config-dir 512`: the value is removed with its own option, as one word.
        if {*about} <= {*remove} and any(typed.count(word) > 1 for word in about[1:]):
            remove = [*(word for word in remove if word not in about), " ".join(about)]
        # 3. Other words that would win over the written ones go, too.
        # `model.dtype=fp32 model.dtype=x`: the last word of a key wins, so that only the new one is kept.
        repeated = {key for key in keys if typed_keys.count(key) > 1}
        remove += [word for word in typed if key_of(word) in repeated]
        # loss=kto is written: `loss.kind` would win over it; loss={beta: 1} is no preset.
        presets = {key_of(word) for word in write if "={" not in word}
        for group in _CHOSEN_BY:
            if group in presets:
                remove += _CHOSEN_BY[group]
        # 4. What goes is named by words that the command has, or by keys.
        # `loss.beta="=0.2"`, typed without quotes, or a word without its secret: removed by its key.
        remove = [
            word if word in typed or key_of(word) not in typed_keys else key_of(word) for word in remove
        ]
        return {"write": write, "remove": list(dict.fromkeys(remove))}

    def _renamed(self, word: str) -> str:
        wrong, right = self.rename or ("", "")
        return re.sub(rf"(?<![\w./-]){re.escape(wrong)}(?![\w/-])", lambda _: right, word)


_CHOSEN_BY = {"loss": ("loss.kind", "loss.terms"), "reference": ("reference.mode",)}
_CHOSEN_BY |= {"parallelism": ("parallelism.kind",), "optim": ("optim.kind",)}
"""By the group of a preset: the keys that would win over a preset that is written."""


def joined(parts: Sequence[Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """Return the words of several remedies as those of one.

    Of two that write one value differently the one with fewer words knows it: the other gives a usual value
    beside its own. `--eval_steps 50` writes trainer.eval_every=50, `--early_stopping_patience 3` writes 100
    beside trainer.patience=3: 50 is kept. Of two alike neither is known, and what they are about stays as it
    is: `--rpo_alpha 1 --loss_type ipo` writes nothing, as one word sets loss.terms and one the loss.
    """
    # By what is set, the words that set it, each with the number of words of its remedy.
    least: dict[str, set[tuple[int, str]]] = {}
    for part in parts:
        for word in part["write"]:
            least.setdefault(_chosen(word), set()).add((len(part["write"]), word))
    best: set[tuple[int, str]] = set()  # that are alone with the fewest words
    for candidates in least.values():
        fewest = min(candidates)
        if [size for size, _ in candidates].count(fewest[0]) == 1:
            best.add(fewest)
    write: list[str] = []
    remove: list[str] = []
    for part in parts:
        words = [word for word in part["write"] if (len(part["write"]), word) in best]
        if words or not part["write"]:
            write += words
            remove += part["remove"]
    return {"write": list(dict.fromkeys(write)), "remove": list(dict.fromkeys(remove))}


def _chosen(word: str) -> str:
    """Return what a word sets: its key, or the preset that sets the key, `loss` for `loss.kind=ipo`."""
    key = key_of(word)
    return next((group for group, keys in _CHOSEN_BY.items() if key in keys), key)


def key_of(word: str) -> str:
    """Return the key of a word of a command: `loss.beta=0.2`, `+experiment=qwen7b`."""
    return word.partition("=")[0].lstrip("+")
