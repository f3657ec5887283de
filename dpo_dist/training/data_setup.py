"""The inputs of a run before any weights are loaded: digests of models, tokenizer, encoded data, schedule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.config.loss_kinds import LossConfig
from dpo_dist.config.schema import ParallelismKind, ReferenceMode, RunConfig, SourceConfig
from dpo_dist.data.build_dataset import prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import (
    PreferenceDataset,
    count_duplicates,
    count_shared,
    open_dataset,
    remembered_count,
)
from dpo_dist.data.micro_batches import ComputeCosts
from dpo_dist.data.sampler import BatchSampler, Indices, make_sampler
from dpo_dist.distributed.world import World
from dpo_dist.errors import ConfigError, DataError
from dpo_dist.model.flops import StepFlops, compute_costs, count_flops
from dpo_dist.model.folder import model_folder
from dpo_dist.model.load import load_config, load_tokenizer
from dpo_dist.model.supported import check_supported, training_notes
from dpo_dist.reference.digest import ModelFiles, digest_on_every_node
from dpo_dist.report.console import Console

_TOLD_APART = "chat_template_not_applied"
_NO_CHANGES = frozenset({"path", "read", "kept", "dropped", "examples", "details", "sources", _TOLD_APART})


@dataclass(frozen=True)
class Inputs:
    """The inputs of one run, the same on every rank.

    Attributes:
        policy_files: what the policy is loaded from, as it was before.
        reference_files: the same of the reference; None where there is none.
    """

    policy_files: ModelFiles
    reference_files: ModelFiles | None
    tokenizer: PreTrainedTokenizerBase
    train_set: PreferenceDataset
    eval_set: PreferenceDataset | None
    sampler: BatchSampler
    flops: StepFlops

    @property
    def costs(self) -> ComputeCosts:
        """What a plan weighs pairs by."""
        return compute_costs(self.flops)

    @property
    def named(self) -> dict[str, PreferenceDataset]:
        """The data sets by what they are for."""
        return {"train": self.train_set} | ({} if self.eval_set is None else {"eval": self.eval_set})

    @property
    def visited(self) -> list[tuple[PreferenceDataset, Indices]]:
        """Each data set with the rows of it that the run visits; the training set is the first."""
        visited = [(self.train_set, self.sampler.visited_indices())]
        if self.eval_set is not None:
            visited.append((self.eval_set, np.arange(len(self.eval_set), dtype=np.int64)))
        return visited


def load_inputs(config: RunConfig, world: World, console: Console) -> Inputs:
    """Tokenizer and encoded data; rank 0 reads and encodes, all map the result. Collective."""
    folder = shared_model_folder(config.model.path, config.model.revision, "model.path", world, console)
    tokenizer = load_tokenizer(folder, config.model)
    model_config = load_config(folder, config.model)
    check_supported(model_config, config.data.max_length)
    for note in training_notes(model_config):
        console.say(note)
    policy_files, reference_files = _digest_models(folder, config, world, console)
    cache = Path(config.data.cache)

    def encode(name: str, sources: Sequence[SourceConfig]) -> PreferenceDataset:
        with console.counter(f"encoding {name} data", "record") as count:
            encoded = world.on_main(
                lambda: prepare_dataset(sources, config.data, tokenizer, tokenizer_digest(folder), count),
                console.heartbeat(f"preparing the {name} data"),
            )
        # A node that sees the files as another device verifies them anew.
        opening = console.heartbeat(f"verifying the {name} data")
        dataset = world.together(lambda: open_dataset(encoded, config.data), opening)
        world.on_main(lambda: check_ids_in_vocabulary(dataset, tokenizer, model_config.vocab_size))
        world.on_main(lambda: check_data_fits_loss(dataset, config.loss))
        duplicates = world.on_main(partial(remembered_count, count_duplicates, cache, dataset), opening)
        return _counting(dataset, duplicates=duplicates)

    train_set = encode("train", config.data.train)
    eval_set = encode("eval", config.data.eval) if config.data.eval else None
    if eval_set is not None:
        also_in_train = world.on_main(partial(remembered_count, count_shared, cache, eval_set, train_set))
        eval_set = _counting(eval_set, also_in_train=also_in_train)
    spans = train_set.spans([source.weight for source in config.data.train])
    sampler = make_sampler(spans, config.trainer)
    flops = count_flops(model_config, config.model.adapter)
    inputs = Inputs(policy_files, reference_files, tokenizer, train_set, eval_set, sampler, flops)
    for name, dataset in inputs.named.items():
        for line in counts_told(name, dataset.counts):
            console.say(line)
    for line in short_run_told(sampler):
        console.say(line)
    return inputs


def check_ids_in_vocabulary(
    dataset: PreferenceDataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Raise an error for data with token ids that the model has no embedding of.

    Tokenizers often have more tokens than their model, which never occur in text (a padding token).

    Raises:
        ConfigError: an id in the data is `vocab_size` or above.
    """
    largest = dataset.largest_id
    if largest >= vocab_size:
        raise ConfigError(
            "the data have a token that the model has no embedding of",
            where="model.path",
            got=f"token {tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}",
            expected=f"ids below the model's vocab_size of {vocab_size}",
            remedy="use the tokenizer that belongs to the model, or resize the model's embeddings to it",
        )


