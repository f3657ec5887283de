"""Make the preference records of `pairs.method`: from models' responses or from scores in the data."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verb_options import DropOrKeep, PairsConfig, PairSelection, PairsMethod
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, PreferenceRecord
from dpo_dist.data.sources import pinned
from dpo_dist.distributed.memory import return_memory
from dpo_dist.foundation.files import collect_abandoned, locked, staged_file, text_digest
from dpo_dist.generation.judges import Judge, describe_judge, open_judge, score
from dpo_dist.generation.pairs.files import (
    as_fields,
    check_output,
    context_fields,
    good_records,
    pair_fields,
    write_lines,
    write_results,
)
from dpo_dist.generation.pairs.people import label_pairs
from dpo_dist.generation.pairs.prompts import (
    PART_PROMPTS,
    PromptList,
    open_prompts,
    prompt_key,
    rendering,
    write_prompts,
)
from dpo_dist.generation.pairs.start import responding_models
from dpo_dist.generation.sampling.generate import Sampling
from dpo_dist.generation.sampling.respond import (
    Answer,
    Answers,
    Generate,
    ModelSource,
    Responder,
    open_generator,
    open_responder,
    respond,
)
from dpo_dist.generation.sampling.stages import Parts, Screen, Stages, joined_stages

MEMORY_REMEDY = (
    "lower pairs.max_new_tokens; each process loads whole models onto its GPU: "
    "larger ones cannot respond or judge"
)


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
        is_tied = len(set(scores)) == 1
        reason = "too_few_responses" if len(scores) < 2 else "all_tied" if is_tied else "below_margin"
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


def usable(answers: Sequence[Answer], pairs: PairsConfig) -> tuple[list[Answer], Counter[str]]:
    """Return the answers to one prompt that can be part of a pair, and counts of the others by reason."""
    found: dict[str, Answer] = {}
    counts: Counter[str] = Counter()
    for answer in answers:
        if not answer.finished and pairs.unfinished is DropOrKeep.drop:
            counts["unfinished"] += 1
        elif not answer.content.strip():
            counts["empty"] += 1
        elif _text(answer) in found:
            counts["identical"] += 1
        else:
            found[_text(answer)] = answer
    return list(found.values()), counts


def answers_of_part(responses: Sequence[Parts], index: int) -> list[tuple[list[Answer], str | None]]:
    """Return the answers of all models to each prompt of a part, and the reason why a prompt was dropped."""
    return [
        (
            [replace(answer, model=model) for model, row in enumerate(rows) for answer in row.answers],
            next((row.dropped for row in rows if row.dropped is not None), None),
        )
        for rows in zip(*(map(Answers.of, parts.read(index)) for parts in responses), strict=True)
    ]


class _Asked(NamedTuple):
    """A prompt with the answers of all models, the reason why it was dropped, and the judge's counts."""

    record: PreferenceRecord
    answers: list[Answer]
    dropped: str | None
    judge_counts: dict[str, int]


@dataclass(frozen=True)
class Results:
    """Finished stages: responses of each model, scores if there is a judge, `facts` for provenance."""

    pairs: PairsConfig
    prompts: PromptList
    models: Sequence[ModelSource]
    responses: Sequence[Parts]
    scores: Parts | None
    facts: Mapping[str, Any]
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # filled by `pairs_of`

    def asked(self) -> Iterator[_Asked]:
        """Yield each prompt; of equal responses the judge has scored the first, and all get its score."""
        for index in range(self.prompts.parts):
            records = self.prompts.part(index)
            rows = [{}] * len(records) if self.scores is None else self.scores.read(index)
            answers = answers_of_part(self.responses, index)
            for record, (own, dropped), row in zip(records, answers, rows, strict=True):
                numbers = row.get("scores", {})
                scores = {_text(one): numbers[str(one.number)] for one in own if str(one.number) in numbers}
                scored = [replace(answer, score=scores.get(_text(answer))) for answer in own]
                yield _Asked(record, scored, dropped, row.get("counts", {}))

    def origin(self, answer: Answer) -> dict[str, Any]:
        """Return the provenance of a response."""
        model = self.models[answer.model].described()
        return {
            "model": model,
            "number": answer.number,
            "tokens": answer.tokens,
            "finished": answer.finished,
        }


def pairs_of(results: Results) -> Iterator[dict[str, Any]]:
    """Yield the preference records of all prompts, in order; count in `results.counts`."""
    counts, pairs = results.counts, results.pairs
    for asked in results.asked():
        counts["prompts"] += 1
        counts["samples"] += len(asked.answers)
        counts["encoded_differently"] += sum(not answer.same_ids for answer in asked.answers)
        counts.update(asked.judge_counts)
        if asked.dropped is not None:
            counts[f"prompts_dropped_{asked.dropped}"] += 1
            continue
        answers, unused = usable(asked.answers, pairs)
        counts.update({f"samples_{reason}": number for reason, number in unused.items()})
        if results.scores is not None:
            scored = [answer for answer in answers if answer.score is not None]
            counts["samples_without_score"] += len(answers) - len(scored)
            scores, key = [answer.score or 0.0 for answer in scored], prompt_key(asked.record)
            for better, worse in select_pairs(scores, pairs, results.seed, key, counts):
                yield _pair(asked, scored[better], scored[worse], results)
        elif len(answers) == len(results.models):  # of the stronger and the weaker model (arXiv 2507.06187)
            yield _pair(asked, answers[0], answers[1], results)
        else:
            counts["prompts_too_few_responses"] += 1


