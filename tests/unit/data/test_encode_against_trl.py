"""TRL's tokenisation as the oracle: equal ids except for the differences named here."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from dpo_dist.config.data import DataConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from tests.support import tiny
from tests.support.shared_data import shared_data_dir

SHARED = shared_data_dir()
WIDE = DataConfig(max_length=100_000)
INVENTED = [
    PreferenceRecord((Message("user", "hello"),), ("hello there", "no"), Origin("invented", 1)),
    PreferenceRecord(
        (Message("user", "a"), Message("assistant", "b"), Message("user", "What is it?\n\n1. first")),
        (" Paris\n", "Größe 你好"),
        Origin("invented", 2),
    ),
]


def conversations() -> list[PreferenceRecord]:
    if SHARED is None:
        return INVENTED
    path = SHARED / "derived/trl_conversational_from_hh.jsonl"
    return INVENTED + [record for record in read_records(str(path)) if isinstance(record, PreferenceRecord)]


def trl_ids(records: list[PreferenceRecord], tokenizer: PreTrainedTokenizerFast) -> list[list[list[int]]]:
    """Return the prompt, chosen and rejected ids of each record from TRL's DPO trainer."""

    def row(record: PreferenceRecord) -> dict[str, Any]:
        if isinstance(record.prompt, str):
            return dict(
                zip(("prompt", "chosen", "rejected"), (record.prompt, *record.responses), strict=True)
            )
        assert isinstance(record.prompt, tuple)
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in record.responses)
        prompt = [{"role": message.role, "content": message.content} for message in record.prompt]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer),
        Dataset.from_list([row(record) for record in records]),
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
        "train",
    )
    return [[item["prompt_ids"], item["chosen_ids"], item["rejected_ids"]] for item in prepared]


def our_ids(records: list[PreferenceRecord], tokenizer: PreTrainedTokenizerFast) -> list[list[list[int]]]:
    pairs = [encode_pair(record, tokenizer, WIDE) for record in records]
    assert all(isinstance(pair, EncodedExample) for pair in pairs)
    return [
        [ids.tolist() for ids in (pair.prompt_ids, *pair.responses)]
        for pair in pairs
        if isinstance(pair, EncodedExample)
    ]


@pytest.mark.parametrize("make", [tiny.llama3, tiny.mistral])
def test_conversations_have_trl_s_ids(make: Any) -> None:
    records = conversations()
    assert our_ids(records, make()) == trl_ids(records, make())


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.CHATML_WITH_THOUGHT])
def test_chatml_has_trl_s_ids_without_the_newline_after_the_end_of_turn(template: str) -> None:
    tokenizer = tiny.with_template(tiny.qwen(), template)
    newline = tokenizer("\n")["input_ids"]
    expected = trl_ids(conversations(), tokenizer)
    found = our_ids(conversations(), tokenizer)
    assert [[prompt, *(ids + newline for ids in responses)] for prompt, *responses in found] == expected


def test_a_bos_that_the_template_omits_is_added() -> None:
    tokenizer = tiny.zephyr()
    newline = tokenizer("<s>\n", add_special_tokens=False)["input_ids"][1:]
    expected = trl_ids(INVENTED, tokenizer)
    found = our_ids(INVENTED, tokenizer)
    assert [prompt for prompt, *_ in found] == [[tokenizer.bos_token_id, *prompt] for prompt, *_ in expected]
    assert [[ids + newline for ids in responses] for _, *responses in found] == [
        responses for _, *responses in expected
    ]


@pytest.mark.parametrize("make", [tiny.qwen, tiny.llama3, tiny.base])
def test_plain_texts_have_trl_s_ids_if_a_token_ends_at_the_boundary(make: Any) -> None:
    records = [
        PreferenceRecord("Q: What is it?\nA:", (" the answer", " I cannot"), Origin("invented", 1)),
        PreferenceRecord("Human: hello\n\nAssistant:", (" hello there\n", " no"), Origin("invented", 2)),
    ]
    assert our_ids(records, make()) == trl_ids(records, make())
