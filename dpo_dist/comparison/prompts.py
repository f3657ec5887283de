"""The prompts of a comparison: some of the held-out ones, in a file in whose order all processes work."""

import heapq
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo_dist.config.data_schema import SourceConfig
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.fields.dataset_info import resolved
from dpo_dist.data.formats import parse_record
from dpo_dist.data.prompt_split import eval_part, prompt_hash
from dpo_dist.data.prompts import parse_prompt
from dpo_dist.data.records import BadRecord, Dialogue, PreferenceRecord, Prompt, Response
from dpo_dist.data.source_labels import source_labels
from dpo_dist.data.sources import pinned, raw_records
from dpo_dist.digests import text_digest
from dpo_dist.errors import DataError
from dpo_dist.generation.counted import good_records
from dpo_dist.generation.prompts import as_asked, prompt_key, prompt_line, write_named_by_content
from dpo_dist.number_text import counted


def write_held_out(folder: Path, config: RunConfig, say: Callable[[str], None]) -> Path:
    """Write `compare.prompts` different prompts of the evaluation data to a file named by its content.

    They are chosen by a hash of `compare.seed` and the prompt, and written in the order of the data.

    Raises:
        DataError: a source cannot be read, or has no usable prompt.
    """
    wanted = config.compare.prompts
    chosen: list[tuple[int, int, str]] = []  # the smallest hashes, negated: a heap pops its smallest entry
    seen: set[bytes] = set()
    for index, (record, label) in enumerate(_held_out(config, say)):
        key = prompt_key(record)
        if bytes.fromhex(key) in seen:
            continue
        seen.add(bytes.fromhex(key))
        rank = -int(text_digest(f"{config.compare.seed} {key}"), 16)
        if len(chosen) < wanted or rank > chosen[0][0]:
            heapq.heappush(chosen, (rank, index, _line(record, label)))
            if len(chosen) > wanted:
                heapq.heappop(chosen)
    if not chosen:
        raise DataError(
            "the evaluation data have no usable prompt",
            where="data.eval",
            got=", ".join(source.path for source in config.data.eval_sources),
            remedy="check the counts above, or raise data.eval_share",
        )
    fewer = f", fewer than compare.prompts={wanted}" if len(chosen) < wanted else ""
    say(f"prompts: {len(chosen):,} of {counted(len(seen), 'different one')}{fewer}")
    lines = (line + "\n" for _, _, line in sorted(chosen, key=lambda entry: entry[1]))
    return write_named_by_content(folder, lines)


def held_out_facts(line: bytes) -> tuple[str | None, str]:
    """Return the chosen response and the label of the source in a line of the file."""
    fields = json.loads(line)
    return fields["chosen"], fields["source"]


def shown_prompt(prompt: Prompt) -> str:
    """Return a prompt as one text: of a single user turn its content, of others their roles too."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Dialogue):
        return prompt.text
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def _line(record: PreferenceRecord, label: str) -> str:
    chosen = _text(record.responses[0]) if record.responses else None
    return json.dumps(prompt_line(record) | {"chosen": chosen, "source": label})


def _held_out(config: RunConfig, say: Callable[[str], None]) -> Iterator[tuple[PreferenceRecord, str]]:
    """Yield the held-out records, with their responses if they have any, and the labels of their sources."""
    sources, part = config.data.eval_sources, eval_part(config.data)
    for source, label in zip(sources, source_labels(sources), strict=True):
        for record in good_records(prompt_records(pinned(source, None)), source, config.data, say):
            if part.has(prompt_hash(record.prompt)):
                yield as_asked(record, config.data), label


def prompt_records(source: SourceConfig) -> Iterator[PreferenceRecord | BadRecord]:
    """Yield the records of a source, without responses if they have none."""
    source = resolved(source)
    for fields, origin in raw_records(source):
        record = fields if isinstance(fields, BadRecord) else parse_record(fields, source.format, origin)
        if isinstance(record, BadRecord) and not isinstance(fields, BadRecord):
            record = parse_prompt(fields, source.format, origin)
        yield record


def _text(response: Response) -> str:
    """Return a response as text; of several turns, the last one's content."""
    return response if isinstance(response, str) else response[-1].content
