"""Prompts of records in any format, and of records without a response."""

from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.data.prompts import read_prompts
from dpo_dist.data.records import BadRecord, Dialogue, Message
from tests.support.records import assistant, jsonl, user

QUESTION = (Message("user", "hi"),)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "hi"}, "hi"),
        ({"prompt": [user("hi")]}, QUESTION),
        ({"messages": [user("hi")]}, QUESTION),
        ({"messages": [user("hi"), assistant("no")]}, QUESTION),
        ({"prompt": "hi", "system": "be brief"}, (Message("system", "be brief"), *QUESTION)),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "hi"),
        ({"prompt": "hi", "chosen": "same", "rejected": "same"}, "hi"),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1]}, "hi"),
        ({"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}, QUESTION),
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
            Dialogue("\n\nHuman: hi\n\nAssistant:"),
        ),
    ],
)
def test_the_prompt_is_that_of_the_format(tmp_path: Path, record: Any, prompt: Any) -> None:
    (read,) = read_prompts(SourceConfig(jsonl(tmp_path, record)))
    assert not isinstance(read, BadRecord)
    assert (read.prompt, read.responses, read.scores) == (prompt, (), None)
    assert read.origin.line == 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "hi"}, "unknown_format"),
        ({"prompt": "  "}, "empty_prompt"),
        ({"prompt": "hi", "images": ["a.png"]}, "unread_content"),
        ({"prompt": 3}, "unknown_format"),
    ],
)
def test_a_record_without_a_prompt_is_counted(tmp_path: Path, record: Any, reason: str) -> None:
    (read,) = read_prompts(SourceConfig(jsonl(tmp_path, record)))
    assert isinstance(read, BadRecord)
    assert read.reason == reason


def test_the_limit_counts_records(tmp_path: Path) -> None:
    file = jsonl(tmp_path, *({"prompt": text} for text in "abc"))
    assert len(list(read_prompts(SourceConfig(file, limit=2)))) == 2
