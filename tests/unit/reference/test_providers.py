"""Law L3 as a whole: whatever runs came before on a store, and whatever happened to it, what a run is served
is what its own reference says of its own tokens.

Each example is a sequence of runs on one store. Between runs the weights in the model's folder are exchanged
and shards are damaged; runs differ in precision, pairs, order, tokens, lengths, budget and shard size.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.encode import response_key
from dpo_dist.data.packing import PackedBatch, Sequences, pack
from dpo_dist.distributed.world import World
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import load_packed
from dpo_dist.model.numerics import numerics_of
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.fill import FillReport, fill_store, open_filled
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.providers import StoredReference
from dpo_dist.reference.store import LogpStore
from tests.support.packing import COSTS, random_pairs
from tests.support.tiny_model import write_model

CPU = torch.device("cpu")
WEIGHTS = 2
# Of the mean over a response's tokens, in nats; in bf16 a value's digits depend on the shape of its batch.
TOLERANCE = {Dtype.fp32: 1e-5, Dtype.bf16: 0.05}
PAIRS = random_pairs([(5, 7, 2), (1, 4, 9), (8, 3, 3), (3, 12, 6), (2, 1, 1), (6, 5, 8)], seed=1)
# Alike at first sight: one token changed, a response shortened, prompt and response divided elsewhere.
_PROMPT, (_FIRST, _SECOND) = PAIRS[0].prompt_ids, PAIRS[0].responses
PAIRS += [
    Sequences(np.append(_PROMPT[:-1], (_PROMPT[-1:] + 1) % 97).astype(np.int32), (_FIRST, _SECOND)),
    Sequences(_PROMPT, (_FIRST[:-1], _SECOND)),
    Sequences(np.append(_PROMPT, _FIRST[:1]), (_FIRST[1:], _SECOND)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("weights")
    return [write_model(root / str(number), seed=number) for number in range(WEIGHTS)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(None, 0, 1, CPU, ())
    dist.destroy_process_group()


@cache
def load(folder: Path, dtype: Dtype) -> PackedCausalLM:
    return load_packed(folder, ModelConfig(str(folder), dtype=dtype), 64, CPU)


@cache
@torch.no_grad()
def fresh(folder: Path, dtype: Dtype, pair: int) -> list[np.ndarray]:
    """What the model says of each response of a pair, scored alone."""
    sequences = PAIRS[pair]
    alone = [Sequences(sequences.prompt_ids, (response,)) for response in sequences.responses]
    model = load(folder, dtype)
    return [model(pack([one], np.zeros((1, 2), dtype=np.uint64))).float().numpy() for one in alone]


def dataset_of(pairs: list[int]) -> PreferenceDataset:
    sequences = [PAIRS[pair] for pair in pairs]
    pieces = [piece for pair in sequences for piece in (pair.prompt_ids, *pair.responses)]
    keys = [response_key(pair.prompt_ids, response) for pair in sequences for response in pair.responses]
    lengths = np.array([len(piece) for piece in pieces])
    return PreferenceDataset(
        fingerprint="",
        counts={},
        source_paths=("",),
        source_pairs=(len(pairs),),
        largest_id=int(np.concatenate(pieces).max()),
        ids=np.concatenate(pieces),
        piece_starts=np.cumsum(lengths) - lengths,
        piece_tokens=lengths,
        pair_pieces=np.cumsum([1 + len(pair.responses) for pair in sequences]),
        keys=np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2),
        scores=np.full(len(keys), np.nan),
        origins=np.zeros((len(pairs), 2), dtype=np.int64),
    )


@dataclass(frozen=True)
class Run:
    """What one run is: the weights then in its model's folder, and what it scores how."""

    weights: int
    dtype: Dtype
    pairs: list[int]
    micro_batch_tokens: int
    rows_per_shard: int


@dataclass(frozen=True)
class Damage:
    """What happens to one shard: a byte flipped, the end cut off, or the file gone."""

    shard: int
    place: float
    kind: str

    def strike(self, store: Path) -> None:
        shards = sorted(store.glob("*/*.safetensors"))
        if not shards:
            return
        shard = shards[self.shard % len(shards)]
        content = bytearray(shard.read_bytes())
        place = int(self.place * len(content))
        if self.kind == "gone":
            shard.unlink()
        elif self.kind == "cut":
            shard.write_bytes(content[:place])
        elif content:
            content[place] ^= 0x41
            shard.write_bytes(content)


