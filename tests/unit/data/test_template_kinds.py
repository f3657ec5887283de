"""Kinds of chat templates: where a response starts and ends, its trained turns, and what a template omits."""

from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import Message, Response
from dpo_dist.data.text.render import trained_stops
from dpo_dist.data.text.tokenizer import tokenizer_facts
from tests.support.pairs import encode, reason_against, texts
from tests.support.tiny import _byte_level
from tests.unit.data.test_templates import ANSWER, DOUBT, QUESTION, TOOL, as_dict, pair, trained_text

SPECIAL = ["<s>", "</s>", "<|turn|>", "<|end|>", "<|open|>", "<|close|>", "<|calls|>", "<|answer|>"]
SPECIAL += ["<|sep|>", "<|message|>", "<|eom|>"]
ADDED = ["<think>", "</think>", "<thought>", "</thought>"]


def called(city: str, number: int = 1) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"type": "function", "id": f"call{number:05}", "function": function}


def result(content: str, number: int = 1) -> Message:
    return Message("tool", content, {"name": "weather", "tool_call_id": f"call{number:05}"})


CALL, RESULT = Message("assistant", "", {"tool_calls": [called("Bern")]}), result("umbrella")
NO = "No."
TWICE = Message("assistant", "", {"tool_calls": [called("Bern"), called("Oslo", 2)]})


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    backend = _byte_level(SPECIAL)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


def whole(tokenizer: PreTrainedTokenizerFast, response: Response) -> str:
    turns = (Message("assistant", response),) if isinstance(response, str) else response
    messages = list(map(as_dict, (QUESTION, *turns)))
    return str(tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False))


# What all templates below write for the calls of a message.
CALLS = (
    "{% for call in m.tool_calls or () %}<|calls|>{{ call.function.name }} {{ call.function.arguments.city }}"
    "{% endfor %}"
)
ASSISTANT = "<|turn|>assistant\n"
USER = "<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n"
LOOP = "{% for m in messages %}{% if m.role == 'assistant' %}%A{% else %}" + USER + "{% endif %}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}%G{% endif %}"


def template_of(assistant: str, generation: str = ASSISTANT) -> str:
    return "<s>" + (LOOP + PROMPT).replace("%A", assistant).replace("%G", generation)


PLAIN = ASSISTANT + CALLS + "{{ m.content }}<|end|>\n"
THINKING = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
THOUGHT = "{% if m.reasoning_content %}<thought>{{ m.reasoning_content }}</thought>{% endif %}"
# The generation prompt ends a thought that a turn does not have (Gemma 4), or is a text (Apriel).
ENDED = template_of(
    ASSISTANT + THOUGHT + CALLS + "{{ m.content }}<|end|>\n", ASSISTANT + "<thought></thought>"
)
STEPS = template_of(PLAIN, ASSISTANT + "Here are my steps:\n")
WITHOUT_HEADER = template_of("{{ m.content }}<|end|>\n", "Here are my steps:\n")
ANSWERED = template_of(
    ASSISTANT + "{% if m.tool_calls %}" + CALLS + "{% else %}<|answer|>{{ m.content }}{% endif %}<|end|>\n",
    ASSISTANT + "<thought>",
)
LOOKED = (Message("assistant", "It rains.", {"reasoning_content": "Look."}),)


@pytest.mark.parametrize(
    ("template", "response", "expected"),
    [
        (ENDED, "It rains.", "It rains.<|end|>"),
        (ENDED, "<b>Rain</b>", "<b>Rain</b><|end|>"),
        (ENDED, (CALL,), "<|calls|>weather Bern<|end|>"),
        (ENDED, LOOKED, "<thought>Look.</thought>It rains.<|end|>"),
        (ANSWERED, "It rains.", "<|answer|>It rains.<|end|>"),
        (ANSWERED, (CALL,), "<|calls|>weather Bern<|end|>"),
        (STEPS, "Heavy rain.", "Heavy rain.<|end|>"),
        (STEPS, "Here it rains.", "Here it rains.<|end|>"),
        (WITHOUT_HEADER, "Here it rains.", "Here it rains.<|end|>"),
    ],
)
def test_a_response_starts_after_all_that_the_turn_shares_with_the_generation_prompt(
    template: str, response: Response, expected: str
) -> None:
    tokenizer = tokenizer_with(template)
    for sides in ((response, NO), (NO, response)):
        found = encode(pair(*sides, tools=(TOOL,)), tokenizer)
        first = found.responses[sides.index(response)].tolist()
        assert first == tokenizer(expected, add_special_tokens=False)["input_ids"]
        generation = template.partition("{% if add_generation_prompt %}")[2].removesuffix("{% endif %}")
        # A response with a thought follows no ended one.
        generation = ASSISTANT if response is LOOKED else generation
        assert texts(found, tokenizer)[0].endswith(generation)


