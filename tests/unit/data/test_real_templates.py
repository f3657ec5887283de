"""The real chat templates: ids of `apply_chat_template` and of TRL, and the tokens that the loss counts."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from dpo_dist.config.data import TEMPLATE_DATE, DataConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.data.template import pin_clock
from tests.support.chat_tokenizers import FAMILIES, tokenizer_of

CALL_ID = "call12345"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}},
            "required": ["city"],
        },
    },
}
CALLED = {"type": "function", "id": CALL_ID, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
QUESTION, SYSTEM = Message("user", "What is the weather?"), Message("system", "Be brief.")
CALL = Message("assistant", "", {"tool_calls": [CALLED]})
RESULT = Message("tool", "umbrella", {"name": "weather", "tool_call_id": CALL_ID})
ANSWER, DOUBT = Message("assistant", "It rains."), Message("user", "Are you sure?")
HERE = Origin("here", 1)
RECORDS = {
    "plain": PreferenceRecord((QUESTION,), ("Rain.", "No."), HERE),
    "system": PreferenceRecord((SYSTEM, QUESTION), ("Rain.", "No."), HERE),
    "multi_turn": PreferenceRecord((QUESTION, ANSWER, DOUBT), ("Yes.", "No."), HERE),
    "tools": PreferenceRecord((QUESTION, CALL, RESULT), ("Rain.", "No."), HERE, tools=(TOOL,)),
    "call": PreferenceRecord((QUESTION,), ((CALL,), "No."), HERE, tools=(TOOL,)),
    "turns_with_tool": PreferenceRecord((QUESTION,), ((CALL, RESULT, ANSWER), "No."), HERE, tools=(TOOL,)),
    "turns": PreferenceRecord(
        (QUESTION,), ((ANSWER, DOUBT, Message("assistant", "Yes.")), "I do not know."), HERE
    ),
    "thought": PreferenceRecord(
        (QUESTION,),
        tuple((replace(ANSWER, content=c, fields={"reasoning_content": "Look."}),) for c in ("Rain.", "No.")),
        HERE,
    ),
}
WITHOUT_TOOLS = ["gemma3", "phi3", "deepseek_r1_distill"]
# These templates write thoughts of a field; DeepSeek's continue the thought that the prompt opens.
WITH_THOUGHTS = ["qwen3", "qwen3_5_nothink_training", "qwen3_6", "gptoss", "glm4moe", "nemotron_3_nano"]
OPENED = ["deepseekv3", "deepseek_r1_distill"]
# The stop token of a turn, if it is not the last one of the template's output.
ADDED_END = {"glm4moe": "<|endoftext|>"}


@dataclass(frozen=True)
class Oracle:
    """Ids by the tokenizer's own functions, on the day of the configuration."""

    tokenizer: PreTrainedTokenizerFast

    def whole(self, record: PreferenceRecord, side: int, **arguments: Any) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            [*map(as_dict, record.prompt), *map(as_dict, turns_of(record, side))],  # type: ignore[arg-type]
            chat_template=self.template,
            tools=list(record.tools) or None,
            return_dict=False,
            **arguments,
        )
        return list(ids)

    @property
    def template(self) -> str:
        return pin_clock(str(self.tokenizer.chat_template), TEMPLATE_DATE)


def turns_of(record: PreferenceRecord, side: int) -> tuple[Message, ...]:
    response = record.responses[side]
    return (Message("assistant", response),) if isinstance(response, str) else response


def as_dict(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **message.fields}


def encoded(family: str, case: str, **data: Any) -> EncodedExample:
    found = encode_pair(RECORDS[case], tokenizer_of(family), DataConfig(max_length=10**6, **data))
    assert isinstance(found, EncodedExample), found
    return found


def cases() -> list[tuple[str, str]]:
    found = []
    for family in FAMILIES:
        for case, record in RECORDS.items():
            if record.tools and family in WITHOUT_TOOLS:
                continue
            if case == "thought" and family not in WITH_THOUGHTS:
                continue
            found.append((family, case))
    return found


def counted_text(family: str, example: EncodedExample, side: int = 0) -> str:
    ids = example.responses[side]
    return str(tokenizer_of(family).decode(ids[example.trained[side]] if example.trained else ids))


@pytest.fixture(autouse=True)
def _arguments_as_text(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """DeepSeek's own template wants the arguments of calls as JSON text, also from the oracle."""
    if "deepseekv3" in request.node.name:
        text = json.dumps(CALLED["function"]["arguments"])  # type: ignore[index]
        monkeypatch.setitem(CALLED["function"], "arguments", text)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "case"), cases())
