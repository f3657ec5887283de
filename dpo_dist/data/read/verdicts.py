"""Verdicts: fields that say which of two responses is better, beside two answers or beside a pair."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from dpo_dist.data.records import UnusableRecordError, shown_key
from dpo_dist.foundation.types import Fields


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words in the names of answers, and of what is no answer although its name is like that of one.
_ANSWERS = _set(
    "answer assistant candidate chat completion continuation conversation dialogue generation message "
    "messages output ref reply response result solution story summary text"
)
_NO_ANSWERS = _set("context input instruction prompt query question system user")
# Words of names that say themselves which answer is better.
_BETTER_OR_WORSE = _set(
    "accepted bad best better chosen correct dispreferred good incorrect loser negative non positive "
    "preferred rejected right winner worse worst wrong"
)
# Words of the first and of the second answer, in names and in verdicts.
_ORDERS = (("a", "b"), ("0", "1"), ("1", "2"), ("one", "two"), ("first", "second"), ("left", "right"))
_PLACES = {word: place for pair in _ORDERS for place, word in enumerate(pair) if not word.isdigit()}
# The last word of a verdict's name, but for those of `_ENDS`. A name of `_LOOSE` is also that of other
# columns: beside a pair it is a verdict only if its value says chosen, rejected or a tie. A name of
# `_INVERSE` says which response is worse.
_STRICT = _set(
    "best better choice decision favorite favourite judgement judgment picked prefer preference preferred "
    "safer verdict vote winner winning"
)
_LOOSE = _set("chosen label labels outcome result selected selection status")
_INVERSE = _set("dispreferred loser losing rejected worse worst")
_NAMES = _STRICT | _LOOSE | _INVERSE
# Before the last word of a name they turn its meaning: `less_preferred`, `rejected_choice`, `second_best`.
_TURNED = _INVERSE | _set("anti bad dis inverse least less lower no non not second un unsafe wrong")
_ENDS = _set("answer completion id idx index label model option output response side")
_COUNT_FROM_0 = frozenset(("idx", "index"))
# In the name of a flag, which is true or false: `winner_model_a`, `response_1_is_better`, `is_tie`.
_FLAGS = _set("best better chosen preferred prefers winner wins won")
_TIE_FLAGS = _set("draw tie tied")
_TRUTHS = {
    **dict.fromkeys(("true", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "0", "0.0"), False),
}
_TIES = _set("both bothbad draw equal equally neither same tie tied")
_AROUND_TIES = _TIES | _set("a are bad good is")
# Words around the one that names an answer: "Response A is slightly better".
_FILLERS = (
    _ANSWERS
    | _FLAGS
    | _set("chatbot clearly is model much option side significantly slightly strongly system the")
)
# In the names of who gave an answer. The values of other fields that differ as the answers do, such as
# `safety_a` and `safety_b`, are no names of answers.
_GIVERS = _set("agent assistant author bot chatbot generator id llm model name policy source system")
_COMPARED = re.compile(r"\W*(\w+) ?(<+|>+|=+) ?(\w+)\W*")  # A>>B
_LONGEST = 60  # characters of a verdict: anything longer is a text
_TIE = 2
_FEWEST = 4  # values of a column, and of its different values at most
_SHORT = 20  # characters
# Of HelpSteer2 and HelpSteer3: below 0 the first response is better, above 0 the second. Another of their
# fields tells them from a table with numbers of its own meaning.
_SIGNED = {"preference_strength": "preference_statement", "overall_preference": "individual_preference"}


class TwoAnswers(NamedTuple):
    """The names of two fields that differ in one word, and these words: `answer_a`, `answer_b`; a, b."""

    names: tuple[str, str]
    words: tuple[str, str]

    @property
    def is_ordered(self) -> bool:
        """Whether the words say which answer is the first."""
        return self.words in _ORDERS


class Judged(NamedTuple):
    """The names of the better and the worse of two answers, and of the fields that say so."""

    better: str
    worse: str
    verdicts: tuple[str, ...]


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    """Return the words and numbers of a name or a verdict: those of `answerA` and `Answer_a` are equal."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return tuple(re.findall(r"[^\W\d_]+|\d+", spaced.lower()))


@lru_cache(maxsize=4096)
def _name(name: str) -> str:
    """Return the word by which the name of a field is that of a verdict; "" if it is not."""
    words = list(_words(name))
    while len(words) > 1 and words[-1] in _ENDS - _NAMES:
        words.pop()
    if len(words) > 1 and words[-1] in _ENDS and words[-2] in _NAMES:  # `winner_label`, but `gold_label`
        words.pop()
    is_turned = not _TURNED.isdisjoint(words[:-1])
    return words[-1] if words and words[-1] in _NAMES and not is_turned else ""


