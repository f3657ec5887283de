"""Compare models: from prompts to files."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import dpo_dist
from dpo_dist.config.load import from_yaml
from dpo_dist.config.run_folder import RunFolder, existing_run
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.formats import read_prompts
from dpo_dist.distributed.checkpoint import MANIFEST
from dpo_dist.distributed.export import export_checkpoint
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import (
    collect_abandoned,
    content_digest,
    locked,
    plain,
    staged_file,
    write_text,
)
from dpo_dist.generation.judges import Judge, open_judge
from dpo_dist.generation.pairs.files import describe_counts, prompt_key, read_prompt_row, write_lines
from dpo_dist.generation.pairs.preflight import Fault, Lines, check_model, first_records, passed
from dpo_dist.generation.sampling.respond import Answers
from dpo_dist.generation.sampling.stages import Parts, Screen, Stages, joined_stages
from dpo_dist.insight.compare.responses import (
    Row,
    Speaker,
    shown_prompt,
    write_held_out,
)
from dpo_dist.insight.compare.results import compares, comparison, describe, judge_texts
from dpo_dist.insight.compare.start import KEY, Compared
from dpo_dist.model.folder import hub_commit

_DIFFERING = "differing "
"""With a model's name, the count of prompts that it encodes as other tokens than the base."""
_REMEDY = (
    "lower compare.max_new_tokens; each process loads whole models onto its GPU: "
    "larger ones cannot be compared"
)


def compare_models(config: RunConfig, models: Sequence[Compared], screen: Screen) -> dict[str, Any] | None:
    """Write the responses of all models and the results; return the results on rank 0."""
    folder = RunFolder.of(config)
    # Two starts would write the same parts.
    remedy = "wait until it ends, or set another run.dir"
    only = locked(folder.comparison / folder.lock.name, "compares models in this run directory", remedy)
    with ExitStack() as held, joined_stages(config, screen, _REMEDY) as stages:
        world, parts = stages.world, folder.comparison_parts
        world.on_main(lambda: held.enter_context(only))
        prompts = world.on_main(
            lambda: write_held_out(parts, config, screen.say),
            screen.heartbeat("reading prompts"),
        )
        judge = world.together(lambda: open_judge(config, world.device))
        described = None
        if judge is not None:
            described = world.on_main(judge.describe, screen.heartbeat("looking for the judge"))
        speakers = []
        for model in models:
            location = whole_model(model, folder.comparison_models, stages)
            source = stages.found(location, config, KEY)
            speakers.append(Speaker(model, source, config, stages, parts, prompts))
        _speak(speakers, screen)
        judged = None
        if judge is not None:
            settings = {"responses": [one.responses.folder.name for one in speakers], "judge": described}
            judged = Parts.of(parts, "judgements", settings, prompts.count)
            stages.finish("judgements", judged, _judging(speakers, judge, config, prompts))
        return world.on_main(
            lambda: _write(speakers, described, judged, config, prompts, screen),
            screen.heartbeat("writing the comparison"),
        )


def whole_model(model: Compared, folder: Path, stages: Stages) -> str:
    """Return the folder or hub name of a model; of a checkpoint, a folder with its weights. Collective."""
    if not model.is_checkpoint:
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
    found = from_yaml(existing_run(checkpoint.parents[1]).config.read_text(encoding="utf-8"))
    return replace(found, model=replace(found.model, trust_remote_code=False))


def _speak(speakers: Sequence[Speaker], screen: Screen) -> None:
    """Finish responses and log-probs, one model at a time in memory: the base last, to score the others."""
    base, *others = speakers
    for speaker in (*others, base):
        speaker.respond()
        speaker.logps = speaker.score(speaker)
        if speaker is not base:
            speaker.free()
    base.base_logps = base.logps
    for speaker in others:
        if base.has_tokens_of(speaker):
            speaker.base_logps = base.score(speaker)
        else:
            screen.say(f"{speaker.name}: no KL to {base.name}, which has other token ids")
    base.free()


def _judging(
    speakers: Sequence[Speaker], judge: Judge, config: RunConfig, prompts: Parts
) -> Callable[[int], list[Row]]:
    """Return the function that judges a part."""

    def part(index: int) -> list[Row]:
        rows = zip(*(map(Answers.of, speaker.responses.read(index)) for speaker in speakers), strict=True)
        texts = [[one.answers[0].content for one in row if one.answers] for row in rows]
        # A prompt that a model cannot be asked is not judged.
        asked = [own if len(own) == len(speakers) else [] for own in texts]
        records = list(map(read_prompt_row, prompts.read(index)))
        return judge_texts(records, asked, judge, in_pairs=compares(config.pairs))

    return part


