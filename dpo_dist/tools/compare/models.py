"""Ask two models the same prompts, have their answers judged, and write the result."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import numpy as np

import dpo_dist
from dpo_dist.data import (
    DataConfig,
    DataSource,
    Dialogue,
    Part,
    PreferenceRecord,
    Prompt,
    prompt_hash,
    source_labels,
    turns_of,
)
from dpo_dist.data.counts import count_lines
from dpo_dist.foundation import files
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.text import pluralize
from dpo_dist.kit import (
    Column,
    RunConfig,
    bootstrap_intervals,
    count_trained,
    in_chunks,
    joined_run,
    return_memory,
    whole_model,
)
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.start import MODELS_KEY, NamedModel
from dpo_dist.tools.pages.thumbnails import thumbnails, with_marks
from dpo_dist.tools.sampling.keys import DropOrKeep, SamplingConfig
from dpo_dist.tools.sampling.prompts import (
    DROPPED_PROMPT_PREFIX,
    PROMPTS_OF_A_PART,
    Parts,
    Prompts,
    as_user_message,
    find_model_together,
    good_records,
    open_judge_together,
)
from dpo_dist.tools.sampling.respond import Completions, open_generator
from dpo_dist.tools.sampling.scores import finish_scores
from dpo_dist.tools.sampling.settings import sampling_for

_Row = dict[str, Any]
WON = 1.0
TIED = 0.5
LOST = 0.0


USUAL_PROMPTS = 128
"""Prompts of a comparison without `sampling.prompts`."""


def held_out(
    data: DataConfig, most: int, say: Callable[[str], None]
) -> tuple[list[PreferenceRecord], dict[str, str]]:
    """Return `most` different prompts of the evaluation data, and source labels by `prompt_key`.

    A hash of the prompt decides which are chosen. They keep the order of the data, and their first response.
    """
    labels = dict[str, str]()
    sources = data.eval_sources
    part = Part.to_evaluate(data)

    def ranked() -> Iterator[tuple[str, int, PreferenceRecord]]:
        for source, label in zip(sources, source_labels(sources), strict=True):
            for record in good_records(DataSource(source).pinned().prompts(), source, data, say):
                scores = record.scores if record.labelled_side else None
                prompt = replace(as_user_message(record, data), responses=record.responses[:1], scores=scores)
                key = prompt.prompt_key()
                if key not in labels and part.has(prompt_hash(record.prompt, record.images)):
                    labels[key] = label
                    yield files.text_digest(f"0 {key}"), len(labels), prompt

    prompts = heapq.nsmallest(most, ranked())
    if not prompts:
        raise DataError(
            "the evaluation data have no usable prompt",
            where="data.eval",
            got=", ".join(source.path for source in sources),
            remedy="check the counts above, or raise data.eval_share",
        )
    line = f"prompts: {len(prompts):,} of {pluralize(len(labels), 'different one')}"
    if len(prompts) < most:
        line += f", fewer than sampling.prompts={most}"
    say(line)
    return [prompt for *_, prompt in sorted(prompts, key=lambda entry: entry[1])], labels


def compare_models(config: RunConfig, models: Sequence[NamedModel], console: Console) -> _Row | None:
    """Write the answers of both models and the result; return the result on rank 0."""
    folder = ComparisonFolder(config.run.path)
    # Without a lock two starts would write the same parts.
    lock = files.locked(folder.comparison / folder.lock.name, "compares models in this run directory")
    with joined_run(config, console, lock) as run:
        world = run.world
        settings = config.section_of(SamplingConfig)
        most = settings.prompts or USUAL_PROMPTS
        with console.heartbeat("reading prompts"):
            records, labels = world.on_main(lambda: held_out(config.data, most, console.say))
        prompts = Prompts(run, folder.comparison_parts, list(in_chunks(records, PROMPTS_OF_A_PART)))
        judge, judge_facts = open_judge_together(run)
        sampling = sampling_for("compare", settings)
        answers = []
        facts = []
        for model in models:
            location = whole_model(model.location, folder.comparison_models, run)
            source = replace(find_model_together(location, run, MODELS_KEY), name=model.name)
            open_model = cache(partial(open_generator, source, config.model, config.data, world.device))
            answers.append(prompts.responses(source, sampling, range(1), open_model))
            facts.append({"name": model.name, "path": model.path, "digest": source.digest})
            open_model.cache_clear()  # the next model needs the memory
            return_memory()

        scores = finish_scores(prompts, answers, judge, judge_facts, DropOrKeep.keep)

        def write() -> _Row:
            counts = Counter[str]()
            files.remove_abandoned(folder.comparison)
            with files.staged_file(folder.comparison_answers) as temporary:
                names = [model.name for model in models]
                rows = answer_rows(prompts, names, scores, labels, counts, is_judged=judge is not None)
                if not files.write_lines(temporary, rows):
                    raise DataError(
                        "no prompt can be used with both models",
                        where="data.eval",
                        got="; ".join(line.strip() for line in count_lines(counts)),
                        remedy="raise data.max_length, lower sampling.max_new_tokens, or use other data",
                    )
                found = comparison(files.read_lines(temporary), [model.name for model in models])
            hashes = [prompt_hash(record.prompt, record.images) for record in records]
            for row, fact in zip(found["models"], facts, strict=True):
                count = count_trained(str(fact["path"]), hashes, "prompt", console)
                row.update(fact, prompts_also_in_train=count)
            settings = {name: value for name, value in asdict(sampling).items() if name != "seed"}
            about = {"judge": judge and str(judge), "counts": dict(sorted(counts.items()))}
            results = {**about, **found, "sampling": settings, "version": dpo_dist.__version__}
            files.write_json(folder.comparison_results, files.for_json(results))
            for line in count_lines(counts):
                console.say(line)
            return results

        with console.heartbeat("writing the comparison"):
            return world.on_main(write)


def credit(texts: Sequence[str], scores: Sequence[float | None]) -> float | None:
    """Return what the second of two answers gets: 1 if it is better, one half for a tie; None if unknown."""
    first, second = texts
    score, other = scores
    if first == second or not (first.strip() or second.strip()):
        return TIED
    if not second.strip():
        return LOST
    if not first.strip():
        return WON
    if score is None or other is None:
        return None
    return TIED if score == other else float(other > score)


def answer_rows(
    prompts: Prompts,
    names: Sequence[str],
    scores: Parts,
    labels: Mapping[str, str],
    counts: Counter[str],
    *,
    is_judged: bool,
) -> Iterator[_Row]:
    """Yield the rows of `answers.jsonl`.

    A prompt that a model cannot be asked has no row; `counts` gets its reason, and the judge's counts.
    """
    for index, records in enumerate(prompts.parts):
        for record, answers in zip(records, map(Completions.from_row, scores.read(index)), strict=True):
            counts.update(answers.counts)
            if answers.dropped:
                counts[DROPPED_PROMPT_PREFIX + answers.dropped] += 1
                continue
            responses = {}
            for name, each in zip(names, answers.completions, strict=True):
                fields = {"text": each.content, "tokens": each.tokens, "finished": each.finished}
                responses[name] = {**fields, "score": each.score}
            texts = [each.content for each in answers.completions]
            verdict = credit(texts, [each.score for each in answers.completions]) if is_judged else None
            key = record.prompt_key()
            row: _Row = {
                "prompt_id": key[:16],
                "prompt": prompt_text(record.prompt),
                "source": labels[key],
                "chosen": turns_of(record.responses[0])[-1].content if record.responses else None,
                "responses": responses,
                "credit": verdict,
            }
            if record.images:
                row["images"] = thumbnails(record.images)
            if record.labelled_side:
                row["label"] = "good" if record.labelled_side == "chosen" else "bad"
            yield row


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text: the content of a single user turn, or all turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Dialogue):
        return prompt.text
    if len(prompt) == 1 and prompt[0].role == "user":
        return with_marks(prompt[0].content)
    return with_marks("\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt))


def comparison(rows: Iterable[_Row], names: Sequence[str]) -> _Row:
    """Return the parts of `comparison.json` that the rows of `answers.jsonl` decide."""
    rows = list(rows)
    credits_of_second = [row["credit"] for row in rows]
    known = [each["score"] for row in rows for each in row["responses"].values() if each["score"] is not None]
    columns = {"rate": _column(credits_of_second)}
    models = list[_Row]()
    for place, name in enumerate(names):
        responses = [row["responses"][name] for row in rows]
        scores = []
        for each in responses:
            # A model that is silent where it would be bad is not better for it.
            is_silent = bool(known) and not each["text"].strip()
            scores.append(min(known) if is_silent else each["score"])
        columns[f"score {place}"] = _column(scores)
        model: _Row = {
            "name": name,
            "tokens": fmean(each["tokens"] for each in responses),
            "finished": fmean(each["finished"] for each in responses),
            "empty": fmean(not each["text"].strip() for each in responses),
        }
        models.append(model)
    ends = bootstrap_intervals(columns, np.arange(len(rows), dtype=np.uint64), lowest={"rate": 0.0})
    for place, model in enumerate(models):
        key = f"score {place}"
        model |= {"score": _mean(columns[key]), "score_interval": ends.get(key)}
    return {
        "prompts": len(rows),
        "models": models,
        "wins": credits_of_second.count(WON),
        "ties": credits_of_second.count(TIED),
        "losses": credits_of_second.count(LOST),
        "not_judged": credits_of_second.count(None),
        "rate": _mean(columns["rate"]),
        "interval": ends.get("rate"),
    }


def _column(values: Sequence[float | None]) -> tuple[Column, Column]:
    """Return the values, and how often each is known."""
    return (
        np.array([value or 0.0 for value in values], dtype=np.float64),
        np.array([value is not None for value in values], dtype=np.float64),
    )


def _mean(column: tuple[Column, Column]) -> float | None:
    values, counts = column
    return float(values.sum() / counts.sum()) if counts.any() else None
