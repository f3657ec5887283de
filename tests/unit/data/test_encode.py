"""Token ids of a record: no doubled or smuggled special tokens; limits; tokens that the loss counts."""

import copy
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_dist.data.config import DataConfig, ScoredDataConfig, Truncation, UnpairedDataConfig
from dpo_dist.data.encode import EncodedRecord, encode_pair, encode_record
from dpo_dist.data.records import Dialogue, Message, Messages, Origin, PreferenceRecord, Prompt
from dpo_dist.data.text.escape import tokenize_texts
from dpo_dist.data.text.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support import tiny
from tests.support.cache import opened
from tests.support.chat_tokenizers import tokenizer_of
from tests.support.pairs import CHAT, WIDE, encode, flags, reason_against, record, texts
from tests.support.records import TEXT, jsonl

UNRENDERED = partial(DataConfig, text_as_messages=False)
UNRENDERED_SCORED = partial(ScoredDataConfig, text_as_messages=False)

LONG_CHAT = (Message("user", "hello"), Message("assistant", "hello there"), Message("user", "and then?"))
DIALOGUE = Dialogue("\n\nHuman: hello\n\nAssistant: hello there\n\nHuman: and then? \n\nAssistant:")
WRITTEN = "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n"
LONG_WRITTEN = (
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhello there<|im_end|>\n"
    "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
)
PLAIN = "user: What is the capital?\nassistant:"
AS_MESSAGES = replace(WIDE, text_as_messages=True)


@pytest.mark.parametrize(
    ("template", "what", "config", "expected"),
    [
        (tiny.CHATML, record(CHAT, "yes", "no"), WIDE, [WRITTEN, "yes", "no"]),
        (tiny.CHATML, record("Q: why?\nA:", " so", " no"), WIDE, ["Q: why?\nA:", " so", " no"]),
        (tiny.CHATML, record("What is the capital?", "yes", "no"), AS_MESSAGES, [WRITTEN, "yes", "no"]),
        (tiny.CHATML, record(DIALOGUE, " yes", " no "), WIDE, [LONG_WRITTEN, "yes", "no"]),
        (None, record(DIALOGUE, " yes", " no "), WIDE, [DIALOGUE.text, " yes", " no "]),
        (tiny.WITHOUT_END, record(CHAT), WIDE, [PLAIN, " It is Paris.", " I cannot do that."]),
    ],
)
def test_a_record_is_rendered_with_one_end_of_each_response(
    template: str | None, what: PreferenceRecord, config: DataConfig, expected: list[str]
) -> None:
    tokenizer = tiny.with_template(tiny.qwen(), template)
    found = encode(what, tokenizer, config)
    prompt, *responses = expected
    assert texts(found, tokenizer) == [prompt, *(f"{text}<|im_end|>" for text in responses)]
    assert found.prompt_ids.dtype == np.int32
    assert flags(found) == (False, False, False)
    assert "templated_text" not in found.changes


@pytest.mark.parametrize(
    ("teacher_prompt", "joins"), [("the sea", True), ("sea\n", False), ("x", False)], ids=repr
)
def test_a_response_that_would_join_the_end_of_a_scorer_s_prompt_is_counted(
    teacher_prompt: str, joins: bool
) -> None:
    """The scorer reads the policy's tokens."""
    what = record("Q: why? ", "so", "no")
    plain = encode(what, tiny.qwen())
    found = encode(replace(what, scorer_prompts={"teacher": teacher_prompt}), tiny.qwen())
    assert found.changes - plain.changes == ({"scorer_boundary_resplit"} if joins else set())
    assert [ids.tolist() for ids in found.responses] == [ids.tolist() for ids in plain.responses]


@pytest.mark.parametrize("make", [tiny.qwen, tiny.llama3, tiny.mistral, tiny.zephyr])
@pytest.mark.parametrize("prompt", [CHAT, "What is the capital?", Dialogue("\n\nHuman: hi\n\nAssistant:")])
def test_one_bos_if_the_tokenizer_has_one_and_one_end_of_turn(make: Any, prompt: Prompt) -> None:
    tokenizer = make()
    found = encode(record(prompt), tokenizer)
    bos = tokenizer.bos_token_id
    if bos is not None:
        assert found.prompt_ids[0] == bos
        assert list(chain(found.prompt_ids, *found.responses)).count(bos) == 1
    end = "<|eot_id|>" if make is tiny.llama3 and not isinstance(prompt, str) else tokenizer.eos_token
    for response in found.responses:
        assert response[-1] == tokenizer.convert_tokens_to_ids(end)
        assert not set(response[:-1].tolist()) & set(tokenizer.all_special_ids)


