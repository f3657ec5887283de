"""`pairs.jsonl.summary.json` beside a file of pairs: the settings that made it, and its counts."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import dpo_dist
from dpo_dist.atomic import collect_abandoned, staged_file, write_text
from dpo_dist.config.check import as_written
from dpo_dist.errors import ConfigError
from dpo_dist.generation.count_words import describe_counts
from dpo_dist.generation.pair_records import write_lines, write_pairs
from dpo_dist.number_text import counted


def summary_file(file: Path) -> Path:
    """Return the path of the summary of a file of pairs."""
    return file.with_name(f"{file.name}.summary.json")  # pairs.jsonl and pairs.parquet may both exist


def check_output(file: Path, settings: Mapping[str, Any]) -> None:
    """Check that an existing file of pairs was made with the same settings; it is then written again.

    Raises:
        ConfigError: it was made with other settings, or not by this program.
    """
    if not file.exists():
        return
    try:
        before = json.loads(summary_file(file).read_text(encoding="utf-8"))["settings"]
        old = {str(name): value for name, value in before.items()}
    except (OSError, ValueError, LookupError, AttributeError):
        old = {}
    now = json.loads(json.dumps(settings))
    changed = [
        f"{name}: {as_written(old.get(name))} before, {as_written(now.get(name))} now"
        for name in sorted({*old, *now})
        if old.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            "the file of pairs exists and was made with other settings",
            where=str(file),
            got="; ".join(changed) if old else "a file without a summary of its settings",
            remedy="set pairs.output to another file (finished responses and scores are used again), or "
            "remove this one",
        )


def write_samples(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write every prompt with all its responses, whole or not at all."""
    collect_abandoned(file.parent)  # of starts that were killed while they wrote samples or pairs
    with staged_file(file) as temporary:
        write_lines(temporary, rows)


def write_results(
    file: Path,
    records: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    counts: Counter[str],
    say: Callable[[str], None],
) -> None:
    """Write pairs and their summary, and print the counts.

    Args:
        file: of the pairs.
        records: counted in `counts` while they are read.
        settings: of `check_output`.
        counts: by name.
        say: prints a line.

    Raises:
        DataError: as `write_pairs`.
    """

    def summarise(number: int) -> None:
        found = {name: times for name, times in sorted(counts.items()) if times}
        content = {
            "pairs": number,
            "counts": found,
            "settings": dict(settings),
            "version": dpo_dist.__version__,
        }
        write_text(summary_file(file), json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    try:
        number = write_pairs(file, records, summarise)
    finally:
        for line in describe_counts(counts):
            say(line)
    say(f"{counted(number, 'pair')}: {file}")
