"""Render a record as texts to tokenise: a prompt, and its responses with their turns."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dpo_dist.data.config import DataConfig
from dpo_dist.data.images import ExpandedImage, ImageProcessor
from dpo_dist.data.records import (
    Dialogue,
    Message,
    Messages,
    Origin,
    PreferenceRecord,
    UnusableRecordError,
    turns_of,
)
from dpo_dist.data.text.escape import THOUGHT_FIELDS
from dpo_dist.data.text.template import (
    CALLS,
    CONTENT,
    PROBE_CALL,
    PROBE_TOOL,
    ChatRenderer,
    ChatTemplate,
    Forms,
    Turns,
    argument_names,
)
from dpo_dist.data.text.thoughts import DEFAULT_MARKS, ThoughtMarks
from dpo_dist.data.text.tokenizer import TokenizerFacts, tokenizer_facts
from dpo_dist.data.text.turns import ResponseTurn, Span, TurnFinder, message_thought
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.types import Tokenizer

AS_TURN = "text as a user's turn"
"""How a text is read that the template renders."""


@dataclass(frozen=True)
class RenderedRecord:
    """Escaped texts to tokenise: a prompt, and each response after it, with its end of turn.

    `counted` are the spans of the turns of each response that the loss counts, without their headers, and
    `changes` names in counts.yaml.
    """

    prompt: str
    responses: tuple[str, ...]
    counted: tuple[tuple[Span, ...], ...]
    changes: frozenset[str] = frozenset()
    read_as: str = ""
    is_whole: bool = False  # whether these are whole conversations, for a reward model


def render_record(record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig) -> RenderedRecord:
    """Render a record, by the chat template if it has messages, or a dialogue and there is a template."""
    prompt = record.prompt
    responses = record.responses
    texts = tuple(response for response in responses if isinstance(response, str))
    is_text = len(texts) == len(responses)
    if isinstance(prompt, Dialogue):
        form = "hh (Human/Assistant turns)"
        if facts.chat is None and is_text:
            return _as_text(prompt.text, texts, facts, f"{form}, without the chat template")
        responses = tuple(text.strip() if isinstance(text, str) else text for text in responses)
        return _by_template(replace(record, responses=responses), facts, config, form)
    if not isinstance(prompt, str):
        return _by_template(record, facts, config, "messages")
    as_messages = replace(record, prompt=(Message("user", prompt),))
    if not is_text:
        return _by_template(as_messages, facts, config, "text")
    # A text, to which somebody may have applied a template already: to its prompt, or to its responses alone.
    changes = set[str]()
    if facts.is_templated(prompt) or any(map(facts.is_ended, texts)):
        changes.add("templated_text")
    if config.text_as_messages and (facts.chat is not None or config.text_as_messages is True):
        rendered = _by_template(replace(as_messages, responses=texts), facts, config, AS_TURN)
        return replace(rendered, changes=(rendered.changes - {"templated_content"}) | changes)
    if facts.tokenizer.chat_template:
        changes.add("chat_template_not_applied")
    return _as_text(prompt, texts, facts, "text, without the chat template", changes)


_CALLED = Message("assistant", "", {CALLS: [PROBE_CALL]})
_RESULT = Message("tool", "probe result", {"name": "probe", "tool_call_id": PROBE_CALL["id"]})
_ASKED = Message("user", "probe question")
_SAID = Message("assistant", "probe answer")


def _trained_ends(facts: TokenizerFacts) -> set[str]:
    """Return the tokens with which training ends turns and that stand nowhere else in a turn."""
    ends = set[str]()
    for turns in ((_CALLED, _RESULT, _SAID), (_SAID, _ASKED, _SAID)):
        record = PreferenceRecord((_ASKED,), (turns,), Origin("", 0), tools=(PROBE_TOOL,))
        with contextlib.suppress(UnusableRecordError, ConfigError):  # the template cannot be used for these
            rendered = render_record(record, facts, DataConfig())
            [text] = rendered.responses
            [counted] = rendered.counted
            ends |= {facts.ending_token(text[start:end]) for start, end in counted}
    ends |= {facts.last_special(facts.end_of_turn), facts.tokenizer.eos_token or ""}
    return ends - facts.tokens_inside_turns - {""}


def trained_stops(tokenizer: Tokenizer, data: DataConfig) -> list[int]:
    """Return the ids of the tokens that end texts in training, and of those that end a template's turns."""
    ends = {tokenizer.eos_token}
    for with_tools in (False, True):
        with contextlib.suppress(ConfigError):  # the template cannot be used for training
            ends |= _trained_ends(tokenizer_facts(tokenizer, data, with_tools=with_tools))
    ids = set(map(tokenizer.convert_tokens_to_ids, ends - {None}))
    return sorted(ids - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id}))