def test_most_texts_with_an_applied_template_are_refused(tmp_path: Path) -> None:
    written = {"prompt": WRITTEN, "chosen": "so", "rejected": "no"}
    for end in ("", "<|im_end|>", "<|im_end|>\n", "<|endoftext|><|im_end|>", "<|eot_id|>"):
        ended = TEXT | {"chosen": f"so{end}", "rejected": f"no{end}"} if end else written
        counts = opened(tmp_path, jsonl(tmp_path, TEXT, TEXT, ended)).counts
        assert counts["templated_text"] == 1
        with pytest.raises(DataError, match="encoded as text in 2 of 3 records") as raised:
            opened(tmp_path, jsonl(tmp_path, TEXT, ended, ended))
        assert "data.max_bad_share=1" in raised.value.remedy
    counts = opened(tmp_path, jsonl(tmp_path, TEXT, written, written), max_bad_share=1).counts
    assert (counts["templated_text"], counts["chat_template_not_applied"]) == (2, 3)


def test_a_tokenizer_without_a_fast_version_is_refused() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    tokenizer = Slow(tokenizer_object=tiny.qwen().backend_tokenizer)
    with pytest.raises(ConfigError, match="no fast version"):
        encode(record(CHAT), tokenizer)


def test_a_conversation_that_the_template_rejects_is_a_bad_record() -> None:
    what = record((Message("user", "one"), Message("user", "two")))
    assert reason_against(what, tiny.mistral()) == "template_rejected"


SYSTEM = Message("system", "be brief")
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"


def test_a_template_whose_end_of_turn_cannot_be_found_is_an_error() -> None:
    tokenizer = tiny.with_template(tiny.qwen(), NEEDS_SYSTEM + tiny.CHATML)
    with pytest.raises(ConfigError, match="system first"):
        encode_pair(record((SYSTEM, *CHAT)), WIDE, tokenizer)


def legacy() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tiny._sentencepiece_like().to_str())
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gpt2_with_prefix_space() -> PreTrainedTokenizerFast:
    backend = tiny._byte_level(["</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("make", [legacy, gpt2_with_prefix_space, tiny.base])
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("A: ", "the answer"), ("the w", "eather"), ("A: ", "</s> the answer"), ("A:", " the")],
)
def test_no_space_is_added_between_prompt_and_response(make: Any, prompt: str, response: str) -> None:
    tokenizer = make()
    found = encode(record(prompt, response, "x"), tokenizer)
    whole = tokenizer.decode([*found.prompt_ids, *found.responses[0]], clean_up_tokenization_spaces=False)
    assert whole.removeprefix("<s>").strip() == f"{prompt}{response}</s>"


WORDS = st.lists(
    st.sampled_from(["the", " weather", " is", " capital", "\n", "ital", " an", "swer", ".", "1"])
)


@settings(deadline=None, max_examples=150)
@given(words=WORDS, cut=st.integers(1, 40), make=st.sampled_from([tiny.qwen, tiny.base, tiny.mistral]))
def test_a_response_has_the_ids_of_the_whole_text(words: list[str], cut: int, make: Any) -> None:
    tokenizer = make()
    text = "a" + "".join(words)
    prompt, response = text[:cut], text[cut:]
    for written in (prompt, f"{tokenizer.eos_token}{prompt}"):
        encoder = tokenizer_facts(tokenizer).encoder
        (prompt_ids, _), (whole, _) = encoder.encode([written, written + response])
        found_prompt, [(found, _)], resplit = encoder.encode_after(written, (response,))
        assert found_prompt == prompt_ids
        assert resplit == (whole[: len(prompt_ids)] != prompt_ids)
        if not resplit:
            assert found == whole[len(prompt_ids) :]


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "</s>", "<s>", "<", "|>", "literal0", " ", "\n"]
)
CONTENT = st.lists(st.one_of(PIECES, st.text(max_size=5)), min_size=1, max_size=8).map("".join)