# Kimi K3 ends a turn by several tokens with text between them; Command A always writes the next turn's start.
SEVERAL = template_of(
    "<|open|>turn<|sep|><|open|>think<|sep|>{{ m.reasoning_content or '' }}<|close|>think<|sep|>"
    + CALLS
    + "<|open|>answer<|sep|>{{ m.content }}<|close|>answer<|sep|><|close|>turn<|sep|><|end|>\n",
    "<|open|>turn<|sep|><|open|>think<|sep|>",
)
ALWAYS = template_of("<|turn|><|open|>" + CALLS + "{{ m.content }}<|close|><|end|>\n").replace(
    PROMPT.replace("%G", ASSISTANT), "<|turn|><|open|>"
)
LAST = template_of(PLAIN) + "{% if messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "end", "stops"),
    [
        (SEVERAL, "<|close|>answer<|sep|><|close|>turn<|sep|><|end|>", {"<|end|>"}),
        (ALWAYS, "<|close|><|end|>", {"<|end|>"}),
        (LAST, "<|end|>", {"<|end|>"}),
        (template_of("{{ m.content }}<|close|><|answer|>\n"), "<|close|><|answer|>", {"<|answer|>"}),
        (template_of("{{ m.content }}<|close|> done"), "<|close|>", {"<|close|>"}),
        (template_of("{{ m.content }}<|close|> {{ m.content | length }}"), "<|close|>", {"<|close|>"}),
    ],
)
def test_a_turn_ends_with_all_that_the_template_writes_up_to_its_last_token(
    template: str, end: str, stops: set[str]
) -> None:
    tokenizer = tokenizer_with(template)
    facts = tokenizer_facts(tokenizer)
    assert facts.end_of_turn == end
    found = tokenizer.convert_ids_to_tokens(trained_stops(tokenizer, DataConfig()))
    assert set(found) >= stops | {"</s>"}
    for response in ("It rains.", (CALL,)) if "calls" in template else ("It rains.",):
        _, one, other = texts(encode(pair(response, NO, tools=(TOOL,)), tokenizer), tokenizer)
        assert other.endswith(NO + end)
        assert one.endswith(end)


# GigaChat 3 ends turns by a token that also stands before a call: only EOS can end a response.
PARTED = template_of(
    ASSISTANT
    + "{{ m.content }}<|close|>{% for call in m.tool_calls or () %}call\n"
    + "{{ call.function.name }} {{ call.function.arguments.city }}<|close|>{% endfor %}"
).replace("<|end|>", "<|close|>")
# GLM ends no turn: a model stops where the next one starts.
OPEN = "<s>{% for m in messages %}<|{{ {'assistant': 'answer', 'tool': 'open'}.get(m.role, 'turn') }}|>"
OPEN += CALLS + "{{ m.content }}{% endfor %}" + PROMPT.replace("%G", "<|answer|>")
SAID = Message("assistant", "Let me look.", CALL.fields)


@pytest.mark.parametrize(
    ("template", "response", "expected"),
    [
        (PARTED, (SAID,), ["Let me look.<|close|>call\nweather Bern<|close|></s>"]),
        (PARTED, NO + " Why?", [NO + " Why?<|close|></s>"]),
        (
            PARTED,
            (SAID, RESULT, ANSWER),
            ["Let me look.<|close|>call\nweather Bern<|close|>", "It rains.<|close|></s>"],
        ),
        (OPEN, (CALL, RESULT, ANSWER), ["<|calls|>weather Bern<|open|>", "It rains.</s>"]),
        (OPEN, (ANSWER, DOUBT, ANSWER), ["It rains.<|turn|>", "It rains.</s>"]),
    ],
)
def test_a_token_that_stands_within_turns_stops_none(
    template: str, response: Response, expected: list[str]
) -> None:
    tokenizer = tokenizer_with(template)
    found = encode(pair(response, NO, tools=(TOOL,)), tokenizer)
    assert trained_text(tokenizer, found) == "".join(expected)
    stops = tokenizer.convert_ids_to_tokens(trained_stops(tokenizer, DataConfig()))
    assert set(stops) == ({"</s>"} if template is PARTED else {"</s>", "<|open|>", "<|turn|>"})
    assert texts(found, tokenizer)[2].endswith("<|close|></s>" if template is PARTED else "</s>")