def test_ids_are_those_of_the_tokenizer(family: str, case: str) -> None:
    oracle, example = Oracle(tokenizer_of(family)), encoded(family, case)
    for side, response in enumerate(example.responses):
        found = [*example.prompt_ids, *response]
        if family in ADDED_END:
            end = oracle.tokenizer.convert_tokens_to_ids(ADDED_END[family])
            assert found.pop() == end
        whole = oracle.whole(RECORDS[case], side)
        assert found == whole[: len(found)]
        # Text after the end of the last turn is in no response.
        assert oracle.tokenizer.decode(whole[len(found) :]).strip() in ("", "<|endoftext|>")


@pytest.mark.parametrize(("family", "case"), cases())
def test_the_loss_counts_the_turns_of_the_assistant_only(family: str, case: str) -> None:
    example, record = encoded(family, case), RECORDS[case]
    for side in (0, 1):
        text = counted_text(family, example, side)
        for message in turns_of(record, side):
            is_counted = message.role == "assistant"
            part = "Bern" if message.fields.get("tool_calls") else message.content
            assert (part in text) is is_counted, (part, text)
        assert "<think>\n\n</think>" not in text
        assert "<think></think>" not in text
        assert "assistant<|end_header_id|>" not in text
        assert "<|im_start|>" not in text
    if case == "thought":
        assert "Look." in counted_text(family, example)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_counted_turn_has_its_end(family: str) -> None:
    tokenizer, example = tokenizer_of(family), encoded(family, "turns")
    ends = {tokenizer.eos_token, "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|user|>"}
    end_ids = {tokenizer.convert_tokens_to_ids(end) for end in ends} - {None}
    counted = example.responses[0][example.trained[0]].tolist()
    assert sum(token in end_ids for token in counted) == 2
    assert counted[-1] in end_ids


@pytest.mark.parametrize("family", ["qwen3", "qwen3_6", "glm4moe", "smollm3", "nemotron_3_nano"])
@pytest.mark.parametrize("case", ["plain", "multi_turn", "turns"])
def test_an_argument_of_the_run_is_given_to_the_template(family: str, case: str) -> None:
    oracle = Oracle(tokenizer_of(family))
    example = encoded(family, case, template_arguments={"enable_thinking": False})
    assert "</think>" not in counted_text(family, example)
    found = [*example.prompt_ids, *example.responses[0]][: -1 if family in ADDED_END else None]
    whole = oracle.whole(RECORDS[case], 0, enable_thinking=False)
    assert found == whole[: len(found)]


@pytest.mark.parametrize("family", OPENED)
def test_a_thought_in_a_field_continues_the_opened_one(family: str) -> None:
    example = encoded(family, "thought")
    assert str(tokenizer_of(family).decode(example.prompt_ids)).endswith("<think>\n")
    assert counted_text(family, example) == f"Look.\n</think>\n\nRain.{tokenizer_of(family).eos_token}"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WITH_THOUGHTS) - set(OPENED)))
def test_a_thought_that_the_template_omits_is_counted(family: str) -> None:
    assert "content_not_rendered" in encoded(family, "thought").changes


# TRL has no BOS that the template does not write, and keeps the text after the last turn.
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3_1", "mistral", "gptoss", "smollm3", "gemma3"])
@pytest.mark.parametrize(
    "case", ["plain", "system", "multi_turn", "tools", "call", "turns_with_tool", "thought"]
)
def test_ids_are_those_of_trl(family: str, case: str) -> None:
    if (family, case) not in cases():
        pytest.skip("this template does not write all of the record")
    found = [ids.tolist() for ids in (encoded(family, case).prompt_ids, *encoded(family, case).responses)]
    expected = trl_ids(Oracle(tokenizer_of(family)), RECORDS[case])
    assert found[0] == expected[0]
    assert found[1:] == [ids[: len(own)] for ids, own in zip(expected[1:], found[1:], strict=True)]


def trl_ids(oracle: Oracle, record: PreferenceRecord) -> list[list[int]]:
    """Return the prompt, chosen and rejected ids of a record from TRL's DPO trainer."""
    row = {
        "prompt": list(map(as_dict, record.prompt)),  # type: ignore[arg-type]
        "chosen": list(map(as_dict, turns_of(record, 0))),
        "rejected": list(map(as_dict, turns_of(record, 1))),
        "tools": json.dumps(record.tools) if record.tools else None,
        "chat_template_kwargs": {"chat_template": oracle.template},
    }
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=oracle.tokenizer),
        Dataset.from_list([row]),
        oracle.tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
        "train",
    )
    return [prepared[0][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
