"""What prefix trees save of a source's tokens."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo_dist.batching.prefixes import input_rows
from dpo_dist.config.losses import LossConfig
from dpo_dist.config.schema import ModelConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.training.start.prepared_data import prepare_data, saved_by_tree
from tests.support.doctor_data import agent_records, clean_pairs, write
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow


def test_a_tree_saves_what_a_node_for_each_token_would_save_at_most(tmp_path: Path) -> None:
    """Less is shared only where it is too short to pay."""
    files = [
        write(tmp_path / "agent.jsonl", agent_records(128, kinds=4)),
        write(tmp_path / "clean.jsonl", clean_pairs(70)),
    ]
    data = DataConfig(train=list(map(SourceConfig, files)), cache=str(tmp_path / "encoded"))
    model = ModelConfig(path=str(write_model(tmp_path / "model")))
    prepared = prepare_data(data, model, LossConfig(), lambda *_: contextlib.nullcontext(lambda *_: None))
    [agent], [clean] = prepared.datasets

    def least(indices: Sequence[int]) -> int:
        rows = [row.tobytes() for index in indices for row in input_rows(agent.example(index))]
        return len({row[:stop] for row in rows for stop in range(4, len(row) + 1, 4)})

    examples = list(map(agent.example, range(128)))
    plain = sum(len(each.prompt_ids) + sum(map(len, each.responses)) - 2 for each in examples)
    assert saved_by_tree(clean, 64) < 0.01
    assert saved_by_tree(agent, 64) == pytest.approx(1 - 2 * least(range(64)) / plain, abs=0.05)
    assert 0.5 < saved_by_tree(agent, 64) < saved_by_tree(agent, 128) < 1
