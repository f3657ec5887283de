"""The prompts of `pairs`: read once, without repetitions, into parts that all processes share."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_dist.config.data import TEMPLATE_DATE, DataConfig
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.formats import read_prompts
from dpo_dist.data.records import Message, PreferenceRecord
from dpo_dist.foundation.files import content_digest
from dpo_dist.foundation.text import counted
from dpo_dist.generation.pairs.files import prompt_key, prompt_row, training_records
from dpo_dist.generation.sampling.generate import Sampling
from dpo_dist.generation.sampling.stages import Parts

PART_PROMPTS = 64
"""Prompts of one part of the work: processes share the parts, and finished ones are not repeated."""


def write_prompts(folder: Path, config: RunConfig, say: Callable[[str], None]) -> Parts:
    """Write the different prompts of `data.train`, in their order, as parts of a stage."""
    pairs = config.pairs
    seen: set[str] = set()
    counts: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for record in training_records(config, read_prompts, say, lambda: len(seen) == pairs.limit):
            asked = as_asked(record, config.data)
            key = prompt_key(asked)
            if int(key[:16], 16) % pairs.prompt_parts != pairs.prompt_part:
                counts["in_other_parts"] += 1
            elif key in seen:
                counts["repeated"] += 1
            else:
                seen.add(key)
                yield prompt_row(asked)

    prompts = Parts.written(folder, "prompts", rows(), PART_PROMPTS)
    skipped = "".join(f", {number:,} {name.replace('_', ' ')}" for name, number in sorted(counts.items()))
    say(f"prompts: {counted(len(seen), 'different one')}{skipped}")
    return prompts


def as_asked(record: PreferenceRecord, data: DataConfig) -> PreferenceRecord:
    """Return a prompt as models are asked: a text as a user's message if `data.text_as_messages` is set."""
    if data.text_as_messages and isinstance(record.prompt, str):
        return replace(record, prompt=(Message("user", record.prompt),))
    return record


def generation_settings(config: RunConfig, prompts: Parts, sampling: Sampling) -> dict[str, Any]:
    """Return what the responses of a model depend on; a chat template in a file by its content."""
    data, model = config.data, config.model
    chat_template = data.chat_template
    if chat_template is not None and (file := Path(chat_template).expanduser()).is_file():
        chat_template = content_digest([file])
    return {
        "prompts": prompts.folder.name,
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "text_as_messages": data.text_as_messages,
        "template": str(data.template),
        "template_date": TEMPLATE_DATE,
        "chat_template": chat_template,
        "template_arguments": data.template_arguments,
        **asdict(sampling),
        "dtype": str(model.dtype),
        "quantization": None if model.quantization is None else str(model.quantization),
    }
