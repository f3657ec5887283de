"""Evaluation data split off by a hash of the prompt: stable, and sharing no prompt with training."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.records import Dialogue, Message, Part, Prompt, prompt_hash
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, count_shared_prompts, open_dataset
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.records import jsonl


def pairs(numbers: Iterable[int], variant: int = 0) -> list[dict[str, Any]]:
    sides = {"chosen": f"good {variant}", "rejected": f"bad {variant}"}
    return [{"prompt": f"question {number}", **sides} for number in numbers]


def write(folder: Path, name: str, records: list[Any]) -> SourceConfig:
    (folder / name).mkdir()
    return SourceConfig(jsonl(folder / name, *records))


def part_of(sources: Sequence[SourceConfig], part: Part, config: DataConfig) -> PreferenceDataset:
    return open_dataset(Preparation(sources, config, tiny.qwen(), "qwen", part=part).whole(), config)


def split(folder: Path, *sources: SourceConfig, **data: Any) -> tuple[PreferenceDataset, PreferenceDataset]:
    """Return the training and the evaluation data."""
    config = DataConfig(cache=str(folder / "cache"), **{"eval_share": 0.3, "max_bad_share": 0.5, **data})
    return part_of(sources, Part.to_train(config, None), config), part_of(
        sources, Part.to_evaluate(config), config
    )


def hashes(*datasets: PreferenceDataset) -> list[set[int]]:
    return [set(map(int, dataset.prompt_hashes[:])) for dataset in datasets]


def test_both_parts_are_all_records_and_share_no_prompt(tmp_path: Path) -> None:
    records = [*pairs(range(60)), *pairs(range(60), variant=1), "no record"]
    train, held_out = split(tmp_path, write(tmp_path, "a", records))
    assert len(train) + len(held_out) == 120
    assert set.isdisjoint(*hashes(train, held_out))
    assert count_shared_prompts(held_out, train) == 0
    assert 10 <= len(held_out) / 2 <= 26
    # A record that cannot be read has no prompt; it belongs to the training data.
    assert (train.counts["dropped"], held_out.counts["dropped"]) == ({"unparsable": 1}, {})
    assert train.counts["held_out_for_eval"] == len(held_out) == held_out.counts["read"]
    assert held_out.counts["left_in_train"] == len(train) + 1 == train.counts["read"]


def test_a_prompt_keeps_its_side_when_data_grow_or_move(tmp_path: Path) -> None:
    records = pairs(range(80))
    few = write(tmp_path, "few", records[:40])
    train, held_out = hashes(*split(tmp_path, few))
    random.Random(0).shuffle(records)
    parts = [write(tmp_path, "a", records[:50]), write(tmp_path, "b", records[50:])]
    more_train, more_held_out = hashes(*split(tmp_path, *parts))
    assert train < more_train
    assert held_out < more_held_out
    assert hashes(*split(tmp_path, *reversed(parts))) == [more_train, more_held_out]
    assert held_out < hashes(*split(tmp_path, few, eval_share=0.5))[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a  b\n", (Message("user", "a b"),)),
        ("a b", (Message("system", ""), Message("user", "a b"))),
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
    # Full width and compatibility forms are other characters.
    texts = ("ab", "a b c", "Human: a b", "\u0915\u0941", "\u0915", "cafe", "caf\u00e9", "\uff21", "A")
    turns = [(Message(role, "a b"),) for role in ("user", "system")]
    prompts: list[Prompt] = [*texts, *turns, (Message("user", "a"), Message("user", "b")), "a\0user\0b"]
    assert len({prompt_hash(prompt) for prompt in prompts}) == len(prompts)


def test_a_part_without_records_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path, "a", [*pairs([1]), *pairs([1], variant=1)])
    for share, key in ((0.001, "data.eval_share"), (0.999, "data.train")):
        with pytest.raises(DataError) as raised:
            split(tmp_path, source, eval_share=share)
        assert raised.value.where == key


def test_prompts_of_the_evaluation_data_can_be_kept_out_of_training(tmp_path: Path) -> None:
    train = write(tmp_path, "train", pairs(range(20)))
    eval_ = write(tmp_path, "eval", pairs(range(15, 25), variant=1))
    for is_dropped, expected in ((False, (20, 5, 0)), (True, (15, 0, 5))):
        config = DataConfig(cache=str(tmp_path / "cache"), eval=[eval_], drop_eval_prompts=is_dropped)
        held_out = part_of([eval_], Part.to_evaluate(config), config)
        trained = part_of([train], Part.to_train(config, held_out.prompt_hashes[:]), config)
        left = trained.counts.get("held_out_for_eval", 0)
        assert (len(trained), count_shared_prompts(held_out, trained), left) == expected


def test_the_draw_and_the_hash_of_a_prompt_never_change() -> None:
    """Another value would move prompts of existing splits to the other side."""
    assert prompt_hash("question 1") == 4804875621796327754
    assert prompt_hash("\u95ee caf\u00e9") == 4905711415591228481
    drawn = [Part(share=0.5).has(number) for number in range(8)]
    assert drawn == [False, True, False, True, True, True, True, True]
    held_out = Part(held_out=np.array([3, 5], dtype=np.uint64))
    assert [held_out.has(number) for number in (2, 3, 4, 5, 6)] == [True, False, True, False, True]
