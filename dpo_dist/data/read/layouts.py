"""Layouts of records: where a pair, a ranking or a single response has its prompt and responses."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo_dist.data.read.fields import (
    CONVERSATIONS,
    LABELS,
    LISTS,
    PAIR_SCORES,
    PAIRS,
    QUESTIONS,
    SHARED_SIDES,
    SIDE_FIELDS,
)
from dpo_dist.data.read.messages import check_no_media, has_more
from dpo_dist.data.read.values import (
    finite_numbers,
    first_value,
    from_json,
    given_images,
    has_value,
    ignoring,
    is_messages,
    message_role,
    spelled_messages,
    with_value,
)
from dpo_dist.data.read.verdicts import has_two_answers, has_verdict, is_answer, judge, two_answers
from dpo_dist.data.records import FIRST_TURN, UnusableRecordError, shown_key
from dpo_dist.foundation.types import Fields


class Content(NamedTuple):
    """The prompt and the responses of a record, with values as in the source.

    `prompt` is None if the responses contain it. `responses`: text or messages, best first, by names for
    errors. `scores` are finite. `field`: the name of the field if it holds a list of responses. `verdicts`:
    the names of the fields that say which of two answers is better.
    """

    prompt: Any
    responses: Fields
    scores: tuple[float, ...] | None = None
    field: str | None = None
    verdicts: tuple[str, ...] = ()


def record_prompt(record: Fields, responses: Iterable[Any]) -> Any:
    """Return a record's prompt, text or messages; None if it has none, or responses contain it."""
    responses = list(responses)
    if record.get("prompt") is not None or any(map(is_conversation, responses)):
        return record.get("prompt")
    for turns in map(record.get, CONVERSATIONS):
        if turns is not None and not ends_with_response(turns):
            return _asked(turns)
        if turns is not None and repeats(turns, responses[0]):
            return turns[:-1]
    if has_value(record.get("instruction")):
        parts = [record["instruction"], record.get("input")]
        return _asked("\n".join(part for part in parts if isinstance(part, str) and part))
    questions = [record[name] for name in with_value(record, QUESTIONS)]
    if questions:
        return questions[0] if is_messages(questions[0]) else _asked(questions[0])
    # A text in `context` is not all that was asked, but messages are (HelpSteer3, NeMo RL).
    turns = record.get("context")
    return turns if isinstance(turns, list) and turns and is_messages(turns) else None


def _asked(turns: Any) -> Any:
    return [{"role": "user", "content": turns}] if isinstance(turns, str) else turns


def is_conversation(response: Any) -> bool:
    """Return whether a response includes the turns before it, as messages or as an HH dialogue."""
    if isinstance(response, str):
        return response.startswith(FIRST_TURN)
    is_list = isinstance(response, list) and bool(response) and is_messages(response)
    return is_list and not ends_with_response(response[:1])


def repeats(turns: Any, response: Any) -> bool:
    """Return whether a conversation ends with a response that is also given as a text or as a message."""
    if not ends_with_response(turns):
        return False
    [message] = response if isinstance(response, list) and len(response) == 1 else [response]
    return bool(_content(message) == _content(turns[-1]))


def _content(message: Any) -> Any:
    """Return the content of an assistant's message that is nothing but text; any other value as it is."""
    if message_role(message) != "assistant" or has_more(message):
        return message
    return message.get("content", message.get("value"))


def ends_with_response(turns: Any) -> bool:
    """Return whether the last of a list of messages is the assistant's."""
    return isinstance(turns, list) and bool(turns) and message_role(turns[-1]) == "assistant"


def _sides(record: Fields) -> tuple[str, str] | None:
    """Return the names of a record's first complete pair, else of the first pair with one side."""
    pairs = [(chosen, rejected) for chosen, rejected in PAIRS if _has_side(record, chosen, rejected)]
    complete = [names for names in pairs if None not in map(record.get, names)]
    return next(iter([*complete, *pairs]), None)


def _has_side(record: Fields, chosen: str, rejected: str) -> bool:
    """Return whether a record has one of two sides; one that others share counts beside the other's field."""
    if record.get(rejected) is not None:
        return True
    return record.get(chosen) is not None and (chosen not in SHARED_SIDES or rejected in record)


def has_pair(record: Fields) -> bool:
    """Return whether a record has a side of a pair, the field of a rejected side, or two answers to judge."""
    return _sides(record) is not None or _is_judged(record)


