"""What a template reads of a message beside its content, and the turns, calls and thoughts that it writes."""

from typing import Any

import pytest

from dpo_dist.data.config import DataConfig
from dpo_dist.data.counts import DataCounts
from dpo_dist.data.encode import EncodedExample, encode_record
from dpo_dist.data.records import BadRecord, Message
from dpo_dist.data.text.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError, DataError
from tests.support.pairs import WIDE, encode, texts
from tests.support.records import assistant, good, user
from tests.unit.data.test_template_kinds import (
    ASSISTANT,
    CALL,
    CALLS,
    LOOKED,
    NO,
    PLAIN,
    PROMPT,
    template_of,
    tokenizer_with,
)
from tests.unit.data.test_templates import ANSWER, QUESTION, RESULT, TOOL, pair, trained_text

DEFINED = '[{"name": "weather"}]'
CALLED = "weather(city='Bern')"
# Definitions in the system's message and calls in the assistant's, as texts of their own keys (OLMo 3).
FUNCTIONS = (
    "<s>{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m.get('content') or '' }}"
    "{% if m.get('functions') is not none %}<functions>{{ m['functions'] }}</functions>{% endif %}"
    "{% if m.get('function_calls') is not none %}<calls>{{ m['function_calls'] }}</calls>{% endif %}<|end|>\n"
    "{% endfor %}" + PROMPT.replace("%G", ASSISTANT)
)
SYSTEM = {"role": "system", "content": "Call."}


KEYS = ["functions", "function_calls"]
PAIR = {name: name for name in ("prompt", "chosen", "rejected")}


def of(fields: dict[str, Any], template: str, keys: list[str] = KEYS) -> EncodedExample | BadRecord:
    """Return a record encoded, from a source that gives these keys of its messages to the template."""
    record = good(fields, fields={**PAIR, "keys": keys}, ignore=["[].id"])
    encoded = encode_record(record, WIDE, tokenizer_with(template), None)
    return encoded if isinstance(encoded, BadRecord) else encoded.example


def example(fields: dict[str, Any], template: str, keys: list[str] = KEYS) -> EncodedExample:
    found = of(fields, template, keys)
    assert isinstance(found, EncodedExample), found
    return found


def record_with(said: str, **keys: Any) -> dict[str, Any]:
    prompt = [SYSTEM | {"functions": DEFINED, "function_calls": None}, user("Rain?")]
    return {"prompt": prompt, "chosen": [assistant(said) | keys], "rejected": [assistant("No.")]}


@pytest.mark.parametrize("said", ["Let me look.", ""])
def test_keys_that_the_template_names_are_rendered_and_trained(said: str) -> None:
    found = example(record_with(said, function_calls=CALLED, functions=None), FUNCTIONS)
    tokenizer = tokenizer_with(FUNCTIONS)
    assert f"Call.<functions>{DEFINED}</functions><|end|>" in texts(found, tokenizer)[0]
    assert trained_text(tokenizer, found) == f"{said}<calls>{CALLED}</calls><|end|>"
    assert found.changes == set()


@pytest.mark.parametrize("trained", [True, False])
def test_a_call_as_text_in_one_of_several_turns_is_trained_as_its_turn_is(trained: bool) -> None:
    called = assistant("") | {"function_calls": CALLED, "loss_weight": int(trained)}
    turns = [called, {"role": "tool", "content": "umbrella"}, assistant("It rains.")]
    found = example(record_with("") | {"chosen": turns}, FUNCTIONS)
    first = f"<calls>{CALLED}</calls><|end|>" if trained else ""
    assert trained_text(tokenizer_with(FUNCTIONS), found) == f"{first}It rains.<|end|>"


@pytest.mark.parametrize(
    "reading",
    [
        "{{ m.mood }}",
        "{{ m['mood'] }}",
        "{{ m.get('mood') }}",
        "{% if 'mood' in m %}{{ m | attr('mood') or m.mood }}{% endif %}",
        "{% for key in ('mood', 'more') %}{{ m[key] }}{% endfor %}",
        "{{ messages[loop.index0].mood }}",
        "{{ ([m] | map(attribute='mood') | list)[0] }}",
        "{% macro of(turn) %}{{ turn.mood }}{% endmacro %}{{ of(m) }}",
    ],
)
def test_any_key_that_a_template_names_is_given_to_it(reading: str) -> None:
    template = template_of(ASSISTANT + "{{ m.content }}" + reading + "<|end|>\n")
    fields = {"prompt": [user("q") | {"id": 3}], "chosen": [assistant("Yes.") | {"mood": "calm"}]}
    found = example(fields | {"rejected": [assistant(NO) | {"mood": "sad"}]}, template, ["mood"])
    tokenizer = tokenizer_with(template)
    assert [text.partition("<|end|>")[0] for text in texts(found, tokenizer)[1:]] == ["Yes.calm", "No.sad"]


