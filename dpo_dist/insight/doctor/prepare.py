"""Encode the data of a run into `data.cache`, where training finds them; data that training refuses too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class PreparedSource:
    """One source, encoded; without a dataset if no record can be used."""

    is_eval: bool
    dataset: PreferenceDataset | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """The encoded sources, training data first, and the errors with which training would stop."""

    sources: tuple[PreparedSource, ...]
    refusals: tuple[DpoDistError, ...]


def prepare(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    vocab_size: int,
    progress: Progress = no_progress,
) -> Prepared:
    """Encode the data as training does, and collect the errors with which training would refuse them.

    Args:
        config: of the run.
        tokenizer: of the policy.
        folder: with the files of the tokenizer.
        vocab_size: of the policy's embeddings.
        progress: called for each source that is not encoded yet.

    Raises:
        DataError: a source cannot be read.
        ConfigError: the data cannot be encoded with this tokenizer.
    """
    digest = tokenizer_digest(folder)
    refusals: list[DpoDistError] = []

    def prepared(sources: Sequence[SourceConfig], part: Part, is_eval: bool) -> list[PreparedSource]:
        # A split source is encoded twice.
        side = f" ({'eval' if is_eval else 'train'} part)" if config.data.eval_share else ""
        encoded, refusal = _encoded(
            sources, config.data, tokenizer, digest, lambda source: progress(source + side), part
        )
        refusals.extend([refusal] if refusal else _refusals(encoded, config, tokenizer, vocab_size))
        return [PreparedSource(is_eval, _usable(each, config.data)) for each in encoded]

    of_eval = prepared(config.data.eval_sources, eval_part(config.data), True)
    prompts = [source.dataset.prompts[:] for source in of_eval if source.dataset is not None]
    part = train_part(config.data, np.concatenate(prompts) if prompts else None)
    return Prepared((*prepared(config.data.train, part, False), *of_eval), tuple(refusals))


def _encoded(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    digest: str,
    progress: Progress,
    part: Part,
) -> tuple[tuple[EncodedSource, ...], DataError | None]:
    """Encode sources; with `data.on_bad_record=error` also those with bad records, and return the error."""
    try:
        return prepare_dataset(sources, config, tokenizer, digest, progress, part, needs_pairs=False), None
    except DataError as refusal:
        if config.on_bad_record is not OnBadRecord.error:
            raise
        config = replace(config, on_bad_record=OnBadRecord.drop)
        return prepare_dataset(sources, config, tokenizer, digest, progress, part, needs_pairs=False), refusal


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


def _usable(source: EncodedSource, config: DataConfig) -> PreferenceDataset | None:
    """Return the examples of a source, also if most of its records are bad; None if all are."""
    tolerant = replace(config, max_bad_share=1.0, template=TextTemplate.literal)
    try:
        return open_dataset([source], tolerant)
    except DataError:
        return None
