"""The part of a model that computes text, where others read images or sounds."""

from typing import Any

from torch import nn

# The name of modules that choose which keys a query attends to (DeepSeek-V3.2, arXiv 2512.02556).
_INDEXER = "indexer"


def text_part(causal_lm: Any) -> Any:
    """Return the decoder of text of a transformers model; the model itself if it reads nothing else."""
    config = causal_lm.config
    return causal_lm if config.get_text_config() is config else causal_lm.get_decoder()


def other_weights(causal_lm: Any) -> set[nn.Parameter]:
    """Return the weights that text does not depend on, as of a vision tower: they have no gradient."""
    text = text_part(causal_lm)
    if text is causal_lm:
        return set()
    used = {*text.parameters(), *causal_lm.get_output_embeddings().parameters()}
    return set(causal_lm.parameters()) - used


def indexers(causal_lm: Any) -> list[nn.Module]:
    """Return the modules that choose keys of sparse attention: the choice has no gradient."""
    return [module for name, module in causal_lm.named_modules() if name.rpartition(".")[2] == _INDEXER]


def without_gradient(causal_lm: Any) -> set[nn.Parameter]:
    """Return the weights that have no gradient from text: those of other inputs and of indexers."""
    return other_weights(causal_lm) | {w for module in indexers(causal_lm) for w in module.parameters()}
