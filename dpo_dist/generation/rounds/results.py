"""Results of the rounds: scores of the samples, size and outcome of each training; table and hints."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dpo_dist.atomic import write_text
from dpo_dist.data.tokenization.rendered_parts import THOUGHT_FIELDS
from dpo_dist.errors import DataError
from dpo_dist.generation.text_table import table_text
from dpo_dist.json_values import plain


@dataclass(frozen=True)
class Samples:
    """The samples of a round, before its training.

    Attributes:
        policy: the model that gave them.
        prompts: their prompts with at least one score.
        responses: those with a score; of equal responses to a prompt each counts.
        unscored: responses without a score: unfinished, empty, or without a usable verdict.
        mean_score: of the responses; None without any, and for shares of won comparisons.
        pairs: number of pairs; None if no prompt gave one, so that the rounds end.
    """

    policy: str
    prompts: int
    responses: int
    unscored: int
    mean_score: float | None
    pairs: int | None


@dataclass(frozen=True)
class Training:
    """The training of a round.

    Attributes:
        steps: optimizer steps.
        accuracy: share of pairs whose chosen response has the larger reward, in the last metrics row.
        computed: reference log-probs computed by this run.
        found: those found in the store.
        seconds: of training.
    """

    steps: int
    accuracy: float | None
    computed: int | None
    found: int | None
    seconds: float | None


@dataclass(frozen=True)
class RoundResult:
    """A round so far; the last one has samples only."""

    number: int
    samples: Samples | None = None
    training: Training | None = None


def read_result(file: Path, number: int) -> RoundResult:
    """Return the stored result of a round; an empty one if there is none.

    Raises:
        DataError: the file is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        samples, training = content["samples"], content["training"]
        return RoundResult(
            number,
            None if samples is None else Samples(**samples),
            None if training is None else Training(**training),
        )
    except FileNotFoundError:
        return RoundResult(number)
    except (ValueError, TypeError, KeyError) as fault:
        raise DataError(
            "the result of a round cannot be read",
            where=str(file),
            got=type(fault).__name__,
            remedy="delete this file and run the same command again: finished work is found again",
        ) from fault


def write_result(file: Path, result: RoundResult) -> None:
    """Write the result of a round whole."""
    write_text(file, json.dumps(asdict(result), indent=2) + "\n")


def write_results(file: Path, results: Sequence[RoundResult]) -> None:
    """Write the results of all rounds, and the hints."""
    content = {"rounds": [asdict(one) for one in results], "hints": hints(results)}
    write_text(file, json.dumps(plain(content), indent=2) + "\n")


def read_training(summary: dict[str, Any]) -> Training:
    """Return the facts of a training from the content of its summary.json."""
    reference = summary.get("reference") or {}
    final = summary.get("final") or {}
    return Training(
        steps=int(summary["steps"]),
        accuracy=final.get("rewards/accuracies"),
        computed=reference.get("computed"),
        found=reference.get("hits"),
        seconds=summary.get("train_seconds"),
    )


def samples_of(policy: str, file: Path, pairs: int | None, is_relative: bool = False) -> Samples:
    """Return the counts and the mean score of a file of samples.

    A response that equals an earlier one of its prompt has its score. Scores of comparisons (`is_relative`)
    have a mean of one half in every round, so it is not given.
    """
    prompts = responses = unscored = 0
    total = 0.0
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            scores = _scores(json.loads(line))
            known = [score for score in scores if score is not None]
            prompts += bool(known)
            responses += len(known)
            unscored += len(scores) - len(known)
            total += sum(known)
    mean = total / responses if responses and not is_relative else None
    return Samples(policy, prompts, responses, unscored, mean, pairs)


def is_exhausted(file: Path, margin: float) -> bool:
    """Return whether responses have scores, and no prompt has two that differ by more than `margin`."""
    if not file.is_file():
        return False
    has_scores = False
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            known = [score for score in _scores(json.loads(line)) if score is not None]
            has_scores = has_scores or bool(known)
            if known and max(known) - min(known) > margin:
                return False
    return has_scores


def _scores(row: Mapping[str, Any]) -> list[float | None]:
    """Return the score of every response to a prompt: of equal responses, the judge has scored the first."""
    samples = [*row["responses"], *row["unused"]]
    texts = [(one["content"].strip(), one.get(THOUGHT_FIELDS[0])) for one in samples]
    known = {
        text: one["score"] for text, one in zip(texts, samples, strict=True) if one.get("score") is not None
    }
    return [known.get(text) for text in texts]


def hints(results: Sequence[RoundResult]) -> list[str]:
    """Return sentences about scores that do not rise and responses that are all alike."""
    found = []
    scored = [(one.number, one.samples) for one in results if one.samples is not None]
    means = [(number, samples.mean_score) for number, samples in scored if samples.mean_score is not None]
    if len(means) > 1:
        (_, before), (number, after) = means[-2:]
        if after <= before:
            found.append(
                f"the mean score did not rise in round {number - 1} ({before:.4g} to {after:.4g}): look at "
                "the samples, lower optim.lr, take other prompts (pairs.prompt_parts) or more samples"
            )
    if scored and scored[-1][1].pairs is None:
        found.append(
            f"round {scored[-1][0]} has no pair: no two responses to a prompt have scores that differ by "
            "more than pairs.margin, so there is nothing more to learn from these prompts and this judge"
        )
    return found


def results_table(results: Sequence[RoundResult]) -> str:
    """Return the rounds as a table for the terminal; scores are those before a round's training."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in ("round", "responses", "mean score", "pairs", "steps", "accuracy", "reference", "seconds"):
        table.add_column(heading, justify="right")
    for one in results:
        samples, training = one.samples, one.training
        if samples is None:
            continue
        reference = (
            "" if training is None else f"{_cell(training.computed)} new, {_cell(training.found)} found"
        )
        table.add_row(
            str(one.number) if training is not None else "after",
            str(samples.responses),
            _cell(samples.mean_score, ".4f"),
            _cell(samples.pairs),
            *(
                ("", "", "", "")
                if training is None
                else (
                    str(training.steps),
                    _cell(training.accuracy, ".3f"),
                    reference,
                    _cell(training.seconds, ".0f"),
                )
            ),
        )
    return table_text(table)


def _cell(value: float | None, format_: str = "") -> str:
    return "-" if value is None else format(value, format_)
