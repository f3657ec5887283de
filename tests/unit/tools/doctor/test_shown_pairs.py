"""Decoded records show every token once, with its marks, and are those that findings name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.config import DataConfig, SourceConfig, Truncation
from dpo_dist.tools.doctor.shown_pairs import show_pairs
from dpo_dist.tools.findings import Finding, Level
from dpo_dist.tools.pages.blocks import Answers, Piece
from tests.support import tiny
from tests.support.invented import write_pairs
from tests.support.records import assistant, jsonl, user

CHAT = {"prompt": [user("the sea")], "chosen": [assistant("one story")], "rejected": [assistant("bad")]}


def config(path: str | Path, **changes: Any) -> DataConfig:
    return DataConfig(train=[SourceConfig(str(path))], cache=str(Path(path).parent / "encoded"), **changes)


def shown_one(data: DataConfig, tokenizer: Any) -> Answers:
    example = Finding("rule", Level.note, "text", examples=(f"{data.train[0].path}:1",))
    [pair] = show_pairs(data, tokenizer, [example])
    return pair


def text_of(pieces: Sequence[Piece], *kinds: str) -> str:
    return "".join(text for text, kind in pieces if not kinds or kind in kinds)


def tokens(notes: str) -> int:
    return int(notes.rsplit("; ", maxsplit=1)[-1].split(" token", maxsplit=1)[0])


@pytest.mark.parametrize("tokenizer", [tiny.qwen, tiny.mistral])
def test_the_segments_are_the_whole_text_in_order(tmp_path: Path, tokenizer: Any) -> None:
    pair = shown_one(config(jsonl(tmp_path, CHAT)), tokenizer())
    prompt, (chosen, rejected) = pair.prompt, [pieces for _, _, pieces in pair.responses]
    assert [name for name, _, _ in pair.responses] == ["chosen", "rejected"]
    assert "the sea" in text_of(prompt, "")
    assert "one story" in text_of(chosen, "trained")
    assert not text_of(prompt, "trained", "special trained")
    assert not text_of(rejected, "cut", "special cut")
    special = text_of(prompt, "special ") + text_of(chosen, "special trained")
    assert any(token in special for token in tokenizer().all_special_tokens)


def test_cut_tokens_are_marked_and_not_trained(tmp_path: Path) -> None:
    words = " ".join(["story"] * 40)
    record = {**CHAT, "prompt": [user(words)], "chosen": [assistant(words)]}
    path, tokenizer = jsonl(tmp_path, record), tiny.llama3()
    whole = shown_one(config(path), tokenizer)
    _, notes, chosen = whole.responses[0]
    _, notes_of_cut, at_end = shown_one(
        config(path, max_length=tokens(whole.notes) + 10), tokenizer
    ).responses[0]
    assert notes_of_cut == notes, "counted before anything is cut"
    assert text_of(at_end) == text_of(chosen)
    cut = text_of(at_end, "cut", "special cut")
    assert cut.count("story") >= 30
    assert text_of(at_end, "trained", "special trained") + cut == text_of(at_end)
    keep_end = config(path, max_length=tokens(notes) + 20, truncation=Truncation.keep_end)
    at_start = shown_one(keep_end, tokenizer).prompt
    assert at_start[0][0].startswith("<|begin_of_text|>")
    assert "cut" not in at_start[0][1] + at_start[-1][1]
    assert text_of(at_start, "cut", "special cut")
    assert text_of(at_start) == text_of(whole.prompt)


def test_examples_of_findings_are_few(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", 40)
    examples = [f"{path}:{line}" for line in (30, 7, 9)]
    of_rules = (("first", tuple(examples)), ("second", (f"{path}:7, {path}:12",)))
    found = [Finding(rule, Level.warning, "text", examples=origins) for rule, origins in of_rules]
    pairs = show_pairs(config(path), tiny.qwen(), found)
    rules = [(pair.title.rpartition(":")[2], *pair.notes.split("; ")[:-1]) for pair in pairs]
    assert rules == [("7", "first", "second"), ("12", "second"), ("30", "first")]
    assert show_pairs(config(path), tiny.qwen(), []) == []


def test_of_a_huge_record_the_start_is_shown(tmp_path: Path) -> None:
    huge = "first " + "story " * 100_000
    data = config(jsonl(tmp_path, {**CHAT, "chosen": [assistant(huge)]}))
    for tokenizer in (tiny.qwen(), None):
        _, _, chosen = shown_one(data, tokenizer).responses[0]
        assert len(text_of(chosen)) < 20_000
        assert "first" in text_of(chosen)
        assert text_of(chosen, "omitted").endswith(("tokens not shown", "characters not shown"))
