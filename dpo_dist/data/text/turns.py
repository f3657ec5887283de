r"""The turns of a conversation in the output of its chat template, and what a model writes of each.

A template writes an assistant's turn with a header: that is how the prompt of a generation ends. The model
writes the rest, up to an end of turn, and the loss counts what the model writes. More may stand after it.

    header                                             by the model      after it
    <|im_start|>assistant\n                            Hello.<|im_end|>  \n                ChatML (Qwen)
    <|start_header_id|>assistant<|end_header_id|>\n\n  Hello.<|eot_id|>                    Llama 3
    <|im_assistant|>assistant<|im_middle|>             Hello.<|im_end|>                    Kimi K2
    <|assistant|>\n                                    Hello.<|end|>     \n<|endoftext|>   Phi 3
    <|start|>assistant   <|channel|>final<|message|>Hello.<|return|>                       gpt-oss
    <|assistant|>           \n<think></think>\nHello.<|user|>            \nWhy?            GLM 4.5

GLM ends no turn: a model stops with the token that starts the next one. Positions are in characters.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from dpo_dist.data.records import RESERVED_CHARACTER, Message, Messages, UnusableRecordError
from dpo_dist.data.text.escape import THOUGHT_FIELDS
from dpo_dist.data.text.template import ChatRenderer, Forms, Turns
from dpo_dist.data.text.tokenizer import TokenizerFacts

Span = tuple[int, int]
"""Start and end of a part of a text."""


def message_thought(message: Message) -> str | None:
    """Return the thought that a field of a message has."""
    thoughts = map(message.fields.get, THOUGHT_FIELDS)
    return next((thought for thought in thoughts if thought and isinstance(thought, str)), None)


@dataclass(frozen=True)
class ResponseTurn:
    """A turn of a response in the output of a template; `before` and `text` are the output up to its end."""

    before: str
    text: str  # with its header; the end of the last turn is added if the template writes none
    header: int  # length of the header; 0 in another role's turn: no prompt ends with that one
    counted: Span  # in the output: its content, to the end of the turn, perhaps in the next one (GLM)

    @property
    def start(self) -> int:
        """The position in the output after the header."""
        return len(self.before) + self.header

    @property
    def counted_text(self) -> str:
        """The content and the end of the turn."""
        start, end = self.counted
        return (self.before + self.text)[start:end]


class TurnFinder:
    """Finds the turns of the responses to one prompt in what the template writes for the conversation."""

    def __init__(self, prompt: Turns, context: Forms, facts: TokenizerFacts, chat: ChatRenderer):
        """Args: `context`: tools and arguments of the template."""
        self._prompt = prompt
        self._context = context
        self._facts = facts
        self._chat = chat
        self._generation_prompts: dict[str, str] = {}

    def find(self, response: Messages) -> Iterator[ResponseTurn]:
        r"""Yield the turns of a response; `counted` of an assistant's turn is without its header.

        The parts of an answer in the output of ChatML; `header` is the length of the first:

            <|im_start|>assistant\n    Hello.<|im_end|>     \n
            from `start`               `counted`            after it, to `stop`

        Raises UnusableRecordError: a turn is not found.
        """
        first = len(self._prompt)
        turns = (*self._prompt, *map(self._chat.turn, response))
        output = self._chat.render(turns, self._context)
        # Each turn is what a pass of the template's loop writes; else what it adds to the turns before it.
        passes = _loop_passes(self._chat, turns, self._context, output)
        spans = list(filter(None, passes.spans[first:]))
        if len(spans) < len(response) or any(one[1] > other[0] for one, other in pairwise(spans)):
            spans = self._added_spans(turns, output)
        for index, (message, (start, stop)) in enumerate(zip(response, spans, strict=True), start=first):
            text = output[start:stop]
            is_assistant = message.role == "assistant"
            header = self._header_length(message, text, turns[:index]) if is_assistant else 0
            if index == len(turns) - 1:
                text = text[:header] + self._facts.turn_with_end(text[header:])
            counted = start + header, start + self._end(text, output[stop:])
            yield ResponseTurn(output[:start], text, header, counted)

    def _end(self, turn: str, following: str) -> int:
        """Return the position after the token that ends a turn, perhaps the first one after the turn."""
        end = self._facts.after_ending_token(turn)
        if end:
            return end
        # <|assistant|>\n<think></think>\nHello. of GLM 4.5, before <|user|>\nWhy? To the last turn, which has
        # no next token, `TokenizerFacts.turn_with_end` adds an end.
        # Nemotron's next one, \n<extra_id_1>, comes after a line end.
        next_token = self._facts.marks.in_text.match(following, _leading_space(following))
        return len(turn) + (next_token.end() if next_token else 0)

    # The header of a turn.

    def _header_length(self, message: Message, turn: str, before: Turns) -> int:
        r"""Return the length of the header of an assistant's `turn`, which follows the turns `before`.

        A header is what the turn shares with the prompt for its generation:

            turn               <|im_start|>assistant\nHello.<|im_end|>\n
            generation prompt  <|im_start|>assistant\n

        If the prompt has a rest that the turn does not share, the rest stands before the header, or after it:
        then the shared part may reach into what the model writes, and is cut. `ChatRenderer._answered` does
        less for a probe, whose content is known: the facts that are used here come from it.
        """
        generation = self._generation_prompt(before)
        length, rest = self._shared_header(turn, generation)
        if not rest:
            return length
        later = self._later_header(turn, generation)
        if later is not None:
            return later
        length = self._cut_at_content(message, turn, length)
        thought = self._start_of_ended_thought(turn, length, rest)
        return length if thought is None else thought

    def _shared_header(self, turn: str, generation: str) -> tuple[int, str]:
        r"""Return the length of what a turn shares with the prompt, and the rest of the prompt.

        The space before the header may be another one, or belong to the former turn (Alpaca):

            turn               ### Response:\nHello.</s>
            generation prompt  \n\n### Response:\n
        """
        space = _leading_space(turn)
        header = generation.lstrip()
        shared = self._facts.common_length(turn[space:], header)
        if shared:
            return space + shared, header[shared:]
        length = self._facts.common_length(turn, generation)
        return length, generation[length:]

    def _later_header(self, turn: str, generation: str) -> int | None:
        r"""Return the length of a header before which the prompt says more (Command R+, tools), else None.

        turn               <|turn|>assistant\nHello.<|end|>
        generation prompt  <|turn|>system\nUse tools.<|end|>\n<|turn|>assistant\n
        """
        space = _leading_space(turn)
        for token in self._facts.marks.in_text.finditer(generation):
            header = generation[token.start() :]
            if turn.startswith(header, space):
                return space + len(header)
        return None

    def _cut_at_content(self, message: Message, turn: str, length: int) -> int:
        r"""Return the length of a header without words of the prompt that the content starts like (Apriel).

        turn               <|assistant|>\nHere it rains.
        generation prompt  <|assistant|>\nHere are my steps:\n
        """
        marks = self._facts.marks
        for part in filter(None, (message_thought(message), message.content.strip())):
            text = marks.escape(part, marks.in_response)
            start = turn.find(text, max(length - len(text) + 1, 0))
            if 0 <= start < length:
                length = start
        return length

    def _start_of_ended_thought(self, turn: str, length: int, rest: str) -> int | None:
        r"""Return where a thought opens in the header that the `rest` of the prompt ends at once, else None.

        The turn ends it later: it is the model's as a whole (Gemma 4).

            turn               <|turn>model\n<|channel>thought\nLook.<channel|>Hello.<turn|>\n
            generation prompt  <|turn>model\n<|channel>thought\n<channel|>
        """
        closing = self._facts.unbroken.search(rest)
        if not closing or closing.group() not in turn[length:]:
            return None
        opening = list(self._facts.unbroken.finditer(turn[:length]))
        if opening and opening[0].group() != self._facts.thoughts.tags[0]:
            del opening[0]  # the token that starts the turn
        return opening[-1].start() if opening else None

    def _generation_prompt(self, before: Turns) -> str:
        """Return what the template writes after the turns `before` for a generation."""
        role = before[-1].plain["role"] if before else ""
        if role not in self._generation_prompts:  # templates write it by the role of the last turn alone
            output = self._chat.render(before, self._context, generation=True)
            passes = _loop_passes(self._chat, before, self._context, output, generation=True)
            end = passes.end
            if not before or passes.spans[-1] is None or end == len(output):
                # Llama 3.1 writes tools and the first question before its loop over messages; Zephyr and
                # OLMo 2 write the generation prompt in that loop.
                alone = self._facts.without_tail(self._chat.render(before, self._context))
                end = self._facts.common_length(output, alone)
            self._generation_prompts[role] = output[end:]
        return self._generation_prompts[role]

    # The turns of templates that do not write each in a pass of a loop.

    def _added_spans(self, turns: Turns, output: str) -> list[Span]:
        r"""Return the span of each turn of a response: what it adds to the output for those before it.

        For templates that write turns after their loop (Nemotron), or tools' results with the call (Gemma 4)
        or with each other (Command R7B): such a result may have an empty span.

            question          <|turn|>user\nRain?<|end|>\n
            question, answer  <|turn|>user\nRain?<|end|>\n<|turn|>assistant\nYes.<|end|>\n
        """
        first = len(self._prompt)
        roles = [turn.plain["role"] for turn in turns]
        ends: list[int] = []  # of the prompt, and of each turn
        for count in range(first, len(turns) + 1):
            start = ends[-1] if ends else 0
            around = roles[max(count - 1, 0) : count + 1]
            if "assistant" not in around and first < count < len(turns):
                ends.append(start)  # between two results
                continue
            alone = self._facts.without_tail(self._chat.render(turns[:count], self._context))
            end = self._facts.common_length(alone, output)
            if not self._facts.is_blank(alone[end:]):  # they differ in more than an end of turn
                # The last answer of a conversation may have another form (Nemotron).
                ending = self._facts.end_of_turn
                place = output.find(ending, start) if around[0] == "assistant" else -1
                end = place + len(ending) if place >= 0 else -1
            if end < start:
                raise UnusableRecordError("turns_not_found", "no turns are found in the template's output")
            if count > first and not output[start:end].strip():
                raise UnusableRecordError("turn_not_rendered", "the chat template leaves out a turn")
            ends.append(end)
        return list(pairwise(ends))


def _leading_space(text: str) -> int:
    return len(text) - len(text.lstrip())


# The passes of a template's loop over messages. A copy of the template writes a mark at both ends of each:
#   {% for m in messages %}...{% endfor %}
#   {% for m in messages %}{% print START %}...{% print END %}{% endfor %}

# Fields of a message, with its marks.
_START = "dpo_dist_turn_start"
_END = "dpo_dist_turn_end"
_MARK = re.compile(f"{RESERVED_CHARACTER}(start|end)(\\d+){RESERVED_CHARACTER}")
_COMMENT_OR_LOOP = re.compile(
    r"(?s)\{#.*?#\}"
    r"|\{%(?P<open>[-+]?)\s*(?P<body>(?:for(?:\s+(?P<target>\w+)\s+in)?|endfor)\b.*?)(?P<close>[-+]?)%\}"
)


@dataclass(frozen=True)
class _LoopPasses:
    """The span of each turn that one pass of a loop writes, else None; and the end of the last pass."""

    spans: Sequence[Span | None]
    end: int


def _loop_passes(
    chat: ChatRenderer, turns: Turns, context: Forms, output: str, *, generation: bool = False
) -> _LoopPasses:
    """Return where a template's `output` for these turns has each of them."""
    marked = []
    for index, turn in enumerate(turns):
        marks = {_START: _mark("start", index), _END: _mark("end", index)}
        marked.append(Forms({**turn.plain, **marks}, {**turn.marked, **marks}))
    template = _with_marks(chat.template)
    rendered = chat.render(tuple(marked), context, generation=generation, template=template)
    unmarked = _read_marks(rendered, len(turns))
    if unmarked is None or unmarked[0] != output:  # such as a template that writes all fields of a message
        return _LoopPasses([None] * len(turns), len(output))
    return unmarked[1]


