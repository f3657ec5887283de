"""What a batch gets of a teacher: its own rows, whatever the batch is made of."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.pack import PackedBatch, dummy_batch, pack
from dpo_dist.data import Example
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.objective.distillation import SparseRows
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from dpo_dist.reference.teacher import Teacher, with_uniforms
from dpo_dist.verbs.store import main as store_verb

KEPT = SparseRows(2, 3, 1.0, 50)


def example(number: int, lengths: Sequence[int], *, masked: bool = False) -> Example:
    generator = np.random.default_rng(number)
    responses = tuple(generator.integers(0, 50, tokens).astype(np.int32) for tokens in lengths)
    trained = tuple(np.arange(tokens) % 2 == 0 for tokens in lengths) if masked else ()
    return Example(generator.integers(0, 50, 4).astype(np.int32), responses, trained)


def packed(examples: Sequence[Example]) -> PackedBatch:
    return pack(examples, response_keys(examples))


def uniforms(batch: PackedBatch) -> torch.Tensor:
    teacher = with_uniforms(batch, KEPT).teacher
    assert teacher is not None
    assert teacher.uniforms is not None
    return teacher.uniforms


def answers(tokens: int, seed: int) -> np.ndarray:
    """A teacher's rows of so many tokens."""
    torch.manual_seed(seed)
    return KEPT.rows(torch.randn(tokens, 50).softmax(1), torch.rand(tokens, KEPT.drawn)).numpy()


def test_draws_depend_on_the_response_and_its_place_alone() -> None:
    first, second = example(1, [5, 3]), example(2, [4, 6])
    together = uniforms(packed([first, second]))
    alone = uniforms(packed([second]))
    assert torch.equal(together[8:], alone)
    assert torch.equal(uniforms(packed([replace(second, responses=second.responses[1:])])), alone[4:])
    batch = packed([second])
    drawn = np.random.default_rng([0, *batch.keys.tolist()[0]]).random((4, KEPT.drawn), dtype=np.float32)
    assert torch.equal(alone[:4], torch.from_numpy(drawn)), "stores of earlier versions have these draws"
    assert len(torch.unique(together)) == together.numel()
    masked = example(2, [4, 6], masked=True)
    assert torch.equal(uniforms(packed([masked])), alone[np.concatenate(masked.masks)])


def test_stored_rows_stand_at_the_tokens_of_their_response(tmp_path: Path) -> None:
    """Also in rankings, under masks and behind a rejected response, whose tokens want nothing."""
    examples = [example(1, [5, 3]), example(2, [4, 6, 2], masked=True), example(3, [3])]
    store = LogpStore.open(tmp_path, ReferenceFingerprint("weights", {}, width=KEPT.width))
    chosen = [replace(each, responses=each.responses[:1], trained=()) for each in examples]
    rows = [answers(len(each.responses[0]), number) for number, each in enumerate(examples)]
    store.write(response_keys(chosen), rows)
    teacher = Teacher(KEPT, store=LogpStore.open(tmp_path, store.fingerprint))
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


Damage = Callable[[np.ndarray], np.ndarray]


def with_number(place: tuple[int, int], number: float) -> Damage:
    def damage(rows: np.ndarray) -> np.ndarray:
        rows[place] = number
        return rows

    return damage


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (with_number((2, 0), 50), "token id 50 of 50"),
        (with_number((2, 1), -1), "token id -1 of 50"),
        (with_number((4, 5), 1e9), "token id 1e+09 of 50"),
        (with_number((4, 6), 0.5), "token id 0.5 of 50"),
        (with_number((0, 4), float("nan")), "token id nan of 50"),
        (with_number((1, 2), 40), "probabilities with the sum 4"),
        (with_number((1, 7), 0.9), "probabilities with the sum"),
        (with_number((1, 7), float("nan")), "probabilities with the sum nan"),
        (lambda rows: rows[:-1], "4 tokens in place of 5"),
        (lambda rows: np.concatenate([rows, rows]), "10 tokens in place of 5"),
        (lambda rows: rows[:, :-1], ""),  # no whole number of rows: damaged
    ],
)
def test_an_entry_that_is_no_answer_is_an_error_with_a_command_that_removes_it(
    damage: Damage, fault: str, tmp_path: Path
) -> None:
    root = tmp_path / "the store"
    each = example(1, [5, 3])
    store = LogpStore.open(root, ReferenceFingerprint("weights", {}, width=KEPT.width))
    keys = response_keys([each])
    write = store.write
    with mock.patch("numpy.isfinite", np.ones_like):  # a later version may have written anything
        write(keys[:1], [damage(answers(5, 0))])
    teacher = Teacher(KEPT, store=LogpStore.open(root, store.fingerprint))
    with pytest.raises(ReferenceModelError) as raised:
        teacher.ready(packed([each]))
    error = raised.value
    assert str(root) in error.where
    assert f"entry {keys[0, 0]:016x}{keys[0, 1]:016x}" in error.got
    if not fault:
        assert "missing or damaged" in error.message
        return
    assert fault in error.got
    command = shlex.split(error.remedy.partition("dpo-dist store ")[2])
    assert store_verb(command) == 0
    assert not LogpStore.open(root, store.fingerprint).contains(keys[:1]).any()


def test_a_flipped_row_is_not_read(tmp_path: Path) -> None:
    each = example(1, [5, 3])
    store = LogpStore.open(tmp_path, ReferenceFingerprint("weights", {}, width=KEPT.width))
    keys = response_keys([each])[:1]
    name = store.write(keys, [answers(5, 0)])
    whole = LogpStore.open(tmp_path, store.fingerprint)
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    content[-KEPT.width * 4] ^= 1  # the last digit of a number: of the last token's most likely id
    file.write_bytes(content)
    for opened in (whole, LogpStore.open(tmp_path, store.fingerprint)):
        with pytest.raises(ReferenceModelError, match="missing or damaged"):
            Teacher(KEPT, store=opened).ready(packed([each]))
    assert not LogpStore.open(tmp_path, store.fingerprint).contains(keys).any()


def test_distances_are_of_probabilities_and_entropies_whatever_the_order_of_equal_ones() -> None:
    rows = answers(4, 0)
    assert not KEPT.distances(rows, rows).any()
    turned = rows[:, [1, 0, 3, 2, *range(4, KEPT.width)]]
    assert not KEPT.distances(rows, turned).any()
    other = rows.copy()
    other[0, 2] += 0.5  # a probability
    other[1, 0] = (set(range(50)) - {*rows[1, :2]}).pop()  # a token in place of another
    other[2, -1] += 0.25  # the entropy
    wanted = [0.25, rows[1, 2] / 2, 0.25, 0]
    assert KEPT.distances(rows, other) == pytest.approx(wanted, abs=1e-6)
