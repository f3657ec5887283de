"""Chat templates with clocks, thoughts and ordinary tokens; texts to which a template was applied."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from dpo_dist.config.data import DataConfig, SourceConfig, TextTemplate
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.dataset import open_dataset
from dpo_dist.data.encode import encode_pair
from dpo_dist.data.records import Message
from dpo_dist.data.store import EncodedSource
from dpo_dist.data.template import pin_clock
from dpo_dist.foundation.errors import DataError
from tests.support import tiny
from tests.support.pairs import CHAT, WIDE, encode, record, texts
from tests.support.records import jsonl

LLAMA31 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Today Date: ' + date_string + '<|eot_id|>' }}" + tiny.LLAMA3.removeprefix("{{ bos_token }}")
)
# As DeepSeek-R1's distilled models: thoughts of earlier answers are cut, the prompt opens the next one.
R1 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|im_start|>{{ message['content'] }}"
    "{% else %}<|im_end|>{{ message['content'].split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
# As Qwen's thinking models: an answer without a thought is written with an empty one.
THINKING = tiny.CHATML_WITH_THOUGHT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
APPLIED = DataConfig(max_length=100_000, template=TextTemplate.applied)


class Tomorrow(chat_template_utils.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "Tomorrow":
        return cls(2031, 1, 2)


def ids_of(pair: Any) -> list[list[int]]:
    return [ids.tolist() for ids in (pair.prompt_ids, *pair.responses)]


def test_a_template_with_a_clock_gives_the_same_ids_tomorrow(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.with_template(tiny.llama3(), LLAMA31)
    today = encode(record(CHAT), tokenizer)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert "02 Jan 2031" in tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    assert ids_of(encode(record(CHAT), tokenizer)) == ids_of(today)
    assert "Today Date: 26 Jul 2024<|eot_id|>" in texts(today, tokenizer)[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('100%%, %%Y, %%%Y, %R %D %h %C %e') }}",
        "\n\n  {{ strftime_now('%Y') }}",
        "  {% if true %}a{% endif %}\n  {{ strftime_now('%Y') }}",
    ],
)
def test_a_pinned_template_renders_as_on_that_day(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, turns = tiny.qwen(), [{"role": "user", "content": "q"}]

    def written(template: str) -> Any:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)

    pinned = written(pin_clock(template, "2031-01-02"))
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert pinned == written(template)


def thinking(template: str) -> PreTrainedTokenizerFast:
    return tiny.with_template(tiny.qwen(), template)


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", ""])
def test_a_response_continues_the_thought_opened_in_the_prompt(opening: str) -> None:
    tokenizer = thinking(R1)
    answers = [f"{opening}so\n</think>\n\nParis", f"{opening}no\n</think>\n\nRome"]
    pair = encode(record(CHAT, *answers), tokenizer)
    assert texts(pair, tokenizer) == [
        "<|im_start|>What is the capital?<|im_end|><think>\n",
        "so\n</think>\n\nParis<|endoftext|>",
        "no\n</think>\n\nRome<|endoftext|>",
    ]
    assert ("opened_thought_joined" in pair.changes) == bool(opening)
    assert "opened_thought_removed" not in pair.changes


@pytest.mark.parametrize("other", ["Rome", "<think>\nno\n</think>\n\nRome"])
def test_a_plain_response_follows_no_opened_thought(other: str) -> None:
    tokenizer = thinking(R1)
    pair = encode(record(CHAT, "Paris", other), tokenizer)
    assert texts(pair, tokenizer) == [
        "<|im_start|>What is the capital?<|im_end|>",
        "Paris<|endoftext|>",
        f"{other}<|endoftext|>",
    ]
    assert "opened_thought_removed" in pair.changes
    plain = [{"role": "user", "content": CHAT[0].content}, {"role": "assistant", "content": "Paris"}]
    assert tokenizer.decode([*pair.prompt_ids, *pair.responses[0]]) == tokenizer.apply_chat_template(
        plain, tokenize=False
    )


def test_the_template_may_end_the_thought_itself() -> None:
    tokenizer = thinking(THINKING)
    pair = encode(record(CHAT, "Paris", "Rome"), tokenizer)
    assert texts(pair, tokenizer)[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert texts(pair, tokenizer)[1] == "Paris<|im_end|>"
    assert "opened_thought_removed" not in pair.changes
    assert not pair.trained
    counted = encode(record(CHAT, "Paris", "Rome"), tokenizer, DataConfig(untrained=[]))
    assert texts(counted, tokenizer)[0].endswith("<|im_start|>assistant\n<think>\n")
    assert texts(counted, tokenizer)[1] == "\n</think>\n\nParis<|im_end|>"


def ordinary_marks() -> PreTrainedTokenizerFast:
    """ChatML's marks are added tokens but not special ones in some fine-tuned Llamas."""
    backend = tiny._byte_level(["<s>", "</s>"])
    backend.add_tokens(
        [AddedToken(mark, normalized=False) for mark in ("<|im_start|>", "<|im_end|>", "<think>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=tiny.CHATML
    )


def test_a_turn_ends_with_the_token_of_the_template_special_or_not() -> None:
    tokenizer = ordinary_marks()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pair = encode(record(CHAT, "Paris", "a <|im_end|> spelt, <think>"), tokenizer)
    for response in pair.responses:
        assert response[-1] == end
        assert response.tolist().count(end) == 1
    assert tokenizer.decode(pair.responses[1]) == "a <|im_end|> spelt, <think><|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<think>") in pair.responses[1]


def legacy() -> PreTrainedTokenizerFast:
    """Llama 2's converted tokenizer: a normalizer adds a space before every text."""
    backend = Tokenizer.from_str(tiny._sentencepiece_like().to_str())
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def always() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tiny._sentencepiece_like().to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gpt2_with_prefix_space() -> PreTrainedTokenizerFast:
    backend = tiny._byte_level(["</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("make", [legacy, always, gpt2_with_prefix_space, tiny.base])
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("A: ", "the answer"), ("the w", "eather"), ("A: ", "</s> the answer"), ("A:", " the")],
)
def test_no_space_is_added_between_prompt_and_response(make: Any, prompt: str, response: str) -> None:
    tokenizer = make()
    pair = encode(record(prompt, response, "x"), tokenizer)
    whole = tokenizer.decode([*pair.prompt_ids, *pair.responses[0]], clean_up_tokenization_spaces=False)
    assert whole.removeprefix("<s>").strip() == f"{prompt}{response}</s>"


WRITTEN = "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<|im_end|>"])
def test_an_applied_template_is_encoded_as_it_is(end: str) -> None:
    pair = encode(record(WRITTEN, f"Paris{end}", f"Rome{end}"), tiny.qwen(), APPLIED)
    assert ids_of(pair) == ids_of(encode(record(CHAT, "Paris", "Rome"), tiny.qwen()))
    assert "templated_text" in pair.changes


