"""Make the preference records of `pairs.method`: from models' responses or from scores in the data."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verb_options import DropOrKeep, Engine, PairsConfig, PairSelection, PairsMethod
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, Message, PreferenceRecord, Response
from dpo_dist.data.sources import pinned
from dpo_dist.distributed.memory import return_memory
from dpo_dist.distributed.world import World
from dpo_dist.foundation.files import locked, text_digest
from dpo_dist.generation.judges.judge import Judge
from dpo_dist.generation.judges.score import describe_judge, open_judge, score
from dpo_dist.generation.pairs.files import (
    as_fields,
    check_output,
    context_fields,
    good_records,
    pair_fields,
    write_results,
    write_samples,
)
from dpo_dist.generation.pairs.people import label_pairs
from dpo_dist.generation.pairs.prompts import PromptList, open_prompts, prompt_key, rendering, write_prompts
from dpo_dist.generation.pairs.start import output_file, responding_models
from dpo_dist.generation.sampling.generate import Sampling
from dpo_dist.generation.sampling.respond import (
    Generator,
    ModelSource,
    Numbers,
    Responder,
    chosen_engine,
    lora_options,
    open_generator,
    open_responder,
    respond,
)
from dpo_dist.generation.sampling.stages import Parts, Screen, Stages

if TYPE_CHECKING:
    from dpo_dist.generation.sampling.stages import Screen


@dataclass(frozen=True)
class Selection:
    """Rule that selects pairs; see `PairsConfig` for the values."""

    select: PairSelection = PairSelection.best_worst
    margin: float = 0.0
    seed: int = 0


def select_pairs(
    scores: Sequence[float], selection: Selection, key: str, counts: Counter[str]
) -> list[tuple[int, int]]:
    """Return pairs of responses of one prompt as indices: (chosen, rejected).

    A pair's scores differ by more than the margin, so equal scores are never a pair. Among equally good or
    bad responses the first one counts.

    Args:
        scores: [responses], finite.
        selection: the rule.
        key: of the content: the random choice of `best_random` follows from it and the seed alone.
        counts: gets `prompts_too_few_responses`, `prompts_all_tied` or `prompts_below_margin` for a prompt
            without a pair, and `tied_pairs`: the number of tied pairs among all pairs of responses.
    """
    every = list(itertools.combinations(range(len(scores)), 2))
    counts["tied_pairs"] += sum(scores[one] == scores[other] for one, other in every)
    ordered = [(one, other) if scores[one] > scores[other] else (other, one) for one, other in every]
    possible = [
        (better, worse)
        for better, worse in ordered
        if scores[better] > scores[worse] and scores[better] - scores[worse] > selection.margin
    ]
    if not possible:
        few = len(scores) < 2
        reason = "too_few_responses" if few else "all_tied" if len(set(scores)) == 1 else "below_margin"
        counts[f"prompts_{reason}"] += 1
        return []
    best, worst = _first(scores, max(scores)), _first(scores, min(scores))
    match selection.select:
        case PairSelection.all_pairs:
            return possible
        case PairSelection.best_worst:
            return [(best, worst)]
        case PairSelection.best_random:
            others = [worse for better, worse in possible if better == best]
            digest = text_digest(f"{selection.seed} {key}")
            return [(best, others[int(np.random.default_rng(int(digest, 16)).integers(len(others)))])]


def _first(scores: Sequence[float], score: float) -> int:
    return list(scores).index(score)


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


MEMORY_REMEDY = (
    "lower pairs.batch_tokens or pairs.max_new_tokens; each process loads whole models onto its GPU: "
    "larger ones cannot respond or judge"
)


@dataclass(frozen=True)
class _Work:
    """The settings of a start, the same on every rank."""

    config: RunConfig
    sampling: Sampling
    engine: Engine
    prompts: PromptList
    stages: Stages

    @property
    def count(self) -> int:
        """Samples of each model to a prompt."""
        return 1 if self.config.pairs.method is PairsMethod.delta else self.config.pairs.samples


def pairs_from_models(config: RunConfig, stages: Stages) -> None:
    """Write pairs of the responses of `pairs.models` to the prompts of `data.train`. Collective.

    Raises:
        DpoDistError: data, a model or the judge cannot be used, or no pair can be made.
    """
    world, screen = stages.world, stages.screen
    prompts = _prompts(config, world, screen)
    pairs = config.pairs
    sampling = Sampling(pairs.max_new_tokens, pairs.temperature, pairs.top_p, pairs.top_k, pairs.seed)
    engine = chosen_engine(pairs.engine, quantized=config.model.quantization is not None)
    work = _Work(config, sampling, engine, prompts, stages)
    models = [stages.found(name, config) for name in responding_models(config)]
    for model in models if engine is Engine.vllm else ():
        lora_options(model.adapter)
    judge: dict[str, Any] = {}
    if pairs.method is PairsMethod.samples:
        judge = world.on_main(lambda: describe_judge(config), screen.heartbeat("looking for the judge"))
    settings = _settings(work, models, judge)
    file = output_file(config)
    world.on_main(lambda: check_output(file, settings))

    responses = []
    for index, model in enumerate(models):
        responses.append(_responses(model, index, work))
        return_memory()  # of the model: the next one needs it
    scores = _scores(responses, judge, work) if judge else None
    return_memory()
    facts = {"sampling": asdict(sampling), "engine": str(work.engine)} | ({"judge": judge} if judge else {})
    results = Results(pairs, prompts, models, responses, scores, facts)

    def write() -> None:
        write_samples(RunFolder.of(config).pairs_samples, samples_of(results))
        write_results(file, pairs_of(results), settings, results.counts, screen.say)

    world.on_main(write, screen.heartbeat("writing pairs"))


def _prompts(config: RunConfig, world: World, screen: Screen) -> PromptList:
    """Return the prompts, which rank 0 reads; collective."""
    folder = RunFolder.of(config).pairs_parts
    return world.on_main(
        lambda: open_prompts(write_prompts(folder, config, screen.say), config.pairs.part_prompts),
        screen.heartbeat("reading prompts"),
    )


def _settings(work: _Work, models: Sequence[ModelSource], judge: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the pairs depend on."""
    pairs = work.config.pairs
    chosen = {"select": str(pairs.select), "margin": pairs.margin} if judge else {}
    return {
        "method": str(pairs.method),
        "prompts": work.prompts.digest,
        **rendering(work.config.data),
        "models": [model.described() for model in models],
        "samples": work.count,
        **asdict(work.sampling),
        "engine": str(work.engine),
        "dtype": str(work.config.model.dtype),
        "quantization": _quantization(work),
        **_usable(pairs),
        **chosen,
        "judge": judge,
    }


