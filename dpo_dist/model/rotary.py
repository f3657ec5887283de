"""Rotary frequencies that depend on the length of a sequence.

`dynamic` and `longrope` RoPE choose the frequencies of all tokens of a forward by its longest sequence, and
`dynamic` also by the forwards before it. A model whose sequences may be that long computes each response in
a forward of its own, with the frequencies of a new model for prompt and response, the last token included.
"""

from typing import Any

from torch import Tensor, nn

_ORIGINAL = "original_inv_freq"


def rope_limit(model_config: Any) -> int | None:
    """Return the longest sequence with the frequencies of short ones, in tokens; None: they are fixed."""
    if not getattr(model_config, "rope_parameters", None):
        return None
    model_config.standardize_rope_params()  # as the model does; it may replace the original length
    parameters = model_config.rope_parameters
    of_layers = [value for value in parameters.values() if isinstance(value, dict)]
    limits: list[int] = []
    for rope in of_layers or [parameters]:
        rope_type = rope.get("rope_type", "default")
        if rope_type == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        elif "dynamic" in rope_type:
            limits.append(model_config.max_position_embeddings)
    return min(limits, default=None)


def forget_lengths(causal_lm: nn.Module) -> None:
    """Make the rotary embeddings of a model those of one that has seen no sequence."""
    for module in causal_lm.modules():
        # Buffers with the frequencies of short sequences may be the same tensors as those in use.
        for name, original in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            prefix = name.removesuffix(_ORIGINAL)
            longest = getattr(module, f"{prefix}max_seq_len_cached", None)
            if name.endswith(_ORIGINAL) and isinstance(longest, Tensor):  # of a long sequence
                setattr(module, f"{prefix}inv_freq", original)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