# A prompt may be another one where a response follows: a hint in its last turn, a switch in its system turn.
HINT = "{% if loop.last %} /think{% endif %}<|end|>\n"
SWITCH = "<|turn|>system\nReasoning: o{{ 'n' if add_generation_prompt else 'ff' }}<|end|>\n"
APART = ASSISTANT + "{{ m.content }}{% for call in m.tool_calls or () %}<|end|>\n<|calls|>"
APART += "{{ call.function.name }} {{ call.function.arguments.city }}{% endfor %}<|end|>\n"
OPENED = ASSISTANT + "<think>\n"


@pytest.mark.parametrize(
    ("template", "empty", "end"),
    [
        (template_of(PLAIN).replace(USER, USER.replace("<|end|>\n", HINT)), "<|end|>\n", "<|end|>"),
        (template_of(PLAIN, OPENED).replace(USER, USER.replace("<|end|>\n", HINT)), "<|end|>\n", "<|end|>"),
        (template_of(PLAIN).replace("<s>", "<s>" + SWITCH), "<|end|>\n", "<|end|>"),
        (LOOP.replace("%A", PLAIN) + "<|close|>" + PROMPT.replace("%G", ASSISTANT), None, "<|end|>"),
        (template_of(APART, OPENED), "<|end|>\n", "<|end|></s>"),  # its turn's end also stands before a call
    ],
)
def test_a_turn_is_compared_with_the_prompt_from_its_header_on(
    template: str, empty: str | None, end: str
) -> None:
    tokenizer = tokenizer_with(template)
    facts = tokenizer_facts(tokenizer)
    assert facts.chat is not None
    assert facts.chat.empty_turn == (empty or "<|end|>\n<|close|>")
    assert "<|turn|>" not in facts.tokens_inside_turns
    found = encode(pair("It rains.", NO), tokenizer)
    assert texts(found, tokenizer)[1:] == ["It rains." + end, NO + end]
    stops = tokenizer.convert_ids_to_tokens(trained_stops(tokenizer, DataConfig()))
    assert ("<|end|>" in stops) is (end == "<|end|>")


def test_a_header_is_found_after_words_of_the_generation_prompt() -> None:
    """Command R+ writes instructions between the question and the answer's header."""
    template = template_of(PLAIN, "<|turn|>system\nUse tools.<|end|>\n" + ASSISTANT)
    tokenizer = tokenizer_with(template)
    for response in ((CALL,), (CALL, RESULT, ANSWER)):
        found = encode(pair(response, NO, tools=(TOOL,)), tokenizer)
        assert trained_text(tokenizer, found).startswith("<|calls|>weather Bern<|end|>")
        assert texts(found, tokenizer)[0].endswith(ASSISTANT)
        assert texts(found, tokenizer)[2] == NO + "<|end|>"


