"""Responses of the policy to held-out prompts at evaluations, beside those of the reference."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig, SamplesConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.distributed.world import World
from dpo_dist.distributed.zero import PolicyEngine
from dpo_dist.foundation import files
from dpo_dist.foundation.files import text_digest
from dpo_dist.generation.pairs.files import json_line
from dpo_dist.generation.sampling.generate import (
    Generates,
    NotFiniteError,
    Request,
    Sampling,
    generate_together,
)
from dpo_dist.generation.sampling.respond import find_stop_ids, texts_after
from dpo_dist.generation.text_facts import language_of, sample_metrics, text_facts
from dpo_dist.insight.console import Console
from dpo_dist.insight.recorder import spared
from dpo_dist.model.load import load_config
from dpo_dist.reference.engine import load_digested
from dpo_dist.training.inputs import Inputs
from dpo_dist.training.start import write_on_main
from dpo_dist.training.state import WorkClock

Row = dict[str, Any]
_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class SamplePrompt:
    """A held-out prompt.

    Attributes:
        request: its token ids and key.
        fields: `prompt`, `prompt_id`, `source` and `chosen` of its rows.
        language: of the chosen response; None if it is not clear.
    """

    request: Request
    fields: Row
    language: str | None


@dataclass(frozen=True)
class SamplePrompts:
    """The held-out prompts of a run, and how models respond to them.

    Attributes:
        config: settings.
        sampling: the same as settings of generation.
        prompts: the same at every evaluation and in every start of the run.
        stop_ids: tokens that end a response.
        tokenizer: of the policy.
        folder: of the run.
    """

    config: SamplesConfig
    sampling: Sampling
    prompts: tuple[SamplePrompt, ...]
    stop_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    world: World
    folder: RunFolder
    console: Console

    def responses(
        self, model: Generates, *, of_base: bool = False, give_way: Callable[[], None] = lambda: None
    ) -> list[Row] | None:
        """Return the `text`, `tokens` and `finished` of a response to each prompt; collective.

        `give_way` is called before each batch, and may raise.

        None, with a warning, if the model's logits are not finite.
        """
        requests = [prompt.request for prompt in self.prompts]
        try:
            found = generate_together(
                model,
                requests,
                self.sampling,
                self.stop_ids,
                _BATCH_TOKENS,
                self.world,
                of_base=of_base,
                give_way=give_way,
            )
        except NotFiniteError:
            self.console.say("warning: no samples: the model's logits are not finite")
            return None
        return [
            {
                "text": texts_after(list(sample.ids), request.prompt_ids, self.tokenizer)[0],
                "tokens": len(sample.ids),
                "finished": sample.is_finished,
            }
            for sample, request in zip(found, requests, strict=True)
        ]

    def metrics(self, responses: Sequence[Row]) -> dict[str, float]:
        """Return the metrics of responses by name: see `sample_metrics`."""
        facts = [text_facts(row["text"], row["tokens"], row["finished"]) for row in responses]
        return sample_metrics(facts, [prompt.language for prompt in self.prompts])

    def read_reference(self) -> list[Row] | None:
        """Return the responses in the reference's file, if they are to the same prompts and settings."""
        try:
            text = self.folder.samples_reference.read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            wanted = [(prompt.fields["prompt_id"], asdict(self.sampling)) for prompt in self.prompts]
            if [(row["prompt_id"], row["sampling"]) for row in rows] != wanted:
                return None
            return [{name: row[name] for name in ("text", "tokens", "finished")} for row in rows]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write_reference(self, responses: Sequence[Row]) -> None:
        """Write the reference's responses to its file; collective.

        Raises:
            CheckpointError: the file cannot be written.
        """
        rows = [
            {"prompt_id": prompt.fields["prompt_id"], "sampling": asdict(self.sampling), **response}
            for prompt, response in zip(self.prompts, responses, strict=True)
        ]
        file = self.folder.samples_reference
        write_on_main(lambda: files.write_text(file, lines(rows)), self.folder, self.world)


