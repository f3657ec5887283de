"""Compare models, from prompts to files; each model's weights are loaded once."""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dpo_dist
from dpo_dist.data import (
    DataConfig,
    DataSource,
    Dialogue,
    Example,
    ImageInput,
    Part,
    PreferenceRecord,
    Prompt,
    prompt_hash,
    source_labels,
    turns_of,
)
from dpo_dist.data.counts import DROPPED_PROMPT_PREFIX, count_lines
from dpo_dist.foundation import files
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.text import pluralize
from dpo_dist.foundation.types import CheckReport
from dpo_dist.kit import (
    ModelSource,
    PackedCausalLM,
    Run,
    RunConfig,
    check_writable,
    checkpoint_as_model,
    count_trained,
    hub_commit,
    in_chunks,
    joined_run,
    packed_logps,
    return_memory,
    unsharded_loading,
)
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.results import compares, comparison, judge_texts
from dpo_dist.tools.compare.start import MODELS_KEY, NamedModel
from dpo_dist.tools.pages.thumbnails import thumbnails, with_marks
from dpo_dist.tools.sampling.generate import Request, Sample, generate
from dpo_dist.tools.sampling.judges import Judge, open_judge
from dpo_dist.tools.sampling.keys import CompareConfig, PairsConfig, SamplingConfig
from dpo_dist.tools.sampling.prompts import (
    Parts,
    Prompts,
    as_user_message,
    check_model,
    find_model_together,
    first_records,
    good_records,
    open_judge_together,
)
from dpo_dist.tools.sampling.respond import (
    Completions,
    Responder,
    open_responder,
    usable_prompt,
)
from dpo_dist.tools.sampling.settings import Sampling, sampling_for

_Row = dict[str, Any]
PROMPTS_AT_ONCE = 16
"""Number of prompts in a part: processes share the parts, and finished parts are not repeated."""
_BATCH_TOKENS = 16384
"""Most tokens of a process's batch: rows times the longest prompt with its response."""


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
        line += f", fewer than compare.prompts={most}"
    say(line)
    return [prompt for *_, prompt in sorted(prompts, key=lambda entry: entry[1])], labels


