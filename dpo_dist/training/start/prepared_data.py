"""The data of a run, encoded as training does, for tools that examine them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.plan import shares_in_bins
from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import ModelConfig
from dpo_dist.data import DataConfig, Part, SourceConfig
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import (
    PreferenceDataset,
    check_fits_loss,
    check_ids_in_vocabulary,
    open_dataset,
)
from dpo_dist.foundation.errors import ConfigError, DataError, DpoDistError
from dpo_dist.foundation.types import ProgressOf
from dpo_dist.model.files.folder import description_folder, start_folder
from dpo_dist.model.files.load import Encoder, load_config, load_encoder

_BINS_AT_ONCE = 1024
_TOKENS_ONLY = ComputeCosts(key=0.0, target=0.0, beyond_prompts=True)


def saved_by_tree(dataset: PreferenceDataset, examples: int) -> float:
    """Return the share of the tokens with shared prompts that trees over so many random examples save."""
    order = np.random.default_rng(0).permutation(len(dataset))
    computed = tokens = 0
    for start in range(0, len(order), examples * _BINS_AT_ONCE):
        block = order[start : start + examples * _BINS_AT_ONCE]
        responses = dataset.response_indices(block)
        counts = dataset.response_counts(block)
        sizes = dataset.sizes(block, responses, counts, _TOKENS_ONLY)
        shared = shares_in_bins(sizes, _TOKENS_ONLY, np.arange(len(block)) // examples).tokens
        computed += int((sizes.tokens - shared).sum())
        tokens += int(sizes.prompt_shared_tokens.sum())
    return 1 - computed / tokens if tokens else 0.0


class PreparedData(NamedTuple):
    """The data of a run, encoded as training does."""

    encoder: Encoder
    # A list for each source, those of `data.train` first: empty if no record can be used, two datasets if
    # evaluation data are split off.
    datasets: list[list[PreferenceDataset]]
    refusals: list[DpoDistError]  # errors with which training would refuse the data


def prepare_data(
    data: DataConfig,
    model: ModelConfig,
    loss: LossConfig,
    progress: ProgressOf,
    systems: Mapping[str, str] | None = None,
) -> PreparedData:
    """Encode the data of a run with its model's tokenizer; `systems`: see `encode_record`."""
    folder = description_folder(model.path, model.revision, needs_weights=False)
    encoder = load_encoder(folder, start_folder(model), model)
    tokenizer = encoder.tokenizer
    processor = encoder.processor
    digest = encoder.digest
    vocab_size = load_config(folder, model).get_text_config().vocab_size
    refusals: list[DpoDistError] = []

    def prepared(sources: Sequence[SourceConfig], part: Part, side: str) -> list[list[PreferenceDataset]]:
        def show(path: str) -> AbstractContextManager[Callable[..., None]]:
            title = f"encoding {path} ({side} part)" if data.eval_share else f"encoding {path}"
            return progress(title, "record")

        encoded = Preparation(sources, data, tokenizer, digest, show, part, processor, systems).whole()
        try:
            if encoded:
                dataset = open_dataset(encoded, data, processor)
                check_ids_in_vocabulary(dataset, tokenizer, vocab_size)
                check_fits_loss(dataset, loss)
        except (DataError, ConfigError) as refusal:
            refusals.append(refusal)
        datasets = list[list[PreferenceDataset]]()
        any_share = replace(data, max_bad_share=1.0)
        for source in encoded:
            try:
                datasets.append([open_dataset([source], any_share, processor)])
            except DataError:  # no record can be used
                datasets.append([])
        return datasets

    evals = prepared(data.eval_sources, Part.to_evaluate(data), "eval")
    prompts = [dataset.prompt_hashes[:] for datasets in evals for dataset in datasets]
    trains = prepared(data.train, Part.to_train(data, np.concatenate(prompts) if prompts else None), "train")
    if data.eval:
        return PreparedData(encoder, [*trains, *evals], refusals)
    parts = zip(trains, evals or [[]] * len(trains), strict=True)
    datasets = [[*train, *held_out] for train, held_out in parts]
    return PreparedData(encoder, datasets, refusals)
