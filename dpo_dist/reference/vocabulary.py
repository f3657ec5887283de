"""Whether a reference means by a token id what the policy means by it."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_dist.config.schema import ModelConfig
from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import has_tokenizer
from dpo_dist.model.load import load_config, load_tokenizer


def check_same_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Raise where log-probs of the policy's token ids by the model of `folder` would mean something else.

    Where the folder has no tokenizer, only the number of ids is compared.

    Args:
        folder: of the reference.
        tokenizer: the policy's, by which pairs are encoded.
        config: of the policy.

    Raises:
        ConfigError: the reference has no such ids, or gives them to other tokens.
    """
    vocabulary = tokenizer.get_vocab()
    ids_needed = max(vocabulary.values()) + 1
    ids_there = load_config(folder, config).vocab_size
    if ids_there < ids_needed:
        raise ConfigError(
            "the reference has no such token ids as the policy's tokenizer gives",
            where="reference.path",
            got=f"{folder} with {ids_there} token ids",
            expected=f"at least {ids_needed}",
            remedy="name a reference with the policy's tokenizer",
        )
    if not has_tokenizer(folder):
        return
    reference_vocabulary = load_tokenizer(folder, config).get_vocab()
    differing = [token for token, number in vocabulary.items() if reference_vocabulary.get(token) != number]
    if differing:
        raise ConfigError(
            "the reference's tokenizer has other ids for the same tokens",
            where="reference.path",
            got=f"{folder}: {len(differing)} of {len(vocabulary)} tokens differ, "
            f"{', '.join(map(repr, sorted(differing)[:3]))} among them",
            expected="the policy's tokenizer, with which the pairs were encoded",
            remedy="name a reference with the policy's tokenizer",
        )
