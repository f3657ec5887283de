"""Evaluation data split off by a hash of the prompt: stable, and sharing no prompt with training."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.config.data import DataConfig, Ranked, SourceConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.dataset import PreferenceDataset, count_shared_prompts, open_dataset
from dpo_dist.data.prompts import Part, eval_part, prompt_hash, train_part
from dpo_dist.data.records import Dialogue, Message, Prompt
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.records import assistant, user

SHARE = 0.3


def pair(number: int, variant: int = 0) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": f"good {variant}", "rejected": f"bad {variant}"}


def write(folder: Path, name: str, records: Sequence[Any]) -> str:
    file = folder / name
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def split(
    folder: Path, *paths: str | SourceConfig, tokenizer: Any = None, **data: Any
) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Return the training and the evaluation data."""
    config = DataConfig(cache=str(folder / "cache"), **{"eval_share": SHARE, "max_bad_share": 0.5, **data})
    sources = [SourceConfig(path) if isinstance(path, str) else path for path in paths]
    train, held_out = (
        open_dataset(prepare_dataset(sources, config, tokenizer or tiny.qwen(), "qwen", part=part), config)
        for part in (train_part(config, None), eval_part(config))
    )
    return train, held_out


def hashes(dataset: PreferenceDataset) -> set[int]:
    return set(map(int, dataset.prompts[:]))


def test_both_parts_are_all_records_and_share_no_prompt(tmp_path: Path) -> None:
    records = [pair(number, variant) for number in range(60) for variant in range(2)]
    path = write(tmp_path, "pairs.jsonl", [*records, "no record"])
    train, held_out = split(tmp_path, path)
    assert len(train) + len(held_out) == 120
    assert not hashes(train) & hashes(held_out)
    assert count_shared_prompts(held_out, train) == 0
    assert 10 <= len(held_out) / 2 <= 26
    # A record that cannot be read has no prompt; it belongs to the training data.
    assert (train.counts["dropped"], held_out.counts["dropped"]) == ({"unparsable": 1}, {})
    assert train.counts["held_out_for_eval"] == len(held_out) == held_out.counts["read"]
    assert held_out.counts["left_in_train"] == len(train) + 1 == train.counts["read"]


def test_a_prompt_keeps_its_side_when_data_grow_or_move(tmp_path: Path) -> None:
    records = [pair(number) for number in range(80)]
    train, held_out = split(tmp_path, write(tmp_path, "few.jsonl", records[:40]))
    random.Random(0).shuffle(records)
    parts = [write(tmp_path, "a.jsonl", records[:50]), write(tmp_path, "b.jsonl", records[50:])]
    more_train, more_held_out = split(tmp_path, *parts)
    assert hashes(train) < hashes(more_train)
    assert hashes(held_out) < hashes(more_held_out)
    again = split(tmp_path, *reversed(parts))
    assert [hashes(part) for part in again] == [hashes(more_train), hashes(more_held_out)]


def test_a_larger_share_holds_out_more(tmp_path: Path) -> None:
    path = write(tmp_path, "pairs.jsonl", [pair(number) for number in range(80)])
    few, more = (
        hashes(split(tmp_path, path, **data)[1]) for data in ({"eval_share": 0.2}, {"eval_share": 0.5})
    )
    assert few < more


def test_the_side_does_not_depend_on_format_tokenizer_or_white_space(tmp_path: Path) -> None:
    numbers = range(40)
    texts = [pair(number) for number in numbers]
    turns = [
        {"prompt": [user(f" question  {number}\n")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
        for number in numbers
    ]
    dialogues = [
        {side: f"\n\nHuman: question {number}\n\nAssistant: {side}" for side in ("chosen", "rejected")}
        for number in numbers
    ]
    spelled = [
        {"prompt": f"\n\nHuman: question {number}\n\nAssistant:", "chosen": " a", "rejected": " b"}
        for number in numbers
    ]
    without_system = [{**row, "prompt": [{"role": "system", "content": ""}, *row["prompt"]]} for row in turns]
    rankings = [{"prompt": f"question {number}", "responses": ["a", "b", "c"]} for number in numbers]
    completions = [{"prompt": f"question {number}", "completion": "a"} for number in numbers]
    expected = None
    every = (texts, turns, dialogues, spelled, without_system, rankings, completions)
    for index, records in enumerate(every):
        path = write(tmp_path, f"{index}.jsonl", records)
        found = [hashes(part) for part in split(tmp_path, path, ranked=Ranked.all_pairs)]
        expected = expected or found
        assert found == expected, index
    other = split(tmp_path, write(tmp_path, "0.jsonl", texts), tokenizer=tiny.llama3())
    assert [hashes(part) for part in other] == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a  b\n", (Message("user", "a b"),)),
        ("a b", Dialogue("\n\nHuman: a b\n\nAssistant:")),
        ("Human: a b\n\nAssistant:", (Message("user", "a b"),)),
        ("caf\u00e9 \ud55c", "cafe\u0301 \u1112\u1161\u11ab"),
        ("a question", "\ufeffa ques\u00adtion\u200b"),
        ("\u05e9\u05dc\u05d5\u05dd?", "\u202b\u05e9\u05dc\u05d5\u05dd?\u202c\u200f"),
        ("a question", "a\u200b question"),
        # Half a dialogue is a text.
        *((text, (Message("user", text),)) for text in ("\n\nHuman: hi", "hi\n\nAssistant:", "Human:")),
    ],
)
def test_prompts_that_look_the_same_are_the_same(one: Prompt, other: Prompt) -> None:
    assert one != other
    assert prompt_hash(one) == prompt_hash(other)