@pytest.mark.parametrize(
    "keys",
    [
        {"function_calls": CALLED},
        {"functions": DEFINED},
        {"thought": "Look it up."},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "abc"}]},
    ],
)
@pytest.mark.parametrize("naming", ["", "{%% if m.role == 'x' %%}{{ m['%s'] }}{%% endif %%}"])
def test_keys_that_the_template_does_not_write_drop_the_record(keys: dict[str, Any], naming: str) -> None:
    """Whether it does not name them, or names them and does not write them."""
    name = [*keys][-1]
    template = template_of(PLAIN.replace("{{ m.content }}", "{{ m.content }}" + (naming and naming % name)))
    for turn in (assistant("I look.") | keys, assistant("I look.") | keys | {"loss_weight": 0}):
        sides = {"chosen": [turn, user("x"), assistant("Rain.")], "rejected": [assistant(NO)]}
        found = of({"prompt": [user("q")], **sides}, template, keys=[name])
        assert isinstance(found, BadRecord)
        assert (found.reason, found.unread) == ("unread_content", (name,))


# Turns that the template does not write.

ONLY_TOOL = template_of(PLAIN).replace("{% else %}", "{% elif m.role in ('user', 'tool') %}")


def test_a_turn_is_known_to_be_written_by_its_place_not_by_its_words() -> None:
    """The words of the result also stand in the question, and in both answers."""
    tokenizer = tokenizer_with(ONLY_TOOL)
    for role, is_written in (("tool", True), ("environment", False), ("ipython", False), ("tool", True)):
        for before in (CALL, ANSWER):
            asked = (Message("user", "Rain?"), before, Message(role, "Rain"))
            tools = (TOOL,) if before is CALL else ()
            found = encode(pair("Rain.", "No Rain.", prompt=asked, tools=tools), tokenizer)
            assert ("content_not_rendered" not in found.changes) is is_written


def test_a_turn_that_is_written_otherwise_than_in_words_is_not_counted() -> None:
    written = "<|turn|>tool\n{{ m.content | tojson(ensure_ascii=True) }}<|end|>\n"
    template = ONLY_TOOL.replace("{% elif", "{% elif m.role == 'tool' %}" + written + "{% elif", 1)
    asked = (QUESTION, CALL, Message("tool", 'größer als "2"'))
    found = encode(pair("Rain.", NO, prompt=asked, tools=(TOOL,)), tokenizer_with("{{ tools }}" + template))
    assert found.changes == set()


def test_a_system_turn_in_the_last_question_only_is_written() -> None:
    """Mistral's first templates write it where the conversation ends with the question."""
    turn = "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    template = template_of(PLAIN).replace("{% else %}", "{% elif m.role == 'user' %}")
    template = template.replace("<|turn|>{{ m.role }}\n", "<|turn|>{{ m.role }}\n" + turn)
    found = encode(
        pair("Rain.", NO, prompt=(Message("system", "Be kind."), QUESTION)), tokenizer_with(template)
    )
    assert "Be kind." in texts(found, tokenizer_with(template))[0]
    assert "content_not_rendered" not in found.changes


def counts_of(omitted: int, kept: int = 10) -> DataCounts:
    counts = DataCounts(read=kept, kept=kept, pairs=kept)
    counts.changed["content_not_rendered"] = omitted
    return counts


@pytest.mark.parametrize(
    ("omitted", "share", "is_error"), [(10, 0.05, True), (6, 0.05, True), (5, 0.05, False), (10, 1.0, False)]
)
def test_a_template_that_leaves_out_parts_of_most_records_is_refused(
    omitted: int, share: float, is_error: bool
) -> None:
    config = DataConfig(max_bad_share=share)
    if not is_error:
        counts_of(omitted).check("a.jsonl", config)
        return
    with pytest.raises(DataError, match=f"in {omitted} of 10 records") as raised:
        counts_of(omitted).check("a.jsonl", config)
    assert "data.chat_template" in str(raised.value.remedy)
    assert "data.max_bad_share=1" in str(raised.value.remedy)
    # Among the first records only all of them are a clear sign.
    if omitted < 10:
        counts_of(omitted).check("a.jsonl", config, of_first=True)


