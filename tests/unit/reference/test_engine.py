"""The settings with which a model is scored, and the log-probs that a store gives a batch."""

from pathlib import Path

import numpy as np
import pytest

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.pack import pack
from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Quantization
from dpo_dist.data.example import Example
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.reference.engine import ReferenceProvider, scoring_config
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint


def test_the_reference_has_its_quantization_and_nothing_of_training() -> None:
    words = ["model.path=m", "data.train=[a.jsonl]", "model.adapter={r: 2}"]
    scored = scoring_config(load_run_config(words).model, Quantization.nf4)
    assert scored.quantization is Quantization.nf4
    assert scored.adapter is None
    assert scored.gradient_checkpointing == "none"


@pytest.mark.parametrize("lengths", [(2, 3), (3, 1)])
def test_stored_entries_of_other_lengths_are_an_error(lengths: tuple[int, int], tmp_path: Path) -> None:
    """Also lengths that cancel, which would shift log-probs from one response to the other."""
    tokens = (
        np.arange(1, 3, dtype=np.int32),
        np.arange(3, 6, dtype=np.int32),
        np.arange(6, 8, dtype=np.int32),
    )
    examples = [Example(tokens[0], tokens[1:])]
    keys = response_keys(examples)
    fingerprint = ReferenceFingerprint("a", {})
    LogpStore.open(tmp_path, fingerprint).write(keys, [np.full(n, -1.0, np.float32) for n in lengths])
    provider = ReferenceProvider(store=LogpStore.open(tmp_path, fingerprint))
    with pytest.raises(ReferenceModelError, match="no answer of this model") as raised:
        provider.add_stored_logps(pack(examples, keys))
    assert "store gc" in raised.value.remedy
