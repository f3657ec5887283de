"""CPU time of each stage of encoding, on one process."""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.options import Json
from dpo_dist.config.data import DataConfig, DataFormat, SourceConfig
from dpo_dist.data.encode import encode_chunk
from dpo_dist.data.formats import parse_record
from dpo_dist.data.prompts import prompt_hash
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.render import render_record
from dpo_dist.data.sources import raw_records
from dpo_dist.data.store import SourceWriter
from dpo_dist.data.tokenizer import tokenizer_facts

_MAX_RECORDS = 5000


def measure_stages(file: Path, config: DataConfig, tokenizer: Any) -> Json:
    """Return CPU microseconds for each record of `file`, by stage.

    `collect` is the rest of encoding a chunk: truncation, content keys, arrays.
    """
    raw, read = _timed(lambda: list(itertools.islice(raw_records(SourceConfig(str(file))), _MAX_RECORDS)))
    records, understand = _timed(lambda: [_parsed(fields, origin) for fields, origin in raw])
    good = [record for record in records if isinstance(record, PreferenceRecord)]
    facts = tokenizer_facts(tokenizer, config)
    encode_chunk(good[:2], config, tokenizer)
    _, hashing = _timed(lambda: [prompt_hash(record.prompt) for record in good])
    rendered, render = _timed(lambda: [render_record(record, facts, config) for record in good])
    texts = [(one.prompt, [response.text for response in one.responses]) for one in rendered]
    _, tokenise = _timed(lambda: [facts.encoder.encode_after(*one) for one in texts])
    chunk, whole = _timed(lambda: encode_chunk(records, config, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        _, write = _timed(lambda: SourceWriter(Path(folder), str(file)).add(chunk))
    seconds = {
        "read": read,
        "understand": understand,
        "hash": hashing,
        "render": render,
        "tokenise": tokenise,
        "collect": max(0.0, whole - hashing - render - tokenise),
        "write": write,
    }
    return {stage: 1e6 * spent / len(raw) for stage, spent in seconds.items()}


def _parsed(fields: Any, origin: Any) -> PreferenceRecord | BadRecord:
    return fields if isinstance(fields, BadRecord) else parse_record(fields, DataFormat.auto, origin)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = work()
    return result, time.process_time() - started