@settings(deadline=None, max_examples=80)
@given(content=CONTENT, make=st.sampled_from([tiny.qwen, tiny.llama3, tiny.zephyr]))
def test_no_content_becomes_a_special_token(content: str, make: Any) -> None:
    tokenizer = make()
    special = set(tokenizer.all_special_ids)
    wrapped = f"[{content}]".replace("\ufdd0", "").encode("utf-8", "ignore").decode()
    for prompt, empty in (((Message("user", wrapped),), (Message("user", "[]"),)), (wrapped, "[]")):
        found, without = encode(record(prompt, wrapped, wrapped + "!"), tokenizer), record(empty)
        counts = [
            sum(token in special for token in one.prompt_ids.tolist())
            for one in (found, encode(without, tokenizer))
        ]
        assert counts[0] == counts[1]
        for response, text in zip(found.responses, (wrapped, wrapped + "!"), strict=True):
            assert not special & set(response[:-1].tolist())
            assert make is tiny.zephyr or tokenizer.decode(response[:-1]) == text


def test_a_special_token_that_cannot_be_encoded_as_text_is_a_bad_record() -> None:
    assert reason_against(record("q", "the </s> end", "a"), tiny.unigram()) == "special_token_in_text"


def numbered(prompt: int, *responses: int) -> PreferenceRecord:
    made = record(
        "".join(str(number % 10) for number in range(prompt - 1)),
        *(str(rank) * (length - 1) for rank, length in enumerate(responses, start=1)),
    )
    found = encode(made, tiny.llama3())
    assert [len(found.prompt_ids), *map(len, found.responses)] == [prompt, *responses]
    return made


@pytest.mark.parametrize(
    ("limits", "prompt", "second", "cut"),
    [
        ({"max_length": 18}, slice(None), slice(8), (False, True)),
        ({"max_length": 18, "truncation": Truncation.keep_end}, slice(-5, None), slice(None), (True, False)),
        ({"max_length": 18, "truncation": Truncation.both}, slice(-8, None), slice(9), (True, True)),
        ({"max_length": 21, "truncation": Truncation.both}, slice(None), slice(11), (False, True)),
        ({"max_prompt_length": 4}, slice(-3, None), slice(None), (True, False)),
        ({"max_length": 22, "max_prompt_length": 10}, slice(None), slice(None), (False, False)),
    ],
)
def test_limits_cut_responses_at_their_end_or_the_prompt_after_its_bos(
    limits: dict[str, Any], prompt: slice, second: slice, cut: tuple[bool, bool]
) -> None:
    tokenizer, what = tiny.llama3(), numbered(10, 6, 12)
    full, found = encode(what, tokenizer), encode(what, tokenizer, UNRENDERED(**limits))
    bos = [] if prompt == slice(None) else [tokenizer.bos_token_id]
    assert found.prompt_ids.tolist() == bos + full.prompt_ids.tolist()[prompt]
    first, other = (ids.tolist() for ids in full.responses)
    assert [ids.tolist() for ids in found.responses] == [first, other[second]]
    assert flags(found) == (*cut, False)
    assert found.truncated == (False, cut[1])


@pytest.mark.parametrize(
    ("lengths", "most", "left"),
    [
        ((100, 40, 60), 80, (50, 30)),  # 80 * 60 / 160 of the longest response
        ((100, 30, 39), 80, (41, 39)),  # a side below a half stays whole
        ((30, 100, 90), 80, (30, 50)),
        ((1000, 8, 9), 12, (11, 1)),
        ((9, 1000, 9), 12, (2, 10)),
    ],
)
def test_both_sides_are_cut_in_proportion_to_their_lengths(
    lengths: tuple[int, ...], most: int, left: tuple[int, int]
) -> None:
    limits = UNRENDERED(max_length=most, truncation=Truncation.both)
    whole, found = (
        encode(numbered(*lengths), tiny.llama3(), c) for c in (UNRENDERED(max_length=10**6), limits)
    )
    assert (len(found.prompt_ids), max(map(len, found.responses))) == left
    assert found.prompt_ids.tolist() == [
        whole.prompt_ids[0],
        *whole.prompt_ids[len(whole.prompt_ids) - left[0] + 1 :],
    ]
    assert [ids.tolist() for ids in found.responses] == [ids[: left[1]].tolist() for ids in whole.responses]


