"""Preference data before tokenisation: every format is read into `PreferenceRecord`.

Records belong to the training or to the evaluation data by the hash of their prompt.
"""

import base64
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.data.config import DataConfig, Ranked
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.types import Fields

FIRST_TURN, LAST_TURN = "\n\nHuman:", "\n\nAssistant:"
DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")
DIALOGUE_START = re.compile(r"\s*Human:")
_ROLES = {"Human": "user", "Assistant": "assistant"}
HELD_OUT = "held_out_for_eval"
LEFT_IN_TRAIN = "left_in_train"
NOT_KEPT = "not_kept"
"""The reason of a record that the source's `keep` leaves out: it is no bad one."""
MAX_RECORD_BYTES = 2**27
"""Largest record, in a file and in memory: a larger one is a damaged file, or expands without end."""
MAX_TEXT_BYTES = 2**24
"""Longest texts of a record: tokenizing them takes 160 times as many bytes."""
IMAGE = "\ufdd1"
"""Stands for an image in the content of a message: a noncharacter, never part of interchanged text."""
RESERVED_CHARACTER = "\ufdd0"
"""Delimits the marks of the encoder: a noncharacter, too."""
_MAX_SHOWN_CHARACTERS = 40
_MAX_SHOWN_WORDS = 3


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `fields` are what a chat template renders besides the content: `tool_calls` (arguments as objects),
    `tool_call_id`, `name`, `reasoning_content`, `thinking`, and keys that the source gives to the template.
    `is_trained`: whether the data say that the loss counts this turn of a response; None: by its role.
    """

    role: str
    content: str
    fields: Fields = field(default_factory=dict)
    is_trained: bool | None = field(default=None, compare=False)


Messages: TypeAlias = tuple[Message, ...]
Response: TypeAlias = str | Messages
"""The content of one assistant turn; or all turns after the prompt, of which the last is the assistant's."""


def turns_of(content: Response, role: str = "assistant") -> Messages:
    """Return a prompt or a response as messages; a text is one turn of `role`."""
    return (Message(role, content),) if isinstance(content, str) else content


class Dialogue(tuple[Message, ...]):
    """The messages of a prompt written as one text with `Human:` and `Assistant:` turns, as in HH-RLHF.

    `text` starts with a turn and ends with the last ``"\\n\\nAssistant:"``, before a response. `text` is
    encoded if the tokenizer has no chat template. The contents of the messages are stripped.
    """

    text: str

    def __new__(cls, text: str) -> "Dialogue":
        """Split a text into its turns."""
        _, *parts = DIALOGUE_TURN.split(text)
        turns = zip(parts[:-2:2], parts[1:-2:2], strict=True)
        dialogue = super().__new__(cls, (Message(_ROLES[name], content.strip()) for name, content in turns))
        dialogue.text = text
        return dialogue

    @staticmethod
    def start_of_turn(text: str) -> int | None:
        """Return where a text begins another turn; None if it does not."""
        turn = DIALOGUE_TURN.search(text)
        return None if turn is None else turn.start()

    def __getnewargs__(self) -> tuple[str]:
        return (self.text,)


Prompt: TypeAlias = str | Messages
SCORERS = ("reference", "teacher")
"""Models that only score responses, and may read another prompt than the policy."""


