"""Types of judging: responses to a prompt, their scores, and the counts behind them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpo_dist.config.user_code import find_function, user_function
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.pairs.files import as_fields


@dataclass(frozen=True)
class Question:
    """Different responses to one prompt.

    Attributes:
        record: the prompt; its own responses are not used.
        responses: texts, none empty.
    """

    record: PreferenceRecord
    responses: tuple[str, ...]


@dataclass
class Judgement:
    """The scores of a question's responses.

    Attributes:
        scores: [responses], higher is better; None: without a usable verdict.
        counts: of requests, ties, unreadable verdicts and the like.
    """

    scores: list[float | None]
    counts: Counter[str] = field(default_factory=Counter)


class Judge(Protocol):
    """Scores responses; a reward model, a function of the user, or an endpoint."""

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """Return the judgement of each question, in their order.

        Raises:
            DpoDistError: the judge cannot be used.
        """


KEY = "pairs.function"


class FunctionJudge:
    """Calls `function(prompt, responses)` for each prompt.

    The function gets the prompt as a list of `{"role", "content"}`, or as a string if it is plain text, and
    the responses as a list of strings. It returns a list of numbers, higher is better, with None for a
    response that it cannot score.
    """

    def __init__(self, written: str):
        self._function = user_function(written, KEY)
        self._source = find_function(written, KEY)

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """Return the function's scores."""
        return [Judgement(self._scores(question)) for question in questions]

    def _scores(self, question: Question) -> list[float | None]:
        record = question.record
        prompt, *_ = as_fields(record.prompt, ())
        given = record.prompt.text if prompt is None else prompt  # type: ignore[union-attr]
        try:
            scores = list(self._function(given, list(question.responses)))
        except Exception as error:  # the user's code can raise anything
            raise self._error(
                "raises an exception", question, f"{type(error).__name__} in {_place(error)}"
            ) from error
        if len(scores) != len(question.responses):
            got = f"{len(scores)} for {len(question.responses)} responses"
            raise self._error("returns another number of scores", question, got)
        return [None if score is None else self._number(score, question) for score in scores]

    def _number(self, score: Any, question: Question) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(score, str | bool) or not math.isfinite(number):
            raise self._error("returns a score that is no finite number", question, type(score).__name__)
        return number

    def _error(self, fault: str, question: Question, got: str) -> ConfigError:
        return ConfigError(
            f"the judge {fault}",
            where=f"{KEY} at the prompt of {question.record.origin}",
            got=got,
            expected="a list with a finite number, or None, for each response",
            remedy=f"correct {self._source.name} in {self._source.file}",
        )


def describe_function(written: str) -> dict[str, Any]:
    """Return the function and the digest of its source, for provenance; without modules that it imports."""
    user_function(written, KEY)
    found = find_function(written, KEY)
    return {"kind": "function", "function": f"{found.module}:{found.name}", "digest": found.digest}


def _place(error: BaseException) -> str:
    """Return file and line of an exception; its message could quote a text."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