@lru_cache(maxsize=4096)
def is_verdict(name: str) -> bool:
    """Return whether the name of a field is that of a verdict, of a flag, or of an amount of preference."""
    return bool(_name(name)) or _is_flag(name) or name in _SIGNED or _is_strength(name)


def _is_strength(name: str) -> bool:
    """Return whether a field says how much better the first of two answers is; others are of other things."""
    return _words(name) in (("strength",), ("preference", "strength"))


def _is_flag(name: str) -> bool:
    return not _FLAGS.isdisjoint(_words(name)) or _is_tie_flag(name)


def _is_tie_flag(name: str) -> bool:
    return not _TIE_FLAGS.isdisjoint(_words(name)[-1:])  # but `tied_embeddings`


def is_answer(name: str) -> bool:
    """Return whether the name of a field is that of an answer."""
    return not _ANSWERS.isdisjoint(_words(name))


def two_answers(names: Iterable[str]) -> TwoAnswers | None:
    """Return two fields by name of which each has an answer; None if there are none, or more."""
    return _two_answers(tuple(names))


@lru_cache(maxsize=256)
def _two_answers(names: tuple[str, ...]) -> TwoAnswers | None:
    # `response_0_source` is about an answer: the shortest names are the answers.
    answers = list(filter(is_answer, names))
    twins = []
    for one, other in itertools.combinations(answers, 2):
        words = _difference(_words(one), _words(other))
        if words is not None:
            two = TwoAnswers((other, one), words[::-1])
            if not two.is_ordered:
                two = TwoAnswers((one, other), words)
            twins.append(two)
    length = min((len(_words(two.names[0])) for two in twins), default=0)
    twins = [two for two in twins if len(_words(two.names[0])) == length]
    ordered = [two for two in twins if two.is_ordered]
    # `response_model` beside `response_a` and `response_b` is no third answer, but `response_c` is one.
    marks = set[str]()
    for two in twins:
        marks |= {word for word in two.words if word.isdigit() or len(word) == 1}
    if len(ordered) == 1 and marks <= {*ordered[0].words}:
        return ordered[0]
    return twins[0] if len(twins) == 1 else None


def are_twins(one: str, other: str) -> bool:
    """Return whether two names are those of answers that differ in one word."""
    return _difference(_words(one), _words(other)) is not None


