"""Partners of labelled records: each response once, never of the same prompt, by the records alone."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.step_batch import collate
from dpo_dist.data.example import Example
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import ScorerPrompts
from dpo_dist.encoded.partners import with_partners
from dpo_dist.encoded.views import with_views
from dpo_dist.foundation.errors import DataError
from tests.support.packing import dataset_of

LONG = 10**6


def labelled(prompts: list[int], masked: bool = False) -> PreferenceDataset:
    """Return records of these prompts, whose responses differ in their ids and lengths."""
    generator = np.random.default_rng(len(prompts))

    def example(number: int, prompt: int) -> Example:
        response = np.array([number, *generator.integers(3, 90, 1 + number % 5)], dtype=np.int32)
        mask = np.arange(len(response)) % 2 == 0
        return Example(
            np.full(1 + prompt % 4, 100 + prompt, dtype=np.int32), (response,), (mask,) if masked else ()
        )

    data = dataset_of([example(*record) for record in enumerate(prompts)])
    return replace(data, prompt_hashes=np.array(prompts, dtype=np.uint64), scores=np.zeros(len(prompts)))


def partners(data: PreferenceDataset, prompts: list[int]) -> list[int]:
    """Return the number of each record's partner, by the first id of its response."""
    return [int(data.example(index, [1]).responses[0][0]) for index in range(len(prompts))]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_partners_are_a_permutation_of_records_with_other_prompts(prompts: list[int], source: object) -> None:
    data = labelled(prompts)
    if 2 * max(map(prompts.count, prompts)) > len(prompts):
        with pytest.raises(DataError, match="same prompt"):
            with_partners(data, LONG)
        return
    found = partners(with_partners(data, LONG), prompts)
    assert sorted(found) == list(range(len(prompts)))
    assert all(prompts[index] != prompts[partner] for index, partner in enumerate(found))


def test_order_and_growth_of_a_file_change_no_other_partners() -> None:
    prompts = list(range(200))
    data = labelled(prompts)
    found = partners(with_partners(data, LONG), prompts)
    backwards = dataset_of([data.example(index) for index in reversed(prompts)])
    backwards = with_partners(replace(backwards, prompt_hashes=data.prompt_hashes[::-1].copy()), LONG)
    assert partners(backwards, prompts)[::-1] == found
    longer = labelled([*prompts, 1000])
    grown = partners(with_partners(longer, LONG), [*prompts, 1000])
    assert sum(one != other for one, other in zip(found, grown[:-1], strict=True)) == 1


def test_sources_have_partners_of_their_own() -> None:
    data = replace(labelled([1, 2, 3, 4, 5, 6]), source_pairs=(2, 4))
    assert partners(with_partners(data, LONG), [0] * 6) == [1, 0, 3, 4, 5, 2]
    assert with_partners(data, LONG).fingerprint not in ("", data.fingerprint)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("longest", [5, 3])
def test_a_partner_is_cut_to_what_the_prompt_leaves(longest: int, masked: bool) -> None:
    """Which is one token at least."""
    data = labelled([1, 2, 3, 7], masked)
    cut = with_partners(data, longest)
    for index in range(4):
        prompt, own, partner = cut.example(index, masked=masked).prompt_ids, *cut.example(index).responses
        whole = data.example(int(partner[0])).responses[0]
        assert partner.tolist() == whole[: max(1, longest - len(prompt))].tolist()
        assert own.tolist() == data.example(index).responses[0].tolist()
        if masked:
            mask = cut.example(index, [1], masked=True).masks[0]
            assert mask.tolist() == (np.arange(len(partner)) % 2 == 0).tolist()
        assert np.array_equal(response_keys([cut.example(index)]), cut.keys[2 * index : 2 * index + 2])
    assert len(collate(cut, [0, 1, 2, 3], 1).keys) == 4
    assert cut.truncated[1::2].any()


def test_a_partner_is_cut_to_what_a_scorer_s_prompt_leaves() -> None:
    """The same response stands behind both prompts, so that the longer one decides."""
    data = labelled([1, 2, 3, 7])
    ids = pa.chunked_array([np.arange(500, 507, dtype=np.int32)])
    own = ScorerPrompts(ids, np.zeros(4, dtype=np.int64), np.array([7, 0, 7, 0], dtype=np.int32))
    cut = with_views(with_partners(replace(data, scorer_prompts={"reference": own}), LONG, 9), {"reference"})
    view = cut.view("reference")
    plain = with_partners(data, LONG)
    for index, tokens in enumerate(own.tokens):
        read = view.example(index)
        partner = read.responses[1]
        assert partner[0] == plain.example(index).responses[1][0], "a scorer changes no partner"
        whole = data.example(int(partner[0])).responses[0]
        assert partner.tolist() == (whole[:2] if tokens else whole).tolist()
        assert read.prompt_ids.tolist() == (
            [*range(500, 507)] if tokens else data.example(index).prompt_ids.tolist()
        )
        assert partner.tolist() == cut.example(index).responses[1].tolist()
        assert np.array_equal(response_keys([read]), view.keys[2 * index : 2 * index + 2])