runs = st.builds(
    Run,
    weights=st.integers(0, WEIGHTS - 1),
    dtype=st.sampled_from(Dtype),
    pairs=st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, max_size=8),
    micro_batch_tokens=st.integers(8, 80),
    rows_per_shard=st.integers(1, 8),
)
damages = st.builds(
    Damage,
    st.integers(0, 99),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["flipped", "cut", "gone"]),
)


@torch.no_grad()
def carry_out(run: Run, model_folder: Path, store: Path, world: World) -> tuple[FillReport, Tensor]:
    """Fill the store for a run, and give what a batch of all its pairs is served."""
    setting = ModelConfig(str(model_folder), dtype=run.dtype)
    digest = digest_model(model_folder, store).digest
    space = ReferenceFingerprint(digest, numerics_of(setting, AttentionBackend.sdpa, CPU))
    model = load_packed(model_folder, setting, 64, CPU)

    def score(batch: PackedBatch) -> Tensor:
        return model(batch).float()

    dataset = dataset_of(run.pairs)
    open_store = partial(LogpStore.open, store, space)
    report = fill_store(
        open_store,
        dataset,
        np.arange(len(dataset)),
        lambda: score,
        world,
        run.micro_batch_tokens,
        COSTS,
        run.rows_per_shard,
        lambda _done, _total: None,
    )
    provider = StoredReference(open_filled(open_store, report.shards, world))
    batch = provider.attach(pack([PAIRS[pair] for pair in run.pairs], dataset.keys))
    return report, provider.token_logps(batch)


def exchange_weights(model_folder: Path, source: Path) -> None:
    shutil.copy(source / "model.safetensors", model_folder / "model.safetensors")


@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # shrinking a failure takes minutes
@given(steps=st.lists(st.one_of(runs, runs, damages), min_size=2, max_size=6))
def test_a_run_is_served_what_its_own_reference_says(
    steps: list[Run | Damage], folders: list[Path], world: World
) -> None:
    with TemporaryDirectory() as name:
        model_folder, store = shutil.copytree(folders[0], Path(name, "model")), Path(name, "store")
        for step in steps:
            if isinstance(step, Damage):
                step.strike(store)
                continue
            exchange_weights(model_folder, folders[step.weights])
            report, served = carry_out(step, model_folder, store, world)
            wanted = [row for pair in step.pairs for row in fresh(folders[step.weights], step.dtype, pair)]
            rows = torch.split(served, [len(row) for row in wanted])
            for row, want in zip(rows, wanted, strict=True):
                assert np.abs(row.numpy() - want).mean() <= TOLERANCE[step.dtype]
            assert report.hits + report.computed == len(np.unique(dataset_of(step.pairs).keys, axis=0))


def test_what_is_stored_is_served_bit_for_bit_and_never_computed_again(
    folders: list[Path], world: World, tmp_path: Path
) -> None:
    """Another order, subset, budget and shard size; and back to weights that were there before."""
    folder, store = shutil.copytree(folders[0], tmp_path / "model"), tmp_path / "store"
    first = Run(0, Dtype.fp32, list(range(len(PAIRS))), 40, 4)
    _, served = carry_out(first, folder, store, world)
    exchange_weights(folder, folders[1])
    assert carry_out(first, folder, store, world)[0].hits == 0
    exchange_weights(folder, folders[0])
    lengths = [sum(len(response) for response in pair.responses) for pair in PAIRS]
    of_pair = torch.split(served, lengths)
    again = Run(0, Dtype.fp32, [7, 2, 5, 2], 12, 64)
    report, part = carry_out(again, folder, store, world)
    assert report.computed == 0
    assert torch.equal(part, torch.cat([of_pair[pair] for pair in again.pairs]))


def test_values_that_a_store_could_mix_up_are_further_apart_than_the_tolerance(folders: list[Path]) -> None:
    for dtype, pair in itertools.product(Dtype, range(len(PAIRS))):
        one, other = (np.concatenate(fresh(folder, dtype, pair)) for folder in folders)
        assert np.abs(one - other).mean() > 2 * TOLERANCE[dtype]
    for pair in range(len(PAIRS)):
        precise, coarse = (
            np.concatenate(fresh(folders[0], dtype, pair)) for dtype in (Dtype.fp32, Dtype.bf16)
        )
        assert np.abs(precise - coarse).mean() > 2 * TOLERANCE[Dtype.fp32]
    whole, changed_prompt = fresh(folders[0], Dtype.fp32, 0), fresh(folders[0], Dtype.fp32, 6)
    assert np.abs(whole[0] - changed_prompt[0]).mean() > 2 * TOLERANCE[Dtype.fp32]
