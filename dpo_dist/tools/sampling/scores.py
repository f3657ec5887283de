"""Join the completions of several models, and have a judge score them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from dpo_dist.data import PreferenceRecord
from dpo_dist.tools.sampling.judges import Judge, Judgement, Question
from dpo_dist.tools.sampling.keys import DropOrKeep
from dpo_dist.tools.sampling.prompts import Parts, Prompts
from dpo_dist.tools.sampling.respond import Completion, Completions


def finish_scores(
    prompts: Prompts,
    responses: Sequence[Parts],
    judge: Judge | None,
    judge_facts: Mapping[str, Any] | None,
    unfinished: DropOrKeep,
) -> Parts:
    """Return the finished completions of all models with the judge's scores; collective.

    `responses`: of each model.
    """

    def scored(index: int) -> list[dict[str, Any]]:
        rows = zip(*(map(Completions.from_row, parts.read(index)) for parts in responses), strict=True)
        joined = [joined_completions(row, unfinished) for row in rows]
        return list(map(asdict, score(prompts.parts[index], joined, judge)))

    names = [parts.folder.name for parts in responses]
    inputs = {"responses": names, "unfinished": str(unfinished), "judge": judge_facts}
    return prompts.finish("scores", prompts.stage("scores", inputs), scored)


def _text(completion: Completion) -> str:
    """Return the text by which completions are compared."""
    return json.dumps([completion.content.strip(), completion.fields])


def joined_completions(by_model: Sequence[Completions], unfinished: DropOrKeep) -> Completions:
    """Return a prompt's completions by all models; `unused` says why one cannot be in a pair."""
    completions = list[Completion]()
    dropped = None
    texts = set[str]()
    for model, row in enumerate(by_model):
        if dropped is None:
            dropped = row.dropped
        for completion in row.completions:
            unused = None
            text = _text(completion)
            if not completion.finished and unfinished is DropOrKeep.drop:
                unused = "unfinished"
            elif not completion.content.strip():
                unused = "empty"
            elif text in texts:
                unused = "identical"
            else:
                texts.add(text)
            completions.append(replace(completion, model=model, unused=unused, ids=[]))
    return Completions(completions, dropped)


def score(
    records: Sequence[PreferenceRecord], rows: Sequence[Completions], judge: Judge | None
) -> list[Completions]:
    """Return the completions of each prompt with scores and the judge's counts; unchanged without a judge.

    The judge also scores a prompt's only completion, so that the mean score covers all prompts. It scores
    equal completions once, and all get this score.
    """
    if judge is None:
        return list(rows)
    usable = [[completion for completion in row.completions if completion.unused is None] for row in rows]
    questions = []
    for record, completions in zip(records, usable, strict=True):
        if completions:
            questions.append(Question(record, tuple(completion.content for completion in completions)))
    judgements = iter(judge.judge(questions))
    rows_with_scores = []
    for row, usable_of_row in zip(rows, usable, strict=True):
        judgement = next(judgements) if usable_of_row else Judgement([])
        scores = dict(zip(map(_text, usable_of_row), judgement.scores, strict=True))
        completions = []
        for completion in row.completions:
            value = scores.get(_text(completion))
            unused = completion.unused
            if value is None and unused is None:
                unused = "without_score"
            completions.append(replace(completion, score=value, unused=unused))
        rows_with_scores.append(replace(row, completions=completions, counts=dict(+judgement.counts)))
    return rows_with_scores
