"""Preference records of `pairs.method`, from responses or from scores in the data; their `--check`."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np

from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder, check_writable
from dpo_dist.config.schema import (
    DataConfig,
    DropOrKeep,
    PairsConfig,
    PairSelection,
    PairsMethod,
    RunConfig,
    SourceConfig,
)
from dpo_dist.data.counts import in_one_line
from dpo_dist.data.formats import read_prompts, read_records
from dpo_dist.data.records import Dialogue, PreferenceRecord
from dpo_dist.data.sources import pinned
from dpo_dist.distributed.memory import return_memory
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import collect_abandoned, locked, staged_file, text_digest
from dpo_dist.foundation.text import counted
from dpo_dist.generation.judges import Judge, Judgement, Question, open_judge
from dpo_dist.generation.pairs.files import (
    Read,
    as_fields,
    check_output,
    context_fields,
    good_records,
    pair_fields,
    prompt_key,
    training_records,
    write_lines,
    write_results,
)
from dpo_dist.generation.pairs.people import label_pairs
from dpo_dist.generation.pairs.start import responding_models
from dpo_dist.generation.sampling.generate import Sampling
from dpo_dist.generation.sampling.respond import (
    KEY,
    Answer,
    Answers,
    ModelSource,
    find_model,
    open_generator,
    open_responder,
    usable_prompt,
)
from dpo_dist.generation.sampling.stages import (
    Parts,
    Prompts,
    Stages,
    as_asked,
    generation_settings,
    joined_stages,
)

MEMORY_REMEDY = (
    "lower pairs.max_new_tokens; each process loads whole models onto its GPU: "
    "larger ones cannot respond or judge"
)


PART_PROMPTS = 64
"""Prompts of one part of the work: processes share the parts, and finished ones are not repeated."""


def different_prompts(config: RunConfig, say: Callable[[str], None]) -> list[PreferenceRecord]:
    """Return the different prompts of `data.train` that are to be asked, in their order."""
    pairs = config.pairs
    found: dict[str, PreferenceRecord] = {}
    counts: Counter[str] = Counter()
    for record in training_records(config, read_prompts, say, lambda: len(found) == pairs.limit):
        asked = replace(as_asked(record, config.data), responses=(), scores=None)
        key = prompt_key(asked)
        if int(key[:16], 16) % pairs.prompt_parts != pairs.prompt_part:
            counts["in_other_parts"] += 1
        elif key in found:
            counts["repeated"] += 1
        else:
            found[key] = asked
    skipped = "".join(f", {number:,} {name.replace('_', ' ')}" for name, number in sorted(counts.items()))
    say(f"prompts: {counted(len(found), 'different one')}{skipped}")
    return list(found.values())


def select_pairs(
    scores: Sequence[float], rule: PairsConfig, seed: int, key: str, counts: Counter[str]
) -> list[tuple[int, int]]:
    """Return pairs of responses of one prompt as indices: (chosen, rejected).

    A pair's scores differ by more than the margin. Among equally good or bad responses the first one counts.
    The random choice of `best_random` follows from `seed` and `key` alone. `counts` gets tied pairs, and the
    reason of a prompt without a pair.
    """
    every = list(itertools.combinations(range(len(scores)), 2))
    counts["tied_pairs"] += sum(scores[one] == scores[other] for one, other in every)
    ordered = [(one, other) if scores[one] > scores[other] else (other, one) for one, other in every]
    possible = [pair for pair in ordered if scores[pair[0]] - scores[pair[1]] > rule.margin]
    if not possible:
        reason = "all_tied" if len(set(scores)) == 1 else "below_margin"
        if len(scores) < 2:
            reason = "too_few_responses"
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


def _text(answer: Answer) -> str:
    """Return what makes responses to a prompt different."""
    return json.dumps([answer.content.strip(), answer.fields])


def joined_answers(of_models: Sequence[Answers], pairs: PairsConfig) -> Answers:
    """Return the answers of all models to a prompt, with the reason why one is part of no pair."""
    answers: list[Answer] = []
    seen: set[str] = set()
    for model, row in enumerate(of_models):
        for answer in row.answers:
            reason = None
            if not answer.finished and pairs.unfinished is DropOrKeep.drop:
                reason = "unfinished"
            elif not answer.content.strip():
                reason = "empty"
            elif _text(answer) in seen:
                reason = "identical"
            else:
                seen.add(_text(answer))
            answers.append(replace(answer, model=model, unused=reason, ids=[]))
    return Answers(answers, next((row.dropped for row in of_models if row.dropped is not None), None))


def score(records: Sequence[PreferenceRecord], rows: Sequence[Answers], judge: Judge | None) -> list[Answers]:
    """Return the answers to each prompt with their scores, if there is a judge, and with its counts.

    It is asked about every prompt with an answer, also a single one, so that a mean score is of all. Of equal
    responses it scores the first, and all get its score.
    """
    if judge is None:
        return list(rows)
    asked = [[answer for answer in row.answers if answer.unused is None] for row in rows]
    questions = [
        Question(record, tuple(answer.content for answer in own))
        for record, own in zip(records, asked, strict=True)
        if own
    ]
    judgements = iter(judge.judge(questions))
    found = []
    for row, own in zip(rows, asked, strict=True):
        judgement = next(judgements) if own else Judgement([])
        scores = dict(zip(map(_text, own), judgement.scores, strict=True))
        answers = []
        for answer in row.answers:
            value = scores.get(_text(answer))
            unused = answer.unused or ("without_score" if value is None else None)
            answers.append(replace(answer, score=value, unused=unused))
        found.append(replace(row, answers=answers, counts=dict(+judgement.counts)))
    return found


@dataclass(frozen=True)
class Results:
    """Finished answers of all models to the prompts, with scores if there is a judge; `facts`: provenance."""

    pairs: PairsConfig
    prompts: Prompts
    models: Sequence[ModelSource]
    answers: Parts
    facts: Mapping[str, Any]
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # filled by `pairs_of`

    def rows(self) -> Iterator[tuple[PreferenceRecord, Answers]]:
        """Yield each prompt with its answers."""
        for index, records in enumerate(self.prompts.parts):
            yield from zip(records, map(Answers.of, self.answers.read(index)), strict=True)


def pairs_of(results: Results) -> Iterator[dict[str, Any]]:
    """Yield the preference records of all prompts, in order; count in `results.counts`."""
    counts, pairs = results.counts, results.pairs
    for record, row in results.rows():
        counts["prompts"] += 1
        counts["samples"] += len(row.answers)
        counts["encoded_differently"] += sum(not answer.same_ids for answer in row.answers)
        counts.update(row.counts)
        if row.dropped is not None:
            counts[f"prompts_dropped_{row.dropped}"] += 1
            continue
        counts["samples_unfinished"] += sum(not answer.finished for answer in row.answers)  # kept ones too
        reasons = (answer.unused for answer in row.answers if answer.unused not in (None, "unfinished"))
        counts.update(f"samples_{reason}" for reason in reasons)
        answers = [answer for answer in row.answers if answer.unused is None]
        if pairs.method is PairsMethod.samples:
            scores, key = [answer.score or 0.0 for answer in answers], prompt_key(record)
            for better, worse in select_pairs(scores, pairs, results.seed, key, counts):
                yield _pair(record, row, answers[better], answers[worse], results)
        elif len(answers) == len(results.models):  # of the stronger and the weaker model (arXiv 2507.06187)
            yield _pair(record, row, answers[0], answers[1], results)
        else:
            counts["prompts_too_few_responses"] += 1


def _pair(
    record: PreferenceRecord, row: Answers, chosen: Answer, rejected: Answer, results: Results
) -> dict[str, Any]:
    scores: tuple[float, float] | None = None
    provenance: dict[str, Any] = {"source": str(record.origin), "method": str(results.pairs.method)}
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        model = results.models[answer.model].described()
        facts = {"number": answer.number, "tokens": answer.tokens, "finished": answer.finished}
        provenance[side] = {"model": model, **facts}
    provenance |= results.facts
    if chosen.score is not None and rejected.score is not None:
        scores = (chosen.score, rejected.score)
        provenance |= {"judge_counts": row.counts} | _selection(results.pairs)
    return pair_fields(record, (chosen.response, rejected.response), scores, provenance)


def _selection(pairs: PairsConfig) -> dict[str, Any]:
    return {"select": str(pairs.select), "margin": pairs.margin}


def samples_of(results: Results) -> Iterator[dict[str, Any]]:
    """Yield every prompt with its responses as a scored list, which is a format of input records too."""
    has_scores = results.pairs.method is PairsMethod.samples
    names = ["number", "tokens", "finished", "same_ids"] + ["score"] * has_scores
    for record, answers in results.rows():
        row: dict[str, Any] = {"responses": [], "unused": []}
        is_dialogue = isinstance(record.prompt, Dialogue)
        if not is_dialogue:
            row = {"prompt": as_fields(record.prompt, ())[0]} | row
        for answer in answers.answers:
            text = as_fields(record.prompt, (answer.content,))[1] if is_dialogue else answer.content
            facts = {name: getattr(answer, name) for name in names}
            listed = {"content": text, **answer.fields, **facts, "model": results.models[answer.model].name}
            row["responses" if answer.unused is None else "unused"].append(listed)
        provenance = {"source": str(record.origin), "dropped": answers.dropped, **results.facts}
        yield row | context_fields(record) | {"provenance": provenance}


def pairs_from_models(config: RunConfig, stages: Stages) -> None:
    """Write pairs of the responses of `pairs.models` to the prompts of `data.train`. Collective."""
    world, console, folder, pairs = stages.world, stages.console, RunFolder.of(config), config.pairs
    with console.heartbeat("reading prompts"):
        found = world.on_main(lambda: different_prompts(config, console.say))
    prompts = Prompts.of(folder.pairs_parts, found, PART_PROMPTS)
    models = [stages.found(name, config) for name in responding_models(config)]
    judge, described = stages.judge(config)
    sampling = Sampling(
        pairs.max_new_tokens, pairs.temperature, pairs.top_p, pairs.top_k, config.trainer.seed
    )
    count = 1 if pairs.method is PairsMethod.delta else pairs.samples
    settings = {
        "method": str(pairs.method),
        "prompts": prompts.digest,
        **generation_settings(config, sampling),
        "models": [model.described() for model in models],
        "samples": count,
        "unfinished": str(pairs.unfinished),
        **(_selection(pairs) if judge else {}),
        "judge": described,
    }
    world.on_main(lambda: check_output(folder.pairs_file, settings))

    of_models = []
    for index, model in enumerate(models):
        opened = cache(partial(open_generator, model, config, world.device))
        numbers = range(index * count, (index + 1) * count)
        of_models.append(stages.responses(model, prompts, config, sampling, numbers, opened))
        opened.cache_clear()  # the next model needs its memory
        return_memory()

    def scored(index: int) -> list[dict[str, Any]]:
        rows = zip(*(map(Answers.of, parts.read(index)) for parts in of_models), strict=True)
        answers = [joined_answers(row, pairs) for row in rows]
        return list(map(asdict, score(prompts.parts[index], answers, judge)))

    names = [parts.folder.name for parts in of_models]
    own = {"responses": names, "unfinished": str(pairs.unfinished), "judge": described}
    answers = stages.finish("scores", prompts.stage("scores", own), scored)
    facts = {"sampling": asdict(sampling)} | ({"judge": described} if judge else {})
    results = Results(pairs, prompts, models, answers, facts, config.trainer.seed)

    def write() -> None:
        collect_abandoned(folder.pairs)  # of starts that were killed while they wrote
        with staged_file(folder.pairs_samples) as temporary:
            write_lines(temporary, samples_of(results))
        write_results(folder.pairs_file, pairs_of(results), settings, results.counts, console.say)

    with console.heartbeat("writing pairs"):
        world.on_main(write)


def pairs_from_scores(config: RunConfig, say: Callable[[str], None]) -> None:
    """Write the pairs of all scored records of `data.train`, in their order."""
    counts: Counter[str] = Counter()
    file, pairs, seed = RunFolder.of(config).pairs_file, config.pairs, config.trainer.seed
    method = {"method": str(pairs.method), **_selection(pairs), "seed": seed}
    settings = method | {"sources": plain(config.data.train), "limit": pairs.limit}

    def found() -> Iterator[dict[str, Any]]:
        for record in training_records(config, read_records, say, lambda: counts["prompts"] == pairs.limit):
            counts["prompts"] += 1
            scores = record.scores
            if scores is None:
                counts["without_scores"] += 1
                continue
            key = text_digest(f"{prompt_key(record)} {record.responses}")
            for better, worse in select_pairs(scores, pairs, seed, key, counts):
                counts["order_changed"] += better > worse
                ranks = {"ranks": [better + 1, worse + 1], "responses": len(record.responses)}
                provenance = {"source": str(record.origin), **method, **ranks}
                responses = record.responses[better], record.responses[worse]
                yield pair_fields(record, responses, (scores[better], scores[worse]), provenance)

    check_output(file, settings)
    write_results(file, found(), settings, counts, say)


_FIRST_RECORDS = 1024


def rehearse_pairs(config: RunConfig) -> str:
    """Load what `pairs` loads before weights, ask the judge, and read the first records of each source.

    Returns lines for the screen; raises DpoDistError for what cannot be used.
    """
    pairs, folder = config.pairs, RunFolder.of(config)
    check_writable(folder.path)
    file = (folder.round(1) if pairs.rounds else folder).pairs_file
    lines = [f"{pairs.method}: {file}{' (exists)' if file.exists() else ''}"]
    responds = pairs.method in (PairsMethod.samples, PairsMethod.delta)
    read = read_prompts if responds else read_records
    records = first_records(config.data.train, read, config.data, lines.append)
    if responds:
        for name in responding_models(config):
            check_model(name, config, pairs.max_new_tokens, records, lines.append)
    if pairs.method is PairsMethod.samples and (judge := open_judge(config)) is not None:
        judge.check()
        lines.append(f"judge: {judge}")
    return passed(lines)


def passed(lines: Sequence[str]) -> str:
    """Return the text of a check without a mistake."""
    findings = "".join(f"  {line}\n" for line in lines)
    return f"check passed: everything that needs no weights and no GPU is in order\n{findings}"


def first_records(
    sources: Sequence[SourceConfig], read: Read, data: DataConfig, say: Callable[[str], None]
) -> list[PreferenceRecord]:
    """Return the usable ones of the first records of all sources; `say` their counts."""
    records: list[PreferenceRecord] = []
    for source in sources:
        found = list(islice(read(pinned(source)), _FIRST_RECORDS + 1))
        first, is_more = iter(found[:_FIRST_RECORDS]), len(found) > _FIRST_RECORDS
        records += good_records(first, source, data, say, of_first=is_more)
    return records


def check_model(
    name: str,
    config: RunConfig,
    new_tokens: int,
    records: Sequence[PreferenceRecord],
    say: Callable[[str], None],
    key: str = KEY,
) -> None:
    """Check a model without its weights, and that it can be asked one of the records; `say` what is found."""
    responder = open_responder(find_model(name, config, key, is_check=True), config, key)
    ends = responder.tokenizer.convert_ids_to_tokens(sorted(responder.stop_ids))
    folder = responder.source.adapter or responder.source.folder
    say(f"{folder}, {len(responder.tokenizer):,} tokens, a response ends with {' or '.join(ends)}")
    prompts = [usable_prompt(as_asked(record, config.data), responder, new_tokens) for record in records]
    dropped = Counter(prompt for prompt in prompts if isinstance(prompt, str))
    if dropped.total() == len(prompts):
        raise DataError(
            "none of the first records can be used",
            where=key,
            got=f"{name}: {in_one_line(dropped)}",
            remedy="correct the records, or the keys of data; docs/data.md explains the reasons",
        )
    if dropped:
        say(f"  it is not asked, of the first records: {in_one_line(dropped)}")


def make_pairs(config: RunConfig, console: Console) -> None:
    """Write the preference records of `config.pairs`, and all responses with their scores."""
    match config.pairs.method:
        case PairsMethod.scores:
            with _only_start(config):
                pairs_from_scores(config, console.say)
        case PairsMethod.people:
            label_pairs(config, console.say, console.show)
        case PairsMethod.samples | PairsMethod.delta:
            with joined_stages(config, console, MEMORY_REMEDY, _only_start(config)) as stages:
                pairs_from_models(config, stages)


def _only_start(config: RunConfig) -> AbstractContextManager[int]:
    """Lock the folder of pairs of the run directory: two starts would write the same parts."""
    folder = RunFolder.of(config)
    return locked(folder.pairs / folder.lock.name, "makes pairs in this run directory")