def _rows(
    speakers: Sequence[Speaker], judged: Parts | None, prompts: Parts, counts: Counter[str]
) -> Iterator[Row]:
    """Yield the rows of `answers.jsonl`; count in `counts`.

    A prompt that a model cannot be asked has no row: it is counted by its reason.
    """
    names = [speaker.name for speaker in speakers]
    for index in range(prompts.count):
        lines = prompts.read(index)
        judgements = [{}] * len(lines) if judged is None else judged.read(index)
        rows = zip(*(speaker.rows(index) for speaker in speakers), strict=True)
        for line, row, judgement in zip(lines, rows, judgements, strict=True):
            record = read_prompt_row(line)
            counts.update(judgement.get("counts", {}))
            asked = [answers for answers, _ in row]
            if dropped := next((one.dropped for one in asked if one.dropped is not None), None):
                counts[f"prompts_dropped_{dropped}"] += 1
                continue
            for name, answers in zip(names, asked, strict=True):
                counts[f"{_DIFFERING}{name}"] += answers.prompt_ids != asked[0].prompt_ids
            scores = judgement.get("scores", [None] * len(speakers))
            found: Row = {
                "prompt_id": prompt_key(record)[:16],
                "prompt": shown_prompt(record.prompt),
                "source": line["source"],
                "chosen": line["chosen"],
                "responses": {
                    name: response | {"score": score}
                    for name, (_, response), score in zip(names, row, scores, strict=True)
                },
            }
            if judged is not None:
                pairs = zip(itertools.combinations(names, 2), judgement["credits"], strict=True)
                found["verdicts"] = [
                    {"first": first, "second": second, "credit": credit} for (first, second), credit in pairs
                ]
            yield found


def _write(
    speakers: Sequence[Speaker],
    judge: dict[str, Any] | None,
    judged: Parts | None,
    config: RunConfig,
    prompts: Parts,
    screen: Screen,
) -> dict[str, Any]:
    """Write both files and print what was dropped; on rank 0."""
    folder, settings, counts = RunFolder.of(config), config.compare, Counter[str]()
    names = [speaker.name for speaker in speakers]
    collect_abandoned(folder.comparison)
    with staged_file(folder.comparison_answers) as temporary:
        write_lines(temporary, _rows(speakers, judged, prompts, counts))
        if not temporary.stat().st_size:  # the files of an earlier comparison stay
            raise DataError(
                "no prompt can be used with every model",
                where="data.eval",
                got="; ".join(line.strip() for line in describe_counts(counts)),
                remedy="raise data.max_length, lower compare.max_new_tokens, or use other data",
            )
        with temporary.open("rb") as lines:
            found = comparison(map(json.loads, lines), names)
    for speaker, row in zip(speakers, found["models"], strict=True):
        row |= {
            "path": speaker.compared.path,
            "digest": speaker.source.digest,
            "revision": hub_commit(speaker.source.folder),
            "prompts_encoded_differently": counts.pop(f"{_DIFFERING}{row['name']}", 0),
        }
    results = {
        "base": names[0],
        "judge": None if judge is None else describe(judge),
        "judge_compares": judge is not None and compares(config.pairs),
        **found,
        "counts": dict(sorted(counts.items())),
        "sampling": {
            "temperature": settings.temperature,
            "max_new_tokens": settings.max_new_tokens,
        },
        "version": dpo_dist.__version__,
    }
    written: dict[str, Any] = plain(results)
    write_text(folder.comparison_results, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    for line in describe_counts(counts + Counter(prompts=found["prompts"])) if +counts else []:
        screen.say(line)
    return written


def rehearse_comparison(config: RunConfig, models: Sequence[Compared]) -> str:
    """Load what `compare` loads before weights, ask the judge, and read the first records of each source."""
    RunFolder.of(config).check_writable()
    lines: Lines = []
    faults: dict[str, Fault] = {}
    for model in models:
        if model.is_checkpoint:
            lines.append(("model", f"{model.name}: {model.location}, a checkpoint"))
            continue
        name, new_tokens = f"{model.name}: ", config.compare.max_new_tokens
        faults[name] = check_model(model.location, config, new_tokens, lines, name, KEY)
    judge = open_judge(config)
    lines.append(("judge", "none: no scores, no win rates" if judge is None else judge.check()))
    for source in config.data.eval_sources:
        lines += first_records("held out", read_prompts, source, config.data, faults)
    return passed(lines)