def final_tokens(tokenizer: Tokenizer, data: DataConfig) -> set[str]:
    """Return the special tokens that end texts, or that a template writes behind the last turn."""
    tokens = set(map(tokenizer.convert_ids_to_tokens, trained_stops(tokenizer, data)))
    facts = tokenizer_facts(tokenizer, data)
    if facts.chat is not None:
        tokens.update(facts.marks.in_text.findall(facts.chat.after_response))
    return tokens


def with_images(
    rendered: RenderedRecord,
    images: Sequence[ExpandedImage],
    facts: TokenizerFacts,
    processor: ImageProcessor,
) -> RenderedRecord:
    """Return a rendered record with the placeholders of each image in the place that the template wrote.

    A token of images that a text spells is escaped, so that it is no place. Raises UnusableRecordError: there
    are more places, or fewer; ConfigError: the template writes none for images.
    """
    if facts.chat is None:
        raise UnusableRecordError("image_count", "a text without a chat template has no place for images")
    facts.chat.check_images(processor.token)
    first, *others = rendered.prompt.split(processor.token)
    places = len(others) + sum(text.count(processor.token) for text in rendered.responses)
    if not len(images) == len(others) == places:
        detail = f"{len(images)} images, and {places} places for images in the output of the chat template"
        raise UnusableRecordError("image_count", detail)
    parts = [image.text + text for image, text in zip(images, others, strict=True)]
    return replace(rendered, prompt="".join([first, *parts]))


def _as_text(
    prompt: str, responses: Sequence[str], facts: TokenizerFacts, read_as: str, changes: Iterable[str] = ()
) -> RenderedRecord:
    escape = facts.marks.escape
    texts = [escape(response) + facts.end_of_text for response in responses]
    return _all_counted(escape(prompt), texts, read_as, changes)


def _all_counted(
    prompt: str, responses: Sequence[str], read_as: str, changes: Iterable[str]
) -> RenderedRecord:
    """Return texts whose responses count in the loss as a whole."""
    counted = tuple(((0, len(response)),) for response in responses)
    return RenderedRecord(prompt, tuple(responses), counted, frozenset(changes), read_as)


def _by_template(
    record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig, form: str
) -> RenderedRecord:
    """Render a record whose prompt is messages."""
    chat = facts.chat
    messages = record.prompt
    assert isinstance(messages, tuple)
    if chat is None:
        instead = "convert them to plain text"
        if config.text_as_messages is True:
            instead = "set data.text_as_messages=false"
        raise ConfigError(
            "the data are conversations, but the tokenizer has no chat template",
            where=str(record.origin),
            got="messages",
            expected="plain prompt, chosen and rejected texts, or a tokenizer with a chat template",
            remedy="use the tokenizer of an instruction-tuned model, set data.chat_template, or " + instead,
        )
    responses = tuple(map(turns_of, record.responses))
    # The tools, and the arguments of the run and of the record.
    names = argument_names(chat.template)
    arguments = {name: value for name, value in record.template_arguments.items() if name in names}
    if not names.issuperset(config.template_arguments or ()):
        template = ChatTemplate(facts.tokenizer, config.chat_template)
        template.check_arguments(config.template_arguments or ())
    tools = {"tools": list(record.tools)} if record.tools else {}
    context = chat.data({**(config.template_arguments or {}), **arguments, **tools})
    rendered = _Conversation(messages, context, facts, chat, config).render(responses)
    # What the template left out.
    changes = set(rendered.changes)
    if len(arguments) < len(record.template_arguments):
        changes.add("unknown_template_argument")
    omitted = [chat.omitted(messages, turns, context) for turns in responses]
    keys = sorted(set().union(*omitted) - {CONTENT, CALLS})
    if keys:
        raise UnusableRecordError(
            "unread_content", f"the chat template does not write {', '.join(keys)} of a message", tuple(keys)
        )
    texts = list(map(facts.marks.spell, rendered.responses))
    thoughts = [_thought(turns[-1], facts.thoughts) for turns in responses]
    if any(omitted) or any(said not in text for said, text in zip(thoughts, texts, strict=True)):
        changes.add("content_not_rendered")
    # A template that does not read `tools` may still write their names, in calls.
    reads_tools = re.search(r"\btools\b", chat.template) is not None
    tool_names = [tool["function"]["name"] for tool in record.tools if "name" in tool.get("function", ())]
    prompt = facts.marks.spell(rendered.prompt)
    has_names = all(name in prompt + text for name in tool_names for text in texts)
    if record.tools and not (reads_tools and has_names):
        changes.add("tools_not_rendered")
    if any(facts.has_turns(turn.content) for turn in (*messages, *itertools.chain(*responses))):
        changes.add("templated_content")
    return replace(rendered, changes=frozenset(changes), read_as=f"{form}, by the chat template")


