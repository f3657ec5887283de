"""Check that policy and reference have the same vocabulary."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_dist.config.schema import ModelConfig
from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import has_tokenizer
from dpo_dist.model.load import load_config, load_tokenizer


def check_same_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Check that the reference has the policy's token ids, for the same tokens.

    Without a tokenizer in the reference's folder only the number of ids is compared.

    Args:
        folder: the reference's model folder.
        tokenizer: the policy's.
        config: the policy's.

    Raises:
        ConfigError: the reference has fewer token ids, or other tokens for them.
    """
    vocabulary = tokenizer.get_vocab()
    ids_needed = max(vocabulary.values()) + 1
    ids = load_config(folder, config).vocab_size
    if ids < ids_needed:
        raise ConfigError(
            "the reference model has fewer token ids than the policy's tokenizer",
            where="reference.path",
            got=f"{folder} with {ids} token ids",
            expected=f"at least {ids_needed}",
            remedy="set reference.path to a model with the policy's tokenizer",
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
            f"for example {', '.join(map(repr, sorted(differing)[:3]))}",
            expected="the policy's tokenizer, which encoded the pairs",
            remedy="set reference.path to a model with the policy's tokenizer",
        )
