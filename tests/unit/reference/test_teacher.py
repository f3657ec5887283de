"""What a batch gets of a teacher: its own rows, whatever the batch is made of."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.pack import PackedBatch, dummy_batch, pack
from dpo_dist.data import Example
from dpo_dist.objective.distillation import SparseRows
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from dpo_dist.reference.teacher import Teacher, with_uniforms

KEPT = SparseRows(2, 3, 1.0, 50)


def example(number: int, lengths: Sequence[int], *, masked: bool = False) -> Example:
    generator = np.random.default_rng(number)
    responses = tuple(generator.integers(0, 50, tokens).astype(np.int32) for tokens in lengths)
    trained = tuple(np.arange(tokens) % 2 == 0 for tokens in lengths) if masked else ()
    return Example(generator.integers(0, 50, 4).astype(np.int32), responses, trained)


def packed(examples: Sequence[Example]) -> PackedBatch:
    return pack(examples, response_keys(examples))


def uniforms(batch: PackedBatch, seed: int = 0) -> torch.Tensor:
    teacher = with_uniforms(batch, KEPT, seed).teacher
    assert teacher is not None
    assert teacher.uniforms is not None
    return teacher.uniforms


def test_draws_depend_on_the_response_and_its_place_alone() -> None:
    first, second = example(1, [5, 3]), example(2, [4, 6])
    together = uniforms(packed([first, second]))
    alone = uniforms(packed([second]))
    assert torch.equal(together[8:], alone)
    assert torch.equal(uniforms(packed([replace(second, responses=second.responses[1:])])), alone[4:])
    assert not torch.equal(uniforms(packed([second]), seed=1), alone)
    assert len(torch.unique(together)) == together.numel()
    masked = example(2, [4, 6], masked=True)
    assert torch.equal(uniforms(packed([masked])), alone[np.concatenate(masked.masks)])


def test_stored_rows_stand_at_the_tokens_of_their_response(tmp_path: Path) -> None:
    """Also in rankings, under masks and behind a rejected response, whose tokens want nothing."""
    examples = [example(1, [5, 3]), example(2, [4, 6, 2], masked=True), example(3, [3])]
    store = LogpStore.open(tmp_path, ReferenceFingerprint("weights", {}, width=KEPT.width))
    chosen = [replace(each, responses=each.responses[:1], trained=()) for each in examples]
    rows = []
    for number, each in enumerate(examples):
        values = np.arange(len(each.responses[0]) * KEPT.width, dtype=np.float32) + 1000 * number
        rows.append(values.reshape(-1, KEPT.width))
    store.write(response_keys(chosen), rows)
    teacher = Teacher(KEPT, 0, store=LogpStore.open(tmp_path, store.fingerprint))
    batch = packed([replace(each, trained=each.masks) for each in examples])
    got = teacher.ready(batch).teacher
    assert got is not None
    assert got.rows is not None
    of_response = torch.split(got.rows, batch.response_tokens.tolist())
    for number, response in enumerate((0, 2, 5)):
        mask = examples[number].masks[0]
        assert np.array_equal(of_response[response].numpy(), rows[number][mask])
    for response in (1, 3, 4):
        assert not of_response[response].any()
    dummy = teacher.ready(dummy_batch()).teacher
    assert dummy is not None
    assert dummy.rows is not None
    assert dummy.rows.shape == (2, KEPT.width)
    assert not dummy.rows.any()
