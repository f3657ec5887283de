"""The configured judge: asked before the work, described for provenance, and its scores of a part."""

import math
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.schema import RunConfig
from dpo_dist.config.user_code import find_function, user_function
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.judges.endpoint import EndpointJudge, describe_endpoint
from dpo_dist.generation.judges.judge import Judge, Judgement, Question
from dpo_dist.generation.judges.reward_model import RewardModel, check_reward_model, describe_reward_model
from dpo_dist.generation.sampling.respond import Answer

KEY = "pairs.function"


def ask_judge(config: RunConfig) -> str:
    """Check the judge without its weights; ask an endpoint once. Return its description."""
    pairs = config.pairs
    if pairs.reward_model is not None:
        return check_reward_model(pairs.reward_model, config.model)
    if pairs.function is not None:  # found by `check_judge`
        return f"function {pairs.function}"
    EndpointJudge(pairs.endpoint, retries=0).check()
    return f"{pairs.endpoint.model} at {pairs.endpoint.url} replies"


def describe_judge(config: RunConfig) -> dict[str, Any]:
    """Return everything that the judge's scores depend on, without secrets."""
    pairs = config.pairs
    if pairs.reward_model is not None:
        return describe_reward_model(pairs.reward_model, config.model, Path(config.reference.store))
    if pairs.function is None:
        return describe_endpoint(pairs.endpoint)
    user_function(pairs.function, KEY)
    found = find_function(pairs.function, KEY)
    return {"kind": "function", "function": f"{found.module}:{found.name}", "digest": found.digest}


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
        scores = dict(zip(numbers, judgement.scores, strict=True))
        rows.append({"scores": scores, "counts": dict(+judgement.counts)})
    return rows


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
        try:
            scores = list(self._function(question.prompt, list(question.responses)))
        except Exception as error:  # the user's code can raise anything; its message could quote a text
            place = traceback.extract_tb(error.__traceback__)[-1]
            got = f"{type(error).__name__} in {place.filename}:{place.lineno}"
            raise self._error("raises an exception", question, got) from error
        if len(scores) != len(question.responses):
            got = f"{len(scores)} for {len(question.responses)} responses"
            raise self._error("returns another number of scores", question, got)
        for score in scores:
            try:
                is_number = score is None or (not isinstance(score, str | bool) and math.isfinite(score))
            except TypeError:
                is_number = False
            if not is_number:
                fault = "returns a score that is no finite number"
                raise self._error(fault, question, type(score).__name__)
        return [None if score is None else float(score) for score in scores]

    def _error(self, fault: str, question: Question, got: str) -> ConfigError:
        return ConfigError(
            f"the judge {fault}",
            where=f"{KEY} at the prompt of {question.record.origin}",
            got=got,
            expected="a list with a finite number, or None, for each response",
            remedy=f"correct {self._source.name} in {self._source.file}",
        )