def _pair(asked: _Asked, chosen: Answer, rejected: Answer, results: Results) -> dict[str, Any]:
    pairs, scores = results.pairs, None
    provenance = {
        "source": str(asked.record.origin),
        "method": str(pairs.method),
        "chosen": results.origin(chosen),
        "rejected": results.origin(rejected),
        **results.facts,
    }
    if chosen.score is not None and rejected.score is not None:
        scores = (chosen.score, rejected.score)
        provenance |= {"judge_counts": asked.judge_counts} | _selection(pairs)
    return pair_fields(asked.record, (chosen.response, rejected.response), scores, provenance)


def _selection(pairs: PairsConfig) -> dict[str, Any]:
    return {"select": str(pairs.select), "margin": pairs.margin}


def samples_of(results: Results) -> Iterator[dict[str, Any]]:
    """Yield every prompt with its responses as a scored list, which is a format of input records too."""
    has_scores = results.scores is not None
    names = ["number", "tokens", "finished", "same_ids"] + ["score"] * has_scores
    for record, answers, dropped, _ in results.asked():
        kept = usable(answers, results.pairs)[0]
        row: dict[str, Any] = {"responses": [], "unused": []}
        is_dialogue = isinstance(record.prompt, Dialogue)
        if not is_dialogue:
            row = {"prompt": as_fields(record.prompt, ())[0]} | row
        for answer in answers:
            is_used = answer in kept and not (has_scores and answer.score is None)
            text = as_fields(record.prompt, (answer.content,))[1] if is_dialogue else answer.content
            facts = {name: getattr(answer, name) for name in names}
            listed = {"content": text, **answer.fields, **facts, "model": results.models[answer.model].name}
            row["responses" if is_used else "unused"].append(listed)
        provenance = {"source": str(record.origin), "dropped": dropped, **results.facts}
        yield row | context_fields(record) | {"provenance": provenance}


@dataclass(frozen=True)
class _FromModels:
    """The stages of pairs from models' responses; the same on every rank, methods are collective."""

    config: RunConfig
    prompts: PromptList
    stages: Stages

    @property
    def sampling(self) -> Sampling:
        pairs, seed = self.config.pairs, self.config.trainer.seed
        return Sampling(pairs.max_new_tokens, pairs.temperature, pairs.top_p, pairs.top_k, seed)

    @property
    def count(self) -> int:
        """Samples of each model to a prompt."""
        return 1 if self.config.pairs.method is PairsMethod.delta else self.config.pairs.samples

    @property
    def generation(self) -> dict[str, Any]:
        """The settings that the responses of a model depend on."""
        kind = self.config.model.quantization
        return {
            "prompts": self.prompts.digest,
            **rendering(self.config.data),
            **asdict(self.sampling),
            "dtype": str(self.config.model.dtype),
            "quantization": None if kind is None else str(kind),
        }

    def settings(self, models: Sequence[ModelSource], judge: dict[str, Any]) -> dict[str, Any]:
        """Return everything that the pairs depend on."""
        pairs = self.config.pairs
        return {
            "method": str(pairs.method),
            **self.generation,
            "models": [model.described() for model in models],
            "samples": self.count,
            "unfinished": str(pairs.unfinished),
            **(_selection(pairs) if judge else {}),
            "judge": judge,
        }

    def responses(self, source: ModelSource, index: int) -> Parts:
        """Return the finished responses of one model; its weights are loaded for the first part to do."""
        first, count, config = index * self.count, self.count, self.config
        own = {"part_prompts": self.prompts.part_prompts, "model": source.digest, "numbers": [first, count]}

        @cache
        def opened() -> tuple[Responder, Generate]:
            responder = open_responder(source, config)
            return responder, open_generator(responder, config, self.stages.world.device)

        def part(index: int) -> list[dict[str, Any]]:
            rows = respond(self.prompts.part(index), *opened(), self.sampling, range(first, first + count))
            return [asdict(row) for row in rows]

        return self._finished(f"responses of {source.name}", "responses", self.generation | own, part)

    def scores(self, responses: Sequence[Parts], judge: dict[str, Any]) -> Parts:
        """Return the finished scores of all responses."""
        config, names = self.config, [parts.folder.name for parts in responses]

        @cache
        def opened() -> Judge:
            return open_judge(config, self.stages.world.device)

        def part(index: int) -> list[dict[str, Any]]:
            answers = [usable(own, config.pairs)[0] for own, _ in answers_of_part(responses, index)]
            return score(self.prompts.part(index), answers, opened())

        settings = {"responses": names, "unfinished": str(config.pairs.unfinished), "judge": judge}
        return self._finished("scores", "scores", settings, part)

    def _finished(
        self, title: str, stage: str, settings: dict[str, Any], part: Callable[[int], list[dict[str, Any]]]
    ) -> Parts:
        parts = Parts.of(RunFolder.of(self.config).pairs_parts, stage, settings, self.prompts.parts)
        self.stages.finish(title, parts, part)
        return parts