# Templates that do not write each turn in a pass of its own of a loop over messages.
BODY = LOOP.partition("%}")[2].removesuffix("{% endfor %}").replace("%A", PLAIN)
FOLLOWING = "{% for n in messages[loop.index0 + 1:] %}{% if n.role == 'tool' %}%N{% endif %}{% endfor %}"
LAST_TURN = "{% if messages[-1].role == 'assistant' %}{% set m = messages[-1] %}%A{% endif %}"
WRITING = {
    "by number": "{% for i in range(messages | length) %}{% set m = messages[i] %}" + BODY + "{% endfor %}",
    "as one text": "{% set all = namespace(text='') %}{% for m in messages %}{% set turn %}"
    + BODY
    + "{% endset %}{% set all.text = all.text + turn %}{% endfor %}{{ all.text }}",
    "searching": "{% for m in messages %}{% for n in messages %}{% endfor %}" + BODY + "{% endfor %}",
    "the last one after the loop": "{% for m in messages %}{% if not loop.last or m.role != 'assistant' %}"
    + BODY.replace("<|end|>\n", "\n<|end|>\n")
    + "{% endif %}{% endfor %}"
    + LAST_TURN.replace("%A", PLAIN.replace(ASSISTANT, ASSISTANT + "<think>\n")),
    "results with their call": "{% for m in messages %}{% if m.role == 'assistant' %}"
    + PLAIN.replace(
        "{{ m.content }}<|end|>\n",
        "{{ m.content }}<|end|>\n{% if m.tool_calls %}"
        + FOLLOWING.replace("%N", "<|open|>{{ n.content }}<|close|>\n")
        + "{% endif %}",
    )
    + "{% elif m.role != 'tool' %}"
    + USER
    + "{% endif %}{% endfor %}",
    "results with each other": "{% for m in messages %}{% if m.role != 'tool' %}"
    + BODY
    + "{% elif messages[loop.index0 - 1].role != 'tool' %}<|open|>{{ m.content }}"
    + FOLLOWING.replace("%N", ", {{ n.content }}")
    + " all<|close|>\n{% endif %}{% endfor %}",
}
BOTH = (TWICE, RESULT, result("sunshade", 2), ANSWER)
TURNS = {
    "agent": ((CALL, RESULT, ANSWER), ["<|calls|>weather Bern", "It rains."]),
    "two calls": (BOTH, ["<|calls|>weather Bern<|calls|>weather Oslo", "It rains."]),
    "turns": ((ANSWER, DOUBT, Message("assistant", "Yes.")), ["It rains.", "Yes."]),
}


@pytest.mark.parametrize("writing", WRITING)
@pytest.mark.parametrize("case", TURNS)
def test_turns_are_trained_wherever_the_template_writes_them(writing: str, case: str) -> None:
    tokenizer = tokenizer_with("<s>" + WRITING[writing] + PROMPT.replace("%G", ASSISTANT))
    response, expected = TURNS[case]
    found = encode(pair(response, NO, tools=(TOOL,)), tokenizer)
    text = "".join(texts(found, tokenizer)[:2])
    assert text == whole(tokenizer, response).rstrip()
    trained = trained_text(tokenizer, found).replace("\n", "").replace("<think>", "")
    assert trained == "".join(turn + "<|end|>" for turn in expected)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("{% if m.content != 'Yes.' %}" + PLAIN + "{% endif %}", "turn_not_rendered"),
        (PLAIN + "{{ messages[0].content }}", "turns_not_found"),
    ],
)
def test_turns_that_the_template_leaves_out_are_refused(turn: str, reason: str) -> None:
    writing = WRITING["by number"].replace(PLAIN, turn)
    if reason == "turns_not_found":
        writing = writing.replace("{% for i", "{{ messages | length }}{% for i")
    tokenizer = tokenizer_with("<s>" + writing + PROMPT.replace("%G", ASSISTANT))
    what = pair(TURNS["turns"][0], NO, prompt=(QUESTION, Message("assistant", "Yes, it is."), DOUBT))
    assert reason_against(what, tokenizer) == reason


FIRST = CALLS.replace("m.tool_calls or ()", "(m.tool_calls or ())[:1]")


@pytest.mark.parametrize("calls", [CALLS, FIRST, "{% if m.tool_calls %}<|calls|>{% endif %}"])
def test_each_call_that_the_template_leaves_out_is_counted(calls: str) -> None:
    """Also if a definition, a result or another call has its name."""
    template = "{{ tools | tojson }}" + template_of(
        PLAIN.replace(CALLS, calls).replace("<|end|>", " !<|end|>")
    )
    spoken = Message("assistant", "I call weather.", TWICE.fields)
    for response in ((spoken,), (spoken, RESULT, ANSWER), (ANSWER, DOUBT, spoken)):
        for what in (
            pair(response, NO, tools=(TOOL,)),
            pair(NO, "Rain.", prompt=(QUESTION, *response, DOUBT)),
        ):
            changes = encode(what, tokenizer_with(template)).changes
            assert ("content_not_rendered" in changes) is (calls != CALLS)


