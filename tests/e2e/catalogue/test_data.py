"""Data that cannot be trained on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.catalogue.case import Case
from tests.e2e.catalogue.conftest import Check


def written(name: str, content: str) -> Callable[[Path], object]:
    """Write a file."""
    return lambda folder: (folder / name).write_text(content)


def of(option: str) -> str:
    """Return the override that trains on the good file with an option of its source."""
    return f"'data.train=[{{path: train.jsonl, {option}}}]'"


PAIR = '{"prompt": "a question", "chosen": " yes", "rejected": " no"}\n'

# fmt: off
CASES = [
    # Paths.
    Case("missing file", "data.train=[trian.jsonl]", "the file does not exist", "trian.jsonl",
         to_do="did you mean train.jsonl?"),
    Case("url with a secret", 'data.train=["s3://name:word@bucket/a.jsonl"]', "URL", "data.train",
         to_do="environment"),
    Case("empty folder", "data.train=[./none]", "no data are found", "none",
         "doesn't contain any data files", before=lambda f: (f / "none").mkdir(), to_do="check path"),
    Case("link to nothing", "data.train=[link.jsonl]", "the file does not exist", "link.jsonl",
         "gone.jsonl", before=lambda f: (f / "link.jsonl").symlink_to("gone.jsonl"), to_do="check the path"),
    Case("device in place of a file", "data.train=[/dev/zero]", "neither a file nor a folder", "/dev/zero",
         to_do="check the path"),
    Case("hub name without network", "data.train=[org/name]", "no data are found",
         "org/name", "could not be reached", to_do="check path, name", joins=True),
    Case("split of a file", of("split: test"), "no effect", "split of train.jsonl", "test",
         to_do="remove split"),
    # Content.
    Case("empty file", "data.train=[empty.jsonl]", "the source has no records", "empty.jsonl",
         before=written("empty.jsonl", ""), to_do="check the path"),
    Case("unknown columns", "data.train=[odd.jsonl]", "none of the known shapes", "odd.jsonl", "columns",
         before=written("odd.jsonl", '{"frage": "a", "gut": "b", "schlecht": "c"}\n' * 5),
         to_do="data.train='[{path: odd.jsonl, fields: {prompt: COLUMN"),
    Case("column that no record has", of("fields: {prompt: frage, chosen: chosen, rejected: rejected}"),
         "records has this column", "train.jsonl", "frage",
         to_do="correct the column"),
    Case("too many broken lines", "data.train=[a.jsonl] data.max_bad_share=0.01",
         "1 of 23 records cannot be used", "a.jsonl", "unparsable 1", joins=True,
         before=written("a.jsonl", PAIR * 22 + "{\n"), to_do="correct or remove the lines"),
    Case("all of it held out", "data.eval=[train.jsonl] data.drop_eval_prompts=true",
         "no training data are left", joins=True, to_do="data.drop_eval_prompts=false"),
    Case("limit of nothing", of("limit: 0"), "data.train[0].limit cannot have this value", "limit: 0", "0",
         to_do="set data.train[0].limit to a whole number or null, >= 1"),
]
# fmt: on


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_that_cannot_be_used_get_one_block(case: Case, check: Check) -> None:
    check(case)