@dataclass(frozen=True)
class Origin:
    """Position of a record: its source as configured, and the 1-based line or number of the record in it.

    Files that the record names must be below one of the `folders`.
    """

    source: str
    line: int
    folders: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class PreferenceRecord:
    """One prompt and its responses, best first: one to learn, two (chosen, rejected), or a ranking of more.

    Responses are messages only if the prompt is. `scores` are in the order of the responses; in a ranking
    they never rise, and equal scores are ties. The chat template renders the `tools` and gets the
    `template_arguments`. `numbers`: the `NUMBERS` with an effect. `is_exchanged`: the record's rejected side
    is the first response. `unread`: columns with a value that nothing reads, in words. `images`: of the
    prompt, in the order of the `IMAGE` characters in its contents; a prompt with images is messages.
    `scorer_prompts`: by the names in `SCORERS`, what a scorer reads in place of the prompt.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    origin: Origin
    scores: tuple[float, ...] | None = None
    tools: tuple[Fields, ...] = ()
    template_arguments: Fields = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    is_exchanged: bool = False
    unread: tuple[str, ...] = ()
    images: tuple["ImageFile", ...] = ()
    scorer_prompts: Mapping[str, Prompt] = field(default_factory=dict)

    @property
    def labelled_side(self) -> str | None:
        """A labelled response's side: chosen if it is good, else rejected; None for other records."""
        if len(self.responses) != 1 or self.scores is None:
            return None
        return "chosen" if self.scores[0] > 0 else "rejected"

    def readable(self) -> "Record":
        """Return the record if all its images can be read, else the reason why not."""
        try:
            for image in self.images:
                _ = image.digest  # cached: the record's hashes do not read the file again
        except UnusableRecordError as fault:
            return fault.as_bad_record(self.origin)
        return self

    def prompt_key(self) -> str:
        """Return 32 hex digits over the prompt, its images, tools, template arguments and scorers' prompts.

        Raises UnusableRecordError: an image cannot be read.
        """

        def plain(prompt: Prompt) -> Any:
            if isinstance(prompt, Dialogue):
                return {"dialogue": prompt.text}
            if isinstance(prompt, str):
                return prompt
            return [[turn.role, turn.content, dict(turn.fields)] for turn in prompt]

        arguments = dict(self.template_arguments)
        content = {"prompt": plain(self.prompt), "tools": list(self.tools), "arguments": arguments}
        content |= {scorer: plain(prompt) for scorer, prompt in self.scorer_prompts.items()}
        if self.images:
            content["images"] = [image.digest.hex() for image in self.images]
        return text_digest(json.dumps(content, sort_keys=True))


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, with a reason from counts.yaml.

    The `detail` has no text of the record. `unread` are columns, or keys of messages, that nothing reads.
    `tokens`: of the prompt and the longest response, if the record could be used with other limits; else 0.
    """

    reason: str
    origin: Origin
    detail: str = ""
    unread: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def why(self) -> str:
        """The reason with its details, which have no text of the record."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason

    def __str__(self) -> str:
        return f"{self.origin} {self.why}"

    def readable(self) -> "BadRecord":
        """Return the record itself, which has no images."""
        return self


