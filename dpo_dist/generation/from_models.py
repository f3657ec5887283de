"""Pairs from models' responses: generate, score, choose. Every stage is resumable and shared by processes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from dpo_dist.config.pairs_schema import Engine, PairsConfig, PairsMethod
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.device_memory import return_memory
from dpo_dist.distributed.world import World
from dpo_dist.generation.judging.judge import Judge
from dpo_dist.generation.judging.score import describe_judge, open_judge, score
from dpo_dist.generation.prompts import PromptList, open_prompts, rendering, write_prompts
from dpo_dist.generation.results import Results, pairs_of, samples_of, samples_of_part, usable
from dpo_dist.generation.sampling.engine import Generator, chosen_engine, lora_options, open_generator
from dpo_dist.generation.sampling.generate import Sampling
from dpo_dist.generation.sampling.parts import Parts
from dpo_dist.generation.sampling.respond import Numbers, respond
from dpo_dist.generation.sampling.responder import ModelSource, Responder, open_responder
from dpo_dist.generation.stages import Screen, Stages
from dpo_dist.generation.startup import output_file, responding_models
from dpo_dist.generation.summary import check_output, write_results, write_samples

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
