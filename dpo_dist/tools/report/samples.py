"""Generate responses of policy and reference to held-out prompts, at evaluations."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.foundation.errors import ConfigError, warn_on_bug
from dpo_dist.foundation.files import json_line, read_lines, text_digest, write_text
from dpo_dist.foundation.text import duration, pluralize
from dpo_dist.kit import (
    Engine,
    Inputs,
    Interrupted,
    NotFiniteError,
    PreferenceDataset,
    ReferenceMode,
    Run,
    WrongGenerationError,
    context_length,
    find_stop_ids,
    load_config,
    load_reference,
)
from dpo_dist.tools.pages.thumbnails import shown_prompt
from dpo_dist.tools.sampling.generate import Request, generate_together
from dpo_dist.tools.sampling.keys import SamplingConfig
from dpo_dist.tools.sampling.respond import texts_after
from dpo_dist.tools.sampling.settings import Sampling, sampling_for
from dpo_dist.tools.text_facts import sample_metrics, text_facts

_Row = dict[str, Any]
_BATCH_TOKENS = 16384
_USUAL_PROMPTS = 8
_MOST_SECONDS = 60.0  # of the default's responses by one model on a CPU


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt; its rows have `prompt`, `prompt_id`, `source`, `chosen`, and perhaps `images`."""

    request: Request
    fields: _Row