# Thoughts between other marks than <think>, as templates write them: before a call or an answer.


def thinking(
    opening: str, closing: str, around: str = "{{ m.content }}", generation: str | None = None
) -> str:
    """Return a template that opens a thought in its generation prompt, and writes it in these marks."""
    written = "{% if m.reasoning_content %}" + opening + "{{ m.reasoning_content }}" + closing + "{% endif %}"
    said = "{% if m.tool_calls %}" + CALLS + "{% else %}" + around + "{% endif %}<|end|>\n"
    return template_of(
        ASSISTANT + written + said, ASSISTANT + (opening if generation is None else generation)
    )


MARKS = {
    "a token": ("<thought>", "</thought>", "{{ m.content }}"),
    "a token beside that of the answer": ("<thought>", "</thought>", "<|answer|>{{ m.content }}<|close|>"),
    "with space": ("<thought>\n", "\n</thought>\n\n", "{{ m.content }}"),
    "several tokens": (
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        "<|open|>say<|sep|>{{ m.content }}",
    ),
    "no token": ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n", "{{ m.content }}"),
    "a tag that is no token": ("<my:think>", "</my:think>\n", "{{ m.content }}"),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_thought_that_the_prompt_opens_is_continued_or_not_opened(name: str) -> None:
    opening, closing, around = MARKS[name]
    tokenizer = tokenizer_with(thinking(opening, closing, around))
    answer = [around.replace("{{ m.content }}", text) + "<|end|>" for text in ("It rains.", NO)]
    thought = f"Look.{closing}"
    refused = (Message("assistant", NO, LOOKED[0].fields),)
    # All responses have a thought: they continue it.
    prompt, *found = texts(encode(pair(LOOKED, refused), tokenizer), tokenizer)
    assert prompt.endswith(ASSISTANT + opening)
    assert found == [thought + answer[0], thought + answer[1]]
    # One has none: the prompt opens none.
    for sides in ((LOOKED, NO), (NO, LOOKED)):
        encoded = encode(pair(*sides), tokenizer)
        prompt, *found = texts(encoded, tokenizer)
        assert prompt.endswith(ASSISTANT)
        assert found[sides.index(LOOKED)] == opening + thought + answer[0]
        assert found[sides.index(NO)] == answer[1]
        assert "opened_thought_removed" in encoded.changes


@pytest.mark.parametrize("name", MARKS)
def test_a_response_with_a_thought_follows_no_ended_one(name: str) -> None:
    opening, closing, around = MARKS[name]
    tokenizer = tokenizer_with(thinking(opening, closing, around, opening + closing))
    encoded = encode(pair(LOOKED, NO), tokenizer)
    prompt, *found = texts(encoded, tokenizer)
    assert prompt.endswith(ASSISTANT)
    assert found[0].startswith(f"{opening}Look.{closing}")
    assert "ended_thought_reopened" in encoded.changes


@pytest.mark.parametrize("name", MARKS)
def test_thoughts_between_the_marks_of_the_template_can_be_left_out(name: str) -> None:
    opening, closing, around = MARKS[name]
    tokenizer = tokenizer_with(thinking(opening, closing, around, ""))
    turns = (Message("assistant", "", CALL.fields | LOOKED[0].fields), RESULT, *LOOKED)
    found = encode(
        pair(turns, NO, tools=(TOOL,)), tokenizer, DataConfig(max_length=9999, untrained=["thoughts"])
    )
    said = around.replace("{{ m.content }}", "It rains.")
    assert "".join(
        trained_text(tokenizer, found).split()
    ) == f"<|calls|>weatherBern<|end|>{said}<|end|>".replace(" ", "")


def test_a_token_that_opens_all_parts_of_a_turn_is_no_part_of_its_header() -> None:
    """Nor of the end of a thought before an answer or a call: Kimi K3 names each part after such a token."""
    written = "{% if m.reasoning_content %}<|open|>think<|sep|>{{ m.reasoning_content }}<|close|>think<|sep|>"
    said = "{% endif %}<|open|>{% if m.tool_calls %}tools<|sep|>" + CALLS
    said += "{% else %}say<|sep|>{{ m.content }}{% endif %}"
    turn = ASSISTANT + written + said + "<|end|>\n"
    tokenizer = tokenizer_with(template_of(turn, ASSISTANT + "<|open|>think<|sep|>"))
    found = encode(pair(LOOKED, NO), tokenizer)
    prompt, one, other = texts(found, tokenizer)
    assert prompt.endswith(ASSISTANT)
    assert one == "<|open|>think<|sep|>Look.<|close|>think<|sep|><|open|>say<|sep|>It rains.<|end|>"
    assert other == f"<|open|>say<|sep|>{NO}<|end|>"
    config = DataConfig(untrained=["thoughts"], max_length=9999)
    assert trained_text(tokenizer, encode(pair(LOOKED, NO), tokenizer, config)).startswith("<|open|>say")


ALWAYS = {
    "one token": ("<thought>", "</thought>", "{{ m.content }}"),
    "several": ("<|open|>think<|sep|>", "<|close|>think<|sep|>", "<|open|>say<|sep|>{{ m.content }}"),
}


@pytest.mark.parametrize("name", ALWAYS)
@pytest.mark.parametrize("switch", ["", " if is_training"])
def test_the_end_of_an_empty_thought_is_not_trained_where_each_turn_has_a_thought(
    name: str, switch: str
) -> None:
    """Hy3, which writes thoughts only if an argument asks for them, and Kimi K3."""
    opening, closing, around = ALWAYS[name]
    thought = "{{ m.reasoning_content or ''%s }}" % (
        " if is_training or not m.reasoning_content" if switch else ""
    )
    said = opening + thought + closing + CALLS + around + "<|end|>\n"
    template = template_of(ASSISTANT + said, ASSISTANT + opening)
    config = DataConfig(max_length=9999, template_arguments={"is_training": True} if switch else None)
    tokenizer = tokenizer_with(template)
    assert tokenizer_facts(tokenizer).thoughts.tags == (opening, closing)
    found = encode(pair("It rains.", NO), tokenizer, config)
    prompt, *responses = texts(found, tokenizer)
    assert prompt.endswith(ASSISTANT + opening + closing)
    assert responses == [around.replace("{{ m.content }}", text) + "<|end|>" for text in ("It rains.", NO)]
    both = encode(pair(LOOKED, NO), tokenizer, config)
    assert texts(both, tokenizer)[0].endswith(ASSISTANT + opening)
    assert trained_text(tokenizer, both).startswith("Look." + closing)
    assert trained_text(tokenizer, both, 1) == responses[1]


def test_a_thought_that_is_a_turn_of_its_own_ends_with_its_turn() -> None:
    """As in gpt-oss and Muse: the same token ends other turns, and is escaped in a content."""
    own = ASSISTANT.strip() + "to=self<|message|>{{ m.reasoning_content }}<|eom|>"
    written = "{% if m.reasoning_content %}" + own + "{% endif %}" + ASSISTANT.strip()
    said = "<|open|>all\n" + CALLS + "{{ m.content }}<|close|>"
    template = template_of(written + said, ASSISTANT.strip())
    tokenizer = tokenizer_with(template)
    found = encode(
        pair(LOOKED, "No <|eom|>."), tokenizer, DataConfig(untrained=["thoughts"], max_length=9999)
    )
    prompt, one, other = texts(found, tokenizer)
    assert prompt.endswith(f"?<|end|>\n{ASSISTANT.strip()}")
    assert one == f"to=self<|message|>Look.<|eom|>{ASSISTANT.strip()}<|open|>all\nIt rains.<|close|>"
    assert trained_text(tokenizer, found) == f"{ASSISTANT.strip()}<|open|>all\nIt rains.<|close|>"
    assert tokenizer.convert_tokens_to_ids("<|eom|>") not in found.responses[1].tolist()
    assert other == "<|open|>all\nNo <|eom|>.<|close|>"


def test_thoughts_between_unknown_marks_are_an_error_if_they_are_to_be_left_out() -> None:
    tokenizer = tokenizer_with(thinking("<|open|>reason<|sep|>", "<|close|>reason<|sep|>", generation=""))
    with pytest.raises(ConfigError, match="marks that are not known"):
        encode(pair(LOOKED, NO), tokenizer)
    whole = encode(pair(LOOKED, NO), tokenizer, DataConfig(max_length=9999, untrained=[]))
    assert "Look." in texts(whole, tokenizer)[1]
