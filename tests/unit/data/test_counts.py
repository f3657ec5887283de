"""Counts of records by source and by field, errors with their remedies, duplicates."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.batching.sampler import Span, make_sampler
from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.schema import TrainerConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.counts import describe_counts, describe_short_run, in_words
from dpo_dist.data.dataset import PreferenceDataset, count_duplicates, count_shared, open_dataset
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.pages import ROOT
from tests.support.records import TEXT, jsonl

GOOD = [{"prompt": f"question {n}", "chosen": f"right {n}", "rejected": f"wrong {n}"} for n in range(40)]


def opened(folder: Path, *paths: str, **data: object) -> PreferenceDataset:
    config = DataConfig(cache=str(folder / "cache"), **data)  # type: ignore[arg-type]
    return open_dataset(
        prepare_dataset([SourceConfig(path) for path in paths], config, tiny.qwen(), "q"), config
    )


def file_of(folder: Path, name: str, *rows: object) -> str:
    (folder / name).mkdir()
    return jsonl(folder / name, *rows)


def test_every_source_has_its_counts(tmp_path: Path) -> None:
    bad = TEXT | {"chosen": None}
    first, second = file_of(tmp_path, "one", *GOOD), file_of(tmp_path, "two", *GOOD[:3], bad)
    counts = opened(tmp_path, first, second, max_bad_share=0.5).counts
    assert [
        (source["path"], source["read"], source["kept"], source["dropped"]) for source in counts["sources"]
    ] == [(first, 40, 40, {}), (second, 4, 3, {"missing_field": 1})]
    lines = describe_counts("train", counts)
    assert "43 of 44 records kept" in lines[0]
    assert lines[1] == "  1 dropped (missing_field): a prompt or response is missing"
    plain = "text, without the chat template"
    assert f"  of one-records ({first}): 40 of 40 records kept: {plain}" in lines
    assert f"  of two-records ({second}): 3 of 4 records kept, 1 missing_field: {plain}" in lines
    json.dumps(counts)


@pytest.mark.parametrize(
    ("rows", "data", "expected"),
    [
        ([{"task": "q", "chosen": "a", "rejected": "b"}], {}, ["task (text)", "columns: {prompt: COLUMN"]),
        (
            GOOD,
            {"max_length": 2},
            ["data.max_length is 2", "data.max_prompt_length", "data.truncation=keep_end"],
        ),
        ([*GOOD[:3], TEXT | {"images": [1]}], {}, ["fields: images", "data.max_bad_share", "COLUMN: null"]),
        (
            [{"prompt": "q", "completion": "a", "label": True}],
            {},
            ["unpaired", "pair good and bad responses"],
        ),
    ],
)
def test_remedies(tmp_path: Path, rows: list[object], data: dict[str, object], expected: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        opened(tmp_path, jsonl(tmp_path, *rows), **data)
    block = raised.value.block()
    assert [text for text in expected if text not in block] == []


def test_duplicates_are_counted(tmp_path: Path) -> None:
    swapped = GOOD[0] | {"chosen": GOOD[0]["rejected"], "rejected": GOOD[0]["chosen"]}
    ranking = {"prompt": "q", "responses": ["a", "b", "c"]}
    other_order = {"prompt": "q", "responses": ["a", "c", "b"]}
    once = opened(tmp_path, file_of(tmp_path, "once", *GOOD, swapped, ranking, other_order))
    assert count_duplicates(once) == 0
    twice = opened(
        tmp_path, file_of(tmp_path, "a", *GOOD, GOOD[3], ranking, ranking), file_of(tmp_path, "b", *GOOD[:5])
    )
    assert count_duplicates(twice) == 7
    held_out = opened(tmp_path, file_of(tmp_path, "c", GOOD[0], TEXT, swapped, other_order))
    assert (count_shared(held_out, once), count_shared(held_out, twice)) == (3, 1)


@pytest.mark.parametrize(
    ("pairs", "trainer", "expected"),
    [
        (12, {"global_batch_pairs": 1000, "max_steps": 1}, "up to 84 times in one step"),
        (12, {"global_batch_pairs": 64}, "the whole run is 1 step: 12 pairs"),
        (12, {"global_batch_pairs": 10, "epochs": 2.0}, None),
        (100, {"global_batch_pairs": 64, "max_steps": 1}, "the whole run is 1 step: 64 pairs"),
        (100, {"global_batch_pairs": 10}, None),
    ],
)
def test_a_very_short_run_is_announced(pairs: int, trainer: dict[str, float], expected: str | None) -> None:
    sampler = make_sampler([Span(0, pairs, 1.0)], TrainerConfig(**trainer))  # type: ignore[arg-type]
    lines = describe_short_run(sampler)
    assert len(lines) == (expected is not None)
    assert expected is None or expected in lines[0]
    most = max(
        int(np.unique(sampler.indices(step), return_counts=True)[1].max()) for step in range(sampler.steps)
    )
    assert ("times in one step" in (expected or "")) == (most > 2)


def test_every_count_on_the_page_has_words() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    tables = re.findall(r"^\| (?:count|reason) \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", page, re.M)
    cells = [line.split("|")[1] for table in tables for line in table.splitlines()]
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert {"unparsable", "held_out_for_eval", "too_long"} <= names
    assert [name for name in sorted(names) if in_words(name) == name.replace("_", " ")] == []
    assert in_words("unread_images") == "the field images is not read"
    assert in_words("of_a_later_version") == "of a later version"