def _usable(pairs: PairsConfig) -> dict[str, Any]:
    """Return the settings that decide which samples are used; earlier files lack a key that was added."""
    differing = {"encoded_differently": str(pairs.encoded_differently)}
    is_default = pairs.encoded_differently is PairsConfig.encoded_differently
    return {"unfinished": str(pairs.unfinished)} | ({} if is_default else differing)


def _quantization(work: _Work) -> str | None:
    kind = work.config.model.quantization
    return None if kind is None else str(kind)


class _Opened:
    """A model with its tokenizer; the weights are loaded when a process has its first part to do."""

    def __init__(self, source: ModelSource, work: _Work):
        self._source, self._work = source, work

    @cached_property
    def responder(self) -> Responder:
        return open_responder(self._source, self._work.config)

    @cached_property
    def generator(self) -> Generator:
        work = self._work
        return open_generator(self.responder, work.engine, work.config, work.stages.world.device)


def _responses(source: ModelSource, index: int, work: _Work) -> Parts:
    """Return the finished responses of one model; collective."""
    numbers = Numbers(index * work.count, work.count)
    settings = {
        "prompts": work.prompts.digest,
        "part_prompts": work.prompts.part_prompts,
        **rendering(work.config.data),
        "model": source.digest,
        "numbers": asdict(numbers),
        **asdict(work.sampling),
        "engine": str(work.engine),
        "dtype": str(work.config.model.dtype),
        "quantization": _quantization(work),
    }
    parts = Parts.of(RunFolder.of(work.config).pairs_parts, "responses", settings, work.prompts.parts)
    opened = _Opened(source, work)

    def part(index: int) -> list[dict[str, Any]]:
        records = work.prompts.part(index)
        return respond(records, opened.responder, opened.generator, work.sampling, numbers)

    work.stages.finish(f"responses of {source.name}", parts, part)
    return parts


