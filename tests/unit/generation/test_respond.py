"""Samples of a dialogue: as generated, up to the end of the response."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, Message, Origin, PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.pairs.files import pair_fields, write_results
from dpo_dist.generation.sampling.generate import NotFiniteError, Request, Sample, Sampling
from dpo_dist.generation.sampling.respond import Answer, Numbers, Responder, respond, usable_prompt
from tests.support import tiny
from tests.support.chat_tokenizers import tokenizer_of
from tests.support.pairs import WIDE

DIALOGUE = PreferenceRecord(Dialogue("\n\nHuman: hi\n\nAssistant:"), (), Origin("here", 1))


def write(file: Path, pairs: list[dict[str, Any]]) -> None:
    write_results(file, pairs, {}, Counter(), lambda _: None)


def without_template() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny.qwen())
    tokenizer.chat_template = None
    return tokenizer


def sampled(text: str, *, finished: bool = True) -> tuple[Answer, list[int]]:
    tokenizer = without_template()
    ids = tokenizer(text)["input_ids"]
    responder: Any = Responder(None, tokenizer, WIDE, frozenset(), None)  # type: ignore[arg-type]
    (row,) = respond([DIALOGUE], responder, lambda *_: [Sample(ids, finished)], Sampling(50), Numbers(0, 1))
    return row.answers[0], ids


@pytest.mark.parametrize("text", ["yes", " yes", "\n yes"])
def test_training_reads_the_tokens_that_were_generated(tmp_path: Path, text: str) -> None:
    sample, ids = sampled(text)
    assert sample.same_ids
    file = tmp_path / "pairs.jsonl"
    write(file, [pair_fields(DIALOGUE, (sample.content, " no"), None, {})])
    (record,) = read_records(str(file))
    assert isinstance(record, PreferenceRecord)
    example = encode_pair(record, without_template(), WIDE)
    assert isinstance(example, EncodedExample)
    assert example.responses[0][:-1].tolist() == ids


@pytest.mark.parametrize("turn", ["Human: and you?", "Assistant: more"])
def test_a_response_ends_before_a_further_turn(turn: str) -> None:
    sample, _ = sampled(f" yes\n\n{turn}", finished=False)
    assert (sample.content, sample.tokens, sample.finished, sample.same_ids) == (
        *(" yes", len(without_template()(" yes")["input_ids"]), True, True),
    )
    assert sampled(f"\n\n{turn}")[0].content == ""


CHAT = PreferenceRecord((Message("user", "What is 2+2?"),), (), Origin("here", 1))
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>add<|end|><|start|>assistant"


def chatted(family: str, *texts: str) -> tuple[list[Answer], list[list[int]], Any]:
    """Samples of a chat model with these texts, their tokens, and the tokenizer."""
    tokenizer = tokenizer_of(family)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    samples = [Sample(each, True) for each in ids]
    responder: Any = Responder(None, tokenizer, WIDE, frozenset(), None)  # type: ignore[arg-type]
    (row,) = respond([CHAT], responder, lambda *_: samples, Sampling(50), Numbers(0, len(texts)))
    return row.answers, ids, tokenizer


@pytest.mark.parametrize(
    ("family", "chosen", "rejected"),
    [
        ("gptoss", f"{ANALYSIS}{FINAL}four", f"{FINAL}five"),
        ("gptoss", f"{ANALYSIS}{FINAL}four", f"{ANALYSIS.replace('add', 'sum')}{FINAL}four"),
        ("qwen3", "<think>\nadd\n</think>\n\nfour", "<think>\n\n</think>\n\nfive"),
        ("qwen3_instruct_2507", "<think>\nadd\n</think>\n\nfour", "five"),
        ("deepseek_r1_distill", "add\n</think>\n\nfour", "subtract\n</think>\n\nzero"),
    ],
)
def test_thoughts_are_trained_as_they_were_generated(
    tmp_path: Path, family: str, chosen: str, rejected: str
) -> None:
    samples, ids, tokenizer = chatted(family, chosen, rejected)
    assert [sample.same_ids for sample in samples] == [True, True]
    sides = samples[0].response, samples[1].response
    write(tmp_path / "pairs.jsonl", [pair_fields(CHAT, sides, None, {})])
    (record,) = read_records(str(tmp_path / "pairs.jsonl"))
    assert isinstance(record, PreferenceRecord)
    example = encode_pair(record, tokenizer, WIDE)
    assert isinstance(example, EncodedExample)
    assert [response[:-1].tolist() for response in example.responses] == ids


def test_the_channels_of_a_response_are_its_content_and_its_thought() -> None:
    (whole, final, call), _, _ = chatted(
        "gptoss", f"{ANALYSIS}{FINAL}four", f"{FINAL}five", "<|channel|>commentary<|message|>{}"
    )
    assert (whole.content, whole.fields) == ("four", {"reasoning_content": "add"})
    assert (final.content, bool(final.fields)) == ("five", False)
    assert not call.same_ids


def test_logits_that_are_not_finite_name_model_and_prompt() -> None:
    def fail(requests: list[Request], *_: Any) -> Any:
        raise NotFiniteError(requests[1])

    tokenizer = tokenizer_of("qwen2_5")
    source: Any = SimpleNamespace(name="my_model")
    responder = Responder(source, tokenizer, WIDE, frozenset(), None)
    generator: Any = fail
    with pytest.raises(ConfigError) as caught:
        respond([CHAT], responder, generator, Sampling(5), Numbers(4, 2))
    assert caught.value.where == "my_model, sample 5 of the prompt of here:1"


def test_a_prompt_needs_room_for_its_response() -> None:
    responder = Responder(None, tokenizer_of("qwen2_5"), WIDE, frozenset(), 400)  # type: ignore[arg-type]
    assert not isinstance(usable_prompt(CHAT, responder, 5), str)
    assert usable_prompt(CHAT, responder, 400) == "too_long_for_the_model"