def _digest_models(
    policy_folder: Path, config: RunConfig, world: World, console: Console
) -> tuple[ModelFiles, ModelFiles | None]:
    """Digest the files of the policy and of the reference, if there is one; collective."""
    is_scattered = config.parallelism.kind is ParallelismKind.zero3
    digest = partial(
        digest_on_every_node,
        store=Path(config.reference.store),
        remote_code=config.model.trust_remote_code,
        world=world,
        while_waiting=console.heartbeat("reading the model's files to identify them"),
    )
    policy_is_whole = config.model.quantization is not None or not is_scattered
    policy_files = digest(policy_folder, loads_whole=policy_is_whole)
    if config.reference.mode is ReferenceMode.none:
        return policy_files, None
    reference_is_whole = config.reference.quantization is not None
    if config.reference.path is None and (policy_is_whole or not reference_is_whole):
        return policy_files, policy_files
    folder = policy_folder
    if config.reference.path is not None:
        revision = config.reference.revision
        folder = shared_model_folder(config.reference.path, revision, "reference.path", world, console)
    return policy_files, digest(folder, loads_whole=reference_is_whole)


def check_data_fits_loss(dataset: PreferenceDataset, loss: LossConfig) -> None:
    """Refuse data of which a pair does not have what the loss compares.

    Raises:
        DataError: too few or too many responses, or scores that `odpo` cannot take the logarithm of.
    """
    every = np.arange(len(dataset), dtype=np.int64)
    counts = dataset.response_counts(every)
    kinds = ", ".join(loss.kinds)
    if not loss.is_one_sided:
        _refuse(dataset, every[counts < 2], f"{kinds} compares responses", "1 response", "set loss=sft")
    if not loss.accepts_rankings:
        _refuse(
            dataset,
            every[counts > 2],
            f"{kinds} compares two responses",
            "a ranking of more",
            "set loss.kind=plackett_luce, or data.ranked=best_worst or all_pairs",
        )
    if loss.needs_scores:
        _refuse(
            dataset,
            every[~(dataset.score_gaps(every) > 0)],
            "odpo takes the logarithm of how much better the chosen response is scored",
            "no scores, or a chosen one that is not above the rejected one's",
            "leave these pairs out, or set another loss.kind",
        )


def _refuse(dataset: PreferenceDataset, rows: Indices, what: str, got: str, remedy: str) -> None:
    if len(rows):
        raise DataError(
            f"{len(rows)} of {len(dataset)} pairs do not fit the loss: {what}",
            where="; ".join(str(dataset.origin(int(row))) for row in rows[:5]),
            got=got,
            remedy=remedy,
        )


def shared_model_folder(path: str, revision: str | None, key: str, world: World, console: Console) -> Path:
    """`model_folder` on every rank; rank 0 is first to download, nodes may have caches of their own."""
    downloading = console.heartbeat(f"downloading {path}")
    world.on_main(lambda: model_folder(path, revision, key), downloading)
    return world.together(lambda: model_folder(path, revision, key), downloading)


def _counting(dataset: PreferenceDataset, **numbers: int) -> PreferenceDataset:
    return replace(dataset, counts=dataset.counts | numbers)


def counts_told(name: str, counts: dict[str, Any]) -> list[str]:
    """What was kept and every reason for which something was not, of all sources and of each."""
    lines = [f"{name} data: {_told(counts)}"]
    sources = counts["sources"] if len(counts["sources"]) > 1 else []
    lines += [f"{name} data: {source['path']}: {_told(source)}" for source in sources]
    if plain := counts.get(_TOLD_APART):
        lines.append(
            f"{name} data: {plain} of {counts['kept']} records are plain text, without the chat template "
            "(data.text_as_messages=true makes their prompts user turns)"
        )
    return lines


def short_run_told(sampler: BatchSampler) -> list[str]:
    """What is unusual of a run with fewer pairs than a few steps take."""
    pairs, batch = sampler.pairs_per_epoch, sampler.global_batch_pairs
    times = -(-min(batch, sampler.total_pairs) // pairs)
    if times > 1:
        return [
            f"an epoch has {pairs} pairs and trainer.global_batch_pairs is {batch}: "
            f"each pair occurs up to {times} times in one step"
        ]
    if sampler.steps == 1:
        return [
            f"the whole run is 1 step: {sampler.total_pairs} pairs with trainer.global_batch_pairs={batch}; "
            "lower it or raise trainer.epochs"
        ]
    return []


def _told(counts: dict[str, Any]) -> str:
    """Counts as one line: what was kept, and every reason for which something was not."""
    told = [f"{counts['kept']} of {counts['read']} records kept"]
    told += [f"{number} dropped ({reason})" for reason, number in sorted(counts["dropped"].items())]
    changes = sorted(name for name in counts if name not in _NO_CHANGES and counts[name])
    told += [f"{counts[name]} {name.replace('_', ' ')}" for name in changes]
    return ", ".join(told)
