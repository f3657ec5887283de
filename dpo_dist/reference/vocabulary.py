"""Check that the policy and another model that is scored have the same vocabulary."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_dist.config.schema import ModelConfig
from dpo_dist.errors import ConfigError
from dpo_dist.model.folder import has_tokenizer
from dpo_dist.model.load import load_config, load_tokenizer


def check_same_vocabulary(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, key: str = "reference.path"
) -> None:
    """Check that a model has the policy's token ids, for the same tokens.

    Without a tokenizer in its folder only the number of ids is compared.

    Args:
        folder: of the model.
        tokenizer: the policy's.
        config: the policy's.
        key: that names the model.

    Raises:
        ConfigError: the model has fewer token ids, or other tokens for them.
    """
    vocabulary = tokenizer.get_vocab()
    ids_needed = max(vocabulary.values()) + 1
    ids = load_config(folder, config).get_text_config().vocab_size
    if ids < ids_needed:
        raise ConfigError(
            f"the model of {key} has fewer token ids than the tokenizer of model.path",
            where=key,
            got=f"{folder} with {ids} token ids",
            expected=f"at least {ids_needed}",
            remedy=f"set {key} to a model with the tokenizer of model.path",
        )
    if not has_tokenizer(folder):
        return
    own_vocabulary = load_tokenizer(folder, config).get_vocab()
    differing = [token for token, number in vocabulary.items() if own_vocabulary.get(token) != number]
    if differing:
        raise ConfigError(
            f"the tokenizer of {key} has other ids for the same tokens",
            where=key,
            got=f"{folder}: {len(differing)} of {len(vocabulary)} tokens differ, "
            f"for example {', '.join(map(repr, sorted(differing)[:3]))}",
            expected="the tokenizer of model.path, which encoded the pairs",
            remedy=f"set {key} to a model with the tokenizer of model.path",
        )