def test_the_end_of_a_turn_may_stand_before_the_next_one() -> None:
    turn = "{{ '<|end|>' if not loop.first }}<|turn|>{{ m.role }}\n{{ m.content }}"
    closed = "<s>{% for m in messages %}" + turn + "{% endfor %}"
    closed += "<|end|>{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    found = encode(pair(TURNS["turns"][0], NO), tokenizer := tokenizer_with(closed))
    assert trained_text(tokenizer, found) == "It rains.<|end|>Yes.<|end|>"


def test_a_header_is_no_part_of_a_response_if_the_space_before_it_ends_the_former_turn() -> None:
    """Alpaca's template writes two newlines between turns, and before the header of a generation prompt."""
    turn = (
        "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}{% else %}### Response:\n{{ m.content }}"
    )
    template = (
        "<s>{% for m in messages %}" + turn + "</s>{% endif %}{{ '\n\n' if not loop.last }}{% endfor %}"
    )
    tokenizer = tokenizer_with(template + PROMPT.replace("%G", "{{ '\\n\\n### Response:\\n' }}"))
    found = encode(pair(TURNS["turns"][0], NO), tokenizer)
    prompt, turns, other = texts(found, tokenizer)
    assert prompt.endswith("?\n\n### Response:\n")
    assert (turns.startswith("It rains.</s>"), other) == (True, "No.</s>")
    assert trained_text(tokenizer, found) == "It rains.</s>Yes.</s>"
    assert "prompt_not_prefix" not in found.changes


@pytest.mark.parametrize(
    ("header", "generation"),
    [
        ("\n  " + ASSISTANT, ASSISTANT),
        ("\n\n  " + ASSISTANT, "\n" + ASSISTANT),
        ("  " + ASSISTANT, "\n" + ASSISTANT + "\n"),
        ("    Answer:", "\n  Answer:\n"),
        ("  " + ASSISTANT, "<|turn|>system\nUse tools.<|end|>\n" + ASSISTANT),
    ],
)
def test_a_header_is_found_after_another_space_than_in_the_generation_prompt(
    header: str, generation: str
) -> None:
    """As in a template with indented lines: the header would be trained, after that of the prompt."""
    template = template_of(PLAIN.replace(ASSISTANT, header), generation)
    for response in ("It rains.", TURNS["turns"][0]):
        found = encode(pair(response, NO), tokenizer := tokenizer_with(template))
        prompt, one, other = texts(found, tokenizer)
        assert prompt.count(header.strip()) == 1
        assert (one.startswith("It rains.<|end|>"), other) == (True, NO + "<|end|>")
        later = "" if isinstance(response, str) else "Yes.<|end|>"
        assert trained_text(tokenizer, found) == "It rains.<|end|>" + later


OFF = template_of(PLAIN.replace(ASSISTANT, ASSISTANT + THINKING), ASSISTANT + "<think></think>")
# An empty thought before the last turn only, as Qwen3 writes it.
OFF_LAST = template_of(
    PLAIN.replace(ASSISTANT, ASSISTANT + "{% if loop.last %}<think></think>{% endif %}"),
    ASSISTANT + "<think></think>",
)


@pytest.mark.parametrize("template", [ENDED, ANSWERED, STEPS, OFF, OFF_LAST])
@pytest.mark.parametrize("case", ["agent", "turns"])
def test_several_turns_follow_the_same_prompt_as_one(template: str, case: str) -> None:
    """The generation prompt, after which a server generates the first turn, too (Gemma 4, Command R7B)."""
    tokenizer = tokenizer_with(template)
    response, _ = TURNS[case]
    several, one = (encode(pair(side, NO, tools=(TOOL,)), tokenizer) for side in (response, response[:1]))
    prompt = tokenizer.apply_chat_template([as_dict(QUESTION)], add_generation_prompt=True)["input_ids"]
    assert several.prompt_ids.tolist() == one.prompt_ids.tolist() == prompt
    for side in (0, 1):
        assert trained_text(tokenizer, several, side).startswith(trained_text(tokenizer, one, side))
    assert "prompt_not_prefix" in several.changes


def test_a_thought_of_several_turns_follows_no_ended_one() -> None:
    thinking = Message("assistant", "It rains.", {"reasoning_content": "Look."})
    found = encode(pair((thinking, DOUBT, ANSWER), NO), tokenizer := tokenizer_with(OFF))
    prompt, several, other = texts(found, tokenizer)
    assert prompt.endswith(ASSISTANT)
    assert several.startswith("<think>Look.</think>It rains.<|end|>")
    assert other == NO + "<|end|>"


