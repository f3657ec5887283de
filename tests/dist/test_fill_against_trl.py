"""Stored log-probs equal those that TRL computes for its own training."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.data.build import prepare_dataset
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.reference.store import LogpStore
from tests.dist.scenario import FINGERPRINT, Assets, fill
from tests.support import tiny
from tests.support.invented import write_pairs
from tests.support.ranks import run_ranks
from tests.support.tiny_model import write_model

PAIRS = 9


def trl_sums(pairs: Path, model: Path, output: Path) -> np.ndarray:
    """Return TRL's precomputed reference log-probs, float32 [pairs, 2]: chosen and rejected."""
    rows = []
    for record in read_records(SourceConfig(str(pairs))):
        assert isinstance(record, PreferenceRecord)
        assert isinstance(record.prompt, tuple)
        turns = [{"role": message.role, "content": message.content} for message in record.prompt]
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in record.responses)
        rows.append({"prompt": turns, "chosen": chosen, "rejected": rejected})
    config = DPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        max_length=None,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=4,
        report_to=[],
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = DPOTrainer(
        str(model), args=config, train_dataset=Dataset.from_list(rows), processing_class=tiny.llama3()
    )
    columns = [trainer.train_dataset[f"ref_{which}_logps"] for which in ("chosen", "rejected")]
    return np.stack(columns, axis=1)


def test_stored_log_probs_equal_those_of_trl(assets: Assets, tmp_path: Path) -> None:
    """With a chat template for which both produce the same ids."""
    model = write_model(tmp_path / "model", tiny.llama3(), seed=4)
    pairs = write_pairs(tmp_path / "pairs.jsonl", PAIRS, seed=5)
    config = DataConfig(cache=str(tmp_path / "encoded"))
    encoded = prepare_dataset([SourceConfig(str(pairs))], config, tiny.llama3(), "llama3")
    ours = replace(assets, reference=model, encoded=encoded)
    run_ranks(partial(fill, ours, tmp_path / "store", PAIRS), 2, tmp_path / "ranks")

    entries = LogpStore.open(tmp_path / "store", FINGERPRINT).read(ours.dataset().keys)
    sums = np.array([entry.sum() for entry in entries]).reshape(PAIRS, 2)
    np.testing.assert_allclose(sums, trl_sums(pairs, model, tmp_path / "trl"), atol=1e-4, rtol=0)
