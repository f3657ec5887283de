"""Samples of a dialogue: as generated, up to the end of the response."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, Origin, PreferenceRecord
from dpo_dist.generation.pair_records import pair_fields, write_pairs
from dpo_dist.generation.sampling.generate import Sample, Sampling
from dpo_dist.generation.sampling.respond import Numbers, respond
from dpo_dist.generation.sampling.responder import Responder
from tests.support import tiny
from tests.support.pairs import WIDE

DIALOGUE = PreferenceRecord(Dialogue("\n\nHuman: hi\n\nAssistant:"), (), Origin("here", 1))


def without_template() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny.qwen())
    tokenizer.chat_template = None
    return tokenizer


def sampled(text: str, *, finished: bool = True) -> tuple[dict[str, Any], list[int]]:
    tokenizer = without_template()
    ids = tokenizer(text)["input_ids"]
    generator = SimpleNamespace(generate=lambda *_: [Sample(ids, finished)])
    responder: Any = Responder(None, tokenizer, WIDE, frozenset(), None)  # type: ignore[arg-type]
    (row,) = respond([DIALOGUE], responder, generator, Sampling(50), Numbers(0, 1))  # type: ignore[arg-type]
    return row["samples"][0], ids


@pytest.mark.parametrize("text", ["yes", " yes", "\n yes"])
def test_training_reads_the_tokens_that_were_generated(tmp_path: Path, text: str) -> None:
    sample, ids = sampled(text)
    assert sample["same_ids"]
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, [pair_fields(DIALOGUE, (sample["content"], " no"), None, {})])
    (record,) = read_records(str(file))
    assert isinstance(record, PreferenceRecord)
    example = encode_pair(record, without_template(), WIDE)
    assert isinstance(example, EncodedExample)
    assert example.responses[0][:-1].tolist() == ids


@pytest.mark.parametrize("turn", ["Human: and you?", "Assistant: more"])
def test_a_response_ends_before_a_further_turn(turn: str) -> None:
    sample, _ = sampled(f" yes\n\n{turn}", finished=False)
    assert (sample["content"], sample["tokens"], sample["finished"], sample["same_ids"]) == (
        *(" yes", len(without_template()(" yes")["input_ids"]), True, True),
    )
    assert sampled(f"\n\n{turn}")[0]["content"] == ""