@dataclass(eq=False)
class ComparedModel:
    """A model of the comparison; a process loads its weights at its first part.

    `path` is as configured; the name in the results is `source.name`. `logps` score the model's responses
    under itself, `base_logps` under the base: None if the base has other tokens.
    """

    path: str
    source: ModelSource
    prompts: Prompts
    responses: Parts = field(init=False)
    logps: Parts = field(init=False)
    base_logps: Parts | None = None

    @property
    def name(self) -> str:
        """The model's name in the results."""
        return self.source.name

    @property
    def _sampling(self) -> Sampling:
        return sampling_for("compare", self.prompts.run.config.section_of(SamplingConfig))

    @cached_property
    def responder(self) -> Responder:
        """The model's tokenizer and stop tokens."""
        config = self.prompts.run.config
        return open_responder(self.source, config.model, config.data)

    @cached_property
    def _packed(self) -> PackedCausalLM:
        config = self.prompts.run.config
        longest = config.data.max_length + self._sampling.max_new_tokens
        if self.responder.longest is not None:
            longest = min(longest, self.responder.longest)
        world = self.prompts.run.world
        with unsharded_loading(world):
            processor = self.responder.processor
            return self.source.load_packed(config.model, longest, world.device, processor)

    def room(self, record: PreferenceRecord) -> int | None:
        """Return the most tokens of a response to a prompt; None: the model cannot be asked."""
        prompt = usable_prompt(record, self.responder, self._sampling)
        if isinstance(prompt, str):
            return None
        return self._sampling.room(len(prompt.prompt_ids), self.responder.longest)

    def respond(self, rooms: Mapping[str, int]) -> None:
        """Generate the responses that are missing; collective. All models share a prompt's random numbers.

        `rooms`: most tokens of a response by `prompt_key`.
        """

        def samples(requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
            with self._packed.unpacked() as causal_lm:
                return generate(causal_lm, requests, sampling, self.responder.stop_ids, _BATCH_TOKENS)

        self.responses = self.prompts.responses(
            self.source,
            self._sampling,
            range(1),
            lambda: (self.responder, samples),
            rooms,
        )

    def score(self, other: "ComparedModel") -> Parts:
        """Return the log-probs of the other model's responses under this model; collective.

        A row is `{"logp": ...}`: the sum over the tokens of a response, null without a response.
        """
        settings = {
            "responses": other.responses.folder.name,
            "model": self.source.digest,
            "attention": str(self.prompts.run.config.model.attention),
        }

        def part(index: int) -> list[_Row]:
            rows = [Completions.from_row(row) for row in other.responses.read(index)]
            logps = response_logps(self._packed, rows, _BATCH_TOKENS, self._images(index, rows))
            return [{"logp": logp} for logp in logps]

        title = f"log-probs of {other.name}"
        if other is not self:
            title += f"'s responses under {self.name}"
        return self.prompts.finish(title, self.prompts.stage("logps", settings), part)

    def _images(self, index: int, rows: Sequence[Completions]) -> list[tuple[ImageInput, ...] | None]:
        """Return the images of each prompt of a part; None if it has another number of placeholders.

        A model with the same tokens may divide an image into more or fewer; a response may have some, too.
        """
        responder = self.responder
        images_of_prompts = list[tuple[ImageInput, ...] | None]()
        for record, row in zip(self.prompts.parts[index], rows, strict=True):
            prompt = usable_prompt(record, responder, None) if record.images and row.completions else ""
            images = () if isinstance(prompt, str) else responder.images(prompt)
            places = 0
            if responder.processor:
                placeholder_id = responder.processor.placeholder_id
                for ids in (row.prompt_ids, *(completion.ids for completion in row.completions)):
                    places += ids.count(placeholder_id)
            has_all = places == sum(image.tokens for image in images)
            images_of_prompts.append(images if has_all else None)
        return images_of_prompts

    def free(self) -> None:
        """Free the memory of the weights."""
        vars(self).pop("_packed", None)
        return_memory()

    def rows(self, index: int) -> Iterator[tuple[str | None, _Row]]:
        """Yield by prompt why the model cannot be asked (or None), and its response for `answers.jsonl`."""
        logps = self.logps.read(index)
        base = self.base_logps
        base_rows = [{"logp": None}] * len(logps) if base is None else base.read(index)
        for row, logp, base_logp in zip(self.responses.read(index), logps, base_rows, strict=True):
            completions = Completions.from_row(row)
            response = {}
            for completion in completions.completions:
                response = {
                    "text": completion.content,
                    "tokens": completion.tokens,
                    "finished": completion.finished,
                    **logp,
                    "base_logp": base_logp["logp"],
                    "logp_tokens": len(completion.ids),
                }
            yield completions.dropped, response


@torch.inference_mode()
def response_logps(
    packed: PackedCausalLM,
    rows: Sequence[Completions],
    budget: int,
    images: Sequence[tuple[ImageInput, ...] | None] = (),
) -> list[float | None]:
    """Return the sum of the log-probs of each row's response, in nats; None without a response.

    `images` are those of each prompt, none by default; None: the response is not scored.
    """
    sums: list[float | None] = [None] * len(rows)
    indices = []
    examples = []
    for index, (row, prompt_images) in enumerate(zip(rows, images or [()] * len(rows), strict=True)):
        if not row.completions or prompt_images is None:
            continue
        ids = np.array(row.completions[0].ids, dtype=np.int32)
        if not len(ids):
            sums[index] = 0.0  # a response without tokens has probability 1
            continue
        prompt_ids = np.array(row.prompt_ids, dtype=np.int32)
        indices.append(index)
        examples.append(Example(prompt_ids, (ids,), images=prompt_images))
    for index, logps in zip(indices, packed_logps(packed, examples, budget), strict=True):
        sums[index] = float(logps.cpu().double().sum())
    return sums


def compare_models(
    config: RunConfig, models: Sequence[NamedModel], console: Console
) -> dict[str, Any] | None:
    """Write the responses of all models and the results; return the results on rank 0."""
    folder = ComparisonFolder(config.run.path)
    # Without a lock two starts would write the same parts.
    lock = files.locked(folder.comparison / folder.lock.name, "compares models in this run directory")
    with joined_run(config, console, lock) as run:
        world = run.world
        most = config.section_of(CompareConfig).prompts
        with console.heartbeat("reading prompts"):
            records, labels = world.on_main(lambda: held_out(config.data, most, console.say))
        parts = list(in_chunks(records, PROMPTS_AT_ONCE))
        prompts = Prompts(run, folder.comparison_parts, parts)
        judge, judge_facts = open_judge_together(run)
        speakers = []
        for model in models:
            source = find_model_together(whole_model(model, folder.comparison_models, run), run, MODELS_KEY)
            source = replace(source, name=model.name)
            speakers.append(ComparedModel(model.path, source, prompts))
        # A model that reads more gets no more room than the others: a longer response is not a better model.
        rooms = dict[str, int]()
        for record in itertools.chain(*parts):
            of_speakers = {speaker.room(record) for speaker in speakers}
            tokens = {room for room in of_speakers if room is not None}
            if len(tokens) > 1:
                rooms[record.prompt_key()] = min(tokens)
        # One model at a time is in memory; the base, which scores all, comes last.
        base, *others = speakers
        for speaker in (*others, base):
            speaker.respond(rooms)
            speaker.logps = speaker.score(speaker)
            if speaker is not base:
                speaker.free()
        base.base_logps = base.logps
        base_vocabulary = base.responder.tokenizer.get_vocab().items()
        for speaker in others:
            if speaker.responder.tokenizer.get_vocab().items() <= base_vocabulary:  # the same tokens
                speaker.base_logps = base.score(speaker)
            else:
                console.say(f"{speaker.name}: no KL to {base.name}, which has other token ids")
        base.free()
        judgement_parts: Parts | None = None
        if judge is not None:

            def judgements(index: int) -> list[_Row]:
                answers = (map(Completions.from_row, speaker.responses.read(index)) for speaker in speakers)
                texts_of_prompts = []
                for row in zip(*answers, strict=True):
                    texts = [answer.completions[0].content for answer in row if answer.completions]
                    if len(texts) < len(speakers):
                        texts = []  # a prompt that a model cannot be asked is not judged
                    texts_of_prompts.append(texts)
                records = prompts.parts[index]
                return judge_texts(
                    records, texts_of_prompts, judge, in_pairs=compares(config.section_of(PairsConfig))
                )

            folders = [speaker.responses.folder.name for speaker in speakers]
            settings = {"responses": folders, "judge": judge_facts}
            stage = prompts.stage("judgements", settings)
            judgement_parts = prompts.finish("judgements", stage, judgements, judge.client)
        with console.heartbeat("writing the comparison"):
            return world.on_main(lambda: _write(speakers, judge, judgement_parts, labels))


def whole_model(model: NamedModel, folder: Path, run: Run) -> str:
    """Return a model's folder or hub name; a checkpoint is exported to a folder first. Collective."""
    if not model.is_checkpoint:
        return model.location
    write = partial(
        checkpoint_as_model, Path(model.location), folder, run.console.say, run.config.model.trust_remote_code
    )
    with run.console.heartbeat(f"writing the weights of {model.name}"):
        return str(run.world.on_main(write))


def _rows(
    speakers: Sequence[ComparedModel],
    judgement_parts: Parts | None,
    labels: Mapping[str, str],
    counts: Counter[str],
) -> Iterator[_Row]:
    """Yield the rows of `answers.jsonl`.

    A prompt that some model cannot be asked has no row; `counts` gets its reason, and the judge's counts.
    """
    names = [speaker.name for speaker in speakers]
    for index, records in enumerate(speakers[0].prompts.parts):
        judgements = [{}] * len(records) if judgement_parts is None else judgement_parts.read(index)
        rows = zip(*(speaker.rows(index) for speaker in speakers), strict=True)
        for record, row, judgement in zip(records, rows, judgements, strict=True):
            counts.update(judgement.get("counts", {}))
            reasons = [reason for reason, _ in row if reason]
            if reasons:
                counts[DROPPED_PROMPT_PREFIX + reasons[0]] += 1
                continue
            scores = judgement.get("scores", [None] * len(speakers))
            responses = {}
            for name, (_, response), score in zip(names, row, scores, strict=True):
                responses[name] = {**response, "score": score}
            key = record.prompt_key()
            answer: _Row = {
                "prompt_id": key[:16],
                "prompt": prompt_text(record.prompt),
                "source": labels[key],
                "chosen": turns_of(record.responses[0])[-1].content if record.responses else None,
                "responses": responses,
            }
            if record.images:
                answer["images"] = thumbnails(record.images)
            if record.labelled_side:
                answer["label"] = "good" if record.labelled_side == "chosen" else "bad"
            if judgement_parts is not None:
                pairs = zip(itertools.combinations(names, 2), judgement["credits"], strict=True)
                answer["verdicts"] = [
                    {"first": first, "second": second, "credit": credit} for (first, second), credit in pairs
                ]
            yield answer


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text: the content of a single user turn, or all turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Dialogue):
        return prompt.text
    if len(prompt) == 1 and prompt[0].role == "user":
        return with_marks(prompt[0].content)
    return with_marks("\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt))


def _write(
    speakers: Sequence[ComparedModel],
    judge: Judge | None,
    judgement_parts: Parts | None,
    labels: Mapping[str, str],
) -> dict[str, Any]:
    run = speakers[0].prompts.run
    folder = ComparisonFolder(run.folder.path)
    console = run.console
    counts = Counter[str]()
    sampling = asdict(sampling_for("compare", run.config.section_of(SamplingConfig)))
    names = [speaker.name for speaker in speakers]
    files.remove_abandoned(folder.comparison)
    with files.staged_file(folder.comparison_answers) as temporary:  # after an error earlier answers stay
        if not files.write_lines(temporary, _rows(speakers, judgement_parts, labels, counts)):
            raise DataError(
                "no prompt can be used with every model",
                where="data.eval",
                got="; ".join(line.strip() for line in count_lines(counts)),
                remedy="raise data.max_length, lower sampling.max_new_tokens, or use other data",
            )
        sections = comparison(files.read_lines(temporary), names)
    for speaker, row in zip(speakers, sections["models"], strict=True):
        row |= {
            "path": speaker.path,
            "digest": speaker.source.digest,
            "revision": hub_commit(speaker.source.folder),
        }
    records = itertools.chain(*speakers[0].prompts.parts)
    prompts = [prompt_hash(record.prompt, record.images) for record in records]
    in_train = {each.name: count_trained(each.path, prompts, "prompt", console) for each in speakers}
    results: dict[str, Any] = files.for_json(
        {
            "base": names[0],
            "judge": judge and str(judge),
            "judge_compares": judge is not None and compares(run.config.section_of(PairsConfig)),
            **sections,
            "prompts_also_in_train": in_train,
            "counts": dict(sorted(counts.items())),
            "sampling": {name: value for name, value in sampling.items() if name != "seed"},
            "version": dpo_dist.__version__,
        }
    )
    files.write_json(folder.comparison_results, results)
    if +counts:
        for line in count_lines(counts + Counter(prompts=sections["prompts"])):
            console.say(line)
    return results


def dry_run_comparison(config: RunConfig, models: Sequence[NamedModel]) -> CheckReport:
    """Check models without loading weights, the judge, and each source's first records; return the report."""
    check_writable(config.run.path)
    lines: list[str] = []
    records = first_records(config.data.eval_sources, DataSource.prompts, config.data, lines.append)
    sampling = sampling_for("compare", config.section_of(SamplingConfig))
    for model in models:
        if model.is_checkpoint:
            lines.append(f"{model.location}, a checkpoint")
        else:
            check_model(model.location, config, sampling, records, lines.append, MODELS_KEY, model.name)
    judge = open_judge(config.section_of(PairsConfig), config.model, Path(config.reference.store))
    if judge is not None:
        judge.check()
    lines.append(f"judge: {judge or 'none, so no scores and win rates'}")
    return CheckReport([("", line) for line in lines])
