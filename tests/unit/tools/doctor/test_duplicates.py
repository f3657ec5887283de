"""Matches are those of brute force; of too many records a sample tells about how many there are."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import Origin
from dpo_dist.tools.doctor.measures.duplicates import (
    Comparison,
    EvaluationPrompts,
    NearCopies,
    contradictions,
    equal_records,
)
from dpo_dist.tools.doctor.measures.observe import RecordFacts
from dpo_dist.tools.doctor.measures.texts import Signature

pytestmark = pytest.mark.slow

Record = tuple[int, Signature]
"""The key of a record, and the signatures of its prompt and its responses."""


@given(st.lists(st.integers(0, 5)))
def test_equal_records_have_the_first_one_as_partner(keys: list[int]) -> None:
    firsts = [-1 if keys.index(key) == at else keys.index(key) for at, key in enumerate(keys)]
    assert equal_records(np.array(keys, dtype=np.uint64)).tolist() == firsts


@given(st.lists(st.sets(st.integers(0, 9), max_size=3)))
def test_records_of_opposite_preferences_are_partners(preferences: list[set[int]]) -> None:
    rows = [[each for each in of_one if each ^ 1 not in of_one] for of_one in preferences]
    found = contradictions(
        np.array([key for row in rows for key in row], dtype=np.uint64),
        np.array([index for index, row in enumerate(rows) for _ in row], dtype=np.int32),
        len(rows),
    )
    for partner, row in zip(found.tolist(), rows, strict=True):
        firsts = [next((at for at, other in enumerate(rows) if key ^ 1 in other), -1) for key in row]
        assert partner in ([first for first in firsts if first >= 0] or [-1])


def records(groups: int, seed: int) -> list[Record]:
    """Return shuffled records: of each group one to five that nearly equal each other, some of them twice.

    Every second group has the prompts of the one before, and responses that resemble its responses by half.
    """
    rng, made = np.random.default_rng(seed), list[Record]()
    base = np.zeros((2, 64), dtype=np.uint32)
    for group in range(groups):
        is_half = group % 2
        changed = base[is_half:, is_half * 32 :]
        changed[:] = rng.integers(1 << 32, size=changed.shape, dtype=np.uint32)
        for _ in range(rng.choice([1, 1, 1, 1, 2, 5])):
            near = base.copy()
            near[rng.integers(2), rng.integers(64, size=3)] += 1
            made += [(int(rng.integers(1 << 64, dtype=np.uint64)), near)] * int(rng.choice([1, 1, 1, 3]))
    random.Random(seed).shuffle(made)
    return made


def near_copies(made: Sequence[Record], chunk: int, limit: int) -> tuple[dict[int, int], list[int]]:
    """Return the records with a near copy and the first one after them, and the records that were sought."""
    finder = NearCopies(limit)
    for start in range(0, len(made), chunk):
        keys, signatures = zip(*made[start : start + chunk], strict=True)
        finder.add(keys, np.stack(signatures))
    found = {finder.indexes[key]: later for key, later in finder.matches.items()}
    return found, sorted(finder.indexes.values())


@pytest.mark.parametrize("chunk", [1, 64, 1000])
@pytest.mark.parametrize(("limit", "fewest"), [(10_000, 300), (120, 60)])
def test_near_copies_are_those_of_brute_force_among_all_or_a_sample(
    chunk: int, limit: int, fewest: int
) -> None:
    made = records(300, 1)
    keys = [key for key, _ in made]
    found, sought = near_copies(made, chunk, limit)
    assert fewest <= len(sought) <= limit
    assert sought == sorted(map(keys.index, sorted(set(keys))[: len(sought)]))
    for index in sought:
        last = len(keys) - 1 - keys[::-1].index(keys[index])  # of its copies
        alike = (
            at
            for at in range(last + 1, len(made))
            if ((made[at][1] == made[index][1]).mean(axis=1) >= 0.7).all()
        )
        assert found.get(index) == next(alike, None)


def compared(made: Sequence[Record], is_eval: Sequence[bool], limit: int) -> Any:
    """Return the counts and the findings about records; prompts are equal if the keys are."""
    prompts = EvaluationPrompts(limit)
    prompts.add((key, sides[0]) for (key, sides), each in zip(made, is_eval, strict=True) if each)
    comparison = Comparison(DataConfig(), prompts, NearCopies(limit))
    for line, ((key, sides), each) in enumerate(zip(made, is_eval, strict=True), 1):
        if line in (1, 700):
            comparison.add_source(f"source {line}", is_eval=False)
        facts = RecordFacts(Origin("a", line), is_readable=True, is_held_out=each, signatures=sides)
        facts.record = facts.prompt = facts.hash = key
        comparison.add([facts])
    return comparison.result()


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_tells_about_how_many_near_copies_there_are(seed: int) -> None:
    made = records(900, seed)
    none = [False] * len(made)
    (exact, of_all), (across, of_sample) = (compared(made, none, limit) for limit in (len(made), 600))
    [truth], [finding] = (
        [one for one in found if one.rule == "near_duplicates"] for found in (of_all, of_sample)
    )
    assert {**across, "near_duplicates": 0} == {**exact, "near_duplicates": 0}
    assert finding.count == pytest.approx(truth.count, rel=0.25)
    assert finding.count != truth.count
    assert across["near_duplicates"] == finding.count + across["duplicates"]
    assert finding.text.startswith(f"about {finding.count} of {len(made)} records")
    assert ": estimated from one record in 4; " in finding.text
    assert " in source 1, " in finding.text


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_tells_about_how_many_prompts_are_leaked(seed: int) -> None:
    made = records(700, seed)
    is_eval = [key % 3 == 0 for key, _ in made]
    [truth], [finding] = (
        [one for one in compared(made, is_eval, limit)[1] if one.rule == "near_train_eval_leak"]
        for limit in (len(made), 150)
    )
    assert finding.count == pytest.approx(truth.count, rel=0.4)
    assert "estimated from " in finding.text
