"""The prompts of records: read alone, or split into training and evaluation data by their hash."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_dist.config.data import DataConfig, DataFormat, SourceConfig
from dpo_dist.data.columns import resolved
from dpo_dist.data.counts import HELD_OUT, LEFT_IN_TRAIN
from dpo_dist.data.formats import parse_record
from dpo_dist.data.records import (
    BadRecord,
    Dialogue,
    Fields,
    Message,
    Messages,
    Origin,
    PreferenceRecord,
    Prompt,
)
from dpo_dist.data.sources import raw_records

# Faults of the responses of a record; its prompt may be usable.
_OF_RESPONSES = frozenset(
    (
        *("unknown_format", "missing_field", "not_one_answer", "no_ranking", "all_tied", "invalid_scores"),
        *("empty_response", "identical_responses"),
    )
)


def read_prompts(source: SourceConfig) -> Iterator[PreferenceRecord | BadRecord]:
    """Read the records of a source for their prompts: without responses where they have none to be used."""
    source = resolved(source)
    for record, origin in raw_records(source):
        yield record if isinstance(record, BadRecord) else parse_prompt(record, source.format, origin)


def parse_prompt(record: Fields, name: DataFormat, origin: Origin) -> PreferenceRecord | BadRecord:
    """Return a record of format `name`, without responses if it has none that can be used."""
    parsed = parse_record(record, name, origin)
    if not isinstance(parsed, BadRecord) or parsed.reason not in _OF_RESPONSES:
        return parsed
    completed = parse_record(_completed(record), DataFormat.completion, origin)
    if isinstance(completed, BadRecord):
        return parsed if completed.reason in _OF_RESPONSES else completed
    return replace(completed, responses=(), scores=None)


def _completed(record: Fields) -> dict[str, Any]:
    """Return a record with an invented response, so that its prompt is read as that of any completion."""
    turns = record.get("messages")
    if record.get("prompt") is None and isinstance(turns, list):
        return {**record, "messages": [*turns, {"role": "assistant", "content": "response"}]}
    return {**record, "completion": "response"}


PromptHashes = npt.NDArray[np.uint64]
_HASH_BYTES = 8
# Characters without width that change no word: joiners, marks of direction, soft hyphens, byte-order marks.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def prompt_hash(prompt: Prompt) -> int:
    """Return 64 bits of a hash over the roles and texts of a prompt, as they are seen; see docs/data.md."""
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for message in _messages(prompt):
        if message.role == "system" and not message.content.strip():
            continue
        for text in (message.role, message.content):
            visible = text if text.isascii() else unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
            content = " ".join(visible.split()).encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(digest.digest(), "little")


def _messages(prompt: Prompt) -> Messages:
    if not isinstance(prompt, str):
        return prompt
    text = "\n\n" + prompt.strip()
    is_dialogue = text.startswith("\n\nHuman:") and text.endswith("\n\nAssistant:")
    return Dialogue(text) if is_dialogue else (Message("user", prompt),)


@dataclass(frozen=True, eq=False)
class Part:
    """The records of sources that belong to the training data, or to the evaluation data.

    `is_eval`: those of a split of the training sources by `share`. `held_out`: uint64 [prompts], ascending,
    the `prompt_hash` of prompts that are not in the training data.
    """

    is_eval: bool = False
    share: float = 0.0
    held_out: PromptHashes | None = None

    @property
    def others(self) -> str:
        """The name under which records of the other part are counted."""
        return LEFT_IN_TRAIN if self.is_eval else HELD_OUT

    @property
    def identity(self) -> list[str]:
        """A text for each property that selects records; empty if all records belong to this part."""
        split = [f"{'eval' if self.is_eval else 'train'} {self.share!r}"] if self.share else []
        held_out = [] if self.held_out is None else [hashlib.blake2b(self.held_out.tobytes()).hexdigest()]
        return split + held_out

    def has(self, prompt: int) -> bool:
        """Return whether records with this `prompt_hash` belong to this part."""
        if self.held_out is not None:
            index = int(np.searchsorted(self.held_out, np.uint64(prompt)))
            if index < len(self.held_out) and int(self.held_out[index]) == prompt:
                return False
        return not self.share or self._is_drawn(prompt) == self.is_eval

    def _is_drawn(self, prompt: int) -> bool:
        seeded = prompt.to_bytes(_HASH_BYTES, "little") + bytes(_HASH_BYTES)
        drawn = hashlib.blake2b(seeded, digest_size=_HASH_BYTES).digest()
        return int.from_bytes(drawn, "little") < self.share * 2.0 ** (8 * _HASH_BYTES)


ALL_RECORDS = Part()


def train_part(config: DataConfig, eval_prompts: PromptHashes | None) -> Part:
    """Return the part that is trained; `eval_prompts`: uint64 [examples], hashes of the evaluation data."""
    held_out = None if eval_prompts is None or not config.drop_eval_prompts else np.unique(eval_prompts)
    return Part(share=config.eval_share, held_out=held_out)


def eval_part(config: DataConfig) -> Part:
    """Return the part of the evaluation sources that is evaluated: all of `data.eval`, else the split's."""
    return Part(is_eval=config.eval_share > 0, share=config.eval_share)
