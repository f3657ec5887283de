"""Two responses beside a field that names the better one, read as a pair."""

from dataclasses import dataclass
from typing import Any

from dpo_dist.data.records import Fields, UnusableRecordError


@dataclass(frozen=True)
class Comparison:
    """The fields of two compared responses.

    Attributes:
        prompt: name of the prompt; empty if the responses contain it.
        responses: names of the first and the second response.
        winner: name of the field that says which is better.
        first, second: its values if the first or the second response is better.
        ties: its values if none is.
        scores: names of the responses' scores.
    """

    prompt: str
    responses: tuple[str, str]
    winner: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    ties: tuple[str, ...] = ()
    scores: tuple[str, str] | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """All names, for messages."""
        return (*filter(None, [self.prompt]), *self.responses, self.winner)

    def matches(self, record: Fields) -> bool:
        """Return whether a record has these fields."""
        return self.winner in record and all(record.get(name) is not None for name in self.responses)

    def is_first_better(self, value: Any) -> bool:
        """Return whether the first response is better. Raises UnusableRecordError."""
        if value is None or value == "":
            raise UnusableRecordError("missing_field", self.winner)
        found = format(value, "g") if isinstance(value, int | float) else str(value).strip()
        if found in self.ties:
            raise UnusableRecordError("all_tied", f"{self.winner} says that no response is better")
        if found not in (*self.first, *self.second):
            expected = ", ".join((*self.first, *self.second, *self.ties))
            raise UnusableRecordError("invalid_scores", f"{self.winner} is none of {expected}")
        return found in self.first


COMPARISONS = (
    # PKU-SafeRLHF
    Comparison("prompt", ("response_0", "response_1"), "better_response_id", ("0",), ("1",)),
    # SHP
    Comparison(
        "history",
        ("human_ref_A", "human_ref_B"),
        "labels",
        ("1",),
        ("0",),
        scores=("score_A", "score_B"),
    ),
    # HelpSteer3
    Comparison(
        "context",
        ("response1", "response2"),
        "overall_preference",
        ("-3", "-2", "-1"),
        ("1", "2", "3"),
        ("0",),
    ),
    # Chatbot Arena, MT-Bench: whole conversations
    Comparison(
        "",
        ("conversation_a", "conversation_b"),
        "winner",
        ("model_a",),
        ("model_b",),
        ("tie", "tie (bothbad)"),
    ),
)
_WINNERS = frozenset(row.winner for row in COMPARISONS)


def as_pair(record: Fields) -> Fields:
    """Return a record of two compared responses as a pair; any other record unchanged.

    Raises:
        UnusableRecordError: `missing_field`, `invalid_scores` or `all_tied` of the field that names the
            better response; `ambiguous_format` if the record also has another pair.
    """
    if _WINNERS.isdisjoint(record):
        return record
    row = next((row for row in COMPARISONS if row.matches(record)), None)
    if row is None:
        return record
    order = 1 if row.is_first_better(record[row.winner]) else -1
    fields = {name: value for name, value in record.items() if name not in row.responses}
    found = dict(zip(("chosen", "rejected"), [record[name] for name in row.responses][::order], strict=True))
    if row.scores and all(record.get(name) is not None for name in row.scores):
        scores = [record[name] for name in row.scores][::order]
        found |= dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    if any(fields.get(name) not in (None, value) for name, value in found.items()):
        raise UnusableRecordError(
            "ambiguous_format",
            f"another pair beside {', '.join(row.responses)}; to read it, ignore {row.winner}: columns: "
            f"{{{row.winner}: null}}",
        )
    if row.prompt and fields.get("prompt") is None:
        found["prompt"] = fields.pop(row.prompt, None)
    return fields | found
