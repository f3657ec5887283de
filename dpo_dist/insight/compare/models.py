"""Compare models: from prompts to files."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dpo_dist
from dpo_dist.config.load import from_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.user_code import read_config
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.data.sources import pinned
from dpo_dist.distributed.export import export_checkpoint
from dpo_dist.distributed.manifest import MANIFEST
from dpo_dist.distributed.memory import return_memory
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import (
    collect_abandoned,
    content_digest,
    locked,
    plain,
    staged_file,
    write_text,
)
from dpo_dist.generation.judges.judge import Judge
from dpo_dist.generation.judges.score import describe_judge, open_judge
from dpo_dist.generation.pairs.files import describe_counts, write_lines
from dpo_dist.generation.pairs.preflight import (
    Fault,
    ask_judge,
    check_writable,
    describe_responder,
    fault_of,
    first_records,
)
from dpo_dist.generation.pairs.prompts import PromptList, open_prompts, prompt_key
from dpo_dist.generation.sampling.respond import Answers, find_description, open_responder
from dpo_dist.generation.sampling.stages import Parts, Screen, Stages, joined_stages
from dpo_dist.insight.compare.judging import (
    all_credits,
    compare_texts,
    compares,
    describe,
    has_judge,
    score_texts,
)
from dpo_dist.insight.compare.responses import (
    Row,
    Speaker,
    prompt_records,
    shown_prompt,
    write_held_out,
)
from dpo_dist.insight.compare.results import Tally, comparison
from dpo_dist.insight.compare.start import KEY, Compared, Kind
from dpo_dist.insight.evaluation import Resampling
from dpo_dist.model.folder import hub_commit

DIFFERING = "differing "
"""With a model's name, the count of prompts that it encodes as other tokens than the base."""


@dataclass(frozen=True)
class Finished:
    """The finished parts of all stages.

    Attributes:
        responses: of each model, the base first.
        logps: of each model's responses under itself.
        base_logps: the same under the base; None for a model with other tokens.
        judged: of the judge; None without one.
    """

    responses: Sequence[Parts]
    logps: Sequence[Parts]
    base_logps: Sequence[Parts | None]
    judged: Parts | None


def answers(finished: Finished, prompts: PromptList, tally: Tally, counts: Counter[str]) -> Iterator[Row]:
    """Yield the rows of `answers.jsonl`; count in `tally` and `counts`.

    A prompt that a model cannot be asked has no row: it is counted by its reason.
    """
    with prompts.file.open("rb") as lines:
        for index in range(prompts.parts):
            records = prompts.part(index)
            rows = zip(records, lines, *_columns(finished, index, len(records)), strict=False)
            for record, line, asked, logps, base_logps, judged in rows:
                counts.update(judged.get("counts", {}))
                dropped = next((one.dropped for one in asked if one.dropped is not None), None)
                if dropped is not None:
                    counts[f"prompts_dropped_{dropped}"] += 1
                    continue
                scores = judged.get("scores", [None] * len(asked))
                responses = {
                    name: _response(*facts)
                    for name, *facts in zip(tally.models, asked, logps, base_logps, scores, strict=True)
                }
                for name, one in zip(tally.models, asked, strict=True):
                    counts[f"{DIFFERING}{name}"] += one.prompt_ids != asked[0].prompt_ids
                texts = [response["text"] for response in responses.values()]
                credited = (
                    None if finished.judged is None else all_credits(texts, scores, judged.get("credits"))
                )
                tally.add(responses, credited)
                yield _row(record, json.loads(line), responses, credited)


def _columns(finished: Finished, index: int, prompts: int) -> Iterator[Sequence[Any]]:
    """Yield what each stage has for the prompts of a part, of all models: answers, log-probs, judgements."""
    yield list(zip(*(map(Answers.of, parts.read(index)) for parts in finished.responses), strict=True))
    for stages in (finished.logps, finished.base_logps):
        rows = (None if parts is None else parts.read(index) for parts in stages)
        logps = ([None] * prompts if own is None else [row["logp"] for row in own] for own in rows)
        yield list(zip(*logps, strict=True))
    yield [{}] * prompts if finished.judged is None else finished.judged.read(index)


def _response(asked: Answers, logp: float | None, base_logp: float | None, score: float | None) -> Row:
    (answer,) = asked.answers
    return {
        "text": answer.content,
        "tokens": answer.tokens,
        "finished": answer.finished,
        "logp": logp,
        "base_logp": base_logp,
        "logp_tokens": len(answer.ids),
        "score": score,
    }


