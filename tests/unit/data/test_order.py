"""Which leading tokens examples share: stored with the encoded data, never more than there are."""

import os
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_dist.batching.costs import Arrangement, ComputeCosts
from dpo_dist.data.config import DataConfig, Ranked, SourceConfig, UnpairedDataConfig
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.encoded.partners import with_partners
from dpo_dist.foundation.errors import DataError
from tests.support.cache import opened, prepare_all
from tests.support.packing import SHARING, dataset_of
from tests.support.prefixes import check_claims, sizes_of, some_of
from tests.support.records import BAD, GOOD, assistant, jsonl, user

pytestmark = pytest.mark.slow

texts = st.text("ab", max_size=6)
prompts = texts.map("prompt".__add__)
pairs = st.tuples(prompts, texts, st.integers(0, 6))
rankings = st.fixed_dictionaries(
    {"prompt": prompts, "responses": st.lists(texts.map("a".__add__), min_size=2, max_size=4, unique=True)}
).map(lambda row: row | {"scores": [*range(len(row["responses"]), 0, -1)]})


def rows_of_pairs(drawn: Sequence[tuple[str, str, int]]) -> list[dict[str, str]]:
    """Return pairs whose rejected responses begin like the chosen ones, and go on like no other record."""
    return [
        {"prompt": prompt, "chosen": f"{chosen}c", "rejected": f"{chosen[:same]}{chr(ord('A') + n)}"}
        for n, (prompt, chosen, same) in enumerate(drawn)
    ]


def data_of(*sources: Sequence[Any], limit: int | None = None, **data: Any) -> PreferenceDataset:
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        root, configs = Path(folder), []
        for number, rows in enumerate(sources):
            (root / str(number)).mkdir()
            configs.append(SourceConfig(jsonl(root / str(number), *rows), limit=limit))
        return opened(root, *configs, max_bad_share=1.0, **data)


@settings(max_examples=20)
@given(st.lists(pairs, min_size=1, max_size=26), st.randoms(use_true_random=False))
def test_tokens_of_pairs_are_planned_as_they_are_packed(drawn: Any, draw: random.Random) -> None:
    rows = rows_of_pairs(drawn)
    data = data_of(rows)
    assert len(data) == len(rows)
    for _ in range(3):
        check_claims(data, some_of(data, draw), is_exact=True)
        check_claims(data, some_of(data, draw), 0, is_exact=True)
        check_claims(data, some_of(data, draw), 1)
    in_memory = dataset_of([data.example(index) for index in range(len(data))])
    check_claims(in_memory, some_of(in_memory, draw), is_exact=True)


@settings(max_examples=25)
@given(
    st.lists(st.lists(rankings, min_size=1, max_size=6), min_size=1, max_size=3),
    st.sampled_from(Ranked),
    st.sampled_from([DataConfig, UnpairedDataConfig]),
    st.sampled_from([None, 4]),
    st.randoms(use_true_random=False),
)
def test_no_more_is_claimed_than_rankings_of_several_sources_share(
    sources: Any, how: Ranked, kind: type[DataConfig], limit: int | None, draw: random.Random
) -> None:
    for source in sources:
        for row in source:
            if draw.random() < 0.5 and "responses" in row:
                scores = draw.sample(range(9), len(row["responses"]))
                row["scores"] = scores
    data = data_of(*sources, limit=limit, ranked=how, kind=kind)
    for which in (None, 0, None, None):
        check_claims(data, some_of(data, draw), which)


@settings(max_examples=10)
@given(st.lists(pairs, min_size=4, max_size=12), st.randoms(use_true_random=False))
def test_a_partner_shares_the_prompt_only(drawn: Any, draw: random.Random) -> None:
    rows = [
        {"prompt": f"{row['prompt']}{n}", "completion": row["chosen"], "label": draw.random() < 0.5}
        for n, row in enumerate(rows_of_pairs(drawn))
    ]
    data = with_partners(replace(data_of(rows), encoded=()), 30)
    for which in (None, 0, 1):
        check_claims(data, some_of(data, draw), which)
    assert not data.begins.any()


