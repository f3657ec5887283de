"""The prompts of `pairs`: read once, without repetitions, into a file in whose order all processes work."""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_dist.config.data import TEMPLATE_DATE, DataConfig, Truncation
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.encode import TokenIds, encode_pair
from dpo_dist.data.prompts import read_prompts
from dpo_dist.data.records import BadRecord, Dialogue, Message, Origin, PreferenceRecord, Prompt
from dpo_dist.data.sources import pinned
from dpo_dist.foundation.files import collect_abandoned, content_digest, staged_file, text_digest
from dpo_dist.foundation.text import counted
from dpo_dist.generation.pairs.files import good_records

UNLIMITED = 2**30
# The first ends a thought, so that one is kept which the template opens in the prompt: the model continues
# it. The second has none, so that one is kept which the template ends in the prompt.
_PLACEHOLDERS = ("response\n</think>\n\nresponse", "response")


@dataclass(frozen=True)
class PromptList:
    """Different prompts in a file of `write_prompts`, one per line."""

    file: Path
    count: int
    part_prompts: int  # of one part of the work
    digest: str  # of the file
    starts: "array[int]"  # byte offset of each part

    @property
    def parts(self) -> int:
        """The number of parts."""
        return len(self.starts)

    def part(self, index: int) -> list[PreferenceRecord]:
        """Return the prompts of a part."""
        with self.file.open("rb") as lines:
            lines.seek(self.starts[index])
            return [parse_line(line) for line in islice(lines, self.part_prompts)]


PART_PROMPTS = 64


def open_prompts(file: Path, part_prompts: int) -> PromptList:
    """Return the prompts of a file that `write_prompts` wrote."""
    count, start, starts = 0, 0, array("q")
    with file.open("rb") as lines:
        for line in lines:
            if count % part_prompts == 0:
                starts.append(start)
            count, start = count + 1, start + len(line)
    return PromptList(file, count, part_prompts, content_digest([file]), starts)


def write_prompts(folder: Path, config: RunConfig, say: Callable[[str], None]) -> Path:
    """Write the different prompts of `data.train`, in their order, to a file named by its content."""
    pairs, data = config.pairs, config.data
    seen: set[bytes] = set()
    counts: Counter[str] = Counter()

    def enough() -> bool:
        return len(seen) == pairs.limit

    def lines() -> Iterator[str]:
        for source in data.train:
            for record in good_records(read_prompts(pinned(source, None)), source, data, say, enough):
                asked = as_asked(record, data)
                key = bytes.fromhex(prompt_key(asked))
                if int.from_bytes(key[:8], "big") % pairs.prompt_parts != pairs.prompt_part:
                    counts["in_other_parts"] += 1
                elif key in seen:
                    counts["repeated"] += 1
                else:
                    seen.add(key)
                    yield json.dumps(prompt_line(asked)) + "\n"
            if enough():
                return

    file = write_named_by_content(folder, lines())
    skipped = "".join(f", {number:,} {name.replace('_', ' ')}" for name, number in sorted(counts.items()))
    say(f"prompts: {counted(len(seen), 'different one')}{skipped}")
    return file


def write_named_by_content(folder: Path, lines: Iterable[str]) -> Path:
    """Write lines to `prompts-DIGEST.jsonl` in a folder, and return its path."""
    collect_abandoned(folder)
    temporary = folder / "prompts.jsonl"
    with staged_file(temporary) as staged, staged.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
    file = folder / f"prompts-{content_digest([temporary])}.jsonl"
    temporary.replace(file)
    return file


def as_asked(record: PreferenceRecord, data: DataConfig) -> PreferenceRecord:
    """Return a prompt as models are asked: a text as a user's message if `data.text_as_messages` is set."""
    if data.text_as_messages and isinstance(record.prompt, str):
        return replace(record, prompt=(Message("user", record.prompt),))
    return record


def prompt_key(record: PreferenceRecord) -> str:
    """Return 32 hex digits over the prompt, its tools and template arguments: the same for equal prompts."""
    return text_digest(json.dumps(_content(record), sort_keys=True))


def encode_prompt(
    record: PreferenceRecord, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> TokenIds | BadRecord:
    """Return the token ids of a prompt as training encodes them, with the template's start of a thought."""
    limits = replace(data, max_length=UNLIMITED, truncation=Truncation.drop)
    for placeholder in _PLACEHOLDERS:
        encoded = encode_pair(replace(record, responses=(placeholder,)), tokenizer, limits)
        if isinstance(encoded, BadRecord) or "ended_thought_reopened" not in encoded.changes:
            break
    return encoded if isinstance(encoded, BadRecord) else encoded.prompt_ids


def rendering(data: DataConfig) -> dict[str, Any]:
    """Return the settings that decide the token ids of prompts; a chat template in a file by its content."""
    chat_template = data.chat_template
    if chat_template is not None and (file := Path(chat_template).expanduser()).is_file():
        chat_template = content_digest([file])
    return {
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "text_as_messages": data.text_as_messages,
        "template": str(data.template),
        "template_date": TEMPLATE_DATE,
        "chat_template": chat_template,
        "template_arguments": data.template_arguments,
    }


def _content(record: PreferenceRecord) -> dict[str, Any]:
    prompt: Any = record.prompt
    if isinstance(prompt, Dialogue):
        prompt = {"dialogue": prompt.text}
    elif not isinstance(prompt, str):
        prompt = [[turn.role, turn.content, dict(turn.fields)] for turn in prompt]
    return {"prompt": prompt, "tools": list(record.tools), "arguments": dict(record.template_arguments)}


def prompt_line(record: PreferenceRecord) -> dict[str, Any]:
    """Return the line of a prompt in a file of prompts; further fields may be added to it."""
    return _content(record) | {"origin": [record.origin.source, record.origin.line]}


def parse_line(line: bytes) -> PreferenceRecord:
    """Return the prompt of a line in a file of prompts."""
    fields = json.loads(line)
    prompt: Prompt
    match fields["prompt"]:
        case str() as text:
            prompt = text
        case {"dialogue": text}:
            prompt = Dialogue(text)
        case turns:
            prompt = tuple(Message(role, content, below) for role, content, below in turns)
    return PreferenceRecord(
        prompt,
        (),
        Origin(*fields["origin"]),
        tools=tuple(fields["tools"]),
        template_arguments=fields["arguments"],
    )