def test_a_limit_with_space_for_bos_only_is_refused() -> None:
    limits = UNRENDERED(max_prompt_length=1)
    assert reason_against(record("one two three"), tiny.llama3(), limits) == "empty_prompt"
    encode(record("one"), tiny.llama3(), UNRENDERED(max_prompt_length=2))


@pytest.mark.parametrize(
    ("what", "limits", "reason"),
    [
        (numbered(10, 6, 12), {"max_length": 21, "truncation": Truncation.drop}, "too_long"),
        (numbered(10, 6, 12), {"max_length": 10}, "prompt_fills_max_length"),
        (
            numbered(10, 6, 12),
            {"max_length": 13, "truncation": Truncation.keep_end},
            "response_fills_max_length",
        ),
        (record("q", "the a is one", "the a is two"), {"max_length": 4}, "identical_after_truncation"),
        (record(CHAT, "yes", "yes "), {}, "identical_after_encoding"),
        (record(""), {}, "empty_prompt"),
    ],
)
def test_a_record_without_an_example_is_bad(what: PreferenceRecord, limits: Any, reason: str) -> None:
    assert reason_against(what, tiny.llama3(), UNRENDERED(**limits)) == reason
    if reason.endswith(("long", "length")):
        encode(what, tiny.llama3(), UNRENDERED(**limits | {"max_length": limits["max_length"] + 1}))


def test_a_turn_ends_with_the_token_of_the_template_special_or_not() -> None:
    """ChatML's marks are added tokens but not special ones in some fine-tuned Llamas."""
    backend = tiny._byte_level(["<s>", "</s>"])
    marks = ("<|im_start|>", "<|im_end|>", "<think>")
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=tiny.CHATML
    )
    end, thought = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    found = encode(record(CHAT, "Paris", "a <|im_end|> spelt, <think>"), tokenizer)
    assert [(ids[-1], ids.tolist().count(end)) for ids in found.responses] == [(end, 1)] * 2
    assert texts(found, tokenizer)[2] == "a <|im_end|> spelt, <think><|im_end|>"
    assert thought in found.responses[1]


def test_limits_that_a_tokenizer_file_sets_do_not_cut() -> None:
    tokenizer = copy.deepcopy(tiny.qwen())
    expected = tokenize_texts(tokenizer, ["hello there, the weather"])
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert tokenize_texts(tokenizer, ["hello there, the weather"]) == expected


# The tokens that the loss counts: roles, markers, formatting, and what a record says itself.
QUESTION = (Message("user", "What is the weather?"),)
ANSWER, DOUBT, LAST = (
    Message("assistant", "It rains."),
    Message("user", "Are you sure?"),
    Message("assistant", "Yes, <note>I think</note> so."),
)
TURNS = (ANSWER, DOUBT, LAST)


def pluralize(response: Messages | str, family: str = "qwen2_5", **data: Any) -> str:
    """Return the text of a response that the loss counts."""
    tokenizer = tokenizer_of(family)
    what = PreferenceRecord(QUESTION, (response, "another"), Origin("here", 1))
    pair = encode(what, tokenizer, UNRENDERED(**data))
    ids = pair.responses[0]
    return str(tokenizer.decode(ids[pair.trained[0]] if pair.trained else ids))


THOUGHT = "<think>\nLook.\n</think>\n\n"
IN_FIELD = (replace(ANSWER, fields={"reasoning_content": "Look."}),)
SAID = (replace(ANSWER, is_trained=False), DOUBT, LAST)
LITERAL = (Message("assistant", "a <|im_end|> b"), Message("user", "<|im_start|>c"), LAST)
RAIN, YES, END = "It rains.<|im_end|>", "Yes, <note>I think</note> so.<|im_end|>", "<|im_end|>"