def pairs_from_models(config: RunConfig, stages: Stages) -> None:
    """Write pairs of the responses of `pairs.models` to the prompts of `data.train`. Collective."""
    world, screen, folder = stages.world, stages.screen, RunFolder.of(config)
    prompts = world.on_main(
        lambda: open_prompts(write_prompts(folder.pairs_parts, config, screen.say), PART_PROMPTS),
        screen.heartbeat("reading prompts"),
    )
    work = _FromModels(config, prompts, stages)
    models = [stages.found(name, config) for name in responding_models(config)]
    judge: dict[str, Any] = {}
    if config.pairs.method is PairsMethod.samples:
        judge = world.on_main(lambda: describe_judge(config), screen.heartbeat("looking for the judge"))
    settings = work.settings(models, judge)
    world.on_main(lambda: check_output(folder.pairs_file, settings))
    responses = []
    for index, model in enumerate(models):
        responses.append(work.responses(model, index))
        return_memory()  # of the model: the next one needs it
    scores = work.scores(responses, judge) if judge else None
    return_memory()
    facts = {"sampling": asdict(work.sampling)} | ({"judge": judge} if judge else {})
    results = Results(config.pairs, prompts, models, responses, scores, facts, config.trainer.seed)

    def write() -> None:
        collect_abandoned(folder.pairs)  # of starts that were killed while they wrote
        with staged_file(folder.pairs_samples) as temporary:
            write_lines(temporary, samples_of(results))
        write_results(folder.pairs_file, pairs_of(results), settings, results.counts, screen.say)

    world.on_main(write, screen.heartbeat("writing pairs"))


def pairs_from_scores(config: RunConfig, say: Callable[[str], None]) -> None:
    """Write the pairs of all scored records of `data.train`, in their order."""
    counts: Counter[str] = Counter()
    file, pairs = RunFolder.of(config).pairs_file, config.pairs
    settings = {
        "method": str(pairs.method),
        "sources": plain(config.data.train),
        **_selection(pairs),
        "limit": pairs.limit,
        "seed": config.trainer.seed,
    }
    check_output(file, settings)
    write_results(file, _scored_pairs(config, counts, say), settings, counts, say)


def _scored_pairs(
    config: RunConfig, counts: Counter[str], say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    pairs, seed = config.pairs, config.trainer.seed
    for record in _scored_records(config, say, lambda: counts["prompts"] == pairs.limit):
        counts["prompts"] += 1
        scores = record.scores
        if scores is None:
            counts["without_scores"] += 1
            continue
        key = text_digest(f"{prompt_key(record)} {record.responses}")
        for better, worse in select_pairs(scores, pairs, seed, key, counts):
            counts["order_changed"] += better > worse
            provenance = {
                "source": str(record.origin),
                "method": str(pairs.method),
                **_selection(pairs),
                "seed": seed,
                "ranks": [better + 1, worse + 1],
                "responses": len(record.responses),
            }
            responses = record.responses[better], record.responses[worse]
            yield pair_fields(record, responses, (scores[better], scores[worse]), provenance)


def _scored_records(
    config: RunConfig, say: Callable[[str], None], enough: Callable[[], bool]
) -> Iterator[PreferenceRecord]:
    for source in config.data.train:
        if not enough():
            yield from good_records(read_records(pinned(source, None)), source, config.data, say, enough)


def make_pairs(config: RunConfig, screen: Screen) -> None:
    """Write the preference records of `config.pairs`, and all responses with their scores."""
    match config.pairs.method:
        case PairsMethod.scores:
            with _only_start(config):
                pairs_from_scores(config, screen.say)
        case PairsMethod.people:
            label_pairs(config, screen.say, screen.show)
        case PairsMethod.samples | PairsMethod.delta:
            with ExitStack() as held, joined_stages(config, screen, MEMORY_REMEDY) as stages:
                stages.world.on_main(lambda: held.enter_context(_only_start(config)))
                pairs_from_models(config, stages)


def _only_start(config: RunConfig) -> AbstractContextManager[int]:
    """Lock the folder of pairs of the run directory: two starts would write the same parts."""
    folder = RunFolder.of(config)
    remedy = "wait until it ends, or set another run.dir"
    return locked(folder.pairs / folder.lock.name, "makes pairs in this run directory", remedy)
