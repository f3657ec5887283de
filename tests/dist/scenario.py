"""What the ranks of several tests do: the folders they work on, and filling a store."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dpo_dist.config.schema import DataConfig, Dtype, ModelConfig, ReferenceConfig, RunConfig
from dpo_dist.data.dataset import PreferenceDataset, open_dataset
from dpo_dist.data.encoded_source import EncodedSource
from dpo_dist.data.packing import PackedBatch
from dpo_dist.distributed.world import World
from dpo_dist.reference.engine import load_reference
from dpo_dist.reference.fill import fill_store, open_filled
from dpo_dist.reference.fingerprint import ReferenceFingerprint
from dpo_dist.reference.scoring import Scorer
from dpo_dist.reference.store import LogpStore
from tests.support.packing import COSTS

PAIRS = 11
SPACE = ReferenceFingerprint("tiny", {"dtype": "fp32"})


@dataclass(frozen=True)
class Assets:
    """Folders that ranks can be told of."""

    policy: Path
    untied_policy: Path
    reference: Path
    encoded: tuple[EncodedSource, ...]

    def dataset(self) -> PreferenceDataset:
        return open_dataset(self.encoded, DataConfig())

    def config(
        self, model: Path, reference: ReferenceConfig | None = None, dtype: Dtype = Dtype.fp32
    ) -> RunConfig:
        """Of a run that trains `model`."""
        return RunConfig(model=ModelConfig(str(model), dtype=dtype), reference=reference or ReferenceConfig())


def fill(
    assets: Assets,
    store: Path,
    pairs: int,
    world: World,
    _folder: Path,
    before_scoring: Callable[[], None] = lambda: None,
    change: Callable[[Tensor], Tensor] = lambda logps: logps,
    rows_per_shard: int = 4,
) -> dict[str, Any]:
    """Fill `store` for the first `pairs`, a few a shard; what was reported, and what this rank scored."""
    scored = {"rows": 0, "dummies": 0}

    def scorer() -> Scorer:
        before_scoring()
        engine = load_reference(assets.reference, assets.config(assets.policy), world)

        def score(batch: PackedBatch) -> Tensor:
            scored["rows"] += len(batch.keys)
            scored["dummies"] += not len(batch.keys)
            return change(engine.token_logps(batch))

        return score

    open_store = partial(LogpStore.open, store, SPACE)
    report = fill_store(
        open_store,
        assets.dataset(),
        np.arange(pairs, dtype=np.int64),
        scorer,
        world,
        micro_batch_tokens=128,
        costs=COSTS,
        rows_per_shard=rows_per_shard,
        progress=lambda _done, _total: None,
    )
    complete = open_filled(open_store, report.shards, world).contains(assets.dataset().keys[: 2 * pairs]).all()
    return {"hits": report.hits, "computed": report.computed, "complete": bool(complete), **scored}
