"""Make preference records by `pairs.method`, from models' responses or scores in the data."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.data import DataConfig, DataSource, Dialogue, PreferenceRecord, turns_of
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.fields import plain
from dpo_dist.foundation.files import locked, remove_abandoned, staged_file, text_digest, write_lines
from dpo_dist.foundation.text import pluralize, without_secrets
from dpo_dist.kit import ModelSource, Run, RunConfig, in_chunks, joined_run, return_memory
from dpo_dist.tools.pairs.files import (
    check_output,
    image_fields,
    pair_fields,
    training_records,
    write_results,
)
from dpo_dist.tools.pairs.folder import PairsFolder
from dpo_dist.tools.pairs.people import label_pairs
from dpo_dist.tools.pairs.start import responding_models
from dpo_dist.tools.sampling.keys import PairsConfig, PairSelection, PairsMethod, SamplingConfig
from dpo_dist.tools.sampling.prompts import (
    DROPPED_PROMPT_PREFIX,
    PROMPTS_OF_A_PART,
    Parts,
    Prompts,
    as_user_message,
    find_model_together,
    generation_settings,
    open_judge_together,
)
from dpo_dist.tools.sampling.respond import (
    Completion,
    Completions,
    open_generator,
)
from dpo_dist.tools.sampling.scores import finish_scores
from dpo_dist.tools.sampling.settings import sampling_for
from dpo_dist.tools.written_records import as_fields, context_fields, scorer_fields

_MODELS = "pairs.models"


def different_prompts(
    data: DataConfig, pairs: PairsConfig, say: Callable[[str], None]
) -> list[PreferenceRecord]:
    """Return the different prompts of `data.train`, as models get them, in order."""
    prompts = dict[str, PreferenceRecord]()
    counts = Counter[str]()
    part, parts = pairs.share
    for record in training_records(data, DataSource.prompts, say, lambda: len(prompts) == pairs.limit):
        prompt = replace(as_user_message(record, data), responses=(), scores=None)
        key = prompt.prompt_key()
        if int(key[:16], 16) % parts != part:
            counts["in_other_parts"] += 1
        elif key in prompts:
            counts["repeated"] += 1
        else:
            prompts[key] = prompt
    line = f"prompts: {pluralize(len(prompts), 'different one')}"
    for name, number in sorted(counts.items()):
        line += f", {number:,} {name.replace('_', ' ')}"
    say(line)
    return list(prompts.values())


def select_pairs(
    scores: Sequence[float], rule: PairsConfig, seed: int, key: str, counts: Counter[str]
) -> list[tuple[int, int]]:
    """Return pairs of one prompt's responses as indices (chosen, rejected).

    The scores of a pair differ by more than the margin. Of equally good or bad responses the first is taken.
    `seed` and `key` alone decide the random choice of `best_random`. `counts` gets tied pairs, and the reason
    if there is no pair.
    """
    possible = []
    for first, second in itertools.combinations(range(len(scores)), 2):
        counts["tied_pairs"] += scores[first] == scores[second]
        better, worse = (first, second) if scores[first] > scores[second] else (second, first)
        if scores[better] - scores[worse] > rule.margin:
            possible.append((better, worse))
    if not possible:
        if len(scores) < 2:
            reason = "too_few_responses"
        elif len(set(scores)) == 1:
            reason = "all_tied"
        else:
            reason = "below_margin"
        counts[f"prompts_{reason}"] += 1
        return []
    best = scores.index(max(scores))
    match rule.select:
        case PairSelection.all_pairs:
            return possible
        case PairSelection.best_worst:
            return [(best, scores.index(min(scores)))]
        case PairSelection.best_random:
            others = [worse for better, worse in possible if better == best]
            random = np.random.default_rng(int(text_digest(f"{seed} {key}"), 16))
            return [(best, others[int(random.integers(len(others)))])]


@dataclass(frozen=True)
class PairResults:
    """The completions of all prompts by all models, scored if there is a judge; `facts`: for provenance."""

    prompts: Prompts
    models: Sequence[ModelSource]
    completions: Parts
    facts: Mapping[str, Any]
    counts: Counter[str] = field(default_factory=Counter)  # filled by `pairs_from_results`

    @property
    def pairs(self) -> PairsConfig:
        """The settings of the pairs."""
        return self.prompts.run.config.section_of(PairsConfig)

    def rows(self) -> Iterator[tuple[PreferenceRecord, Completions]]:
        """Yield each prompt with its completions."""
        for index, records in enumerate(self.prompts.parts):
            yield from zip(records, map(Completions.from_row, self.completions.read(index)), strict=True)


def pairs_from_results(results: PairResults) -> Iterator[dict[str, Any]]:
    """Yield the preference records of all prompts, in order; fill `results.counts`."""
    counts = results.counts
    pairs = results.pairs
    seed = results.prompts.run.config.trainer.seed
    for record, row in results.rows():
        counts["prompts"] += 1
        counts["samples"] += len(row.completions)
        counts["encoded_differently"] += sum(not each.same_ids for each in row.completions)
        counts.update(row.counts)
        if row.dropped is not None:
            counts[DROPPED_PROMPT_PREFIX + row.dropped] += 1
            continue
        usable = []
        for completion in row.completions:
            counts["samples_unfinished"] += not completion.finished  # used or not
            if completion.unused is None:
                usable.append(completion)
            elif completion.unused != "unfinished":
                counts[f"samples_{completion.unused}"] += 1
        if pairs.method is PairsMethod.samples and [each.score for each in usable] == [None]:
            yield _learned(record, usable[0], results)  # the only response, without a judge
        elif pairs.method is PairsMethod.samples:
            scores = [each.score or 0.0 for each in usable]
            for better, worse in select_pairs(scores, pairs, seed, record.prompt_key(), counts):
                yield _pair(record, row, usable[better], usable[worse], results)
        elif len(usable) == len(results.models):  # one by the stronger, one by the weaker (arXiv 2507.06187)
            yield _pair(record, row, usable[0], usable[1], results)
        else:
            counts["prompts_too_few_responses"] += 1


def _learned(record: PreferenceRecord, completion: Completion, results: PairResults) -> dict[str, Any]:
    """Return the record of a response that is learned as it is."""
    provenance = {
        "source": without_secrets(str(record.origin)),
        "method": str(results.pairs.method),
        "chosen": _of_side(completion, results),
        **results.facts,
    }
    prompt, response = as_fields(turns_of(record.prompt, "user"), (completion.response,))
    fields = {"prompt": prompt, "completion": response, **context_fields(record), **scorer_fields(record)}
    images = image_fields(record, PairsFolder(results.prompts.run.folder.path).pairs)
    return {**fields, "provenance": provenance, **images}


def _of_side(completion: Completion, results: PairResults) -> dict[str, Any]:
    return {
        "model": results.models[completion.model].provenance(),
        "number": completion.number,
        "tokens": completion.tokens,
        "finished": completion.finished,
    }


def _pair(
    record: PreferenceRecord, row: Completions, chosen: Completion, rejected: Completion, results: PairResults
) -> dict[str, Any]:
    scores: tuple[float, float] | None = None
    provenance: dict[str, Any] = {
        "source": without_secrets(str(record.origin)),
        "method": str(results.pairs.method),
    }
    provenance |= {"chosen": _of_side(chosen, results), "rejected": _of_side(rejected, results)}
    provenance |= results.facts
    if chosen.score is not None and rejected.score is not None:
        scores = (chosen.score, rejected.score)
        provenance |= {"judge_counts": row.counts, **_selection(results.pairs)}
    images = image_fields(record, PairsFolder(results.prompts.run.folder.path).pairs)
    return {**pair_fields(record, (chosen.response, rejected.response), scores, provenance), **images}


def _selection(pairs: PairsConfig) -> dict[str, Any]:
    return {"select": str(pairs.select), "margin": pairs.margin}


def scored_lists(results: PairResults) -> Iterator[dict[str, Any]]:
    """Yield every prompt with its responses as a scored list, which dpo_dist also reads as input."""
    names = ["number", "tokens", "finished", "same_ids"]
    if results.pairs.method is PairsMethod.samples:
        names.append("score")
    for record, completions in results.rows():
        is_dialogue = isinstance(record.prompt, Dialogue)
        row: dict[str, Any] = {}
        if not is_dialogue:
            row["prompt"] = as_fields(record.prompt, ())[0]
        row["responses"] = []
        row["unused"] = []
        for each in completions.completions:
            content = each.content
            if is_dialogue:
                content = as_fields(record.prompt, (content,))[1]
            response = {
                **({} if is_dialogue else {"role": "assistant"}),
                "content": content,
                **each.fields,
                **{name: getattr(each, name) for name in names},
                "model": without_secrets(results.models[each.model].name),
            }
            part = "responses" if each.unused is None else "unused"
            row[part].append(response)
        provenance = {
            "source": without_secrets(str(record.origin)),
            "dropped": completions.dropped,
            **results.facts,
        }
        images = image_fields(record, PairsFolder(results.prompts.run.folder.path).pairs)
        yield {**row, **context_fields(record), **scorer_fields(record), "provenance": provenance, **images}


def pairs_from_models(run: Run) -> None:
    """Ask `pairs.models` the prompts of `data.train`, and write pairs of their responses. Collective."""
    config = run.config
    world = run.world
    console = run.console
    folder = PairsFolder(run.folder.path)
    pairs = config.section_of(PairsConfig)
    with console.heartbeat("reading prompts"):
        records = world.on_main(lambda: different_prompts(config.data, pairs, console.say))
    prompts = Prompts(run, folder.pairs_parts, list(in_chunks(records, PROMPTS_OF_A_PART)))
    models = [find_model_together(name, run, _MODELS) for name in responding_models(pairs, config.model.path)]
    judge, judge_facts = open_judge_together(run)
    sampling = sampling_for("pairs", config.section_of(SamplingConfig), config.trainer.seed)
    count = 1 if pairs.method is PairsMethod.delta else pairs.samples
    settings = {
        "method": str(pairs.method),
        "prompts": prompts.digest,
        **generation_settings(config.data, config.model, sampling),
        "models": [model.provenance() for model in models],
        "samples": count,
        "unfinished": str(pairs.unfinished),
    }
    if judge:
        settings |= _selection(pairs)
    settings["judge"] = judge_facts
    world.on_main(lambda: check_output(folder.pairs_file, settings))

    responses = []
    for index, model in enumerate(models):
        open_model = cache(partial(open_generator, model, config.model, config.data, world.device))
        numbers = range(index * count, (index + 1) * count)
        responses.append(prompts.responses(model, sampling, numbers, open_model))
        open_model.cache_clear()  # the next model needs the memory
        return_memory()

    completions = finish_scores(prompts, responses, judge, judge_facts, pairs.unfinished)
    facts: dict[str, Any] = {"sampling": asdict(sampling)}
    if judge:
        facts["judge"] = judge_facts
    results = PairResults(prompts, models, completions, facts)

    def write() -> None:
        remove_abandoned(folder.pairs)  # left by starts that were killed
        with staged_file(folder.pairs_samples) as temporary:
            write_lines(temporary, scored_lists(results))
        write_results(folder.pairs_file, pairs_from_results(results), settings, results.counts, console.say)

    with console.heartbeat("writing pairs"):
        world.on_main(write)


def pairs_from_scores(
    file: Path, data: DataConfig, pairs: PairsConfig, seed: int, say: Callable[[str], None]
) -> None:
    """Write the pairs of all scored records of `data.train`, in order, to `file`."""
    counts: Counter[str] = Counter()
    method = {"method": str(pairs.method), **_selection(pairs), "seed": seed}
    settings = {**method, "sources": plain(data.train), "limit": pairs.limit}

    def records() -> Iterator[dict[str, Any]]:
        for record in training_records(
            data, DataSource.records, say, lambda: counts["prompts"] == pairs.limit
        ):
            counts["prompts"] += 1
            scores = record.scores
            if scores is None:
                counts["without_scores"] += 1
                continue
            key = text_digest(f"{record.prompt_key()} {record.responses}")
            for better, worse in select_pairs(scores, pairs, seed, key, counts):
                counts["order_changed"] += better > worse
                provenance = {
                    "source": without_secrets(str(record.origin)),
                    **method,
                    "ranks": [better + 1, worse + 1],
                    "responses": len(record.responses),
                }
                responses = record.responses[better], record.responses[worse]
                fields = pair_fields(record, responses, (scores[better], scores[worse]), provenance)
                yield {**fields, **image_fields(record, file.parent)}

    check_output(file, settings)
    write_results(file, records(), settings, counts, say)


def make_pairs(config: RunConfig, console: Console) -> None:
    """Write the preference records of `config.pairs`, and all responses with their scores."""
    folder = PairsFolder(config.run.path)
    pairs = config.section_of(PairsConfig)
    seed = config.trainer.seed
    # Without a lock two starts would write the same parts.
    lock = locked(folder.pairs / folder.lock.name, "makes pairs in this run directory")
    match pairs.method:
        case PairsMethod.scores:
            with lock:
                pairs_from_scores(folder.pairs_file, config.data, pairs, seed, console.say)
        case PairsMethod.people:
            label_pairs(folder, config.data, pairs.limit, seed, console)
        case PairsMethod.samples | PairsMethod.delta:
            with joined_run(config, console, lock) as run:
                pairs_from_models(run)
