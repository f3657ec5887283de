"""Pairs and samples of finished stages, prompt by prompt, with their provenance."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_dist.config.pairs_schema import DropOrKeep, PairsConfig, PairsMethod
from dpo_dist.data.records import Dialogue, Message, PreferenceRecord, Response
from dpo_dist.generation.pair_records import as_fields, context_fields, pair_fields
from dpo_dist.generation.pairing import Selection, select_pairs
from dpo_dist.generation.prompts import PromptList, prompt_key
from dpo_dist.generation.sampling.parts import Parts
from dpo_dist.generation.sampling.responder import ModelSource

Sample = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Finished stages.

    Attributes:
        pairs: the configuration.
        prompts: all prompts.
        models: that responded.
        responses: finished parts of each model.
        scores: finished parts of the judge; None without a judge.
        facts: sampling and judge, for provenance.
        counts: filled by `pairs_of`.
    """

    pairs: PairsConfig
    prompts: PromptList
    models: Sequence[ModelSource]
    responses: Sequence[Parts]
    scores: Parts | None
    facts: Mapping[str, Any]
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Answered:
    """A prompt with all its samples; each has its `model` and, from a judge, its `score` or None."""

    record: PreferenceRecord
    samples: list[Sample]
    judge_counts: Mapping[str, int]
    dropped: str | None


def samples_of_part(responses: Sequence[Parts], index: int) -> tuple[list[list[Sample]], list[str | None]]:
    """Return the samples of each prompt of a part, and the reasons why prompts were dropped, or None.

    The samples are of all models, each with the index of its `model`.
    """
    prompts = list(zip(*(parts.read(index) for parts in responses), strict=True))
    samples = [
        [sample | {"model": model} for model, row in enumerate(rows) for sample in row["samples"]]
        for rows in prompts
    ]
    return samples, [next((row["dropped"] for row in rows if "dropped" in row), None) for rows in prompts]


def usable(samples: Sequence[Sample], pairs: PairsConfig) -> tuple[list[Sample], Counter[str]]:
    """Return the samples of one prompt that can be part of a pair, and counts of the others by reason."""
    found: dict[str, Sample] = {}
    counts: Counter[str] = Counter()
    for sample in samples:
        text = sample["content"].strip()
        response = json.dumps([text, sample.get("fields")])
        if not sample["finished"] and pairs.unfinished is DropOrKeep.drop:
            counts["unfinished"] += 1
        elif not text:
            counts["empty"] += 1
        elif not sample["same_ids"] and pairs.encoded_differently is DropOrKeep.drop:
            counts["encoded_differently"] += 1
        elif response in found:
            counts["identical"] += 1
        else:
            found[response] = sample
    return list(found.values()), counts


def pairs_of(results: Results) -> Iterator[dict[str, Any]]:
    """Yield the preference records of all prompts, in order; count in `results.counts`."""
    counts = results.counts
    for answered in _answered(results):
        counts["prompts"] += 1
        counts["samples"] += len(answered.samples)
        counts["encoded_differently"] += sum(not sample["same_ids"] for sample in answered.samples)
        counts.update(answered.judge_counts)
        if answered.dropped is not None:
            counts[f"prompts_dropped_{answered.dropped}"] += 1
            continue
        samples, unused = usable(answered.samples, results.pairs)
        counts.update({f"samples_{reason}": number for reason, number in unused.items()})
        if results.scores is None:
            yield from _delta_pair(answered, samples, results)
        else:
            yield from _scored_pairs(answered, samples, results)


def _delta_pair(answered: _Answered, samples: Sequence[Sample], results: Results) -> Iterator[dict[str, Any]]:
    """Yield the stronger model's response over the weaker one's (arXiv 2507.06187)."""
    if len(samples) < len(results.models):
        results.counts["prompts_too_few_responses"] += 1
        return
    stronger, weaker = samples
    yield _pair(answered, stronger, weaker, results)


def _scored_pairs(
    answered: _Answered, samples: Sequence[Sample], results: Results
) -> Iterator[dict[str, Any]]:
    pairs, counts = results.pairs, results.counts
    scored = [sample for sample in samples if sample["score"] is not None]
    counts["samples_without_score"] += len(samples) - len(scored)
    rule = Selection(pairs.select, pairs.margin, pairs.seed)
    chosen = select_pairs([sample["score"] for sample in scored], rule, prompt_key(answered.record), counts)
    for better, worse in chosen:
        yield _pair(answered, scored[better], scored[worse], results)


def _pair(answered: _Answered, chosen: Sample, rejected: Sample, results: Results) -> dict[str, Any]:
    scores = None if results.scores is None else (chosen["score"], rejected["score"])
    provenance = {
        "source": str(answered.record.origin),
        "method": str(results.pairs.method),
        "chosen": _origin(chosen, results),
        "rejected": _origin(rejected, results),
        **results.facts,
    }
    if results.pairs.method is PairsMethod.samples:
        provenance |= {
            "judge_counts": dict(answered.judge_counts),
            "select": str(results.pairs.select),
            "margin": results.pairs.margin,
        }
    return pair_fields(answered.record, (as_response(chosen), as_response(rejected)), scores, provenance)


def as_response(sample: Sample) -> Response:
    """Return the text of a sample, or its message if a thought is apart from its content."""
    fields = sample.get("fields")
    return (Message("assistant", sample["content"], fields),) if fields else str(sample["content"])


def _origin(sample: Sample, results: Results) -> dict[str, Any]:
    facts = ("number", "tokens", "finished")
    model = results.models[sample["model"]].described()
    return {"model": model, **{name: sample[name] for name in facts}}


def samples_of(results: Results) -> Iterator[dict[str, Any]]:
    """Yield every prompt with its responses as a scored list, which is a format of input records too."""
    for answered in _answered(results):
        kept, _ = usable(answered.samples, results.pairs)
        row: dict[str, Any] = {"responses": [], "unused": []}
        if not isinstance(answered.record.prompt, Dialogue):
            row = {"prompt": as_fields(answered.record.prompt, ())[0]} | row
        for sample in answered.samples:
            listed = _listed(answered.record, sample, results)
            has_score = results.scores is None or sample["score"] is not None
            row["responses" if sample in kept and has_score else "unused"].append(listed)
        facts = {"source": str(answered.record.origin), "dropped": answered.dropped, **results.facts}
        yield row | context_fields(answered.record) | {"provenance": facts}


def _listed(record: PreferenceRecord, sample: Sample, results: Results) -> dict[str, Any]:
    content = sample["content"]
    if isinstance(record.prompt, Dialogue):
        content = as_fields(record.prompt, (content,))[1]
    names = ("number", "tokens", "finished", "same_ids", *(() if results.scores is None else ("score",)))
    return {
        "content": content,
        **sample.get("fields", {}),
        **{name: sample[name] for name in names},
        "model": results.models[sample["model"]].name,
    }


def _answered(results: Results) -> Iterator[_Answered]:
    for index in range(results.prompts.parts):
        records = results.prompts.part(index)
        samples, dropped = samples_of_part(results.responses, index)
        judged: Sequence[Mapping[str, Any]] = [{"scores": {}, "counts": {}}] * len(records)
        if results.scores is not None:
            judged = results.scores.read(index)
        for record, own, reason, row in zip(records, samples, dropped, judged, strict=True):
            scored = [sample | {"score": row["scores"].get(str(sample["number"]))} for sample in own]
            yield _Answered(record, scored, row["counts"], reason)