def _row(
    record: PreferenceRecord,
    facts: Mapping[str, Any],
    responses: Mapping[str, Row],
    credited: Sequence[float | None] | None,
) -> Row:
    row: Row = {
        "prompt_id": prompt_key(record)[:16],
        "prompt": shown_prompt(record.prompt),
        "source": facts["source"],
        "chosen": facts["chosen"],
        "responses": responses,
    }
    if credited is not None:
        pairs = zip(itertools.combinations(responses, 2), credited, strict=True)
        row["verdicts"] = [{"first": one, "second": two, "credit": credit} for (one, two), credit in pairs]
    return row


def whole_model(model: Compared, folder: Path, stages: Stages) -> str:
    """Return the folder or hub name of a model; of a checkpoint, a folder with its weights. Collective.

    Args:
        model: of the comparison.
        folder: of the folders written from checkpoints; one that exists is used again.
        stages: the processes.

    Raises:
        ConfigError: the checkpoint's run has no configuration, or its base model does not exist.
        CheckpointError: the checkpoint is damaged.
    """
    if model.kind is not Kind.checkpoint:
        return model.location
    checkpoint = Path(model.location).resolve()
    digest = content_digest([checkpoint / MANIFEST])[:16]
    written = folder / f"{checkpoint.parents[1].name}-{checkpoint.name}-{digest}"

    if not stages.world.on_main(written.is_dir):
        stages.screen.say(f"{model.name}: writing the weights of {model.path} as a model folder")
        stages.world.on_main(
            lambda: export_checkpoint(checkpoint, written, _config_of_run(checkpoint)),
            stages.screen.heartbeat(f"writing {written}"),
        )
    return str(written)


def _config_of_run(checkpoint: Path) -> RunConfig:
    """Return the configuration of a checkpoint's run, which cannot ask for code of the base model."""
    run = RunFolder(checkpoint.parents[1])
    try:
        found = from_yaml(read_config(run.config))
        return replace(found, model=replace(found.model, trust_remote_code=False))
    except (OSError, UnicodeDecodeError) as fault:
        raise ConfigError(
            "the run of this checkpoint has no configuration",
            where=KEY,
            got=f"{run.config}: {getattr(fault, 'strerror', None) or fault}",
            expected="a checkpoint in its run directory, beside config.yaml",
            remedy="name a checkpoint in the directory of its run",
        ) from None


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
    if not folder.comparison_results.exists():
        return
    former = json.loads(folder.comparison_results.read_bytes())["models"]
    paths = {f"{model['name']}={model['path']}" for model in former}
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
            rows = zip(*(map(Answers.of, own.read(index)) for own in responses), strict=True)
            # A prompt that a model cannot be asked is not judged.
            all_asked = [[one.answers[0].content for one in row if one.answers] for row in rows]
            texts = [own if len(own) == len(responses) else [] for own in all_asked]
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


def rehearse_comparison(config: RunConfig, models: Sequence[Compared]) -> str:
    """Load what `compare` loads before weights, ask the judge, and read the first records of each source.

    Returns:
        The findings, as lines for the screen.

    Raises:
        ConfigError: a model, its tokenizer, the judge or the run directory cannot be used.
        DataError: a source cannot be read, or none of its first records can be used.
    """
    check_writable(RunFolder.of(config).path, "run.dir")
    lines: list[tuple[str, str]] = []
    faults: dict[str, Fault] = {}
    for model in models:
        if model.kind is Kind.checkpoint:
            lines.append(("model", f"{model.name}: {model.location}, a checkpoint"))
            continue
        responder = open_responder(find_description(model.location, config, KEY), config, KEY)
        lines.append(("model", f"{model.name}: {describe_responder(responder)}"))
        faults[f"{model.name}: "] = fault_of(responder, config.data, config.compare.max_new_tokens)
    lines.append(("judge", ask_judge(config) if has_judge(config.pairs) else "none: no scores, no win rates"))
    for source in config.data.eval_sources:
        for whose, fault in faults.items():
            records = prompt_records(pinned(source, None))
            lines.append(("held out", whose + first_records(records, source, config.data, fault)))
    findings = "".join(f"  {label + ':':<10}{text}\n" for label, text in lines)
    return f"check passed: everything that needs no weights and no GPU is in order\n{findings}"