def _is_judged(record: Fields) -> bool:
    """Return whether the sides of a pair are two answers, of which another field says which is better."""
    names = _sides(record)
    two = two_answers(record)
    if names is None:
        others = has_completion(record) or has_ranking(record)
        return has_verdict(record) or (has_two_answers(record) and not others)
    if two is None or not {*names, *two.names} <= record.keys():
        return has_verdict(record)
    # Both sides may be names of the answers.
    return has_verdict({name: record[name] for name in (*names, *two.names)})


def pair(record: Fields) -> Content:
    """Return the two sides of a pair, and their scores from the record or its metadata."""
    judged = judge(record) if _is_judged(record) else None
    if judged is not None:
        prompt, better, worse = _single_turns(record, judged.better, judged.worse)
        return Content(prompt, {judged.better: better, judged.worse: worse}, None, None, judged.verdicts)
    chosen, rejected = _sides(record) or PAIRS[0]
    for name in (chosen, rejected):
        if record.get(name) is None:
            raise UnusableRecordError("missing_field", name)
    scores = _pair_scores(record)
    sides = {name: _text_alone(record[name]) for name in (chosen, rejected)}
    if all(map(_is_scored, sides.values())):
        scores = scores or finite_numbers(_scores_inside(list(sides.values())))
        sides = {name: _response(side) for name, side in sides.items()}
    if chosen == "messages" and not is_conversation(record[rejected]):
        # The other side answers the same question as the last message of `messages`.
        turns = record[chosen]
        if not ends_with_response(turns):
            role = message_role(turns[-1]) if isinstance(turns, list) and turns else None
            last = f"a message of {shown_key(role)}" if role else "no message"
            raise UnusableRecordError(
                "not_one_answer", f"the field messages ends with {last}, not with one of the assistant"
            )
        return Content(turns[:-1], sides | {chosen: turns[-1]}, scores)
    return Content(record_prompt(record, sides.values()), sides, scores)


def _single_turns(record: Fields, *names: str) -> list[Any]:
    """Return the prompt and the answers of two models; lists with one text each, also in JSON, as the texts.

    So the prompts of a chat and its answers are written in tables of Chatbot Arena.
    """
    sides = [_text_alone(record[name]) for name in names]
    lists = [from_json(value, of_texts=True) for value in (record.get("prompt"), *map(record.get, names))]
    if not all(isinstance(value, list) and value and isinstance(value[0], str) for value in lists):
        return [record_prompt(record, sides), *sides]
    if any(len(value) > 1 for value in lists):
        raise UnusableRecordError("history_differs", "the answers are to several turns of one chat")
    return [value[0] for value in lists]


def _pair_scores(record: Fields) -> tuple[float, ...] | None:
    metadata = record.get("metadata")
    for fields, names in itertools.product((record, metadata), PAIR_SCORES):
        if not isinstance(fields, Mapping):
            continue
        scores = list(map(fields.get, names))
        has_score = [score not in (None, "") for score in scores]
        if all(has_score) or (names == PAIR_SCORES[0] and any(has_score)):
            return finite_numbers(scores)
    return None


def _text_alone(side: Any) -> Any:
    """Return the text of a list with nothing else; any other value as it is."""
    return side[0] if isinstance(side, list) and len(side) == 1 and isinstance(side[0], str) else side


def _is_scored(side: Any) -> bool:
    """Return whether a side is an object with its text and its score."""
    if not isinstance(side, Mapping) or message_role(side) is not None:
        return False
    texts = [name for name in _TEXTS if side.get(name) is not None]
    return len(texts) == 1 and any(side.get(name) is not None for name in _SCORES)


# Rankings.
_TEXTS = ("content", "text", "response", "answer", "completion")
_SCORES = ("score", "fine-grained_score", "overall_score", "rating", "reward")


def has_ranking(record: Fields) -> bool:
    """Return whether a record has a list of responses."""
    return any(isinstance(record.get(name), list) for name in LISTS if not _is_output(record, name))


def _is_output(record: Fields, name: str) -> bool:
    """Return whether a field is an `output` that answers the messages of `input`: a text or one message."""
    asked, output = record.get("input"), record.get("output")
    if name != "output" or not isinstance(asked, list) or not asked or not is_messages(asked):
        return False
    turns = output if isinstance(output, list) else [output]
    return isinstance(output, str) or ends_with_response(turns)