def test_other_roles_and_texts_are_other_prompts() -> None:
    two = (Message("user", "a"), Message("user", "b"))
    # Full width and compatibility forms are other characters.
    others = ("\u0915\u0941", "\u0915", "cafe", "caf\u00e9", "\uff21", "A", "a\0user\0b")
    prompts = (
        (Message("user", "a b"),),
        (Message("system", "a b"),),
        "ab",
        "a b c",
        "Human: a b",
        two,
        *others,
    )
    assert len(set(map(prompt_hash, prompts))) == len(prompts)


def test_a_limit_counts_the_records_of_both_parts(tmp_path: Path) -> None:
    path = write(tmp_path, "pairs.jsonl", [pair(number) for number in range(50)])
    train, held_out = split(tmp_path, SourceConfig(path, limit=30))
    assert len(train) + len(held_out) == 30
    whole = split(tmp_path, path)
    # The first records of an encoded source are found in it.
    for part, all_records in zip(split(tmp_path, SourceConfig(path, limit=30)), whole, strict=True):
        assert hashes(part) < hashes(all_records)


def test_a_source_may_be_in_one_part_only(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{number}.jsonl", [pair(number)]) for number in range(12)]
    train, held_out = split(tmp_path, *paths)
    assert len(train) + len(held_out) == 12
    assert train.source_pairs.count(0) == len(held_out) > 0
    assert train.sequences(len(train) - 1).prompt_ids.size


def test_a_part_without_records_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "pairs.jsonl", [pair(1), pair(1, 1)])
    for share, key in ((0.001, "data.eval_share"), (0.999, "data.train")):
        with pytest.raises(DataError) as raised:
            split(tmp_path, path, eval_share=share)
        assert raised.value.where == key


def test_prompts_of_the_evaluation_data_can_be_kept_out_of_training(tmp_path: Path) -> None:
    train_path = write(tmp_path, "train.jsonl", [pair(number) for number in range(20)])
    eval_path = write(tmp_path, "eval.jsonl", [pair(number, variant=1) for number in range(15, 25)])

    def prepared(path: str, part: Part, config: DataConfig) -> PreferenceDataset:
        encoded = prepare_dataset([SourceConfig(path)], config, tiny.qwen(), "qwen", part=part)
        return open_dataset(encoded, config)

    config = DataConfig(cache=str(tmp_path / "cache"), eval=[SourceConfig(eval_path)])
    held_out = prepared(eval_path, eval_part(config), config)
    train = prepared(train_path, train_part(config, held_out.prompts[:]), config)
    assert (len(train), count_shared_prompts(held_out, train)) == (20, 5)
    config = DataConfig(cache=config.cache, eval=config.eval, drop_eval_prompts=True)
    train = prepared(train_path, train_part(config, held_out.prompts[:]), config)
    assert (len(train), count_shared_prompts(held_out, train)) == (15, 0)
    assert train.counts["held_out_for_eval"] == 5


def test_the_draw_and_the_hash_of_a_prompt_never_change() -> None:
    """Another value would move prompts of existing splits to the other side."""
    assert prompt_hash("question 1") == 4804875621796327754
    assert prompt_hash("\u95ee caf\u00e9") == 4905711415591228481
    drawn = [Part(share=0.5).has(number) for number in range(8)]
    assert drawn == [False, True, False, True, True, True, True, True]
    held_out = Part(held_out=np.array([3, 5], dtype=np.uint64))
    assert [held_out.has(number) for number in (2, 3, 4, 5, 6)] == [True, False, True, False, True]
