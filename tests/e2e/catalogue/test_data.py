"""Data that cannot be trained on."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check

Before = Callable[[Path], object]


def written(name: str, content: bytes | str) -> Before:
    """Write a file."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def records(name: str, *items: Any, times: int = 1) -> Before:
    """Write records, one on a line."""
    return written(name, "".join(json.dumps(item) + "\n" for item in items) * times)


def of(path: str, **options: Any) -> str:
    """Return the override that trains on one file."""
    entries = "".join(f", {key}: {value}" for key, value in options.items())
    return f"'data.train=[{{path: {path}{entries}}}]'"


def with_train_as(name: str, change: Callable[[bytes], bytes]) -> Before:
    """Write the bytes of the good file, changed."""

    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(change((folder / "train.jsonl").read_bytes()))

    return write


def saved_without_train(folder: Path) -> None:
    """A folder with parquet files of one split."""

    (folder / "hub").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
        folder / "hub/test-00000-of-00001.parquet",
    )


PAIR = {"prompt": "a question", "chosen": " yes", "rejected": " no"}

# fmt: off
CASES = [
    # Paths.
    Case("missing file", "data.train=[trian.jsonl]", "the file does not exist", "trian.jsonl",
         to_do="train.jsonl"),
    Case("missing folder", "data.train=[data/a.jsonl]", "the file does not exist", "a.jsonl",
         "no folder data", to_do="check the path of the source"),
    Case("missing evaluation file", "data.eval=[evil.jsonl]", "the file does not exist", "evil.jsonl",
         to_do="eval.jsonl"),
    Case("url", 'data.train=["https://example.com/a.jsonl"]', "URLs cannot be read",
         "https://example.com/a.jsonl", to_do="download"),
    Case("pattern without a match", "data.train=[shards/*.jsonl]",
         "no file matches the pattern", "shards/*.jsonl",
         to_do="check the pattern"),
    Case("empty folder", "data.train=[./none]", "no data files", "none", "an empty folder",
         before=lambda f: (f / "none").mkdir(), to_do="check the path"),
    Case("folder of models", "data.train=[./model]",
         "the file cannot be read to its end", "model", "not an array",
         to_do="rename a file with one object per line"),
    Case("wrong kind of file", "data.train=[a.xlsx]", "this kind of file", "a.xlsx", ".xlsx", ".jsonl",
         before=written("a.xlsx", "x"), to_do="convert, unpack or rename the file"),
    Case("link to nothing", "data.train=[link.jsonl]", "the file does not exist", "link.jsonl",
         "gone.jsonl", before=lambda f: (f / "link.jsonl").symlink_to("gone.jsonl"),
         to_do="check the path"),
    Case("device in place of a file", "data.train=[/dev/zero]", "neither a file nor a folder", "/dev/zero",
         to_do="write the records to a file"),
    Case("name too long", f"data.train=[./{'a' * 300}.jsonl]", "cannot be written or read", "aaa.jsonl",
         "too long", to_do="correct the path or its permissions"),
    Case("hub name without network", "data.train=[org/name]", "neither a local file nor a dataset",
         "org/name", "HF_HUB_OFFLINE=1", to_do="check the path or the name"),
    Case("split of a file", of("train.jsonl", split="test"), "no effect", "split of train.jsonl", "test",
         to_do="remove split"),
    Case("split that the folder lacks", of("./hub"), "no such split", "hub", "train", "test",
         before=saved_without_train, to_do="set split of this source"),
    Case("revision of a file", of("train.jsonl", revision="main"), "no effect", "revision of train.jsonl",
         "main", to_do="remove revision"),
    # Content.
    Case("empty file", "data.train=[empty.jsonl]",
         "the source has no records", "empty.jsonl", before=written("empty.jsonl", ""),
         to_do="check the path"),
    Case("unknown columns", "data.train=[odd.jsonl]", "no record can be used", "odd.jsonl", "frage",
         before=records("odd.jsonl", {"frage": "a", "gut": "b", "schlecht": "c"}, times=5),
         to_do="name the columns of the source"),
    Case("column that no record has", of("train.jsonl", columns="{prompt: frage}"),
         "records has a column of the source", "train.jsonl",
         "frage", to_do="correct or remove these columns"),
    Case("lines instead of an array", "data.train=[a.json]", "cannot be read", "a.json", "not an array", "",
         ".jsonl", before=records("a.json", PAIR)),
    Case("broken line with error", "data.train=[a.jsonl] data.on_bad_record=error",
         "a record cannot be used", "a.jsonl:2",
         "delimiter",
         before=with_train_as("a.jsonl", lambda b: b.replace(b'\n{"prompt"', b'\n{"prompt', 1)),
         to_do="correct the record"),
    Case("too many broken lines", "data.train=[a.jsonl] data.max_bad_share=0.01",
         "of 23 records cannot be used", "a.jsonl",
         "unparsable 1", joins=True,
         before=with_train_as("a.jsonl", lambda b: b.replace(b'\n{"prompt"', b'\n{"prompt', 1)),
         to_do="check how the file was written"),
    Case("damaged gzip", "data.train=[a.jsonl.gz]", "the file cannot be read to its end", "a.jsonl.gz",
         before=with_train_as("a.jsonl.gz", lambda b: gzip.compress(b)[:-40]), to_do="download it again"),
    Case("missing response", "data.train=[a.jsonl]", "no record can be used", "a.jsonl", "missing_field",
         before=records("a.jsonl", {"prompt": "a", "chosen": "b"}, times=5),
         to_do="name the columns of the source"),
    Case("responses with labels", "data.train=[a.jsonl]", "no record can be used", "a.jsonl", "unpaired",
         to_do="pair good and bad",
         before=records("a.jsonl", {"prompt": "a", "completion": "b", "label": True}, times=5)),
    Case("all too long", "data.max_length=5 data.truncation=drop",
         "no record can be used", "train.jsonl", "too_long",
         to_do="data.max_length", joins=True),
    Case("nothing left of the prompt", "data.max_length=5",
         "no record can be used", "train.jsonl", "fills_max_length",
         to_do="data.max_length", joins=True),
    Case("odpo without scores", "data.train=[a.jsonl] loss=odpo", "odpo cannot use 6 of 6 examples",
         joins=True, before=records("a.jsonl", PAIR, times=6), to_do="remove these records"),
    Case("all of it held out", "data.eval=[train.jsonl] data.drop_eval_prompts=true",
         "no training data are left", joins=True,
         to_do="set data.drop_eval_prompts=false"),
    Case("limit of nothing", of("train.jsonl", limit=0), "out of range", "data.train[0].limit", "0",
         to_do="choose data.train[0].limit in that range"),
    Case("weight of nothing", of("train.jsonl", weight=0), "out of range", "data.train[0].weight", "0",
         to_do="choose data.train[0].weight in that"),
    Case("wrong format", of("train.jsonl", format="alpaca"), "no record can be used",
         "train.jsonl:1 missing_field", "instruction", to_do="name the columns of the source"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_that_cannot_be_used_get_one_block(case: Case, check: Check) -> None:
    check(case)
