"""Records with values that no one expects are read and encoded, or dropped with a reason; nothing raises."""

import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import pytest

from dpo_dist.config.data import DataConfig, DataFormat, TextTemplate, Truncation
from dpo_dist.data.encode import encode_chunk
from dpo_dist.data.formats import parse_record
from dpo_dist.data.records import Origin
from tests.support import tiny
from tests.support.records import TEXT, assistant, user

CALL = {"function": {"name": "look", "arguments": '{"a": 1}'}}
RECORDS: list[dict[str, Any]] = [
    TEXT | {"score_chosen": 1.0, "score_rejected": 0.0, "system": "s", "history": [["a", "b"]]},
    {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "tools": "[]"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 2, 1]},
    {"prompt": "q", "completion": "a"},
    {"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, assistant("a")]},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": "b",
    },
    {"instruction": "q", "input": "", "output": ["a", "b"], "history": []},
]
VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        10**400,
        float("nan"),
        float("inf"),
        "",
        " ",
        [],
        {},
        [None],
        [[None]],
        [[]],
        {"a": None},
    ),
    *("\ud800", "\x00", "a\u2028b", "\ufdd0", "\ufeff", "</s><|im_end|><|im_start|>", "<think>", "</think>"),
    *("[" * 5000, "[" * 400 + "]" * 400, '{"a":' * 500, "[{'" * 2000, "[1,", "-" * 3000 + "1", b"bytes"),
    *({"role": None, "content": None}, user("\ud800"), {"role": "\ud800", "content": "x"}, [user("x")] * 3),
    *(
        [[user("x")]],
        [{"role": "assistant", "content": "x", "tool_calls": [None]}],
        [["a"]],
        [["a", "b"]],
        [1, 2],
    ),
]
TOKENIZERS = [tiny.qwen(), tiny.llama3(), tiny.mistral()]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def damaged(generator: random.Random) -> dict[str, Any]:
    """Return a record in which some values are replaced."""
    record: dict[str, Any] = copy.deepcopy(generator.choice(RECORDS))
    for _ in range(generator.randrange(1, 3)):
        *outside, last = generator.choice(list(paths(record)))
        part: Any = record
        for key in outside:
            part = part[key]
        part[last] = copy.deepcopy(generator.choice(VALUES))
    return record


@pytest.mark.parametrize("seed", range(4))
def test_no_record_raises(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(400):
        found = parse_record(
            damaged(generator), generator.choice([DataFormat.auto, *DataFormat]), Origin("f", 1)
        )
        pickle.dumps(found)  # it is sent to other processes
        config = DataConfig(
            max_length=generator.choice([16, 512]),
            max_prompt_length=generator.choice([None, 10]),
            truncation=generator.choice(list(Truncation)),
            template=generator.choice(list(TextTemplate)),
            text_as_messages=generator.random() < 0.5,
        )
        encode_chunk([found], config, generator.choice(TOKENIZERS))
