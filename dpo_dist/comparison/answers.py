"""`answers.jsonl`: the responses of all models prompt by prompt, from the finished parts of all stages."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_dist.comparison.judging import all_credits
from dpo_dist.comparison.prompts import held_out_facts, shown_prompt
from dpo_dist.comparison.results import Tally
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.generation.prompts import PromptList, prompt_key
from dpo_dist.generation.sampling.parts import Parts

Row = dict[str, Any]
DIFFERING = "differing "
"""With a model's name, the count of prompts that it encodes as other tokens than the base."""


@dataclass(frozen=True)
class Finished:
    """The finished parts of all stages.

    Attributes:
        responses: of each model, the base first.
        logps: of each model's responses under itself.
        base_logps: the same under the base; None for a model with other tokens.
        judged: of the judge; None without one.
    """

    responses: Sequence[Parts]
    logps: Sequence[Parts]
    base_logps: Sequence[Parts | None]
    judged: Parts | None


def answers(finished: Finished, prompts: PromptList, tally: Tally, counts: Counter[str]) -> Iterator[Row]:
    """Yield the rows of `answers.jsonl`; count in `tally` and `counts`.

    A prompt that a model cannot be asked has no row: it is counted by its reason.
    """
    with prompts.file.open("rb") as lines:
        for index in range(prompts.parts):
            records = prompts.part(index)
            for record, own in zip(records, _of_part(finished, index, len(records)), strict=True):
                chosen, source = held_out_facts(next(lines))
                counts.update(own.judged.get("counts", {}))
                reason = _dropped(own.responses)
                if reason is not None:
                    counts[f"prompts_dropped_{reason}"] += 1
                    continue
                _count_differing(own.responses, tally.models, counts)
                responses = _responses(own, tally.models)
                own_credits = None if finished.judged is None else _credits(own, responses)
                tally.add(responses, own_credits)
                yield _answers(record, chosen, source, responses) | _verdicts(tally.models, own_credits)


def texts_of(rows: Sequence[Row]) -> list[str]:
    """Return the models' responses to a prompt; empty if one of them cannot be asked."""
    return [] if _dropped(rows) is not None else [str(row["samples"][0]["content"]) for row in rows]


def _count_differing(rows: Sequence[Row], names: Sequence[str], counts: Counter[str]) -> None:
    for name, row in zip(names, rows, strict=True):
        counts[f"{DIFFERING}{name}"] += row["prompt_ids"] != rows[0]["prompt_ids"]


def _responses(own: "_OfPrompt", names: Sequence[str]) -> dict[str, Row]:
    scores = own.judged.get("scores", [None] * len(names))
    rows = zip(names, own.responses, own.logps, own.base_logps, scores, strict=True)
    return {name: _response(*facts) for name, *facts in rows}


def _credits(own: "_OfPrompt", responses: Mapping[str, Row]) -> list[float | None]:
    texts = [response["text"] for response in responses.values()]
    scores = [response["score"] for response in responses.values()]
    return all_credits(texts, scores, own.judged.get("credits"))


def _verdicts(names: Sequence[str], own_credits: Sequence[float | None] | None) -> Row:
    """Return the verdicts on every two responses; without a judge nothing."""
    if own_credits is None:
        return {}
    pairs = zip(itertools.combinations(names, 2), own_credits, strict=True)
    return {"verdicts": [{"first": one, "second": two, "credit": credit} for (one, two), credit in pairs]}


@dataclass(frozen=True)
class _OfPrompt:
    """The rows of all stages for one prompt, those of models in their order."""

    responses: Sequence[Row]
    logps: Sequence[float | None]
    base_logps: Sequence[float | None]
    judged: Row


def _of_part(finished: Finished, index: int, prompts: int) -> Iterator[_OfPrompt]:
    nothing: list[Row] = [{"logp": None}] * prompts
    judged = [{}] * prompts if finished.judged is None else finished.judged.read(index)
    rows = zip(
        zip(*(parts.read(index) for parts in finished.responses), strict=True),
        zip(*(parts.read(index) for parts in finished.logps), strict=True),
        zip(*(nothing if p is None else p.read(index) for p in finished.base_logps), strict=True),
        judged,
        strict=True,
    )
    for responses, logps, base_logps, of_judge in rows:
        yield _OfPrompt(
            responses, [row["logp"] for row in logps], [row["logp"] for row in base_logps], of_judge
        )


def _dropped(rows: Sequence[Row]) -> str | None:
    """Return the first reason for which a model cannot be asked this prompt; None if all can."""
    return next((row["dropped"] for row in rows if "dropped" in row), None)


def _response(row: Row, logp: float | None, base_logp: float | None, score: float | None) -> Row:
    sample = row["samples"][0]
    return {
        "text": sample["content"],
        "tokens": sample["tokens"],
        "finished": sample["finished"],
        "logp": logp,
        "base_logp": base_logp,
        "logp_tokens": len(sample["ids"]),
        "score": score,
    }


def _answers(record: PreferenceRecord, chosen: str | None, source: str, responses: dict[str, Row]) -> Row:
    return {
        "prompt_id": prompt_key(record)[:16],
        "prompt": shown_prompt(record.prompt),
        "source": source,
        "chosen": chosen,
        "responses": responses,
    }
