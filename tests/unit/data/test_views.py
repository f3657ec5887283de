"""A scorer's view: the same responses behind other prompts, which are planned by their own ids."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.plan import SCORING_TOKENS_FACTOR
from dpo_dist.batching.prefixes import common_tokens
from dpo_dist.batching.step_batch import RankBatch, shard_batch
from dpo_dist.data import SCORERS
from dpo_dist.data.example import Example, TokenIds
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.encoded.dataset_columns import ScorerPrompts
from dpo_dist.encoded.views import with_views
from tests.support import tiny
from tests.support.cache import opened
from tests.support.packing import COSTS, dataset_of, random_pairs
from tests.support.prefixes import sizes_of
from tests.support.records import jsonl
from tests.unit.reference.test_fill import Scorer, assert_filled, fill

SYSTEM = 200
BUDGET = 300


def behind(pairs: Sequence[Example], *prompts: Sequence[TokenIds]) -> PreferenceDataset:
    """Return pairs of which a reference, and a teacher, read these prompts; an empty one: the pair's own."""
    read = {}
    for scorer, own in zip(SCORERS, prompts, strict=False):
        lengths = np.array([*map(len, own)], dtype=np.int32)
        ids = pa.chunked_array([np.concatenate(own)])
        read[scorer] = ScorerPrompts(ids, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)
    return with_views(replace(dataset_of(pairs), scorer_prompts=read), SCORERS)


def with_system(number: int, tokens: int = SYSTEM) -> PreferenceDataset:
    """Pairs with prompts of five tokens, before which the reference has a system message."""
    pairs = random_pairs([(5, 6, 7)] * number)
    system = random_pairs([(tokens, 1)], seed=1)[0].prompt_ids
    return behind(pairs, [np.concatenate((system, pair.prompt_ids)) for pair in pairs])


def unordered(dataset: PreferenceDataset) -> PreferenceDataset:
    """Return the dataset without the order of its view."""
    return replace(dataset, views={"reference": replace(dataset.view("reference"), prefixes=None)})


@pytest.mark.parametrize("scorer", ["reference", "teacher"])
def test_a_view_has_the_responses_of_its_dataset_behind_the_scorer_s_prompts(scorer: str) -> None:
    pairs = random_pairs([(3, 4, 5), (2, 3, 3, 6), (4, 1, 2)])
    prompts = [np.arange(3, 12, dtype=np.int32), np.empty(0, dtype=np.int32), np.arange(3, 9, dtype=np.int32)]
    others = [np.arange(20, 25, dtype=np.int32)] * 3
    data = behind(pairs, prompts, others) if scorer == "reference" else behind(pairs, others, prompts)
    view = data.view(scorer)
    for index, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
        read = view.example(index)
        assert read.prompt_ids.tolist() == (prompt if len(prompt) else pair.prompt_ids).tolist()
        assert [ids.tolist() for ids in read.responses] == [ids.tolist() for ids in pair.responses]
        responses = list(view.response_range(index))
        assert np.array_equal(response_keys([read]), view.keys[responses])
        assert np.array_equal(view.keys[responses], data.keys[responses]) == (not len(prompt))
    assert (np.diff(view.keys[view.key_order].astype(object), axis=0)[:, 0] > 0).all()
    alone = behind(pairs, prompts)
    assert alone.view("teacher") is alone


def test_the_stored_columns_of_each_scorer_are_its_own(tmp_path: Path) -> None:
    """Written beside the encoded data, and mapped by the next start."""
    own = {"reference_prompt": "the short form", "teacher_prompt": "the solution"}
    rows = [{"prompt": f"number {n}?", "chosen": "yes", "rejected": "no", **own} for n in range(3)]
    data = opened(tmp_path, jsonl(tmp_path, *rows))
    for _ in range(2):
        views = with_views(data, SCORERS)
        read = [tiny.qwen().decode(views.view(scorer).example(0).prompt_ids) for scorer in SCORERS]
        assert read == [*own.values()]
    assert views.view("teacher").columns_files != views.view("reference").columns_files


@pytest.mark.parametrize("seed", range(20))
def test_no_more_is_claimed_than_the_prompts_of_a_view_share(seed: int) -> None:
    generator = np.random.default_rng(seed)
    pairs = random_pairs([(int(generator.integers(1, 9)), 6, 7) for _ in range(12)], seed)
    stem = random_pairs([(30, 1)], seed=seed + 1)[0].prompt_ids
    own = [np.concatenate((stem[: generator.integers(31)], pair.prompt_ids)) for pair in pairs]
    data = behind(pairs, [ids if generator.integers(3) else ids[:0] for ids in own])
    view = data.view("reference")
    assert view.prefixes is not None
    order = np.argsort(view.prefixes.places)
    sizes = sizes_of(view, order)
    assert sizes.prefixes is not None
    prompts = [view.example(int(index)).prompt_ids for index in order]
    shared = [0, *(common_tokens(*both) for both in pairwise(prompts))]
    assert sizes.prefixes.common_with_previous().tolist() == shared


