"""Law L3 as a whole: whatever happened to a store before, a run reads its own reference's log-probs.

Each example is a sequence of runs on one store. Between runs the weights in the model's folder are replaced
and shards are damaged; runs differ in precision, pairs, order, tokens, lengths, budget and shard size.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch, Sequences, pack
from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig
from dpo_dist.distributed.world import World
from dpo_dist.model.load import load_packed
from dpo_dist.model.numerics import numerics_of
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.reference.fill import FillReport, StoreFiller
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from tests.support.packing import COSTS, dataset_of, random_pairs
from tests.support.precision import COMPUTED
from tests.support.tiny_model import write_model

CPU = torch.device("cpu")
WEIGHTS = 2
# Mean over a response's tokens, in nats; in 16 bits a value depends on the shape of its batch.
TOLERANCE = {Dtype.fp32: 1e-5, Dtype.fp16: 0.01, Dtype.bf16: 0.05}
PAIRS = random_pairs([(5, 7, 2), (1, 4, 9), (8, 3, 3), (3, 12, 6), (2, 1, 1), (6, 5, 8)], seed=1)
# Similar pairs: one token changed, a response shortened, another split of prompt and response.
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
    """Return the model's log-probs of each response of a pair, scored alone."""
    sequences = PAIRS[pair]
    alone = [Sequences(sequences.prompt_ids, (response,)) for response in sequences.responses]
    model = load(folder, dtype)
    return [model(pack([one], np.zeros((1, 2), dtype=np.uint64))).float().numpy() for one in alone]


@dataclass(frozen=True)
class Run:
    """One run: the weights in its model's folder, its pairs, and how it scores them."""

    weights: int
    dtype: Dtype
    pairs: list[int]
    micro_batch_tokens: int
    entries_per_shard: int


@dataclass(frozen=True)
class Damage:
    """A byte of one shard flipped."""

    shard: int
    position: float

    def apply(self, store: Path) -> None:
        if shards := sorted(store.glob("*/*.safetensors")):
            shard = shards[self.shard % len(shards)]
            content = bytearray(shard.read_bytes())
            content[int(self.position * len(content))] ^= 0x41
            shard.write_bytes(content)


runs = st.builds(
    Run,
    weights=st.integers(0, WEIGHTS - 1),
    dtype=st.sampled_from(COMPUTED),
    pairs=st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, max_size=8),
    micro_batch_tokens=st.integers(8, 80),
    entries_per_shard=st.integers(1, 8),
)
damages = st.builds(Damage, st.integers(0, 99), st.floats(0, 1, exclude_max=True))


@torch.no_grad()
def carry_out(run: Run, model_folder: Path, store: Path, world: World) -> tuple[FillReport, Tensor]:
    """Fill the store for a run; return the report and the log-probs attached to a batch of all its pairs."""
    setting = ModelConfig(str(model_folder), dtype=run.dtype)
    digest = digest_model(model_folder, store).digest
    fingerprint = ReferenceFingerprint(digest, numerics_of(setting, AttentionBackend.sdpa, CPU))
    model = load_packed(model_folder, setting, 64, CPU)

    def score(batch: PackedBatch) -> Tensor:
        return model(batch).float()

    dataset = dataset_of([PAIRS[pair] for pair in run.pairs])
    empty = LogpStore(store, [fingerprint], [])
    filler = StoreFiller(empty, lambda: score, world, run.micro_batch_tokens, COSTS, run.entries_per_shard)
    report = filler.fill(dataset, np.arange(len(dataset)), lambda _done, _total: None)
    provider = ReferenceProvider(store=filler.open_filled())
    batch = provider.attach(pack([PAIRS[pair] for pair in run.pairs], dataset.keys))
    return report, provider.token_logps(batch)


def replace_weights(model_folder: Path, source: Path) -> None:
    shutil.copy(source / "model.safetensors", model_folder / "model.safetensors")


@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # shrinking a failure takes minutes
@given(steps=st.lists(st.one_of(runs, runs, damages), min_size=2, max_size=6))
def test_a_run_reads_its_own_references_log_probs(
    steps: list[Run | Damage], folders: list[Path], world: World
) -> None:
    with TemporaryDirectory() as name:
        model_folder, store = shutil.copytree(folders[0], Path(name, "model")), Path(name, "store")
        for step in steps:
            if isinstance(step, Damage):
                step.apply(store)
                continue
            replace_weights(model_folder, folders[step.weights])
            report, logps = carry_out(step, model_folder, store, world)
            wanted = [each for pair in step.pairs for each in fresh(folders[step.weights], step.dtype, pair)]
            found = torch.split(logps, [len(each) for each in wanted])
            for response, want in zip(found, wanted, strict=True):
                assert np.abs(response.numpy() - want).mean() <= TOLERANCE[step.dtype]
            assert report.hits + report.computed == len(
                np.unique(dataset_of([PAIRS[pair] for pair in step.pairs]).keys, axis=0)
            )