def _mark(kind: str, index: int) -> str:
    return f"{RESERVED_CHARACTER}{kind}{index}{RESERVED_CHARACTER}"


@lru_cache(maxsize=8)
def _with_marks(template: str) -> str:
    """Return the template with marks around the body of each loop over one variable."""
    targets: list[str | None] = []

    def marked(match: re.Match[str]) -> str:
        tag = match.group()
        body = match["body"]
        name = match["target"]
        if body is None:  # a comment
            return tag
        # `print` is a statement: the whitespace around it is trimmed as around the tag of the loop.
        if body.startswith("for"):
            targets.append(name)
            start = f"{body} %}}{{% {_print(name, _START)}"
            return f"{{%{match['open']} {start} {match['close']}%}}" if name else tag
        name = targets.pop() if targets else None
        end = f"{_print(name, _END)} %}}{{% {body}"
        return f"{{%{match['open']} {end} {match['close']}%}}" if name else tag

    return _COMMENT_OR_LOOP.sub(marked, template)


def _print(name: str | None, key: str) -> str:
    return f"print ({name} is mapping and {name}['{key}']) or ''"


def _read_marks(rendered: str, turns: int) -> tuple[str, _LoopPasses] | None:
    """Return a text without its marks, and the turns in it; None: a turn is written twice or not ended."""
    text, *marks = _MARK.split(rendered)
    spans: list[Span | None] = [None] * turns
    opened = dict[int, int]()
    end = 0
    for kind, number, following in zip(*[iter(marks)] * 3, strict=True):
        index = int(number)
        if kind == "start":
            opened[index] = len(text)
        else:
            start = opened.pop(index, len(text))
            end = len(text)
            # A loop that writes nothing only computes: the turn is not written in it.
            if text[start:].strip():
                if spans[index] is not None:
                    return None
                spans[index] = (start, end)
        text += following
    return None if opened else (text, _LoopPasses(spans, end))
