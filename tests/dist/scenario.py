"""Shared by tests on several ranks: model and data folders, and filling a store."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.config.data import DataConfig
from dpo_dist.config.schema import Dtype, ModelConfig, ReferenceConfig, RunConfig
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.data.store import EncodedSource
from dpo_dist.distributed.world import World
from dpo_dist.reference.digest import ModelFiles
from dpo_dist.reference.engine import load_reference
from dpo_dist.reference.fill import StoreFiller
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.scoring import Scorer
from dpo_dist.reference.store import LogpStore
from tests.support.packing import COSTS

PAIRS = 11
FINGERPRINT = ReferenceFingerprint("tiny", {"dtype": "fp32"})


@dataclass(frozen=True)
class Assets:
    """Model and data folders, picklable for ranks."""

    policy: Path
    untied_policy: Path
    reference: Path
    encoded: tuple[EncodedSource, ...]

    def dataset(self) -> PreferenceDataset:
        return open_dataset(self.encoded, DataConfig())

    def config(
        self, model: Path, reference: ReferenceConfig | None = None, dtype: Dtype = Dtype.fp32
    ) -> RunConfig:
        """Return the configuration of a run that trains `model`."""
        return RunConfig(model=ModelConfig(str(model), dtype=dtype), reference=reference or ReferenceConfig())


def files_of(folder: Path) -> ModelFiles:
    """Return a model folder as `load_reference` takes it, without digests."""
    return ModelFiles(folder, {}, {})


def fill(
    assets: Assets,
    store: Path,
    pairs: int,
    world: World,
    _folder: Path,
    before_scoring: Callable[[], None] = lambda: None,
    change: Callable[[Tensor], Tensor] = lambda logps: logps,
    entries_per_shard: int = 4,
) -> dict[str, Any]:
    """Fill `store` for the first `pairs`; return the report and the number of entries this rank scored."""
    scored = {"entries": 0, "dummies": 0}

    def load_scorer() -> Scorer:
        before_scoring()
        engine = load_reference(files_of(assets.reference), assets.config(assets.policy), world)

        def score(batch: PackedBatch) -> Tensor:
            scored["entries"] += len(batch.keys)
            scored["dummies"] += not len(batch.keys)
            return change(engine.token_logps(batch))

        return score

    empty = LogpStore(store, [FINGERPRINT], [])
    filler = StoreFiller(empty, load_scorer, world, 128, COSTS, entries_per_shard)
    report = filler.fill(assets.dataset(), np.arange(pairs, dtype=np.int64), lambda _done, _total: None)
    complete = filler.open_filled().contains(assets.dataset().keys[: 2 * pairs]).all()
    return {"hits": report.hits, "computed": report.computed, "complete": bool(complete), **scored}
