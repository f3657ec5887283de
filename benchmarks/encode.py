"""Measure how fast records are encoded, by number of processes.

Encodes the records of a file, repeated: a slice of real data if it exists, else invented records. The
tokenizer is trained on them, unless `--tokenizer` names one. Every number of processes must write the same
bytes. `main_share` is the share of CPU time that the process which reads and writes takes: more than 1 /
`main_share` processes are not faster, however busy the machine is.
"""

import hashlib
import itertools
import resource
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoTokenizer

from benchmarks.options import Benchmark, Json, markdown
from benchmarks.setting import (
    REAL_DATA,
    TOKENIZER_VOCABULARY,
    Setting,
    shared_data,
    train_tokenizer,
    write_synthetic,
)
from dpo_dist.data import DataConfig, SourceConfig
from dpo_dist.encoded import workers
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import open_dataset

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run(options: Namespace) -> Json:
    """Encode the records once with each number of processes."""
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        file = _write_repeated(options.file, options.records, Path(name))
        tokenizer: Any = None
        if options.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        else:
            tokenizer = train_tokenizer(file, 512 if options.smoke else TOKENIZER_VOCABULARY)
        if options.chat and options.tokenizer is None:
            tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            tokenizer.chat_template = CHATML
        speeds, contents = [], set()
        for processes in options.processes:
            cache = Path(name, f"cache-{processes}")
            speed, content = _measure(file, options.records, processes, tokenizer, cache)
            speeds.append(speed)
            contents.add(content)
    assert len(contents) == 1, "the written bytes depend on the number of processes"
    print(markdown([list(speeds[0]), *([f"{value:,.4g}" for value in speed.values()] for speed in speeds)]))
    circumstances = {"file": file.name, "records": options.records, "chat": options.chat}
    return {**circumstances, "figures": speeds}


def _config(cache: Path) -> DataConfig:
    return DataConfig(cache=str(cache), max_length=4096, max_bad_share=1.0)


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--file", type=Path, help="pairs, one JSON object a line")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--tokenizer", help="folder or hub name of a real tokenizer; its template is used")
    parser.add_argument("--chat", action="store_true", help="render dialogues with a chat template")


def _write_repeated(file: Path | None, records: int, folder: Path) -> Path:
    """Return a file of `records` lines, which repeats the lines of `file`."""
    source = file or shared_data() / REAL_DATA["hh"]
    if not source.is_file():
        source = folder / "synthetic.jsonl"
        write_synthetic(source, Setting("tiny", 0, 1), min(records, 1000))
    repeated = folder / "repeated" / source.name
    repeated.parent.mkdir()
    lines = source.read_text().splitlines()
    with repeated.open("w") as out:
        out.writelines(f"{line}\n" for line in itertools.islice(itertools.cycle(lines), records))
    return repeated


def _measure(file: Path, records: int, processes: int, tokenizer: Any, cache: Path) -> tuple[Json, str]:
    """Return the speed of encoding `file`, and the digest of the written file."""
    config = _config(cache)
    started, main_before, all_before = time.perf_counter(), time.process_time(), _cpu_seconds()
    with mock.patch.object(workers, "processes_for", return_value=processes):
        encoded = Preparation([SourceConfig(str(file))], config, tokenizer, "trained").whole()
    seconds = time.perf_counter() - started
    main_seconds, all_seconds = time.process_time() - main_before, _cpu_seconds() - all_before
    digest = hashlib.blake2b(encoded[0].file.read_bytes())
    tokens = len(open_dataset(encoded, config).ids)
    speed = {
        "processes": processes,
        "seconds": seconds,
        "records_per_second": records / seconds,
        "tokens_per_second": tokens / seconds,
        "main_share": main_seconds / all_seconds,
        "records_per_cpu_second": records / all_seconds,
        "cpu_ms_per_record": 1000 * all_seconds / records,
    }
    return speed, digest.hexdigest()


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


BENCHMARK = Benchmark(run, {"processes": [1, 2, 4]}, _own_options, {"records": 200})
