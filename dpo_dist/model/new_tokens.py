"""Write a model with tokens added to its vocabulary: a base for training, reference and evaluation.

A new row of embeddings and output layer is the mean of the rows of the tokens that the model has, which
bounds the change of its distribution over them (J. Hewitt, "Initializing New Word Embeddings for Pretrained
Language Models", 2021). It depends on the files of the base only: no random numbers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dpo_dist.config.schema import ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import collect_abandoned, staged_folder
from dpo_dist.model.load import load_config, load_tokenizer
from dpo_dist.model.merge import names_in_model
from dpo_dist.model.save import (
    Shards,
    copy_description,
    copy_tokenizer,
    save_tokenizer,
    tensors_of,
    writing_errors,
)


@dataclass(frozen=True)
class Extended:
    """Sizes of a vocabulary: its tokens, and rows of the embeddings before and after."""

    tokens: int
    former_rows: int
    rows: int


def write_extended(
    folder: Path, base: Path, config: ModelConfig, tokens: Sequence[AddedToken], tokenizer_files: Path | None
) -> Extended:
    """Write `folder`, the model of `base` with rows for all tokens; whole or not at all.

    Memory is that of one file of the result (5 GB) and of the largest weight.

    Args:
        folder: that does not exist.
        base: folder of the model, in safetensors.
        config: of the base: whether its code may run.
        tokens: added in this order; contents spell special ones as text, and contain the others.
        tokenizer_files: folder of the tokenizer; None: that of the base.

    Raises:
        CheckpointError: the folder cannot be written.
        ConfigError: a token exists, nothing is added, or other weights have the size of the vocabulary.
    """
    source, own = tokenizer_files or base, load_tokenizer(base, config)
    tokenizer = load_tokenizer(source, config, "--tokenizer")
    _add_tokens(tokenizer, tokens, own.get_vocab())
    model_config = load_config(base, config)
    former: int = model_config.get_text_config().vocab_size
    rows = max(former, _ids(tokenizer))
    if not tokens and rows == former:
        raise ConfigError(
            "the model has embeddings of all tokens of the tokenizer",
            where="--tokens, --content-tokens",
            got=f"{_ids(tokenizer)} tokens, {former} embeddings",
            remedy="name tokens to add, or a tokenizer with more: --tokens, --content-tokens, --tokenizer",
        )
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    known, of_base = min(_ids(own), former), own.get_vocab()
    new = [id_ for token, id_ in tokenizer.get_vocab().items() if token not in of_base]
    grown, rename = _weights_by_token(causal_lm, former), names_in_model(causal_lm)
    with writing_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        collect_abandoned(folder.parent)
    with writing_errors(folder), staged_folder(folder, replaces=False) as temporary:
        shards = Shards(temporary)
        for name, weight in tensors_of(base):
            shards.add(name, _grow(weight, rows, known, new) if rename(name) in grown else weight)
        shards.close()
        copy_description(base, temporary, None, {"vocab_size": rows})
        if tokens:
            save_tokenizer(tokenizer, temporary)
        else:
            copy_tokenizer(source, temporary)
    return Extended(_ids(tokenizer), former, rows)


def _add_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[AddedToken], of_base: Mapping[str, int]
) -> None:
    """Add tokens to a tokenizer that has the tokens of the base.

    Raises:
        ConfigError: a token exists, is empty or repeated, or the base has it with another id.
    """
    vocabulary, named = tokenizer.get_vocab(), Counter(str(token) for token in tokens)
    repeated = {token for token, count in named.items() if count > 1}
    if present := sorted(repeated | (named.keys() & {"", *vocabulary})):
        raise ConfigError(
            "a new token is empty, one of the tokenizer, or named twice",
            where="--tokens, --content-tokens",
            got=", ".join(map(repr, present[:3])),
            remedy="name only tokens that it lacks, each once",
        )
    if differing := sorted(token for token, number in of_base.items() if vocabulary.get(token) != number):
        raise ConfigError(
            "the tokenizer has other ids for tokens of the model",
            where="--tokenizer",
            got=f"{len(differing)} of {len(of_base)} tokens differ, {', '.join(map(repr, differing[:3]))}",
            expected="the tokenizer of the model with further tokens",
            remedy="name the tokenizer of a training that started from this model",
        )
    tokenizer.add_tokens(list(tokens))


def _ids(tokenizer: PreTrainedTokenizerBase) -> int:
    ids: dict[str, int] = tokenizer.get_vocab()
    return max(ids.values()) + 1


def _weights_by_token(causal_lm: Any, vocabulary: int) -> set[str]:
    """Return the names of the weights of embeddings and output layer, which have a row for each token.

    Raises:
        ConfigError: other embeddings have as many rows.
    """
    ends = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
    names = {module: name for name, module in causal_lm.named_modules()}
    others = [
        name
        for module, name in names.items()
        if isinstance(module, nn.Embedding) and module not in ends and module.num_embeddings == vocabulary
    ]
    sizes = {name: len(weight) for end in ends if end is not None for name, weight in end.named_parameters()}
    if others or any(size != vocabulary for size in sizes.values()):
        raise ConfigError(
            "this model has weights by token of another form",
            where="model",
            got=", ".join(others) or ", ".join(f"{name} of {size} rows" for name, size in sizes.items()),
            expected=f"embeddings and an output layer of {vocabulary} rows",
            remedy="resize it by the code of its authors",
        )
    return {f"{names[end]}.{name}" for end in ends if end is not None for name, _ in end.named_parameters()}


def _grow(weight: Tensor, rows: int, known: int, new: Sequence[int]) -> Tensor:
    """Return a weight with `rows` rows, the mean of the first `known` in further ones and those of `new`.

    The mean is formed in float32. A padded vocabulary has unused rows, some of which `new` may name.
    """
    mean = weight[:known].float().mean(0, keepdim=True).to(weight.dtype)
    grown = torch.cat([weight, mean.expand(rows - len(weight), *mean.shape[1:])])
    grown[list(new)] = mean
    return grown