def test_a_system_message_is_one_branch_of_each_micro_batch_of_a_fill(tmp_path: Path) -> None:
    """40 pairs of 16 tokens behind 200: six in a micro-batch of 300, and one where nothing is known."""
    data = with_system(40)
    tokens = {}
    for name, each in {"with": data, "without": unordered(data)}.items():
        scorer = Scorer()
        view = each.view("reference")
        fill(
            tmp_path / name, view, range(40), entries_per_shard=200, scorer=scorer, tokens=BUDGET, costs=COSTS
        )
        assert_filled(tmp_path / name, view, range(40))
        tokens[name] = scorer.tokens
    own = 40 * (5 + 5 + 6)
    assert tokens["with"] == pytest.approx(7 * SYSTEM + own, rel=0.02)
    assert tokens["without"] == 40 * SYSTEM + own


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_live_scorer_s_system_message_costs_no_micro_batches(ranks: int) -> None:
    """It is one branch of each, so that the policy's tokens alone decide how many there are."""
    data = with_system(40, tokens=4 * SYSTEM)

    def shares(each: PreferenceDataset, live: tuple[str, ...] = ("reference",)) -> list[RankBatch]:
        return [
            shard_batch(each, np.arange(40), rank, ranks, BUDGET, COSTS, live=live) for rank in range(ranks)
        ]

    planned, plain, without = shares(data), shares(data, ()), shares(unordered(data))
    assert [share.micro_batches for share in planned] == [share.micro_batches for share in plain]
    assert len(without[0].micro_batches) > 4 * len(planned[0].micro_batches)
    batches = [batch.views["reference"] for share in planned for batch in share.batches()]
    computed = sum(batch.tokens for batch in batches)
    assert computed == pytest.approx(len(batches) * 4 * SYSTEM + 40 * (5 + 5 + 6), rel=0.02)
    assert max(batch.tokens for batch in batches) <= SCORING_TOKENS_FACTOR * BUDGET


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_system_message_that_takes_most_of_a_live_micro_batch_is_counted_once_in_it(ranks: int) -> None:
    """Of 1,200 tokens it leaves 200, for 12 pairs of 16 tokens."""
    data = with_system(40, tokens=5 * SYSTEM)
    shares = [
        shard_batch(data, np.arange(40), rank, ranks, BUDGET, COSTS, live=("reference",))
        for rank in range(ranks)
    ]
    batches = [batch.views["reference"] for share in shares for batch in share.batches()]
    assert len(batches) == 4
    assert sum(batch.tokens for batch in batches) == pytest.approx(4 * 5 * SYSTEM + 40 * 16, rel=0.02)
    assert max(batch.tokens for batch in batches) <= SCORING_TOKENS_FACTOR * BUDGET


def test_a_live_scorer_s_own_prompts_divide_micro_batches() -> None:
    """Prompts that share nothing are held to what a scorer may have at once."""
    pairs = random_pairs([(5, 6, 7)] * 40)
    data = behind(pairs, [pair.prompt_ids for pair in random_pairs([(300, 1)] * 40, seed=3)])
    share = shard_batch(data, np.arange(40), 0, 1, BUDGET, COSTS, live=("reference",))
    batches = [batch.views["reference"] for batch in share.batches()]
    assert len(batches) > len(shard_batch(data, np.arange(40), 0, 1, BUDGET, COSTS).micro_batches)
    assert max(batch.tokens for batch in batches) <= SCORING_TOKENS_FACTOR * BUDGET


def test_a_live_scorer_that_pads_its_rows_is_held_to_their_longest() -> None:
    """One of eight prompts is long: all rows of its micro-batch would be."""
    pairs = random_pairs([(5, 6, 7)] * 8)
    prompts = [pair.prompt_ids for pair in pairs]
    prompts[0] = random_pairs([(500, 1)], seed=3)[0].prompt_ids
    costs = replace(COSTS, arrangement=Arrangement.padded)
    data = behind(pairs, prompts)
    assert len(shard_batch(data, np.arange(8), 0, 1, BUDGET, costs).micro_batches) == 1
    share = shard_batch(data, np.arange(8), 0, 1, BUDGET, costs, live=("reference",))
    assert (0,) in share.micro_batches
