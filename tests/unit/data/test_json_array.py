"""A JSON array is split into its elements wherever its text is cut into blocks."""

import io
import json
import random
from typing import Any

import pytest

from dpo_dist.data import read
from dpo_dist.data.messages import parse_json
from dpo_dist.data.read import split_array


def split(text: str | bytes, max_bytes: int = 1000) -> list[Any]:
    content = text.encode() if isinstance(text, str) else text
    assert content[:1] == b"["
    return list(split_array(io.BytesIO(content[1:]), max_bytes))


def random_value(generator: random.Random, depth: int) -> Any:
    kind = generator.randrange(8 if depth else 5)
    if kind >= 5:
        values = [random_value(generator, depth - 1) for _ in range(generator.randrange(4))]
        return values if kind == 5 else {f'k{{"{n}\\': value for n, value in enumerate(values)}
    text = "".join(generator.choice('ab\\"[]{},\n é\u2028') for _ in range(generator.randrange(8)))
    return (text, generator.random(), None, True, -1)[kind]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 10_000])
def test_the_elements_are_those_of_the_parsed_array(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_BLOCK_BYTES", block_bytes)
    generator = random.Random(block_bytes)
    for _ in range(100):
        values = [random_value(generator, 3) for _ in range(generator.randrange(5))]
        indent = generator.choice((None, 1))
        text = json.dumps(values, ensure_ascii=generator.random() < 0.5, indent=indent)
        assert [parse_json(element) for element in split(text + " \n", 100_000)] == values


def test_an_element_that_is_no_json_does_not_affect_the_others() -> None:
    found = split('[{"a": 1}, {"a" 1}, {"a": [1}], , "b", {"a": 2}]')
    assert found == [b'{"a": 1}', b'{"a" 1}', b'{"a": [1}]', b"", b'"b"', b'{"a": 2}']
    assert split("[]") == split("[ \n]") == []
    assert split("[1,]") == [b"1", b""]


@pytest.mark.parametrize("block_bytes", [5, 10_000])
def test_an_element_above_the_limit_is_not_kept(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_BLOCK_BYTES", block_bytes)
    long = json.dumps({"a": "x" * 50, "b": [1, 2, 3] * 20})
    assert split(f'[{{"a": 1}}, {long}, {{"a": 2}}, {long}]', 40) == [b'{"a": 1}', None, b'{"a": 2}', None]


@pytest.mark.parametrize(
    "text", ["[", "[1, 2", '["a', '["a\\', '[{"a": "]"}', "[[1]", "[1] 2", "[1]]", '[1]"']
)
def test_an_array_that_does_not_end_once_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"ends inside|follows the array"):
        split(text)


def test_brackets_without_end_are_no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_MAX_DEPTH", 1000)
    assert len(list(read.split_array(io.BytesIO(b"[" * 900 + b"]" * 900 + b"]"), 2**20))) == 1
    with pytest.raises(ValueError, match="nested more than 1,000"):
        list(read.split_array(io.BytesIO(b"[" * 3000), 2**20))
