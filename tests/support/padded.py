"""The plain way to the same numbers, as an oracle: transformers' own model, padding, a mask, full logits."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from dpo_dist.batching.pack import Sequences
from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from tests.support import tiny
from tests.support.packing import random_pairs
from tests.support.shared_data import shared_data_dir

BETA = 0.1


def real_pairs(count: int, seed: int = 0, max_length: int = 320) -> list[Sequences]:
    """Pairs of HH-RLHF drawn at random, or with lengths like theirs where the slice is not there."""
    generator = np.random.default_rng(seed)
    data = shared_data_dir()
    if data is None:
        lengths = np.clip(np.exp(generator.normal(4.3, 0.9, (count, 3))), 2, max_length // 2).astype(int)
        return random_pairs([tuple(map(int, of_pair)) for of_pair in lengths], seed)
    records = [
        record
        for record in read_records(SourceConfig(str(data / "hh_rlhf_sample.jsonl"), limit=300))
        if isinstance(record, PreferenceRecord)
    ]
    limits = DataConfig(max_length=max_length)
    order = generator.permutation(len(records))
    encoded = (encode_pair(records[place], tiny.qwen(), limits) for place in order)
    kept = (pair for pair in encoded if isinstance(pair, EncodedExample))
    return [Sequences(pair.prompt_ids, pair.responses) for pair in itertools.islice(kept, count)]


def padded_logps(causal_lm: Any, pairs: Sequence[Sequences]) -> list[Tensor]:
    """float32 log-probs of each response's tokens, response after response, from one padded batch."""
    rows = [(pair.prompt_ids, response) for pair in pairs for response in pair.responses]
    ids = [torch.from_numpy(np.concatenate(row).astype(np.int64)) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    logits = causal_lm(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    return [
        logps[place, len(prompt) - 1 : len(prompt) + len(response) - 1]
        for place, (prompt, response) in enumerate(rows)
    ]


def plain_loss(logps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Mean DPO loss (arXiv 2305.18290, equation 7) of pairs, from the tokens' values."""
    ratios = [ours.sum() - theirs.sum() for ours, theirs in zip(logps, reference, strict=True)]
    margins = torch.stack(ratios[::2]) - torch.stack(ratios[1::2])
    return -logsigmoid(BETA * margins).mean()


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