def _scores(responses: Sequence[Parts], judge: dict[str, Any], work: _Work) -> Parts:
    """Return the finished scores of all responses; collective."""
    pairs = work.config.pairs
    settings = {
        "responses": [parts.folder.name for parts in responses],
        **_usable(pairs),
        "judge": judge,
    }
    parts = Parts.of(RunFolder.of(work.config).pairs_parts, "scores", settings, work.prompts.parts)
    opened: list[Judge] = []

    def part(index: int) -> list[dict[str, Any]]:
        if not opened:
            opened.append(open_judge(work.config, work.stages.world.device, work.stages.world.size))
        samples = [usable(own, pairs)[0] for own in samples_of_part(responses, index)[0]]
        return score(work.prompts.part(index), samples, opened[0])

    work.stages.finish("scores", parts, part)
    return parts


def pairs_from_scores(config: RunConfig, say: Callable[[str], None]) -> None:
    """Write the pairs of all scored records of `data.train`, in their order.

    Raises:
        DataError: a source cannot be read, too many of its records are bad, or no pair can be made.
        ConfigError: the file exists and was made with other settings.
    """
    counts: Counter[str] = Counter()
    file, pairs = output_file(config), config.pairs
    settings = {
        "method": str(pairs.method),
        "sources": plain(config.data.train),
        "select": str(pairs.select),
        "margin": pairs.margin,
        "limit": pairs.limit,
        "seed": pairs.seed,
    }
    check_output(file, settings)
    write_results(file, _pairs(config, counts, say), settings, counts, say)


def _pairs(config: RunConfig, counts: Counter[str], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    chosen_by = Selection(config.pairs.select, config.pairs.margin, config.pairs.seed)
    for record in _records(config, say, lambda: counts["prompts"] == config.pairs.limit):
        counts["prompts"] += 1
        scores = record.scores
        if scores is None:
            counts["without_scores"] += 1
            continue
        key = text_digest(f"{prompt_key(record)} {record.responses}")
        for better, worse in select_pairs(scores, chosen_by, key, counts):
            counts["order_changed"] += better > worse
            yield pair_fields(
                record,
                (record.responses[better], record.responses[worse]),
                (scores[better], scores[worse]),
                {
                    "source": str(record.origin),
                    "method": str(PairsMethod.scores),
                    "select": str(chosen_by.select),
                    "margin": chosen_by.margin,
                    "seed": chosen_by.seed,
                    "ranks": [better + 1, worse + 1],
                    "responses": len(record.responses),
                },
            )


def _records(
    config: RunConfig, say: Callable[[str], None], enough: Callable[[], bool]
) -> Iterator[PreferenceRecord]:
    for source in config.data.train:
        if not enough():
            yield from good_records(read_records(pinned(source, None)), source, config.data, say, enough)


def make_pairs(config: RunConfig, screen: "Screen") -> None:
    """Write the preference records of `config.pairs`, and all responses with their scores.

    Raises:
        DpoDistError: they cannot be made.
    """
    match config.pairs.method:
        case PairsMethod.scores:
            with _only_start(config):
                pairs_from_scores(config, screen.say)
        case PairsMethod.samples | PairsMethod.delta:
            _from_models(config, screen)
        case PairsMethod.people:
            label_pairs(config, screen.say, screen.show)


def _from_models(config: RunConfig, screen: "Screen") -> None:
    """Join the processes, each of which loads whole models."""
    from dpo_dist.generation.sampling.stages import joined_stages  # noqa: PLC0415

    with ExitStack() as held, joined_stages(config, screen, MEMORY_REMEDY) as stages:
        stages.world.on_main(lambda: held.enter_context(_only_start(config)))
        pairs_from_models(config, stages)


def _only_start(config: RunConfig) -> AbstractContextManager[int]:
    """Lock the folder of pairs of the run directory: two starts would write the same parts."""
    folder = RunFolder.of(config)
    remedy = "wait until it ends, or set another run.dir"
    return locked(folder.pairs / folder.lock.name, "makes pairs in this run directory", remedy)