@pytest.mark.parametrize(
    ("response", "family", "data", "expected"),
    [
        (TURNS, "qwen2_5", {}, RAIN + YES),
        (SAID, "qwen2_5", {}, YES),
        (LITERAL, "qwen2_5", {}, f"a <|im_end|> b{END}{YES}"),
        (TURNS, "qwen2_5", {"untrained": ["formatting"]}, "It rains.Yes, <note>I think</note> so."),
        ((ANSWER,), "llama3_1", {"untrained": ["formatting"]}, "It rains."),
        ("yes <think>cut", "qwen2_5", {"untrained": ["thoughts"]}, "yes "),
        ("a <think>b</think>\nc", "qwen2_5", {"untrained": ["thoughts"]}, f"a c{END}"),
        # An empty thought is the template's only at the start.
        ("yes\n<think>\n\n</think>\nno", "qwen2_5", {}, f"yes\n<think>\n\n</think>\nno{END}"),
        ("It rains.", "qwen3", {}, RAIN),
        ("It rains.", "qwen3", {"untrained": []}, f"<think>\n\n</think>\n\n{RAIN}"),
        *((turns, "qwen3", {}, THOUGHT + RAIN) for turns in (IN_FIELD, f"{THOUGHT}It rains.")),
        *((turns, "qwen3", {"untrained": ["thoughts"]}, RAIN) for turns in (IN_FIELD, f"{THOUGHT}It rains.")),
    ],
)
def test_counted_text(response: Messages | str, family: str, data: dict[str, Any], expected: str) -> None:
    assert pluralize(response, family, **data) == expected


@pytest.mark.parametrize(
    "turns", [(replace(ANSWER, is_trained=False),), (replace(ANSWER, is_trained=False), DOUBT)]
)
def test_a_response_without_counted_tokens_is_a_bad_record(turns: Messages) -> None:
    what = PreferenceRecord(QUESTION, (turns, "another"), Origin("here", 1))
    assert reason_against(what, tokenizer_of("qwen2_5")) == "no_trained_token"


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_turn_of_another_role_with_a_weight_is_refused(role: str) -> None:
    turns = (ANSWER, Message(role, "Are you sure?", is_trained=True), LAST)
    what = PreferenceRecord(QUESTION, (turns, "another"), Origin("here", 1))
    assert reason_against(what, tokenizer_of("qwen2_5")) == "unread_content"


@pytest.mark.parametrize(
    ("start", "family", "data"),
    [
        ("<table>", "qwen3", {"template_arguments": {"enable_thinking": False}}),
        ("</p>", "qwen3_6", {}),
        ("<", "deepseek_r1_distill", {}),
    ],
)
def test_a_turn_may_start_like_the_tag_of_a_prompt(start: str, family: str, data: dict[str, Any]) -> None:
    first = replace(ANSWER, content=f"{start} It rains.")
    assert pluralize((first, DOUBT, LAST), family, **data).startswith(f"{start} It rains.")


def test_the_mask_is_cut_with_its_response() -> None:
    what = PreferenceRecord(QUESTION, (TURNS, "No. " * 40), Origin("here", 1))
    tokenizer = tokenizer_of("qwen2_5")
    whole = encode(what, tokenizer)
    length = len(whole.prompt_ids) + 6
    cut = encode(what, tokenizer, UNRENDERED(max_length=length))
    assert [len(mask) for mask in cut.trained] == [len(ids) for ids in cut.responses]
    assert cut.trained[0].tolist() == whole.trained[0][:6].tolist()


RANKING = record("Name a fruit:", " Apple", " Fruit" * 9, " Car")


def test_a_ranking_is_taken_apart_into_its_best_and_its_worst_response() -> None:
    found = encode_record(RANKING, UnpairedDataConfig(**vars(WIDE)), tiny.qwen(), None)
    assert isinstance(found, EncodedRecord)
    sides = [texts(example, tiny.qwen())[1] for example in found.examples()]
    assert [side.partition("<")[0] for side in sides] == [" Apple", " Car"]
    assert found.scores == [1.0, 0.0]
    assert dict(found.outcome.changed)["taken_apart"] == 1
    alone = encode_record(RANKING, WIDE, tiny.qwen(), None)
    assert isinstance(alone, EncodedRecord)
    assert "taken_apart" not in dict(alone.outcome.changed)


def test_a_ranking_of_which_one_rejected_response_is_cut_is_counted_once() -> None:
    config = UNRENDERED(max_length=24, truncation=Truncation.keep_start)
    found = encode_record(RANKING, config, tiny.qwen(), None)
    assert isinstance(found, EncodedRecord)
    changed = dict(found.outcome.changed)
    assert (changed.get("chosen_truncated", 0), changed["rejected_truncated"]) == (0, 1)