@dataclass(frozen=True)
class Samples:
    """The samples of a run. Methods are collective.

    Attributes:
        held_out: the prompts.
        reference: responses of the reference, one for each prompt; None: not known.
        starts_as_reference: whether they are those of the policy before its first step.
        policy: generates.
    """

    held_out: SamplePrompts
    reference: list[Row] | None
    starts_as_reference: bool
    policy: PolicyEngine

    def at(self, step: int, give_way: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Write the policy's responses after `step`, and return their metrics `samples/...`.

        `give_way` is called before each batch of prompts, and may raise.

        They are without metrics and a file if the model's logits are not finite, and without metrics, with a
        warning, after a bug in these.

        Raises:
            CheckpointError: the file cannot be written.
        """
        held_out = self.held_out
        is_reference = step == 0 and self.starts_as_reference and self.reference is not None
        responses = self.reference if is_reference else held_out.responses(self.policy, give_way=give_way)
        if responses is None:
            return {}
        file, text = held_out.folder.samples_file(step), lines(self._rows(step, responses))

        def write() -> dict[str, float]:
            metrics: dict[str, float] = {}
            files.write_text(file, text)
            with spared("the row of metrics of samples", held_out.console.say):
                metrics = self._metrics(responses)
            return metrics  # noqa: RET504 (a bug ends the block before)

        return write_on_main(write, held_out.folder, held_out.world)

    def _metrics(self, responses: Sequence[Row]) -> dict[str, float]:
        of_policy = self.held_out.metrics(responses)
        of_reference = {} if self.reference is None else self.held_out.metrics(self.reference)
        return {
            "samples/prompts": float(len(responses)),
            **{f"samples/{name}": value for name, value in of_policy.items()},
            **{f"samples/reference_{name}": value for name, value in of_reference.items()},
        }

    def _rows(self, step: int, responses: Sequence[Row]) -> list[Row]:
        unknown = dict.fromkeys(("text", "tokens", "finished"))
        reference = self.reference or [unknown] * len(responses)
        return [
            {
                **prompt.fields,
                "step": step,
                **_named("policy", of_policy),
                **_named("reference", of_reference),
            }
            for prompt, of_policy, of_reference in zip(
                self.held_out.prompts, responses, reference, strict=True
            )
        ]


def _named(model: str, response: Row) -> Row:
    """Return a response as fields of a row: its text under the model's name."""
    return {
        model: response["text"],
        f"{model}_tokens": response["tokens"],
        f"{model}_finished": response["finished"],
    }


def lines(rows: Sequence[Row]) -> str:
    """Return rows as JSON lines."""
    return "".join(map(json_line, rows))


@dataclass(frozen=True)
class PreparedSamples:
    """The samples of a run before its policy is loaded.

    Attributes:
        held_out: the prompts.
        reference: responses of the reference; None: the policy gives them, or they are not known.
        starts_as_reference: whether they are those of the policy before its first step.
        is_from_policy: whether the policy can give them now, at its start or without its adapter.
        of_base: whether it does so without its adapter.
    """

    held_out: SamplePrompts
    reference: list[Row] | None
    starts_as_reference: bool
    is_from_policy: bool
    of_base: bool

    def open(self, policy: PolicyEngine, clock: WorkClock) -> Samples:
        """Return the samples of a policy, which responds as the reference where it can; collective.

        Args:
            policy: generates.
            clock: of the run.

        Raises:
            CheckpointError: the reference's responses cannot be written.
        """
        responses = self.reference
        if responses is None and self.is_from_policy:
            with clock.of("samples"):
                responses = self.held_out.responses(policy, of_base=self.of_base)
                if responses is not None:
                    self.held_out.write_reference(responses)
        return Samples(self.held_out, responses, self.starts_as_reference, policy)


def prepare_samples(
    config: RunConfig, inputs: Inputs, step: int, world: World, console: Console
) -> PreparedSamples | None:
    """Return the samples of a run that continues after `step`; None if it has none. Collective.

    Files of later steps, of a start that was killed, are removed in either case. The reference responds once,
    to a file in the run directory from which a resumed run reads it. If the policy cannot give its responses,
    the reference is loaded for them and freed again: call this before a model is loaded.

    Raises:
        CheckpointError: the reference's responses cannot be written.
    """
    folder = RunFolder.of(config)
    write_on_main(lambda: _remove_later(folder, step), folder, world)
    if not config.samples.prompts or inputs.eval_set is None:
        return None
    held_out = _held_out(config, inputs, inputs.eval_set, world, console)
    if not held_out.prompts:
        return None
    of_base = config.model.adapter is not None
    is_start = _is_policys_start(config, inputs)
    is_from_policy = is_start and (step == 0 or of_base)
    reference = world.on_main(held_out.read_reference)
    if reference is None and not is_from_policy:
        console.say("samples: the reference is loaded for its responses")
        engine = load_digested(inputs.reference_files or inputs.policy_files, config, world)
        reference = held_out.responses(engine)
        engine.free()
        if reference is not None:
            held_out.write_reference(reference)
    return PreparedSamples(held_out, reference, is_start, is_from_policy, of_base)


def _is_policys_start(config: RunConfig, inputs: Inputs) -> bool:
    """Return whether the policy starts as the reference, in the same precision."""
    files = inputs.reference_files
    if files is None or config.reference.mode is ReferenceMode.adapter:
        return True
    is_same = files.digest == inputs.policy_files.digest
    return is_same and config.reference.quantization is config.model.quantization


def _held_out(
    config: RunConfig, inputs: Inputs, dataset: PreferenceDataset, world: World, console: Console
) -> SamplePrompts:
    settings, model_folder = config.samples, inputs.policy_files.folder
    stop_ids = find_stop_ids(inputs.tokenizer, config.data, model_folder)
    text_config = load_config(model_folder, config.model).get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    prompts = choose_prompts(
        dataset,
        inputs.tokenizer,
        stop_ids,
        settings.prompts,
        config.trainer.seed,
        None if longest is None else longest - settings.max_new_tokens,
    )
    if len(prompts) < settings.prompts:
        console.say(
            f"samples: {len(prompts)} prompts, not {settings.prompts}: the evaluation data have no more that "
            "are different and leave room for samples.max_new_tokens"
        )
    sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=config.trainer.seed)
    folder = RunFolder.of(config)
    return SamplePrompts(settings, sampling, prompts, stop_ids, inputs.tokenizer, world, folder, console)