# What templates write for a turn without a thought: nothing, an empty one, or one in the last turn only.
EMPTY = {
    "axolotl's Qwen3": "",
    "Nemotron 3": "{% else %}<think></think>",
    "Qwen3.5": "{% elif loop.last %}<think>\n\n</think>\n\n",
}
THINKING, SILENT = Message("assistant", "Rain.", {"reasoning_content": "Look."}), Message("assistant", NO)


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((THINKING, DOUBT, THINKING), (SILENT,)),
        ((ANSWER, DOUBT, THINKING), (SILENT,)),
        ((ANSWER, DOUBT, ANSWER), (SILENT,)),
        ((ANSWER, DOUBT, THINKING), (THINKING,)),
        ((ANSWER, DOUBT, THINKING), (SILENT, DOUBT, THINKING)),
    ],
)
def test_an_opened_thought_is_removed_before_several_turns_if_a_first_one_has_none(
    empty: str, one: tuple[Message, ...], other: tuple[Message, ...]
) -> None:
    """Or ended at once; the prompt ends after the header, where the model then opens a thought itself."""
    written = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n" + empty
    turn = PLAIN.replace(ASSISTANT, ASSISTANT + written + "{% endif %}")
    tokenizer = tokenizer_with(template_of(turn, OPENED))
    for sides in ((one, other), (other, one)):
        found = encode(pair(*sides), tokenizer)
        prompt, *following = texts(found, tokenizer)
        assert prompt.endswith((ASSISTANT, OPENED, ASSISTANT + "<think></think>"))
        assert "opened_thought_removed" in found.changes
        for index, (text, side) in enumerate(zip(following, sides, strict=True)):
            assert prompt + text == whole(tokenizer, side).rstrip()
            trained = ""
            for message in (message for message in side if message.role == "assistant"):
                opening = "" if trained or prompt.endswith(OPENED) else "<think>\n"
                trained += f"{opening}Look.\n</think>\n\n" if message.fields else ""
                trained += f"{message.content}<|end|>"
            assert trained_text(tokenizer, found, index) == trained


def test_a_part_of_a_first_turn_after_an_empty_thought_can_be_left_out() -> None:
    template = template_of(PLAIN.replace(ASSISTANT, ASSISTANT + "<think></think>"), OPENED)
    noted = Message("assistant", "It <think>surely</think> rains.")
    config = DataConfig(untrained=["empty_thoughts", "thoughts"])
    found = encode(pair((noted, DOUBT, ANSWER), NO), tokenizer := tokenizer_with(template), config)
    assert texts(found, tokenizer)[0].endswith("<think></think>")
    assert trained_text(tokenizer, found) == "It rains.<|end|>It rains.<|end|>"


@pytest.mark.parametrize("generation", ["<think>", "<think></think>", "</think>", ""])
@pytest.mark.parametrize("response", ["It rains.", TURNS["turns"][0]])
def test_the_end_of_a_thought_that_the_template_writes_before_each_answer_is_not_trained(
    generation: str, response: Response
) -> None:
    """GLM 4.7 and DeepSeek V3.2 write it alone where a turn has no thought."""
    tokenizer = tokenizer_with(
        template_of(PLAIN.replace(ASSISTANT, ASSISTANT + "</think>"), ASSISTANT + generation)
    )
    found = encode(pair(response, NO), tokenizer)
    later = "" if isinstance(response, str) else "Yes.<|end|>"
    assert trained_text(tokenizer, found) == "It rains.<|end|>" + later
    assert trained_text(tokenizer, found, 1) == NO + "<|end|>"


@pytest.mark.parametrize("generation", ["<think></think>", "</think>"])
@pytest.mark.parametrize("case", ["agent", "turns"])
def test_a_thought_is_ended_once_before_several_turns(generation: str, case: str) -> None:
    """DeepSeek V3.2 ends a thought in its generation prompt, and again at the start of each turn."""
    turn = PLAIN.replace(ASSISTANT, ASSISTANT + "</think>")
    tokenizer = tokenizer_with(template_of(turn, ASSISTANT + generation))
    response, _ = TURNS[case]
    prompt, *found = texts(encode(pair(response, NO, tools=(TOOL,)), tokenizer), tokenizer)
    for text, side in zip(found, (response, NO), strict=True):
        assert prompt + text == whole(tokenizer, side).rstrip()


