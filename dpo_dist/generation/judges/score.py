"""Score the usable responses of a part of the prompts by the configured judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.schema import RunConfig
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.generation.judges.endpoint import EndpointJudge, describe_endpoint
from dpo_dist.generation.judges.judge import FunctionJudge, Judge, Judgement, Question, describe_function
from dpo_dist.generation.judges.reward_model import RewardModel, describe_reward_model
from dpo_dist.generation.sampling.respond import Answer


def describe_judge(config: RunConfig) -> dict[str, Any]:
    """Return everything that the judge's scores depend on, without secrets."""
    pairs = config.pairs
    if pairs.reward_model is not None:
        return describe_reward_model(pairs.reward_model, config.model, Path(config.reference.store))
    if pairs.function is not None:
        return describe_function(pairs.function)
    return describe_endpoint(pairs.endpoint)


def open_judge(config: RunConfig, device: torch.device) -> Judge:
    """Return the judge, ready to score."""
    pairs = config.pairs
    if pairs.reward_model is not None:
        return RewardModel(pairs.reward_model, config.model, device)
    return FunctionJudge(pairs.function) if pairs.function else EndpointJudge(pairs.endpoint)


def score(
    records: Sequence[PreferenceRecord], answers: Sequence[Sequence[Answer]], judge: Judge
) -> list[dict[str, Any]]:
    """Return a row for each prompt: `{"scores": {number: score or null}, "counts": {...}}`.

    The judge is asked about every prompt with an answer, also a single one, so that a mean score is of all.
    """
    questions = [
        Question(record, tuple(answer.content for answer in own))
        for record, own in zip(records, answers, strict=True)
        if own
    ]
    judgements = iter(judge.judge(questions))
    rows: list[dict[str, Any]] = []
    for own in answers:
        judgement = next(judgements) if own else Judgement([])
        numbers = [str(answer.number) for answer in own]
        counts = {name: number for name, number in judgement.counts.items() if number}
        rows.append({"scores": dict(zip(numbers, judgement.scores, strict=True)), "counts": counts})
    return rows
