"""Types of judging: responses to a prompt, their scores, and the counts behind them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpo_dist.data.records import Dialogue, PreferenceRecord
from dpo_dist.generation.pairs.files import as_fields


@dataclass(frozen=True)
class Question:
    """Different responses to the prompt of a record, none empty; its own responses are not used."""

    record: PreferenceRecord
    responses: tuple[str, ...]

    @property
    def prompt(self) -> Any:
        """The prompt for JSON: messages as `{"role", "content"}`, or a text."""
        prompt = self.record.prompt
        return prompt.text if isinstance(prompt, Dialogue) else as_fields(prompt, ())[0]


@dataclass
class Judgement:
    """The scores of a question's responses, higher is better, None without a usable verdict; and counts."""

    scores: list[float | None]
    counts: Counter[str] = field(default_factory=Counter)


class Judge(Protocol):
    """Scores responses; a reward model, a function of the user, or an endpoint."""

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """Return the judgement of each question, in their order; raises DpoDistError."""
