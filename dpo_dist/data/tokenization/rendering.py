"""Render a record as texts to tokenise: a prompt, and its responses with the turns that the loss counts."""

from collections.abc import Sequence
from dataclasses import replace

from dpo_dist.config.data_schema import DataConfig, TextTemplate
from dpo_dist.data.counts import Changes
from dpo_dist.data.records import Dialogue, Fields, Message, Messages, Origin, PreferenceRecord, Response
from dpo_dist.data.tokenization.chat_renderer import ChatRenderer
from dpo_dist.data.tokenization.render_conversation import Conversation, Rendered, counted
from dpo_dist.data.tokenization.rendered_parts import check_parts_rendered
from dpo_dist.data.tokenization.template_arguments import check_arguments
from dpo_dist.data.tokenization.tokenizer import TokenizerFacts
from dpo_dist.errors import ConfigError


def render_record(record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig) -> Rendered:
    """Render a record: messages, and dialogues if the tokenizer has a chat template, by that template.

    Raises:
        UnusableRecordError: the template rejects the record or would lose a part of it.
        ConfigError: the tokenizer has no chat template for messages, or an unusable one.
    """
    prompt = record.prompt
    is_text = all(isinstance(response, str) for response in record.responses)
    if isinstance(prompt, Dialogue) and facts.chat is None and is_text:
        return _render_text(prompt.text, record.response_texts, facts)
    if isinstance(prompt, Dialogue):
        stripped = tuple(one.strip() if isinstance(one, str) else one for one in record.responses)
        return _render_messages(prompt.messages(), stripped, record, facts, config)
    if not isinstance(prompt, str):
        return _render_messages(prompt, record.responses, record, facts, config)
    if not is_text:
        return _render_messages((Message("user", prompt),), record.responses, record, facts, config)
    return _render_plain_prompt(prompt, record, facts, config)


def _render_plain_prompt(
    prompt: str, record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig
) -> Rendered:
    is_applied = config.template is TextTemplate.applied
    if facts.is_templated(prompt):
        if is_applied:
            ended = tuple(map(facts.end_templated, record.response_texts))
            return Rendered(prompt, tuple(map(counted, ended)), Changes(templated_text=True))
        return _changed(_render_plain(prompt, record, facts, config), templated_text=True)
    if any(map(facts.is_ended, record.response_texts)):
        if is_applied:
            record = replace(record, responses=tuple(map(facts.without_end, record.response_texts)))
        return _changed(_render_plain(prompt, record, facts, config), templated_text=True)
    return _render_plain(prompt, record, facts, config)


def _render_plain(
    prompt: str, record: PreferenceRecord, facts: TokenizerFacts, config: DataConfig
) -> Rendered:
    if config.text_as_messages:
        rendered = _render_messages((Message("user", prompt),), record.responses, record, facts, config)
        return _changed(rendered, templated_content=False)
    return _render_text(prompt, record.response_texts, facts)


def _render_text(prompt: str, responses: Sequence[str], facts: TokenizerFacts) -> Rendered:
    ended = (facts.escape(response) + facts.end_of_text for response in responses)
    return Rendered(facts.escape(prompt), tuple(map(counted, ended)))


def _render_messages(
    messages: Messages,
    given: tuple[Response, ...],
    record: PreferenceRecord,
    facts: TokenizerFacts,
    config: DataConfig,
) -> Rendered:
    if facts.chat is None:
        raise _no_template(record.origin)
    responses = tuple(map(_turns_of, given))
    arguments = record.template_arguments
    known = {name: value for name, value in arguments.items() if name in facts.chat.arguments}
    context = facts.chat.data(_template_context(record, known, facts.chat, config))
    rendered = Conversation(messages, context, facts, facts.chat, config).render(responses)
    spelled = facts.marks.spell(rendered.prompt)
    wholes = [
        check_parts_rendered((spelled, facts.marks.spell(one.text)), messages, turns, record.tools)
        for one, turns in zip(rendered.responses, responses, strict=True)
    ]
    return _changed(
        rendered,
        unknown_template_argument=len(known) < len(arguments),
        by_template=True,
        content_not_rendered=not all(wholes),
        templated_content=any(
            facts.has_turns(turn.content) for turns in (messages, *responses) for turn in turns
        ),
    )


def _changed(rendered: Rendered, **changes: bool) -> Rendered:
    return replace(rendered, changes=replace(rendered.changes, **changes))


def _template_context(
    record: PreferenceRecord, own: Fields, chat: ChatRenderer, config: DataConfig
) -> Fields:
    tools = {"tools": list(record.tools)} if record.tools else {}
    if config.template_arguments:
        check_arguments(config.template_arguments, chat.arguments)
        return {**config.template_arguments, **own, **tools}
    return {**own, **tools}


def _turns_of(response: Response) -> Messages:
    return (Message("assistant", response),) if isinstance(response, str) else response


def _no_template(origin: Origin) -> ConfigError:
    return ConfigError(
        "the data are conversations, but the tokenizer has no chat template",
        where=str(origin),
        got="messages",
        expected="plain prompt, chosen and rejected texts, or a tokenizer with a chat template",
        remedy="use the tokenizer of an instruction-tuned model, set data.chat_template, "
        "set data.text_as_messages=false, or convert the conversations to plain text",
    )