@pytest.mark.parametrize("make", [tiny.llama3, tiny.mistral, tiny.zephyr])
@pytest.mark.parametrize("with_bos", [True, False])
def test_an_applied_template_has_one_bos_and_one_end(make: Any, with_bos: bool) -> None:
    tokenizer = make()
    chat = (Message("user", "hello"), Message("assistant", "hello there"), Message("user", "and then?"))
    turns = [{"role": turn.role, "content": turn.content} for turn in chat]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    bos = str(tokenizer.bos_token)
    prompt = (bos if with_bos else "") + prompt.removeprefix(bos)
    messages = encode(record(chat, "Paris", "Rome"), tokenizer)
    answers = [tokenizer.decode(ids) for ids in messages.responses]
    pair = encode(record(prompt, *answers), tokenizer, APPLIED)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert "templated_text" in pair.changes
    assert pair.prompt_ids.tolist() == [tokenizer.bos_token_id] * (ids[0] != tokenizer.bos_token_id) + ids
    assert [ids[-1] for ids in pair.responses] == [ids[-1] for ids in messages.responses]
    assert pair.prompt_ids.tolist().count(tokenizer.bos_token_id) == prompt.count(bos) + (not with_bos)


def opened(folder: Path, rows: list[dict[str, str]], template: TextTemplate) -> dict[str, Any]:
    config = DataConfig(cache=str(folder / "cache"), template=template)
    encoded: tuple[EncodedSource, ...] = prepare_dataset(
        [SourceConfig(jsonl(folder, *rows))], config, tiny.qwen(), "qwen"
    )
    return open_dataset(encoded, config).counts


def test_templated_texts_are_counted_and_refused_if_most_are(tmp_path: Path) -> None:
    plain = {"prompt": "why?", "chosen": "so", "rejected": "no"}
    written = {"prompt": WRITTEN, "chosen": "so", "rejected": "no"}
    assert opened(tmp_path, [plain, plain, written], TextTemplate.auto)["templated_text"] == 1
    with pytest.raises(DataError, match="already been applied to 2 of 3") as raised:
        opened(tmp_path, [plain, written, written], TextTemplate.auto)
    assert "data.template=applied" in raised.value.remedy
    for template in (TextTemplate.applied, TextTemplate.literal):
        counts = opened(tmp_path, [plain, written, written], template)
        assert counts["templated_text"] == 2
        # With `applied` the templated records count as templated; the plain one does not.
        assert counts["chat_template_not_applied"] == (1 if template is TextTemplate.applied else 3)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|><|im_end|>", "<|eot_id|>"])
def test_ends_of_responses_to_plain_prompts_are_counted(tmp_path: Path, end: str) -> None:
    plain = {"prompt": "why?", "chosen": "so", "rejected": "no"}
    ended = {"prompt": "why?", "chosen": f"so{end}", "rejected": f"no{end}"}
    assert opened(tmp_path, [plain, plain, ended], TextTemplate.auto)["templated_text"] == 1
    with pytest.raises(DataError, match="already been applied"):
        opened(tmp_path, [plain, ended, ended], TextTemplate.auto)


@pytest.mark.parametrize("as_messages", [False, True])
def test_an_applied_end_occurs_once(as_messages: bool) -> None:
    applied = replace(APPLIED, text_as_messages=as_messages)
    bare = encode_pair(record("why </s>?", "so", "no"), tiny.qwen(), applied)
    ended = encode_pair(record("why </s>?", "so<|im_end|>\n", "no<|im_end|>"), tiny.qwen(), applied)
    assert ids_of(ended) == ids_of(bare)
    assert (("templated_text" in bare.changes), ("templated_text" in ended.changes)) == (False, True)


@pytest.mark.parametrize(
    ("text", "templated"),
    [
        ("<s>[INST] q [/INST]", True),
        ("a <s>struck</s> word", False),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", True),
        ("<|user|>\nq</s>\n<|assistant|>\n", True),
        ("an ordinary question?", False),
    ],
)
def test_a_templated_text_has_turns_or_bos(text: str, templated: bool) -> None:
    pair = encode_pair(record(text, "a", "b"), tiny.mistral(), WIDE)
    assert ("templated_text" in pair.changes) is templated