def ranking(record: Fields) -> Content:
    """Return a list of responses: sorted by their scores, inside or beside them, else best first as given."""
    lists = [name for name in LISTS if record.get(name) is not None]
    if not lists:
        raise UnusableRecordError("missing_field", "responses")
    name = next((name for name in lists if isinstance(record[name], list)), lists[0])
    items = record[name]
    if not isinstance(items, list):
        raise UnusableRecordError("unknown_format", f"{name} is not a list")
    if len(items) < 2:
        raise UnusableRecordError("no_ranking", f"{name} has {len(items)}, not at least 2")
    objects = [item for item in items if isinstance(item, Mapping)]
    check_no_media(objects)
    if any(map(given_images, objects)):
        raise UnusableRecordError("image_in_response", f"a response in {name} has an image")
    beside = record.get("scores")
    inside = _scores_inside([item if isinstance(item, Mapping) else {} for item in items])
    is_scored = any(score is not None for score in inside)
    responses = []
    for item in items:
        is_object = isinstance(item, Mapping) and (is_scored or message_role(item) is None)
        responses.append(_response(item) if is_object else item)
    numbers = finite_numbers(inside) if is_scored else ()
    if beside is not None:
        numbers_beside = finite_numbers(beside)
        if is_scored and numbers_beside != numbers:
            raise UnusableRecordError("invalid_scores", "a response has two different scores")
        numbers = numbers_beside
    scores = None
    if numbers:
        if len(numbers) != len(items):
            raise UnusableRecordError("invalid_scores", f"{len(numbers)} scores of {len(items)} responses")
        order = sorted(range(len(items)), key=lambda index: -numbers[index])
        responses = [responses[index] for index in order]
        scores = tuple(numbers[index] for index in order)
    if any(response is None for response in responses):
        raise UnusableRecordError("missing_field", f"a response in {name}")
    if scores is not None and scores[0] == scores[-1]:
        raise UnusableRecordError("all_tied", f"all scores are {scores[0]:g}")
    by_rank = {f"rank {rank}": spelled_messages(text) for rank, text in enumerate(responses, start=1)}
    return Content(record_prompt(record, by_rank.values()), by_rank, scores, name)


def _scores_inside(responses: Sequence[Fields]) -> Sequence[Any]:
    """Return the scores inside responses, of one field, or the negatives of their ranks (1 is the best)."""
    ranks = [response.get("rank") for response in responses]
    first: list[Any] | None = None  # the values of the first field that any of them has
    for name in _SCORES:
        values = [response.get(name) for response in responses]
        if first is None and any(value is not None for value in values):
            first = values
    if all(rank is None for rank in ranks):
        return first or ranks
    places = [-rank for rank in finite_numbers(ranks)]
    scores = places if first is None else finite_numbers(first)
    for (score, place), (other, below) in itertools.combinations(zip(scores, places, strict=True), 2):
        if (score - other) * (place - below) < 0:
            raise UnusableRecordError("invalid_scores", "the scores and ranks of the responses differ")
    return scores


def _response(item: Fields) -> Any:
    """Return the text of an object of a list, or the whole message if it has tool calls or thoughts."""
    text = first_value(item, _TEXTS)
    if isinstance(text, list) and is_messages(text):
        return text
    rest = {key: item[key] for key in item if key not in (*_TEXTS, *_SCORES, "rank")}
    return {"role": "assistant", **rest, "content": text} if has_more(item) else text


# Labels of single responses, in lower case, each with its opposite.
_LABELS = """1/0 1.0/0.0 1/-1 1.0/-1.0 true/false yes/no good/bad chosen/rejected desirable/undesirable
accept/reject accepted/rejected approve/disapprove approved/disapproved correct/incorrect right/wrong
helpful/unhelpful like/dislike liked/disliked pass/fail passed/failed pos/neg positive/negative
preferred/dispreferred safe/unsafe satisfactory/unsatisfactory acceptable/unacceptable thumbs_up/thumbs_down
up/down upvote/downvote upvoted/downvoted valid/invalid"""
_GOOD, _BAD = (
    tuple(dict.fromkeys(words)) for words in zip(*(p.split("/") for p in _LABELS.split()), strict=True)
)


# Words in names of columns that have labels, or responses.
_LABEL_NAMES = {"acceptable", "accepted", "approved", "correct", "good", "helpful", "preferred"}


