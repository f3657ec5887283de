"""Matches are those of brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.tools.doctor.measures.duplicates import contradictions, equal_records

pytestmark = pytest.mark.slow


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