def test_what_begins_a_response_is_counted_once_where_a_forward_shares_it() -> None:
    data = data_of([{"prompt": "prompt", "responses": ["aaab", "aab", "aabb"], "scores": [3, 2, 1]}])
    [prompt, *responses] = data.lengths(0)
    every, unshared = np.arange(1), sum(prompt + tokens - 1 for tokens in responses)
    shared = sizes_of(data, every)
    assert shared.unshared_tokens.tolist() == [unshared]
    assert shared.tokens.tolist() == [unshared - 2 * prompt - 2 - 3]
    rows = [prompt + tokens - 1 for tokens in responses]
    seen = [
        sum(range(start + 1, row + 1)) for row, start in zip(rows, (0, prompt + 2, prompt + 3), strict=True)
    ]
    assert shared.attended.tolist() == [sum(seen)]
    for costs, tokens in (
        (ComputeCosts(0, 0), unshared - 2 * prompt),
        (ComputeCosts(0, 0, beyond_prompts=True, copy=2), unshared - 2 * prompt),
        (ComputeCosts(0, 0, Arrangement.single, beyond_prompts=True), unshared),
    ):
        plain = sizes_of(data, every, costs=costs)
        assert plain.tokens.tolist() == [tokens]
        assert (plain.prefixes is not None) == costs.shares_prefixes
    # Some of the responses: the one that begins like another may be absent.
    two = data.sizes(every, np.array([1, 2]), np.array([2]), SHARING)
    assert two.tokens.tolist() == [prompt + sum(tokens - 1 for tokens in responses[1:])]


def test_a_response_that_another_one_continues_is_shared_but_for_its_last_token() -> None:
    data = data_of(
        [
            {
                "prompt": [user("prompt")],
                "chosen": [assistant("yes")],
                "rejected": [assistant("yes"), user("and?"), assistant("no")],
            }
        ]
    )
    chosen, rejected = data.example(0).responses
    assert np.array_equal(chosen, rejected[: len(chosen)])
    check_claims(data, np.arange(1), is_exact=True)


def test_sources_of_which_nothing_is_kept_and_no_examples_have_no_prefixes() -> None:
    data = data_of([BAD, GOOD[0]], [BAD, BAD, GOOD[0]], [BAD, GOOD[0]])
    check_claims(data, np.arange(3))
    none = sizes_of(data, np.arange(0))
    assert none.prefixes is not None
    assert none.prefixes.common_with_previous().tolist() == []


@pytest.mark.parametrize("damage", ["absent", "cut", "bit", "of other records"])
def test_a_damaged_order_is_not_read_and_is_written_again_without_the_records(
    damage: str, tmp_path: Path
) -> None:
    [source] = prepare_all(tmp_path, jsonl(tmp_path, *GOOD))
    whole, records = source.order_file.read_bytes(), source.file.stat()
    if damage == "absent":
        source.order_file.unlink()
    elif damage == "cut":
        os.truncate(source.order_file, len(whole) // 2)
    elif damage == "bit":
        source.order_file.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    else:
        (tmp_path / "other").mkdir()
        [other] = prepare_all(tmp_path, jsonl(tmp_path / "other", *GOOD[::-1]))
        source.order_file.write_bytes(other.order_file.read_bytes())
    with pytest.raises(DataError, match="damaged"):
        open_dataset([source], DataConfig())
    assert prepare_all(tmp_path, jsonl(tmp_path, *GOOD)) == (source,)
    assert (source.order_file.read_bytes(), source.file.stat()) == (whole, records)


def test_writers_at_one_time_and_one_that_died_between_the_files_leave_whole_ones(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *GOOD)
    killed = mock.patch("dpo_dist.encoded.build.ensure_order", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        prepare_all(tmp_path, path)
    with ThreadPoolExecutor(4) as pool:
        datasets = [*pool.map(lambda _: opened(tmp_path, path), range(8))]
    assert len({source for data in datasets for source in data.encoded}) == 1
    for data in datasets:
        check_claims(data, np.arange(1))
    assert len(list((tmp_path / "cache").glob("*.arrow*"))) == 3
