"""Checks that encoded data fit the loss and the model of a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dpo_dist.config.loss_kinds import LossConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_ids_in_vocabulary(
    dataset: PreferenceDataset, tokenizer: "PreTrainedTokenizerBase", vocab_size: int
) -> None:
    """Check that the model has an embedding of every token id in the data.

    Tokenizers often have more tokens than their model; these (a padding token) never occur in text.

    Raises:
        ConfigError: an id in the data is `vocab_size` or above.
    """
    largest = dataset.largest_id
    if largest >= vocab_size:
        raise ConfigError(
            "the data contain a token without an embedding in the model",
            where="model.path",
            got=f"token {tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}",
            expected=f"ids below the model's vocab_size of {vocab_size}",
            remedy="use the tokenizer that belongs to the model, or write a model with embeddings of all its "
            "tokens: python -m dpo_dist.extend MODEL FOLDER --tokenizer TOKENIZER",
        )


def check_data_fits_loss(dataset: PreferenceDataset, loss: LossConfig) -> None:
    """Check all examples of a dataset with `check_fits_loss`."""
    every = np.arange(len(dataset), dtype=np.int64)
    check_fits_loss(
        loss,
        dataset.response_counts(every),
        lambda: dataset.score_gaps(every),
        lambda index: str(dataset.origin(index)),
    )


def check_fits_loss(
    loss: LossConfig,
    response_counts: npt.NDArray[np.int64],
    score_gaps: Callable[[], npt.NDArray[np.floating]],
    origin: Callable[[int], str],
) -> None:
    """Check that every example has the responses and scores that the loss compares.

    Args:
        loss: the configured loss.
        response_counts: [examples], the number of responses of each.
        score_gaps: returns [examples], score of the best response minus that of the worst, or nan.
        origin: returns the file and line of an example.

    Raises:
        DataError: an example has too few or too many responses, or no score gap above 0 where the loss takes
            its logarithm.
    """

    def check(misfits: npt.NDArray[np.bool_], got: str, remedy: str) -> None:
        if misfits.any():
            raise DataError(
                f"{', '.join(loss.kinds)} cannot use {misfits.sum()} of {len(misfits)} examples",
                where="; ".join(origin(int(index)) for index in np.flatnonzero(misfits)[:5]),
                got=got,
                remedy=remedy,
            )

    if not loss.is_one_sided:
        check(response_counts < 2, "1 response", "set loss=sft, or use data with two responses")
    if not loss.accepts_rankings:
        remedy = "set loss.kind=plackett_luce, or data.ranked=best_worst or all_pairs"
        check(response_counts > 2, "a ranking of more than two responses", remedy)
    if loss.needs_scores:
        got = "no scores, or a chosen response that is not scored above the rejected one"
        check(~(score_gaps() > 0), got, "remove these records, or set another loss.kind")
