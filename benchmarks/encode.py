"""Measure how fast records are encoded, on one process and on several.

python -m benchmarks encode [--file PAIRS.jsonl] [--records 50000] [--processes 1 2 4] [--chat] [--smoke]

The records are those of the file (../shared/data/hh_rlhf_sample.jsonl where it is there, else invented ones),
repeated; the tokenizer is learnt from them. Every number of processes must write the same bytes. `main_share`
is the reading and writing process's CPU time over all CPU time: one over it is the number of processes from
which on more are of no use, whatever else this machine was doing. The last line is the figures as JSON.
"""

import argparse
import hashlib
import itertools
import json
import random
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.assets import REAL_DATA, learnt_tokenizer, shared_data
from dpo_dist.config.schema import DataConfig, SourceConfig
from dpo_dist.data.build_dataset import prepare_dataset
from dpo_dist.data.dataset import open_dataset

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 16_384


@dataclass(frozen=True)
class Figure:
    """What one number of processes did."""

    processes: int
    seconds: float
    records_per_second: float
    tokens_per_second: float
    main_share: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="pairs, one JSON object a line")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--chat", action="store_true", help="render dialogues with a chat template")
    parser.add_argument("--folder", type=Path, help="where to write, and remove (default: /tmp)")
    parser.add_argument("--smoke", action="store_true", help="seconds; checks that this script works")
    arguments = parser.parse_args()
    records = 200 if arguments.smoke else arguments.records
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        file = repeated(arguments.file, records, Path(name))
        tokenizer = learnt_tokenizer(file, 512 if arguments.smoke else VOCABULARY)
        if arguments.chat:
            tokenizer.chat_template = CHATML
        figures = []
        contents = set()
        for processes in arguments.processes:
            figure, content = measure(file, records, processes, tokenizer, Path(name, f"cache-{processes}"))
            print(", ".join(f"{key} {value:,.4g}" for key, value in asdict(figure).items()))
            figures.append(asdict(figure))
            contents.add(content)
    assert len(contents) == 1, "the number of processes changes what is written"
    print(json.dumps({"file": file.name, "records": records, "chat": arguments.chat, "figures": figures}))


def repeated(file: Path | None, records: int, folder: Path) -> Path:
    """A file of `records` lines: those of `file`, over and over."""
    real = file or shared_data() / REAL_DATA["hh"]
    lines = real.read_text().splitlines() if real.is_file() else invented_lines()
    repeated = folder / (real.name if real.is_file() else "invented.jsonl")
    with repeated.open("w") as out:
        out.writelines(f"{line}\n" for line in itertools.islice(itertools.cycle(lines), records))
    return repeated


def invented_lines() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(2000)]
    names = ("prompt", "chosen", "rejected")
    return [json.dumps({name: " ".join(draw.choices(words, k=80)) for name in names}) for _ in range(1000)]


def measure(file: Path, records: int, processes: int, tokenizer: Any, cache: Path) -> tuple[Figure, str]:
    """The speed of encoding `file`, and a digest of what was written."""
    config = DataConfig(cache=str(cache), max_length=4096, max_bad_share=1.0, processes=processes)
    started, main_before, all_before = time.perf_counter(), time.process_time(), cpu_seconds()
    encoded = prepare_dataset([SourceConfig(str(file))], config, tokenizer, "learnt")
    seconds = time.perf_counter() - started
    main_seconds, all_seconds = time.process_time() - main_before, cpu_seconds() - all_before
    digest = hashlib.blake2b()
    for written in sorted(encoded[0].folder.iterdir()):
        digest.update(written.read_bytes())
    tokens = len(open_dataset(encoded, config).ids)
    figure = Figure(processes, seconds, records / seconds, tokens / seconds, main_seconds / all_seconds)
    return figure, digest.hexdigest()


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