def _difference(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the only words in which the names of two answers differ; None for other names."""
    if len(one) != len(other):
        return None
    different = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
    shared = set(one) & set(other)
    if len(different) != 1 or shared.isdisjoint(_ANSWERS):
        return None
    [pair] = different
    is_ordered = pair in _ORDERS or pair[::-1] in _ORDERS
    return pair if is_ordered or (_NO_ANSWERS | _BETTER_OR_WORSE).isdisjoint((*one, *other)) else None


def judge(record: Fields) -> Judged | None:
    """Return which of two answers in a record is better; None if it has no two answers.

    Raises UnusableRecordError: `missing_field` for an empty verdict, `all_tied`, or `unread_verdict` for one
    that can mean several things.
    """
    two = _given_answers(record)
    if two is None:
        return None
    votes = dict[str, int]()
    for name in record:
        vote = _vote(record, name, two)
        if vote is not None:
            votes[name] = vote
    # Beside `raw_preference: 2` a `preference: 1.27` may say something else, which a text or a model's name
    # does not.
    for name in record.keys() - votes.keys() if votes else ():
        value = record[name]
        if _name(name) in _STRICT and isinstance(value, int | float) and not isinstance(value, bool):
            raise unread_verdict(record, two, f"{shown_key(name)}: {shown_key(value)}", name)
    places = set(votes.values())
    if places == {_TIE}:
        raise UnusableRecordError("all_tied", f"a tie by {', '.join(map(shown_key, votes))}")
    if len(places) == 1:
        place = places.pop()
        verdicts = tuple(name for name in record if name in votes or _is_flag(name))
        return Judged(two.names[place], two.names[1 - place], verdicts)
    if votes:
        # The remedy keeps the sides of a pair that the user made, else the first verdict.
        first, *others = votes
        sides = [name for name in votes if _name(name) in ("chosen", "rejected")]
        if len({votes[name] for name in sides}) == 1:
            first = sides[0]
            others = [name for name in votes if name not in sides]
        detail = f"{', '.join(map(shown_key, votes))} contradict each other"
        raise unread_verdict(record, two, detail, first, dict.fromkeys(others, "null"))
    # `status: completed` of an export stands beside a verdict of a stricter name.
    verdicts = tuple(sorted(filter(is_verdict, record), key=lambda name: _name(name) in _LOOSE))
    full = next((name for name in verdicts if _is_given(record[name])), None)
    if verdicts and full is None:
        raise UnusableRecordError("missing_field", shown_key(verdicts[0]))
    if full is None:
        detail = f"{' and '.join(map(shown_key, two.names))}, and no verdict"
        raise unread_verdict(record, two, detail, "COLUMN")
    raise unread_verdict(record, two, f"{shown_key(full)}: {shown_key(record[full])}", full)


def has_verdict(record: Fields) -> bool:
    """Return whether a record has two answers, and a field that says which of them is better."""
    two = _given_answers(record)
    return two is not None and any(_vote(record, name, two) is not None for name in record)


def has_two_answers(record: Fields) -> bool:
    """Return whether a record has two answers that are called the first and the second, or a verdict."""
    two = _given_answers(record)
    return two is not None and are_judged(record)


def are_judged(names: Iterable[str]) -> bool:
    """Return whether names are those of two answers of which neither is the better one by its name."""
    two = two_answers(names)
    return two is not None and (two.is_ordered or any(map(_name, names)))


def unread_verdict(
    record: Fields,
    two: TwoAnswers,
    detail: str,
    verdict: str,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> UnusableRecordError:
    """Return the error for a verdict that is not read; its fields: the verdict, the answers, then others."""
    others = [field for field in record if field not in (verdict, *two.names)]
    fields = list(map(shown_key, (verdict, *two.names, *others)))
    return UnusableRecordError("unread_verdict", detail, fields=fields, columns=columns)


def reader_of(verdict: str, first: str, second: str) -> str:
    """Return a function that reads two answers and a verdict, for the user to write its two values."""
    return (
        "def read(record):\n"
        f"    better = {{'VALUE_1': {first!r}, 'VALUE_2': {second!r}}}[str(record.pop({verdict!r}))]\n"
        f"    answers = {{name: record.pop(name) for name in ({first!r}, {second!r})}}\n"
        "    chosen = answers.pop(better)\n"
        "    return {**record, 'chosen': chosen, 'rejected': answers.popitem()[1]}"
    )


def _given_answers(record: Fields) -> TwoAnswers | None:
    two = two_answers(record)
    return two if two is not None and all(_is_given(record[name]) for name in two.names) else None


def _is_given(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _vote(record: Fields, name: str, two: TwoAnswers) -> int | None:
    """Return which answer a field calls the better one, 0 or 1, or that it says a tie; None for neither."""
    value = record[name]
    words = _words(name)
    if not _is_given(value) or name in two.names:
        return None
    truth = _TRUTHS.get(str(value).strip().lower())
    if truth is not None and _is_tie_flag(name):
        return _TIE if truth else None
    places = [place for place in (0, 1) if two.words[place] in words]
    is_turned = not _TURNED.isdisjoint(set(words) - set(two.words))
    if two.is_ordered and not _FLAGS.isdisjoint(words) and len(places) == 1 and not is_turned:
        return places[0] if truth else None
    if name in _SIGNED:
        if _SIGNED[name] not in record or not isinstance(value, int | float) or two.words != ("1", "2"):
            return None
        return _TIE if value == 0 else int(value > 0)
    if not _name(name):
        return None
    vote = _place(record, value, two, counts_from_0=not _COUNT_FROM_0.isdisjoint(words))
    return 1 - vote if vote in (0, 1) and _name(name) in _INVERSE else vote


def _place(record: Fields, value: Any, two: TwoAnswers, *, counts_from_0: bool) -> int | None:
    """Return the place of the answer that a value names, or a tie."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value).strip().removesuffix(".0")
    # The name of a model, or the answer itself; a number may be one of another meaning.
    for one, other in _alike(tuple(record), two):
        are_equal = [
            isinstance(record[field], str) and record[field].strip() == text for field in (one, other)
        ]
        if sum(are_equal) == 1 and not math.isfinite(_number(text)):
            return are_equal.index(True)
    if len(text) > _LONGEST or text.startswith("-"):  # a negative number names no answer
        return None
    compared = _COMPARED.fullmatch(text)
    if compared:
        left, sign, right = compared.groups()
        # `winner=A` is no tie: its left word names no answer.
        tie = "tie" if left.lower() in (*two.words, *_PLACES, "0", "1", "2") else right
        text = {"<": right, ">": left, "=": tie}[sign[0]]
    words = _words(text)
    if words and _AROUND_TIES.issuperset(words) and not _TIES.isdisjoint(words):
        return _TIE
    ignored = _FILLERS.union(_words(two.names[0])) - set(two.words)
    rest = [word for word in words if word not in ignored]
    if len(rest) != 1:
        return None
    [word] = rest
    if word in two.words:
        is_index = counts_from_0 and two.words == ("1", "2")
        return None if is_index else two.words.index(word)
    return _PLACES.get(word) if two.is_ordered else None


@lru_cache(maxsize=256)
def _alike(names: tuple[str, ...], two: TwoAnswers) -> list[tuple[str, str]]:
    """Return the answers, and the fields that name who gave them in the same words: `model_a`, `model_b`."""
    by_words = {_words(name): name for name in names}
    first, second = two.words
    pairs = list[tuple[str, str]]()
    for words, name in by_words.items():
        is_of_first = words.count(first) == 1
        names_giver = not _GIVERS.isdisjoint(words)
        if is_of_first and (name in two.names or names_giver):
            other = by_words.get(tuple(second if word == first else word for word in words))
            if other:
                pairs.append((name, other))
    return pairs


def contradicting(record: Fields, names: Iterable[str], sides: Sequence[str]) -> list[str]:
    """Return those of the fields that do not say that the first of two sides is the better one."""
    chosen, rejected = sides
    two = TwoAnswers((chosen, rejected), ("chosen", "rejected"))
    others = {name: record[name] for name in names}
    # Who makes a pair of two answers and a verdict may keep their columns.
    answers = _given_answers(others)
    texts = [_last_text(others[name]) for name in answers.names] if answers is not None else []
    best, worst = (_last_text(record[name]) for name in sides)
    place = texts.index(best) if best != worst and set(texts) == {best, worst} else None
    against = []
    for name in filter(is_verdict, others):
        vote = _vote(others, name, answers) if answers is not None and place is not None else None
        if _contradicts(record, name, two) if vote is None else vote != place:
            against.append(name)
    return against


def _last_text(value: Any) -> str:
    """Return a text, or that of the last of some messages."""
    last = value[-1] if isinstance(value, list) and value else value
    text = last.get("content", last.get("value")) if isinstance(last, Mapping) else last
    return text if isinstance(text, str) else repr(text)


def _contradicts(record: Fields, name: str, sides: TwoAnswers) -> bool:
    value = record[name]
    words = _words(name)
    truth = _TRUTHS.get(str(value).strip().lower())
    if _is_tie_flag(name):
        return truth is True
    in_name = set(sides.words) & set(words)
    if truth is not None and in_name and not (_FLAGS - in_name).isdisjoint(words):  # `chosen_is_better`
        return truth is (in_name == {"rejected"})
    if name in _SIGNED or _is_strength(name):
        return _number(value) <= 0
    word = _name(name)
    place = _place(record, value, sides, counts_from_0=False) if word else None
    if place in (0, 1):
        return place == (0 if word in _INVERSE else 1)
    return place == _TIE or (word in _STRICT and _names_a_side(value))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.inf


def _names_a_side(value: Any) -> bool:
    """Return whether a value is a word or a number for the first or the second of any two answers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or len(str(value)) > _LONGEST:
        return False
    words = [word for word in _words(str(value).removesuffix(".0")) if word not in _FILLERS]
    return len(words) == 1 and (words[0] in _PLACES or words[0] in ("0", "1", "2"))


def check_columns(record: Fields, columns: Mapping[str, str | None]) -> None:
    """Check that `columns` do not call two answers chosen and rejected while a verdict beside them is unread.

    A column that the user ignores by its name is no verdict. Raises UnusableRecordError: `unread_verdict`.
    """
    two = _given_answers(record)
    if two is None or set(two.names) != set(map(columns.get, ("chosen", "rejected"))):
        return
    for name in record:
        value = record[name]
        if name in two.names or name in columns or not _is_given(value):
            continue
        if is_verdict(name):
            is_number = isinstance(value, bool | int | float)
            is_unread = is_number or _names_a_side(value) or _vote(record, name, two) is not None
        else:
            is_unread = isinstance(value, str) and _place({}, value, two, counts_from_0=True) is not None
        if is_unread:
            detail = f"{shown_key(name)}: {shown_key(value)}, beside columns that call an answer chosen"
            raise unread_verdict(record, two, detail, name)


def are_verdicts(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return whether the values of a side are a few short ones that repeat, beside longer ones."""
    texts = [value.strip() for value in values if isinstance(value, str)]
    longer = [other for other in others if not isinstance(other, str) or not _is_short(other)]
    is_repeated = len(texts) >= _FEWEST and 2 * len(set(texts)) <= len(texts) and len(set(texts)) <= _FEWEST
    return is_repeated and all(map(_is_short, texts)) and 2 * len(longer) > len(others)


def _is_short(text: str) -> bool:
    return len(text) <= _SHORT and len(text.split()) <= 2
