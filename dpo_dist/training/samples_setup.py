"""Set up the samples of a run: choose held-out prompts, and get the reference's responses."""

import json
from dataclasses import asdict, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist import atomic
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.digests import text_digest
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.world import World
from dpo_dist.generation.languages import language_of
from dpo_dist.generation.sampling.generate import NotFiniteError, Request, Sampling
from dpo_dist.generation.sampling.respond import texts_after
from dpo_dist.generation.sampling.responder import find_stop_ids
from dpo_dist.model.load import load_config
from dpo_dist.report.console import Console
from dpo_dist.training.data_setup import Inputs
from dpo_dist.training.run_start import write_on_main
from dpo_dist.training.samples import Row, SamplePrompt, Samples, lines, respond


def open_samples(
    config: RunConfig, inputs: Inputs, policy: PolicyEngine, step: int, world: World, console: Console
) -> Samples | None:
    """Return the samples of a run that continues after `step`; None if it has none. Collective.

    The reference responds once, to a file in the run directory from which a resumed run reads it.

    Raises:
        CheckpointError: the reference's responses cannot be written.
    """
    settings, folder = config.samples, RunFolder.of(config)
    if not settings.prompts or inputs.eval_set is None:
        return None
    model_folder = inputs.policy_files.folder
    stop_ids = find_stop_ids(inputs.tokenizer, config.data, model_folder)
    longest = getattr(
        load_config(model_folder, config.model).get_text_config(), "max_position_embeddings", None
    )
    prompts = choose_prompts(
        inputs.eval_set,
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
    if not prompts:
        return None
    sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=config.trainer.seed)
    samples = Samples(
        settings, sampling, prompts, None, stop_ids, inputs.tokenizer, policy, world, folder, console
    )
    write_on_main(lambda: _remove_later(folder, step), folder, world)
    return replace(samples, reference=_reference(samples, config, inputs, step))


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


def _reference(samples: Samples, config: RunConfig, inputs: Inputs, step: int) -> list[Row] | None:
    """Return the reference's responses, from the file of an earlier start or generated now; collective.

    The policy can give them if it starts as the reference: before its first step, or without its adapter.
    """
    folder, world, say = samples.folder, samples.world, samples.console.say
    stored = world.on_main(lambda: _read(samples))
    if stored is not None:
        return stored
    has_adapter = config.model.adapter is not None
    files = inputs.reference_files
    is_start = files is None or files.digest == inputs.policy_files.digest
    if not is_start or (step > 0 and not has_adapter):
        reason = "it is another model" if not is_start else "the policy has already been trained"
        say(f"samples: without responses of the reference: {reason}")
        return None
    try:
        responses = respond(samples, of_base=has_adapter)
    except NotFiniteError:
        say("warning: samples: without responses of the reference, whose logits are not finite")
        return None
    rows = [
        {"prompt_id": prompt.fields["prompt_id"], "sampling": asdict(samples.sampling), **response}
        for prompt, response in zip(samples.prompts, responses, strict=True)
    ]
    write_on_main(lambda: atomic.write_text(folder.samples_reference, lines(rows)), folder, world)
    return responses


def _read(samples: Samples) -> list[Row] | None:
    """Return the responses in the reference's file, if they are of the same prompts and settings."""
    try:
        text = samples.folder.samples_reference.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        wanted = [(prompt.fields["prompt_id"], asdict(samples.sampling)) for prompt in samples.prompts]
        if [(row["prompt_id"], row["sampling"]) for row in rows] != wanted:
            return None
        return [{name: row[name] for name in ("text", "tokens", "finished")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_later(folder: RunFolder, step: int) -> None:
    """Create the folder of samples; remove files of steps that are computed again."""
    folder.samples.mkdir(parents=True, exist_ok=True)
    kept = folder.samples_file(step).name
    for file in folder.samples.glob("step-*.jsonl"):
        if (len(file.name), file.name) > (len(kept), kept):
            file.unlink()
