"""Compare models: from prompts to files; the only module that connects the parts of this room."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import dpo_dist
from dpo_dist.atomic import collect_abandoned, staged_file, write_text
from dpo_dist.comparison.answers import DIFFERING, Finished, answers, texts_of
from dpo_dist.comparison.checkpoints import whole_model
from dpo_dist.comparison.judging import compare_texts, compares, describe, has_judge, score_texts
from dpo_dist.comparison.prompts import write_held_out
from dpo_dist.comparison.responses import Row, Speaker
from dpo_dist.comparison.results import Tally, comparison
from dpo_dist.comparison.startup import KEY, Compared
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.device_memory import return_memory
from dpo_dist.errors import DataError
from dpo_dist.evaluation.results import Resampling
from dpo_dist.generation.count_words import describe_counts
from dpo_dist.generation.judging.judge import Judge
from dpo_dist.generation.judging.score import describe_judge, open_judge
from dpo_dist.generation.lock import locked
from dpo_dist.generation.pair_records import write_lines
from dpo_dist.generation.prompts import PromptList, open_prompts
from dpo_dist.generation.sampling.parts import Parts
from dpo_dist.generation.stages import Screen, Stages, joined_stages
from dpo_dist.json_values import plain
from dpo_dist.model.folder import hub_commit

_REMEDY = (
    "lower compare.batch_tokens or compare.max_new_tokens; each process loads whole models onto its GPU: "
    "larger ones cannot be compared"
)


def compare_models(config: RunConfig, models: Sequence[Compared], screen: Screen) -> dict[str, Any] | None:
    """Write the responses of all models and the results; return the results on rank 0.

    Raises:
        DpoDistError: data, a model or the judge cannot be used, or no prompt is left.
    """
    with ExitStack() as held, joined_stages(config, screen, _REMEDY) as stages:
        stages.world.on_main(lambda: held.enter_context(_only_start(config)))
        stages.world.on_main(lambda: announce_replaced(RunFolder.of(config), models, screen))
        return _Comparison(config, models, stages).run()


def _only_start(config: RunConfig) -> Any:
    """Lock the folder of the comparison: two starts would write the same parts."""
    folder = RunFolder.of(config)
    remedy = "wait until it ends, or set another run.dir"
    return locked(folder.comparison / folder.lock.name, "compares models in this run directory", remedy)


def announce_replaced(folder: RunFolder, models: Sequence[Compared], screen: Screen) -> None:
    """Say that the results of a former comparison of other models will be replaced."""
    try:
        former = json.loads(folder.comparison_results.read_bytes())["models"]
        paths = {f"{model['name']}={model['path']}" for model in former}
    except (OSError, ValueError, LookupError, TypeError):
        return
    if paths != {f"{model.name}={model.path}" for model in models}:
        screen.say(
            f"warning: replaces the comparison of {', '.join(sorted(paths))} in {folder.comparison}; "
            "to keep it, set another run.dir"
        )


class _Comparison:
    """A start of the verb. Methods are collective unless they say so."""

    def __init__(self, config: RunConfig, models: Sequence[Compared], stages: Stages):
        self._config, self._stages = config, stages
        self._world, self._screen = stages.world, stages.screen
        self._folder = RunFolder.of(config)
        self._prompts = self._read_prompts()
        self._judge = self._described_judge()
        self._speakers = [self._speaker(model) for model in models]

    def run(self) -> dict[str, Any] | None:
        finished = self._finish()

        def write() -> dict[str, Any]:
            return self._write(finished)

        return self._world.on_main(write, self._screen.heartbeat("writing the comparison"))

    def _read_prompts(self) -> PromptList:
        parts, config = self._folder.comparison_parts, self._config
        return self._world.on_main(
            lambda: open_prompts(
                write_held_out(parts, config, self._screen.say), config.compare.part_prompts
            ),
            self._screen.heartbeat("reading prompts"),
        )

    def _described_judge(self) -> dict[str, Any] | None:
        if not has_judge(self._config.pairs):
            return None
        searching = self._screen.heartbeat("looking for the judge")
        return self._world.on_main(lambda: describe_judge(self._config), searching)

    def _speaker(self, model: Compared) -> Speaker:
        location = whole_model(model, self._folder.comparison_models, self._stages)
        source = self._stages.found(location, self._config, KEY)
        parts = self._folder.comparison_parts
        return Speaker(model, source, self._config, self._stages, parts, self._prompts)

    def _finish(self) -> Finished:
        """Finish all stages, with one model at a time in memory: the base last, to score the others."""
        base, *others = self._speakers
        responses: dict[str, Parts] = {}
        own: dict[str, Parts] = {}
        for speaker in (*others, base):
            name = speaker.compared.name
            responses[name] = speaker.responses()
            own[name] = speaker.logps(responses[name], name)
            if speaker is not base:
                speaker.free()
                return_memory()
        under_base: list[Parts | None] = [own[base.compared.name]]
        for speaker in others:
            name = speaker.compared.name
            has_same = base.has_tokens_of(speaker)
            if not has_same:
                self._screen.say(f"{name}: no KL to {base.compared.name}, which has other token ids")
            under_base.append(base.logps(responses[name], name) if has_same else None)
        base.free()
        return_memory()
        names = [speaker.compared.name for speaker in self._speakers]
        in_order = [responses[name] for name in names]
        return Finished(in_order, [own[name] for name in names], under_base, self._judged(in_order))

    def _judged(self, responses: Sequence[Parts]) -> Parts | None:
        """Return the finished judgements."""
        if self._judge is None:
            return None
        config, prompts = self._config, self._prompts
        settings = {"responses": [parts.folder.name for parts in responses], "judge": self._judge}
        parts = Parts.of(self._folder.comparison_parts, "judgements", settings, prompts.parts)
        budget = replace(config.pairs, batch_tokens=config.compare.batch_tokens)
        opened: list[Judge] = []
        work = compare_texts if compares(config.pairs) else score_texts

        def part(index: int) -> list[Row]:
            if not opened:
                opened.append(open_judge(replace(config, pairs=budget), self._world.device, self._world.size))
            rows = zip(*(own.read(index) for own in responses), strict=True)
            texts = [texts_of(of_prompt) for of_prompt in rows]
            return work(prompts.part(index), texts, opened[0])

        self._stages.finish("judgements", parts, part)
        return parts

    def _write(self, finished: Finished) -> dict[str, Any]:
        """Write both files and print what was dropped; not collective."""
        config, folder = self._config, self._folder
        names = [speaker.compared.name for speaker in self._speakers]
        tally, counts = Tally(names), Counter[str]()
        collect_abandoned(folder.comparison)
        with staged_file(folder.comparison_answers) as temporary:
            write_lines(temporary, answers(finished, self._prompts, tally, counts))
            if not tally.prompts:  # the files of an earlier comparison stay
                raise DataError(
                    "no prompt can be used with every model",
                    where="data.eval",
                    got="; ".join(line.strip() for line in describe_counts(counts)),
                    remedy="raise data.max_length, lower compare.max_new_tokens, or use other data",
                )
        found = comparison(tally, Resampling(config.compare.resamples, config.compare.seed))
        of_models = zip(self._speakers, found["models"], strict=True)
        base = self._speakers[0]
        results = {
            "base": base.compared.name,
            "prompts": tally.prompts,
            "judge": None if self._judge is None else describe(self._judge),
            "judge_compares": self._judge is not None and compares(config.pairs),
            **found,
            "models": [
                row
                | {
                    "path": speaker.compared.path,
                    "digest": speaker.source.digest,
                    "revision": hub_commit(speaker.source.folder),
                    "prompts_encoded_differently": counts.pop(f"{DIFFERING}{row['name']}", 0),
                }
                for speaker, row in of_models
            ],
            "counts": dict(sorted(counts.items())),
            "sampling": {
                "temperature": config.compare.temperature,
                "max_new_tokens": config.compare.max_new_tokens,
                "seed": config.compare.seed,
            },
            "version": dpo_dist.__version__,
        }
        written: dict[str, Any] = plain(results)
        write_text(folder.comparison_results, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
        for line in describe_counts(counts + Counter(prompts=tally.prompts)) if +counts else []:
            self._screen.say(line)
        return written