WHOLE_CONVERSATIONS = {
    "ChatML, with a line end": (tiny.qwen(), CHAT),
    "Llama 3": (tiny.llama3(), CHAT),
    "several turns": (tiny.qwen(), LONG_CHAT),
    "Zephyr": (tiny.zephyr(), CHAT),
    "no end of a turn": (tiny.with_template(tiny.qwen(), tiny.WITHOUT_END), CHAT),
    "Qwen 3, with an empty thought": (tokenizer_of("qwen3"), CHAT),
    "DeepSeek R1, whose prompt opens a thought": (tokenizer_of("deepseek_r1_distill"), CHAT),
    "Qwen 3.5, whose template goes on with a part of a token": (tokenizer_of("qwen3_5_think"), CHAT),
    "Phi 3, with an end of text": (tokenizer_of("phi3"), CHAT),
}


@pytest.mark.parametrize(("tokenizer", "prompt"), WHOLE_CONVERSATIONS.values(), ids=WHOLE_CONVERSATIONS)
def test_a_reward_model_reads_whole_conversations_as_others_write_them(
    tokenizer: Any, prompt: Messages
) -> None:
    """As transformers, TRL and vLLM: also what the template writes behind the last turn."""
    found = encode(record(prompt, "It is Paris.", "I cannot do that."), tokenizer, UNRENDERED_SCORED())
    for ids, mask, answer in zip(
        found.responses, found.trained, ["It is Paris.", "I cannot do that."], strict=True
    ):
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        whole = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": answer}], return_dict=True
        )["input_ids"]
        assert [*found.prompt_ids.tolist(), *ids[:-1].tolist()] == whole
        assert mask.tolist() == [False] * (len(ids) - 1) + [True]
    assert not found.changes & {"partly_trained", "response_truncated"}


@pytest.mark.parametrize(
    ("scores", "beside", "contradict"),
    [
        ((1, 2), {}, 1),
        ((2, 1), {}, 0),
        ((2, 2), {}, 0),
        ((1, 2), {"soft_label": 0.2}, 0),
        ((2, 1), {"soft_label": 0.2}, 1),
    ],
)
def test_scores_against_the_order_of_a_pair_are_counted(
    tmp_path: Path, scores: tuple[int, int], beside: dict[str, Any], contradict: int
) -> None:
    scored = TEXT | dict(zip(("score_chosen", "score_rejected"), scores, strict=True)) | beside
    counts = opened(tmp_path, jsonl(tmp_path, scored)).counts
    assert counts["scores_contradict"] == contradict


def test_a_reward_model_reads_a_text_to_its_end_within_the_limits() -> None:
    tokenizer = tiny.qwen()
    plain = encode(record("Q: why?\nA:", " so it is", " no"), tokenizer)
    scored = encode(record("Q: why?\nA:", " so it is", " no"), tokenizer, UNRENDERED_SCORED())
    assert [ids[:-1].tolist() for ids in scored.responses] == [ids.tolist() for ids in plain.responses]
    room = len(plain.prompt_ids) + 3
    cut = encode(record("Q: why?\nA:", " so it is", " no"), tokenizer, UNRENDERED_SCORED(max_length=room))
    assert (
        len(cut.prompt_ids) + max(map(len, cut.responses))
        == room + 1
        == UNRENDERED_SCORED(max_length=room).longest
    )
    assert cut.truncated == (True, False)
    assert [mask.sum() for mask in cut.trained] == [1, 1]
    # Other losses that share `data.cache` must not read these.
    assert UNRENDERED_SCORED().encoding_identity != UNRENDERED().encoding_identity


def test_a_reward_model_reads_prompt_and_response_in_one_tokenization() -> None:
    """As judges and servers, which do not know where the response begins."""
    tokenizer = tiny.qwen()
    found = encode(record("Q: why?\n", "\nso it is", "no"), tokenizer, UNRENDERED_SCORED())
    for ids, answer in zip(found.responses, ("\nso it is", "no"), strict=True):
        text = f"Q: why?\n{answer}{tokenizer.eos_token}"
        assert [*found.prompt_ids.tolist(), *ids[:-1].tolist()] == tokenizer(text)["input_ids"]