class UnusableRecordError(Exception):
    """Raised for a record that cannot be used; `as_bad_record` adds the record's position."""

    def __init__(self, reason: str, detail: str = "", unread: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.unread = unread

    def as_bad_record(self, origin: Origin) -> BadRecord:
        """Return a `BadRecord` with this reason and the record's position."""
        return BadRecord(self.reason, origin, self.detail, self.unread)


Record: TypeAlias = PreferenceRecord | BadRecord
RawRecord: TypeAlias = tuple[Fields | BadRecord, Origin]
"""An input record, or the reason why it cannot be read, and its origin."""

Ranks: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ImageFile:
    """The file of an image: its content, or its name, looked up in `folders` in their order.

    Wherever a link leads, the file must be below one of the folders. A name can be a base64 `data:` URI.
    """

    content: bytes | None = field(default=None, repr=False)
    name: str = ""
    folders: tuple[str, ...] = ()

    def read(self) -> bytes:
        """Return the content of the file. Raises UnusableRecordError: `image_unreadable`, with the cause."""
        content = self.content
        try:
            if content is None and self.name.startswith("data:"):
                content = base64.b64decode(self.name.partition(";base64,")[2], validate=True)
            elif content is None:
                with self.found().open("rb") as stream:
                    content = stream.read(MAX_RECORD_BYTES + 1)
        except (OSError, ValueError, RuntimeError) as fault:  # RuntimeError: links in a circle
            raise UnusableRecordError("image_unreadable", f"{type(fault).__name__} for its file") from fault
        if not content:
            raise UnusableRecordError("image_unreadable", "a file of 0 bytes")
        if len(content) > MAX_RECORD_BYTES:
            raise UnusableRecordError("image_unreadable", f"over {MAX_RECORD_BYTES:,} bytes")
        return content

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over the content of the file."""
        return hashlib.blake2b(self.read(), digest_size=16).digest()

    @property
    def path(self) -> str:
        """The name without the scheme of local files."""
        return self.name.removeprefix("file://")

    def found(self) -> Path:
        """Return the file of this name. Raises UnusableRecordError: `image_unreadable`."""
        name = self.path
        if "://" in name:
            raise UnusableRecordError("image_unreadable", "a URL is not fetched")
        roots = [Path(folder).resolve() for folder in self.folders]
        files = [root / name for root in roots if (root / name).resolve().is_file()]
        for file in files:
            if any(map(file.resolve().is_relative_to, roots)):
                return file
        what = "is outside the folders of images" if files else "does not exist"
        raise UnusableRecordError("image_unreadable", f"the file {shown_key(Path(name).name)} {what}")


def training_examples(record: PreferenceRecord, ranked: Ranked) -> tuple[list[Ranks], int]:
    """Return the training examples of a record, each as indices of its responses, best first, and the ties.

    `whole` is one ranking with the first of responses with equal scores, `best_worst` the first and the last
    response, `all_pairs` every two responses with different scores. One or two responses are one example.
    Ties are the responses (`whole`) or pairs (`all_pairs`) omitted because of equal scores.
    """
    indices = range(len(record.responses))
    if len(indices) <= 2:
        return [tuple(indices)], 0
    # Without scores the order itself is the ranking.
    scores = record.scores or tuple(-float(index) for index in indices)
    match ranked:
        case Ranked.whole:
            distinct = tuple(index for index in indices if index == 0 or scores[index] != scores[index - 1])
            return [distinct], len(indices) - len(distinct)
        case Ranked.best_worst:
            return [(0, indices[-1])], 0
        case Ranked.all_pairs:
            pairs = list(itertools.combinations(indices, 2))
            untied: list[Ranks] = [pair for pair in pairs if scores[pair[0]] != scores[pair[1]]]
            return untied, len(pairs) - len(untied)


def parts_of(content: str) -> list[Fields]:
    """Return a content as parts: texts, and places of images."""
    parts: list[Fields] = []
    for number, text in enumerate(content.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if text or not content:
            parts.append({"type": "text", "text": text})
    return parts


def shown_key(key: Any) -> str:
    """Return a field's name for a message, or its length if the name may be a text of the record."""
    name = str(key)
    if len(name) > _MAX_SHOWN_CHARACTERS or len(name.split()) > _MAX_SHOWN_WORDS or not name.isprintable():
        return f"a name of {len(name)} characters"
    return name


PromptHashes = npt.NDArray[np.uint64]
_HASH_BYTES = 8
# Invisible characters that change no word: joiners, direction marks, soft hyphens, byte-order marks.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def prompt_hash(prompt: Prompt, images: Sequence[ImageFile] = ()) -> int:
    """Return 64 bits of a hash over the images, and the roles and texts of a prompt, as they are seen.

    See docs/data.md. Raises UnusableRecordError: an image cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    if isinstance(prompt, str):
        text = "\n\n" + prompt.strip()
        is_dialogue = text.startswith(FIRST_TURN) and text.endswith(LAST_TURN)
        prompt = Dialogue(text) if is_dialogue else turns_of(prompt, "user")
    for message in prompt:
        if message.role == "system" and not message.content.strip():
            continue
        for text in (message.role, message.content):
            visible = text if text.isascii() else unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
            content = " ".join(visible.split()).encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
    for image in images:
        digest.update(image.digest)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True, eq=False)
class Part:
    """The records of sources that belong to the training data, or to the evaluation data.

    `is_eval`: the evaluation part of a split by `share`. `held_out`: uint64 [prompts], ascending,
    the `prompt_hash` of prompts that are not in the training data.
    """

    is_eval: bool = False
    share: float = 0.0
    held_out: PromptHashes | None = None

    @classmethod
    def to_train(cls, config: DataConfig, eval_prompts: PromptHashes | None) -> "Part":
        """Return the part that is trained; `eval_prompts`: uint64 [examples], hashes of evaluation data."""
        held_out = None
        if eval_prompts is not None and config.drop_eval_prompts:
            held_out = np.unique(eval_prompts)
        return cls(share=config.eval_share, held_out=held_out)

    @classmethod
    def to_evaluate(cls, config: DataConfig) -> "Part":
        """Return the records to evaluate: all of `data.eval`, or the `data.eval_share` of `data.train`."""
        return cls(is_eval=config.eval_share > 0, share=config.eval_share)

    @property
    def count_of_others(self) -> str:
        """The name in counts.yaml under which records of the other part are counted."""
        return LEFT_IN_TRAIN if self.is_eval else HELD_OUT

    @property
    def identity(self) -> list[str]:
        """A text for each property that selects records; empty if all records belong to this part."""
        texts = list[str]()
        if self.share:
            name = "eval" if self.is_eval else "train"
            texts.append(f"{name} {self.share!r}")
        if self.held_out is not None:
            texts.append(hashlib.blake2b(self.held_out.tobytes()).hexdigest())
        return texts

    def has(self, prompt: int) -> bool:
        """Return whether records with this `prompt_hash` belong to this part."""
        if self.held_out is not None:
            index = int(np.searchsorted(self.held_out, np.uint64(prompt)))
            if index < len(self.held_out) and int(self.held_out[index]) == prompt:
                return False
        if not self.share:
            return True
        # A second hash: else prompts that were chosen by the first hash would be in one part.
        content = prompt.to_bytes(_HASH_BYTES, "little") + bytes(_HASH_BYTES)
        place = int.from_bytes(hashlib.blake2b(content, digest_size=_HASH_BYTES).digest(), "little")
        return (place < self.share * 2.0 ** (8 * _HASH_BYTES)) == self.is_eval
