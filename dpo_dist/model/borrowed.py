"""A model of transformers that scores packed batches for a while, and is as before afterwards."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.data.arrangement import Arrangement
from dpo_dist.errors import ConfigError
from dpo_dist.model.attention_backend import choose_backend
from dpo_dist.model.checked import CheckedModel
from dpo_dist.model.exactness import settle
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.supported import check_supported, check_text


@contextlib.contextmanager
def packed_for_a_while(model: PackedCausalLM | PreTrainedModel, longest: int) -> Iterator[PackedCausalLM]:
    """Yield `model` as a packed model; a model of transformers gets its own attention and head back.

    Args:
        model: in evaluation mode.
        longest: tokens of the longest prompt plus response.

    Raises:
        ConfigError: it is no such model, is in training mode, or its log-probs are not exact.
    """
    if isinstance(model, PackedCausalLM):
        yield model
        return
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            "this is not a causal language model of transformers",
            where="model",
            got=type(model).__name__,
            remedy="pass the result of load_model, or a PreTrainedModel: of a PeftModel, get_base_model()",
        )
    check_text(model.config, "model")
    check_supported(model.config, longest)
    if model.training:
        raise ConfigError(
            "the model is in training mode, in which dropout makes log-probs random",
            where="model",
            got=type(model).__name__,
            remedy="call model.eval(); gradients are recorded in evaluation mode too",
        )
    packed: PackedCausalLM | None = None
    head, attention = model.get_output_embeddings(), model.config._attn_implementation
    dtype = Dtype.fp32 if next(model.parameters()).dtype == torch.float32 else Dtype.bf16
    try:
        backend = choose_backend(AttentionBackend.auto, dtype, model.device)
        packed = PackedCausalLM(model, backend, arrangement=Arrangement.padded).eval()
        settle(CheckedModel(packed, packed, model.device, longest, "model"))
        yield packed
    finally:
        if packed is not None:
            packed.restore_rotary()
        if head is not None:
            model.set_output_embeddings(head)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
