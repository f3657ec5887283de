"""Set up the samples of a run: choose held-out prompts, and get the reference's responses."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import ReferenceMode, RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.digests import text_digest
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.generation.languages import language_of
from dpo_dist.generation.sampling.generate import Request, Sampling
from dpo_dist.generation.sampling.respond import texts_after
from dpo_dist.generation.sampling.responder import find_stop_ids
from dpo_dist.model.load import load_config
from dpo_dist.reference.engine import load_digested
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.data_setup import Inputs
from dpo_dist.training.run_start import write_on_main
from dpo_dist.training.samples import Row, SamplePrompt, SamplePrompts, Samples
from dpo_dist.training.work_clock import WorkClock


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