def _thought(message: Message, thoughts: ThoughtMarks) -> str:
    """Return the thought of a message, from its content or a field; "" if it has none."""
    for marks in (thoughts, DEFAULT_MARKS):
        if marks.is_in(message.content):
            return marks.spelled(message.content)
    return (message_thought(message) or "").strip()


@dataclass(frozen=True)
class _WholeConversation:
    """A conversation as the template writes it, up to the end of its last turn, and the response in it."""

    text: str
    start: int  # of the response: after the header of its first turn
    counted: tuple[Span, ...]  # in `text`, of the turns that the loss counts

    @property
    def prompt(self) -> str:
        """The text before the response."""
        return self.text[: self.start]

    @property
    def response(self) -> str:
        """The text of the response."""
        return self.text[self.start :]

    @property
    def counted_in_response(self) -> tuple[Span, ...]:
        """The spans that the loss counts, in the text of the response."""
        return tuple((max(start - self.start, 0), end - self.start) for start, end in self.counted)

    def starting_with_thought(self, start: int) -> "_WholeConversation":
        """Return the same with a response from `start` on: its first turn then begins with a thought."""
        counted = ((start if first == self.start else first, end) for first, end in self.counted)
        return replace(self, start=start, counted=tuple(counted))


class _Conversation:
    """The prompt of one record, with the tools and arguments of the template: renders its responses."""

    def __init__(
        self,
        messages: Messages,
        context: Forms,
        facts: TokenizerFacts,
        chat: ChatRenderer,
        config: DataConfig,
    ):
        self.messages: Turns = tuple(map(chat.turn, messages))
        self.context = context
        self.facts = facts
        self.chat = chat
        self.config = config
        self.thoughts = facts.thoughts
        self.finder = TurnFinder(self.messages, context, facts, chat)

    def render(self, responses: Sequence[Messages]) -> RenderedRecord:
        """Render the prompt and its responses."""
        if self.config.for_scores:
            return self._whole_conversations(responses)
        if any(len(turns) != 1 or turns[0].role != "assistant" for turns in responses):
            return self._several_turns(responses)
        messages = [turns[0] for turns in responses]
        prompt = self.chat.render(self.messages, self.context, generation=True)
        if self.thoughts.opens(prompt):
            prompt, texts, changes = self._after_opened_thought(prompt, messages)
        else:
            prompt, texts, changes = self._after_closed_prompt(prompt, messages)
        counted = list[tuple[Span, ...]]()
        for turn, text in zip(messages, texts, strict=True):
            self._check_rendered(turn, text)
            counted.append(((0, len(text)),) if self._is_trained(turn) else ())
        return RenderedRecord(prompt, tuple(texts), tuple(counted), frozenset(changes))

    def _whole_conversations(self, responses: Sequence[Messages]) -> RenderedRecord:
        r"""Render each conversation as programs write it that ask for a score: with all behind its last turn.

        The prompt is that of a generation, or ends in a token with which all conversations go on.
        """
        texts = []
        for turns in responses:
            text = self.chat.render((*self.messages, *map(self.chat.turn, turns)), self.context)
            self._check_rendered(turns[-1], text)
            texts.append(text)
        changes = set[str]()
        prompt = ""
        if self.messages:
            prompt = self.chat.render(self.messages, self.context, generation=True)
        if not prompt or not all(text.startswith(prompt) for text in texts):
            shared = min((texts[0][: self.facts.common_length(texts[0], text)] for text in texts), key=len)
            if prompt:
                changes.add("prompt_not_prefix")
            prompt = shared[: self.facts.after_last_special(shared)]
        rendered = _all_counted(prompt, [text[len(prompt) :] for text in texts], "", changes)
        return replace(rendered, is_whole=True)

    def _is_trained(self, turn: Message) -> bool:
        """Return whether the loss counts a turn: those of the assistant, but for a weight of 0."""
        if turn.role == "assistant":
            return turn.is_trained is not False
        if turn.is_trained:
            raise UnusableRecordError("unread_content", f"loss_weight 1 of a turn of {turn.role}")
        return False

    def _check_rendered(self, turn: Message, text: str) -> None:
        """Raise if a trained turn is a call or a thought that the template leaves out of its `text`."""
        has_thought = self.thoughts.is_in(turn.content)
        has_more = turn.role == "assistant" and (turn.fields or has_thought)
        said = self.thoughts.split(turn.content)[1] if has_thought else turn.content
        is_all = has_more and not said.strip()
        if is_all and self._is_trained(turn) and self.facts.is_blank(text):
            raise UnusableRecordError("turn_not_rendered", "the chat template leaves out a call or a thought")

    # One turn: what the template writes after the prompt of a generation. The cases of thoughts, by the end
    # of the prompt and by the responses that have one (off: an argument of the template asks for none):
    #
    #   prompt            responses   what is rendered                                   such as
    #   _after_closed_prompt
    #   no thought        any         what the template writes                           Qwen3
    #   ends one          none        what the template writes                           Qwen3, off
    #   ends one if off   all, some   the thoughts, after the ended one                  Qwen3, off
    #   always ends one   all, some   the thoughts, after a prompt that ends none        Qwen3.5, small
    #   _after_opened_thought, the first that fits
    #   opens one         any         what the template writes, if all texts end it      Qwen3.6
    #   opens one         all         the thoughts as given                              DeepSeek R1
    #   opens one         some, none  the texts, after a prompt that opens none          Nemotron 3

    def _after_closed_prompt(
        self, prompt: str, messages: Sequence[Message]
    ) -> tuple[str, list[str], set[str]]:
        """Return a prompt that opens no thought, the texts of the responses, and changes."""
        texts, is_prefix = self._response_texts(prompt, messages)
        changes = set() if is_prefix else {"prompt_not_prefix"}
        # The prompt ends a thought that a response then has: Qwen3 without thinking writes
        # <|im_start|>assistant\n<think>\n\n</think>\n\n.
        if self.thoughts.ends(prompt) and any(map(self.thoughts.is_in, texts)):
            changes.add("ended_thought_reopened")
            # Does the template end a thought in the prompt even if no argument asks for that?
            tools = {name: value for name, value in self.context.plain.items() if name == "tools"}
            usual = self.chat.render(self.messages, self.chat.data(tools), generation=True)
            if self.thoughts.ends(usual):
                prompt = self.thoughts.without_ended(prompt)
                texts, _ = self._response_texts(prompt, messages)
        return prompt, texts, changes

    def _after_opened_thought(
        self, prompt: str, messages: Sequence[Message]
    ) -> tuple[str, list[str], set[str]]:
        r"""Return a prompt that opens a thought, the texts of the responses, and changes.

        The prompt of Qwen3.6 ends with <|im_start|>assistant\n<think>\n. Each response then ends the thought
        and none opens it again; else the returned prompt opens none.
        """
        # The template continues the thought in all responses: Look.\n</think>\n\nHello.<|im_end|>
        texts = [text or "" for text in self._continuations(prompt, messages)]
        opening = self.thoughts.tags[0]
        if all(self.thoughts.is_in(text) and not text.lstrip().startswith(opening) for text in texts):
            scaffold = self._common_scaffold(texts)
            changes = set[str]()
            if any(map(self.thoughts.none_or_empty.match, texts)):
                changes.add("opened_thought_removed")
            return prompt + scaffold, [text.removeprefix(scaffold) for text in texts], changes
        # The template leaves out the thoughts (DeepSeek R1), but each response has one: as it is given.
        spelled = list(map(self._with_spelled_thought, messages))
        closed = self.thoughts.without_opened(prompt)
        if all(self.thoughts.is_in(message.content) for message in spelled):
            changes = set[str]()
            texts = []
            for message in spelled:
                content = self.thoughts.within(message.content, prompt)
                texts.append(self._as_it_stands(message, content, closed))
                if content != message.content:
                    changes.add("opened_thought_joined")
            return prompt, texts, changes
        # A response has no thought: the prompt opens none, and the model opens those of the others.
        texts, is_prefix = self._response_texts(closed, messages)
        for index, message in enumerate(spelled):
            has_thought = self.thoughts.is_in(message.content)
            text = self.facts.marks.spell(texts[index])
            if has_thought and not self.thoughts.is_only_in(text, message.content):
                texts[index] = self._as_it_stands(message, message.content, closed)
        changes = {"opened_thought_removed"}
        if not is_prefix:
            changes.add("prompt_not_prefix")
        return closed, texts, changes

    def _response_texts(self, prompt: str, messages: Sequence[Message]) -> tuple[list[str], bool]:
        """Return the text of each response, and whether the prompt is unchanged before all of them."""
        continuations = self._continuations(prompt, messages)
        texts = list[str]()
        for text, message in zip(continuations, messages, strict=True):
            if text is not None:
                texts.append(text)
                continue
            # As the template writes the turn after a prompt that it renders differently. The record's prompt
            # opens no thought: a thought opened before the turn belongs to the response.
            conversation = self._whole_conversation((message,))
            prompt_length = len(self.thoughts.without_opened(conversation.prompt))
            texts.append(conversation.text[prompt_length:])
        return texts, None not in continuations

    def _continuations(self, prompt: str, messages: Sequence[Message]) -> list[str | None]:
        """Return the text of each response after the rendered `prompt`, up to its end of turn.

        The text includes what the template adds (a leading space, an empty thought). None if the
        template renders the prompt differently when a response follows.
        """
        texts = list[str | None]()
        for turn in map(self.chat.turn, messages):
            conversation = self.chat.render((*self.messages, turn), self.context)
            text = None
            if conversation.startswith(prompt):
                text = self.facts.turn_with_end(conversation[len(prompt) :])
            texts.append(text)
        return texts

    def _with_spelled_thought(self, message: Message) -> Message:
        """Return a message with its thought, if a field has one, spelled in its content."""
        thought = message_thought(message)
        if thought is None or self.thoughts.is_in(message.content):
            return message
        fields = {name: part for name, part in message.fields.items() if name not in THOUGHT_FIELDS}
        content = f"{self.thoughts.opening}{thought}{self.thoughts.closing}{message.content}"
        return replace(message, content=content, fields=fields)

    def _common_scaffold(self, responses: Iterable[str]) -> str:
        """Return the end of an empty thought with which all responses start: a part of the prompt."""
        if "empty_thoughts" not in self.config.untrained:
            return ""
        matches = map(self.thoughts.empty_end.match, responses)
        starts = {match.group() if match else "" for match in matches}
        return starts.pop() if len(starts) == 1 else ""

    def _as_it_stands(self, message: Message, content: str, prompt: str) -> str:
        """Return a content with its thought and end of turn; the template writes only the tool calls."""
        marks = self.facts.marks
        if not message.fields.get(CALLS):
            return marks.escape(content, marks.in_response) + self.facts.end_of_turn
        thought, rest = self.thoughts.split(content)
        separator = rest[: len(rest) - len(rest.lstrip())]
        [rendered], _ = self._response_texts(prompt, [replace(message, content=rest.lstrip())])
        # The thought stands before what the template writes, perhaps after an empty thought of its own.
        calls = self.thoughts.empty_start.sub("", rendered)
        return marks.escape(thought, marks.in_response) + separator + calls

    # Several turns: a response is a part of the whole conversation. The prompt is the first that fits, by
    # what the template writes for it `alone` (before answers as for a generation) and in each conversation:
    #
    #   alone                               in conversations     the prompt of the record
    #   goes on as the responses do         equal, or as alone   alone
    #                                       begins
    #   any                                 different            what they share
    #   opens a thought                     equal                the same, and an empty thought's end, if the
    #                                                            responses share it
    #   else                                equal                the same
    #
    # `alone` does not go on as the responses do if it is not before answers, opens a thought, or ends one
    # that a response has.

    def _several_turns(self, responses: Sequence[Messages]) -> RenderedRecord:
        """Render responses of several turns, after a prompt that all share."""
        conversations = list(map(self._whole_conversation, responses))
        changes = set[str]()
        prompts = {conversation.prompt for conversation in conversations}
        # The prompt as the template writes it alone; before answers, as for a generation.
        are_answers = all(turns[0].role == "assistant" for turns in responses)
        alone = ""
        if self.messages:
            alone = self.chat.render(self.messages, self.context, generation=are_answers)
            if prompts != {alone}:
                changes.add("prompt_not_prefix")
        # Does it open a thought, or end one that a response then has? Only the first turn says: before later
        # ones templates write empty thoughts (Qwen3). DeepSeek V3.2 ends a thought at the start of each turn,
        # and in the generation prompt, too.
        has_thought = False
        for turns, conversation in zip(responses, conversations, strict=True):
            ends_thought = conversation.response.lstrip().startswith(self.thoughts.tags[1])
            if ends_thought or self.thoughts.is_in(turns[0].content) or message_thought(turns[0]):
                has_thought = True
        has_other_thought = self.thoughts.opens(alone) or (has_thought and self.thoughts.ends(alone))
        goes_on = bool(alone) and are_answers and not has_other_thought
        if goes_on and (len(prompts) == 1 or all(map(alone.startswith, prompts))):
            prompt = alone  # as for one turn: it may end a thought that the turn does not have (Gemma 4)
        elif len(prompts) > 1:  # turns before the response depend on it
            changes.add("prompt_not_prefix")
            prompt, conversations = self._shared_prompt(conversations)
        elif self.thoughts.opens(alone):
            scaffold = self._common_scaffold(conversation.response for conversation in conversations)
            prompt = conversations[0].prompt + scaffold
            conversations = [replace(each, start=each.start + len(scaffold)) for each in conversations]
        else:
            prompt = conversations[0].prompt
        texts = tuple(conversation.response for conversation in conversations)
        has_no_thought = any(map(self.thoughts.none_or_empty.match, texts))
        if self.thoughts.opens(alone) and (has_no_thought or not self.thoughts.opens(prompt)):
            changes.add("opened_thought_removed")
        counted = tuple(conversation.counted_in_response for conversation in conversations)
        return RenderedRecord(prompt, texts, counted, frozenset(changes))

    def _whole_conversation(self, response: Messages) -> _WholeConversation:
        """Return the conversation with a response of several turns, or of one."""
        turns = list[ResponseTurn]()
        counted = list[Span]()
        for message, turn in zip(response, self.finder.find(response), strict=True):
            turns.append(turn)
            self._check_rendered(message, turn.counted_text)
            if self._is_trained(message):
                counted.append(turn.counted)
        return _WholeConversation(turns[-1].before + turns[-1].text, turns[0].start, tuple(counted))

    def _shared_prompt(
        self, conversations: Sequence[_WholeConversation]
    ) -> tuple[str, list[_WholeConversation]]:
        """Return what the different prompts of conversations share, and the conversations after it."""
        first, *others = [conversation.prompt for conversation in conversations]
        shared = first[: min(self.facts.common_length(first, other) for other in others)]
        prompt = self.thoughts.without_opened(shared)
        if all(self.thoughts.only_tags.match(each.prompt, len(prompt)) for each in conversations):
            # Only the thoughts in their headers differ: the model writes them, as after one turn. Qwen3.6:
            #   <|im_start|>assistant\n             before an answer that is not the last one
            #   <|im_start|>assistant\n<think>\n    before the last one
            return prompt, [each.starting_with_thought(len(prompt)) for each in conversations]
        prompt = shared[: self.facts.after_last_special(shared)]
        return prompt, [replace(each, start=len(prompt)) for each in conversations]