@dataclass
class RunSamples:
    """Asks a run's held-out prompts, the same at every evaluation and start. Methods are collective.

    A response is a row with `text`, `tokens` and `finished`.

    Attributes:
        stop_ids: tokens that end a response.
        at_every_evaluation: whether the policy responds at evaluations between the first and the last one.
        policy_starts_as_reference: whether the policy equals the reference before the first step.
        reference: the reference's response to each prompt; None if not known.
        faults: why models cannot respond, each said once.
    """

    run: Run
    sampling: Sampling
    prompts: tuple[SamplePrompt, ...]
    stop_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    at_every_evaluation: bool = True
    policy_starts_as_reference: bool = False
    reference: list[_Row] | None = None
    faults: set[str] = field(default_factory=set)

    def write_responses(self, step: int, policy: Engine, *, is_last: bool) -> dict[str, float]:
        """Write the policy's responses after `step`, and return their metrics `samples/...`.

        Raises Interrupted if the run must stop. Without finite logits there is no file; a bug in the metrics
        gives a warning and no metrics. `is_last`: whether the run ends after this step.
        """
        is_between = step != 0 and not is_last
        if is_between and not self.at_every_evaluation:
            return {}
        responses = self.reference if step == 0 and self.policy_starts_as_reference else None
        responses = responses or self._ask(policy, self.prompts)
        if responses is None:
            return {}

        def write() -> dict[str, float]:
            metrics: dict[str, float] = {}
            by_model = {} if self.reference is None else {"reference": self.reference}
            by_model["policy"] = responses
            self._write(self.run.folder.samples_file(step), {"step": step}, by_model)
            with warn_on_bug("the row of metrics of samples", self.run.warn):
                metrics["samples/prompts"] = float(len(responses))
                metrics |= self._metrics("samples/", responses)
                if self.reference is not None:
                    metrics |= self._metrics("samples/reference_", self.reference)
            return metrics

        return self.run.write(write)

    def _write(self, file: Path, fields: _Row, by_model: Mapping[str, Sequence[_Row]]) -> None:
        """Write a file of answers with these fields and the models' responses in each row."""
        rows = []
        for number, prompt in enumerate(self.prompts):
            responses = {model: responses[number] for model, responses in by_model.items()}
            rows.append({**prompt.fields, **fields, "responses": responses})
        write_text(file, "".join(map(json_line, rows)))

    def open(self, policy: Engine) -> None:
        """Get the reference's responses, if missing, from the policy at its start or with its adapter off."""
        if self.reference is None and self.policy_starts_as_reference:
            self.ask_reference(policy, without_adapter=self.run.config.model.adapter is not None)

    def ask_reference(self, model: Engine, *, without_adapter: bool = False) -> None:
        """Generate and write the reference's responses with this model; ends the run if it must stop."""
        started = time.monotonic()
        is_bounded = not self.at_every_evaluation and self.run.world.device.type == "cpu"
        try:
            first = self._ask(
                model, self.prompts[: 1 if is_bounded else None], without_adapter=without_adapter
            )
            self.reference = first
            if first is not None and is_bounded:
                # Keep as many prompts as fit into `_MOST_SECONDS`, at least one.
                seconds = time.monotonic() - started
                most = self.run.world.on_main(lambda: max(1, int(_MOST_SECONDS / seconds)))
                count = len(self.prompts)
                if most < count:
                    self.run.say(
                        f"samples: {most} of {pluralize(count, 'prompt')}, since a response takes "
                        f"{duration(seconds)} here; sampling.prompts={count} asks all of them"
                    )
                    self.prompts = self.prompts[:most]
                others = self._ask(model, self.prompts[1:], without_adapter=without_adapter)
                self.reference = None if others is None else first + others
        except Interrupted:
            self.run.stops.check()
        if self.reference is not None:
            fields = {"sampling": asdict(self.sampling)}
            by_model = {"reference": self.reference}
            self.run.write(lambda: self._write(self.run.folder.samples_reference, fields, by_model))
            tokens = sum(row["tokens"] for row in self.reference)
            prompts = pluralize(len(self.prompts), "held-out prompt")
            again = "at every evaluation" if self.at_every_evaluation else "after the last step"
            self.run.note(
                f"samples: responses to {prompts}, {tokens:,} tokens, took "
                f"{duration(time.monotonic() - started)}, and take about as long {again}; "
                "sampling.prompts=0 turns them off"
            )

    def read_reference(self) -> list[_Row] | None:
        """Return the reference's responses from their file; None if prompts or settings have changed."""
        rows = list(read_lines(self.run.folder.samples_reference))
        prompts = self.prompts
        if rows and not self.at_every_evaluation:  # the earlier start may have asked fewer
            prompts = prompts[: len(rows)]
        sampling = asdict(self.sampling)
        expected = [(prompt.fields["prompt_id"], sampling) for prompt in prompts]
        if [(row["prompt_id"], row["sampling"]) for row in rows] != expected:
            return None
        return [row["responses"]["reference"] for row in rows]

    def _ask(
        self, model: Engine, prompts: Sequence[SamplePrompt], *, without_adapter: bool = False
    ) -> list[_Row] | None:
        """Return a response to each prompt; warn and return None if the model cannot respond."""
        requests = [prompt.request for prompt in prompts]
        if not requests:
            return []
        limits = self.stop_ids, _BATCH_TOKENS, self.run.stops
        try:
            doing = f"samples: responding to {pluralize(len(requests), 'prompt')}"
            with self.run.console.heartbeat(doing):
                samples = generate_together(
                    model, requests, self.sampling, *limits, without_adapter=without_adapter
                )
        except NotFiniteError:
            self.run.warn("no samples: the model's logits are not finite")
            return None
        except WrongGenerationError as fault:
            if str(fault) not in self.faults:
                self.run.warn(f"no samples: {fault}; the training itself does not generate")
            self.faults.add(str(fault))
            return None
        return [
            {
                "text": texts_after(list(sample.ids), request.prompt_ids, self.tokenizer)[0],
                "tokens": len(sample.ids),
                "finished": sample.is_finished,
            }
            for sample, request in zip(samples, requests, strict=True)
        ]

    @staticmethod
    def _metrics(prefix: str, responses: Sequence[_Row]) -> dict[str, float]:
        facts = [text_facts(row["text"], row["tokens"], row["finished"]) for row in responses]
        return {prefix + name: value for name, value in sample_metrics(facts).items()}