@pytest.mark.parametrize("generation", ["", "\n", "\n\n"])
def test_a_space_before_a_content_belongs_to_the_response(generation: str) -> None:
    tokenizer = tokenizer_with(template_of(" {{ m.content }}<|end|>", generation))
    found = encode(pair(TURNS["turns"][0], NO), tokenizer)
    assert trained_text(tokenizer, found) == " It rains.<|end|> Yes.<|end|>"


def test_a_template_that_needs_tools_is_used_for_records_with_tools() -> None:
    template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + template_of(PLAIN)
    found = encode(pair((CALL,), NO, tools=(TOOL,)), tokenizer := tokenizer_with(template))
    assert texts(found, tokenizer)[1:] == ["<|calls|>weather Bern<|end|>", "No.<|end|>"]


@pytest.mark.parametrize("opening", ["<think>\n\n", "<think>\n"])
def test_a_thought_before_a_call_is_written_once(opening: str) -> None:
    """axolotl's template of Qwen3 writes an empty thought before the call of a turn without one."""
    thoughts = "<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    empty = "{% elif m.tool_calls %}<think>\n\n</think>\n\n{% endif %}"
    written = "{% if m.reasoning_content %}" + thoughts + empty
    template = template_of(PLAIN.replace(ASSISTANT, ASSISTANT + written), ASSISTANT + opening)
    thinking = Message("assistant", "", {**CALL.fields, "reasoning_content": "Look."})
    found = encode(
        pair((thinking,), "<think>\nSee.\n</think>\n\nNo.", tools=(TOOL,)), tokenizer_with(template)
    )
    prompt, one, other = texts(found, tokenizer_with(template))
    assert prompt.endswith(ASSISTANT + opening)
    assert one == "Look.\n</think>\n\n<|calls|>weather Bern<|end|>"
    assert other == "See.\n</think>\n\nNo.<|end|>"


def test_a_header_that_only_one_side_has_is_not_trained() -> None:
    """DeepSeek V3 writes none before a call; the prompts of the sides then differ in more than a thought."""
    turn = PLAIN.replace(ASSISTANT, "{% if not m.tool_calls %}" + ASSISTANT + "{% endif %}")
    tokenizer = tokenizer_with(template_of(turn, OPENED))
    found = encode(pair((CALL, RESULT, ANSWER), NO, tools=(TOOL,)), tokenizer)
    assert trained_text(tokenizer, found) == "<|calls|>weather Bern<|end|>It rains.<|end|>"
    assert trained_text(tokenizer, found, 1) == NO + "<|end|>"


def test_the_header_after_a_result_of_a_tool_may_be_another_one() -> None:
    """Each turn's header is what the generation prompt writes after the turns before it."""
    after_result = "{% if loop.previtem.role == 'tool' %}<|answer|>{% else %}" + ASSISTANT + "{% endif %}"
    generation = "{% if messages[-1].role == 'tool' %}<|answer|>{% else %}" + ASSISTANT + "{% endif %}"
    tokenizer = tokenizer_with(template_of(PLAIN.replace(ASSISTANT, after_result), generation))
    found = encode(pair((CALL, RESULT, ANSWER), NO, tools=(TOOL,)), tokenizer)
    assert trained_text(tokenizer, found) == "<|calls|>weather Bern<|end|>It rains.<|end|>"


def test_the_prompt_of_sides_with_another_question_ends_at_a_control_token() -> None:
    """The template marks the last question; cut where texts differ, a prompt could end inside of a token."""
    mark = "{{ '!' if m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] }}"
    template = template_of(PLAIN).replace(USER, USER.replace("<|end|>", mark + "<|end|>"))
    found = encode(pair((ANSWER, DOUBT, ANSWER), NO), tokenizer := tokenizer_with(template))
    prompt, *sides = texts(found, tokenizer)
    assert prompt.endswith("<|turn|>")
    assert [side.partition("<|end|>")[0] for side in sides] == [
        "user\nWhat is the weather?",
        "user\nWhat is the weather?!",
    ]
    assert trained_text(tokenizer, found, 1) == NO + "<|end|>"