def is_labelled(record: Fields) -> bool:
    """Return whether a record is a single response with a label, as for KTO.

    A label that is neither good nor bad counts only beside a response: many tables have a column `label`.
    """
    words = _label_words(record)
    is_label = not words.isdisjoint(_GOOD + _BAD) or has_completion(record)
    return bool(words) and is_label and not has_pair(record) and not has_ranking(record)


def label_column(record: Fields) -> dict[str, str]:
    """Return the column for `label`: it has one, is called as good ones are, and stands beside one answer."""
    names = [name for name in map(str, record) if _LABEL_NAMES.intersection(name.lower().split("_"))]
    labels = [name for name in names if _label_words(record, (name,)) & {*_GOOD, *_BAD}]
    answers = list(filter(is_answer, map(str, record)))
    return {"label": labels[0]} if len(labels) == len(answers) == 1 else {}


def _label_words(record: Fields, names: Sequence[str] = LABELS) -> set[str]:
    """Return the labels of a record, as `_GOOD` and `_BAD` are written."""
    labels = set[str]()
    for name in names:
        label = "" if record.get(name) is None else str(record[name]).strip().lower()
        if label[:1].isalpha():
            label = "_".join(label.replace("-", " ").split())
        labels.add(label)
    return labels - {""}


def _labels_of(record: Fields) -> set[float]:
    """Return the different labels of a record: 1 for good, 0 for bad, -1 for a bad one that is written so."""
    labels = set[float]()
    for word in _label_words(record):
        if word in _GOOD:
            labels.add(1.0)
        elif word in _BAD:
            labels.add(-1.0 if word.startswith("-") else 0.0)
    return labels


def is_response(record: Fields, name: str) -> bool:
    """Return whether a field has a response or several."""
    value = record.get(name)
    if name in CONVERSATIONS:
        return ends_with_response(value)
    if _is_output(record, name):
        return True
    if name == "output" and isinstance(value, str):
        return record.get("instruction") is not None
    return isinstance(value, list) if name in LISTS else value is not None


def check_no_other(record: Fields, content: Content) -> None:
    """Check that a record has no further responses, except copies of those that are read."""
    fields = [content.field] if content.field else [*content.responses]
    values = list(map(record.get, fields))
    best = next(iter(content.responses.values()))
    others = list[str]()
    for name in (*SIDE_FIELDS, "completion", *LISTS, *CONVERSATIONS):
        if name in fields or name in content.verdicts or not is_response(record, name):
            continue
        is_copy = record[name] in values or (name in CONVERSATIONS and repeats(record[name], best))
        if not is_copy:
            others.append(name)
    if others:
        detail = f"other responses in {', '.join(others)}"
        # Without its conversation, a record may have no prompt.
        has_prompt = content.prompt is not None or any(map(is_conversation, content.responses.values()))
        columns = ignoring(others) if has_prompt else {}
        raise UnusableRecordError("ambiguous_format", detail, columns=columns)


def has_completion(record: Fields) -> bool:
    """Return whether a record has a single response."""
    has_field = any(record.get(name) is not None for name in ("completion", *CONVERSATIONS))
    return has_field or is_response(record, "output")


def completion(record: Fields) -> Content:
    """Return the one response: `completion`, the end of a conversation, `output`, or `chosen`.

    A label, if the record has one, is its score: 1 for good, 0 or -1 for bad.
    """
    labels = _labels_of(record) if is_labelled(record) else set[float]()
    if len(labels) > 1:
        raise UnusableRecordError("invalid_scores", "a good and a bad label")
    for name in ("completion", *CONVERSATIONS, "output", "chosen"):
        value = record.get(name)
        is_list = name == "output" and isinstance(value, list) and not _is_output(record, name)
        if is_response(record, name) and not is_list:
            return Content(record_prompt(record, [value]), {name: value}, tuple(labels) or None)
    if any(record.get(name) is not None for name in CONVERSATIONS):
        raise UnusableRecordError("not_one_answer", "the messages do not end with the assistant's")
    raise UnusableRecordError("missing_field", "completion or messages")


def labelled(record: Fields) -> Content:
    """Return the one response of a record, with its label as score."""
    content = completion(record)
    if not _labels_of(record):
        words = [shown_key(record[name]) for name in LABELS if record.get(name) is not None]
        raise UnusableRecordError("unknown_label", " and ".join(words) or f"no {' or '.join(LABELS)}")
    return content
