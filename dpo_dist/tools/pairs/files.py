"""Write the file of pairs, whose records have their provenance, and its summary; print the counts."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dpo_dist
from dpo_dist.data import DataConfig, DataSource, PreferenceRecord, Response
from dpo_dist.data.counts import count_lines
from dpo_dist.data.read.files import store_image
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.fields import as_written
from dpo_dist.foundation.files import staged_file, write_json, write_lines
from dpo_dist.foundation.text import pluralize
from dpo_dist.tools.sampling.prompts import Read, good_records
from dpo_dist.tools.written_records import as_fields, context_fields, scorer_fields


def training_records(
    data: DataConfig, read: Read, say: Callable[[str], None], enough: Callable[[], bool] = lambda: False
) -> Iterator[PreferenceRecord]:
    """Yield the usable records of `data.train` until `enough` returns true; print each source's counts."""
    for source in data.train:
        if not enough():
            yield from good_records(read(DataSource(source).pinned()), source, data, say, enough)


def pair_fields(
    record: PreferenceRecord,
    responses: tuple[Response, Response],
    scores: tuple[float, float] | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a preference record's fields: the prompt of `record`, and the chosen and rejected response.

    They are messages if the prompt is a conversation, else texts, so training renders them like `record`.
    """
    prompt, chosen, rejected = as_fields(record.prompt, responses)
    fields = {} if prompt is None else {"prompt": prompt}
    fields |= {"chosen": chosen, "rejected": rejected, **context_fields(record), **scorer_fields(record)}
    if scores is not None:
        fields["score_chosen"], fields["score_rejected"] = scores
    return {**fields, "provenance": dict(provenance)}


def image_fields(record: PreferenceRecord, folder: Path) -> dict[str, Any]:
    """Write the images of a record into `folder`, each once; return the field with their paths in it."""
    names = [store_image(image.read(), folder) for image in record.images]
    return {"images": names} if names else {}


def _summary_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.summary.json")


def check_output(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise if the file of pairs exists and was made with other settings; else it may be written again."""
    if not file.exists():
        return
    summary = _summary_file(file)
    old = {}
    if summary.exists():
        old = json.loads(summary.read_text(encoding="utf-8"))["settings"]
    now = json.loads(json.dumps(settings))
    changed = []
    for name in sorted({*old, *now}):
        if old.get(name) != now.get(name):
            changed.append(f"{name}: {as_written(old.get(name))} before, {as_written(now.get(name))} now")
    if not old:
        changed = ["a file without a summary of its settings"]
    if changed:
        raise ConfigError(
            "the file of pairs exists and was made with other settings",
            where=str(file),
            got="; ".join(changed),
            remedy="set run.dir to another folder, or remove this one",
        )


def write_results(
    file: Path,
    records: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    counts: Counter[str],
    say: Callable[[str], None],
) -> None:
    """Write pairs as JSON lines, whole or not at all, and their summary; print the counts.

    `counts` is filled while `records` are read.
    """
    try:
        with staged_file(file) as temporary:
            number = write_lines(temporary, records)
            if not number:
                got = "no prompt has two usable responses with different scores"
                remedy = "see the counts above; for data without scores pairs.method=samples makes "
                remedy += "responses and scores them"
                if 0 < counts["samples"] == counts["samples_unfinished"]:
                    got = f"none of {counts['samples']:,} responses ended"
                    remedy = "raise sampling.max_new_tokens, or set pairs.unfinished=keep"
                raise DataError("no pair can be made", where=str(file), got=got, remedy=remedy)
            summary = {
                "pairs": number,
                "counts": {name: times for name, times in sorted(counts.items()) if times},
                "settings": dict(settings),
                "version": dpo_dist.__version__,
            }
            write_json(_summary_file(file), summary)
    finally:
        for line in count_lines(counts):
            say(line)
    say(f"{pluralize(number, 'pair')}: {file}")