def prepare_samples(run: Run, inputs: Inputs, step: int) -> RunSamples | None:
    """Return the samples of a run that continues after `step`; None if it has none. Collective.

    The reference responds once, and a resumed run reads the responses from a file in the run directory. If
    the policy cannot replace the reference, the reference is loaded and freed again: call this before
    the policy is loaded.
    """
    config = run.config
    settings = run.config.section_of(SamplingConfig)
    tokenizer = inputs.tokenizer
    if settings.prompts == 0 or inputs.eval_set is None or config.loss.of_scores:
        return None
    model_folder = inputs.policy_files.folder
    seed = config.trainer.seed
    try:
        stop_ids = find_stop_ids(tokenizer, config.data, model_folder, "model.path")
    except ConfigError as error:
        if settings.prompts is not None:
            raise
        run.say(f"no samples: {error.message}; {error.remedy}")
        return None
    sampling = sampling_for("train", settings, seed)
    longest = context_length(load_config(model_folder, config.model))
    count = _USUAL_PROMPTS if settings.prompts is None else settings.prompts
    prompts = choose_prompts(
        inputs.eval_set,
        tokenizer,
        stop_ids,
        count,
        seed,
        sampling,
        longest,
        is_labelled=run.config.loss.is_unpaired,
    )
    if len(prompts) < count:
        run.say(
            f"samples: {len(prompts)} prompts, not {count}: the evaluation data have no more that "
            "are different and leave room for sampling.max_new_tokens"
        )
    if not prompts:
        return None
    samples = RunSamples(run, sampling, prompts, stop_ids, tokenizer, settings.prompts is not None)
    files = inputs.reference_files or inputs.policy_files
    same_precision = config.reference.quantization is config.model.quantization
    samples.policy_starts_as_reference = (
        inputs.reference_files is None
        or config.reference.mode is ReferenceMode.adapter
        or (files.digest == inputs.policy_files.digest and same_precision)
    )
    samples.reference = run.world.on_main(samples.read_reference)
    if samples.reference is not None:
        samples.prompts = samples.prompts[: len(samples.reference)]
    policy_responds = samples.policy_starts_as_reference and (step == 0 or config.model.adapter is not None)
    if samples.reference is None and not policy_responds:
        run.note("samples: loading the reference to generate its responses")
        engine = load_reference(
            files, config.model, config.reference, config.data.max_length, run.world, inputs.processor
        )
        samples.ask_reference(engine)
        engine.free()
    return samples


def choose_prompts(
    dataset: PreferenceDataset,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    count: int,
    seed: int,
    sampling: Sampling,
    longest: int | None,
    *,
    is_labelled: bool = False,
) -> tuple[SamplePrompt, ...]:
    """Return different prompts after which there is room in `longest` tokens, by a hash of seed and prompt.

    The choice does not depend on the dataset's order. `is_labelled`: add the field `label`.
    """
    keys, indices = np.unique(dataset.prompt_hashes[:], return_index=True)
    by_hash = sorted(
        (text_digest(f"{seed} {key}"), int(index)) for key, index in zip(keys, indices, strict=True)
    )
    ends = np.cumsum(dataset.source_pairs)
    prompts: list[SamplePrompt] = []
    for prompt_hash, index in by_hash:
        tokens = dataset.lengths(index)[0]
        room = sampling.room(tokens, longest)
        if tokens == 0 or not room:
            continue
        [example] = dataset.with_inputs([dataset.example(index, (0,))])
        chosen_ids = example.responses[0].tolist()
        prompt_ids = np.asarray(example.prompt_ids)
        shown, images = shown_prompt(example, dataset.images)
        while chosen_ids and chosen_ids[-1] in stop_ids:
            chosen_ids.pop()
        fields: _Row = {
            "prompt": str(tokenizer.decode(shown.tolist(), skip_special_tokens=False)),
            "prompt_id": prompt_hash[:16],
            "source": dataset.source_labels[int(np.searchsorted(ends, index, side="right"))],
            "chosen": texts_after(chosen_ids, prompt_ids, tokenizer)[0],
        }
        if images:
            fields["images"] = images
        if is_labelled:
            fields["label"] = "good" if dataset.labels_good([index])[0] else "bad"
        request = Request(prompt_ids, prompt_hash[:16], 0, example.images, room)
        prompts.append(SamplePrompt(request, fields))
        if len(prompts) == count:
            break
    return tuple(prompts)