def choose_prompts(
    dataset: PreferenceDataset,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    count: int,
    seed: int,
    longest: int | None,
) -> tuple[SamplePrompt, ...]:
    """Return different prompts of at most `longest` tokens, chosen by a hash of seed and prompt.

    The choice does not depend on the order of the dataset.
    """
    keys, indices = np.unique(dataset.prompts[:], return_index=True)
    by_hash = sorted(
        (text_digest(f"{seed} {key}"), int(index)) for key, index in zip(keys, indices, strict=True)
    )
    found: list[SamplePrompt] = []
    for prompt_id, index in by_hash:
        if len(found) == count:
            break
        if dataset.lengths(index)[0] > 0 and (longest is None or dataset.lengths(index)[0] <= longest):
            found.append(_prompt(dataset, index, prompt_id[:16], tokenizer, stop_ids))
    return tuple(found)


def _prompt(
    dataset: PreferenceDataset,
    index: int,
    prompt_id: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
) -> SamplePrompt:
    sequences = dataset.sequences(index, (0,))
    chosen_ids = sequences.responses[0].tolist()
    while chosen_ids and chosen_ids[-1] in stop_ids:
        chosen_ids.pop()
    prompt_ids = np.asarray(sequences.prompt_ids)
    chosen = texts_after(chosen_ids, prompt_ids, tokenizer)[0]
    source = int(np.searchsorted(np.cumsum(dataset.source_pairs), index, side="right"))
    fields = {
        "prompt": str(tokenizer.decode(prompt_ids.tolist(), skip_special_tokens=False)),
        "prompt_id": prompt_id,
        "source": dataset.source_labels[source],
        "chosen": chosen,
    }
    return SamplePrompt(Request(prompt_ids, prompt_id, 0), fields, language_of(chosen))


def _remove_later(folder: RunFolder, step: int) -> None:
    """Remove files of steps that are computed again."""
    kept = folder.samples_file(step).name
    for file in folder.samples.glob("step-*.jsonl"):
        if (len(file.name), file.name) > (len(kept), kept):
            file.unlink()
