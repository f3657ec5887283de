"""Encode the data of a run into `data.cache`, where training finds them; data that training refuses too."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_dist.config.data import DataConfig, OnBadRecord, SourceConfig, TextTemplate
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.build import Progress, no_progress, prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import (
    PreferenceDataset,
    check_data_fits_loss,
    check_ids_in_vocabulary,
    open_dataset,
)
from dpo_dist.data.prompts import Part, eval_part, train_part
from dpo_dist.data.store import EncodedSource
from dpo_dist.foundation.errors import ConfigError, DataError, DpoDistError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    vocab_size: int,
    progress: Progress = no_progress,
) -> tuple[list[list[PreferenceDataset]], list[DpoDistError]]:
    """Encode the data as training does, and collect the errors with which training would refuse them.

    Args:
        config: of the run.
        tokenizer: of the policy.
        folder: with the files of the tokenizer.
        vocab_size: of the policy's embeddings.
        progress: called for each source that is not encoded yet.

    Returns:
        The datasets of each source, those of `data.train` first: none if no record can be used, two if
        evaluation data are split off; and the errors.

    Raises:
        DataError: a source cannot be read.
        ConfigError: the data cannot be encoded with this tokenizer.
    """
    data, digest = config.data, tokenizer_digest(folder)
    refusals: list[DpoDistError] = []

    def prepared(sources: Sequence[SourceConfig], part: Part, side: str) -> list[list[PreferenceDataset]]:
        def shown(source: str) -> str:
            return f"{source} ({side} part)" if data.eval_share else source

        def encoded(used: DataConfig) -> tuple[EncodedSource, ...]:
            return prepare_dataset(
                sources, used, tokenizer, digest, lambda path: progress(shown(path)), part, needs_pairs=False
            )

        try:
            found = encoded(data)
            refusals.extend(_refusals(found, config, tokenizer, vocab_size))
        except DataError as refusal:
            if data.on_bad_record is not OnBadRecord.error:
                raise
            found = encoded(replace(data, on_bad_record=OnBadRecord.drop))
            refusals.append(refusal)
        return [list(_usable(source, data)) for source in found]

    of_eval = prepared(data.eval_sources, eval_part(data), "eval")
    prompts = [dataset.prompts[:] for datasets in of_eval for dataset in datasets]
    of_train = prepared(data.train, train_part(data, np.concatenate(prompts) if prompts else None), "train")
    if data.eval:
        return [*of_train, *of_eval], refusals
    parts = zip(of_train, of_eval or [[]] * len(of_train), strict=True)
    return [[*trained, *evaluated] for trained, evaluated in parts], refusals


def _refusals(
    encoded: Sequence[EncodedSource],
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
) -> Iterator[DpoDistError]:
    """Yield the first error of training about a list of sources."""
    if not encoded:
        return
    try:
        dataset = open_dataset(encoded, config.data)
        check_ids_in_vocabulary(dataset, tokenizer, vocab_size)
        check_data_fits_loss(dataset, config.loss)
    except (DataError, ConfigError) as refusal:
        yield refusal


def _usable(source: EncodedSource, config: DataConfig) -> Iterator[PreferenceDataset]:
    """Yield the examples of a source, also if most of its records are bad; nothing if all are."""
    try:
        yield open_dataset([source], replace(config, max_bad_share=1.0, template=TextTemplate.literal))
    except DataError:
        return
