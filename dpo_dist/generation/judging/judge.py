"""Types of judging: responses to a prompt, their scores, and the counts behind them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dpo_dist.data.records import PreferenceRecord


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
