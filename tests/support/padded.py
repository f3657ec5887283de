"""The plain way to the same numbers, as an oracle: transformers' own model, padding, a mask, full logits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_dist.data.example import Example, TokenIds

Rows = Sequence[tuple[TokenIds, TokenIds]]
"""A prompt and a response each."""


def rows_of(pairs: Sequence[Example]) -> list[tuple[TokenIds, TokenIds]]:
    return [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]


def padded_inputs(rows: Rows) -> tuple[Tensor, Tensor]:
    """Token ids of rows, padded to the longest one, and the mask of their tokens."""
    ids = [torch.from_numpy(np.concatenate(row).astype(np.int64)) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, batch_first=True), pad_sequence(masks, batch_first=True)


def padded_logps(causal_lm: Any, rows: Rows) -> list[Tensor]:
    """Log-probs of the tokens of each response, in float32 or wider, from one padded batch."""
    input_ids, mask = padded_inputs(rows)
    logits = causal_lm(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    logps = wide.log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    return [
        logps[place, len(prompt) - 1 : len(prompt) + len(response) - 1]
        for place, (prompt, response) in enumerate(rows)
    ]


def gradients_of(causal_lm: Any, loss: Tensor) -> dict[str, Tensor]:
    """A copy of the gradient of each of the model's parameters, in float32."""
    causal_lm.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.float().clone() for name, p in causal_lm.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each parameter's within 1e-5 of its own norm."""
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias of keys has no gradient but rounding: its own norm is no measure.
        assert (ours[name] - gradient).norm() <= 1e-5 * max(float(gradient.norm()), 1e-2 * largest), name
