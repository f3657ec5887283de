"""Files that become part of an exported model are those that training started from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.schema import AdapterConfig, Dtype, FolderConfig, ModelConfig, ReferenceConfig, RunConfig
from dpo_dist.config.verb_options import ExportConfig
from dpo_dist.distributed import export as checkpoint_export
from dpo_dist.foundation.errors import CheckpointError, ConfigError
from dpo_dist.insight.console import Console
from dpo_dist.model.adapter_files import start_folder
from dpo_dist.model.save import write_tokenizer
from dpo_dist.reference.digest import digest_model
from dpo_dist.training.export import export_model
from tests.support.sft_adapter import write_sft_adapter
from tests.support.tiny_model import write_model
from tests.unit.distributed.test_checkpoint_export import checkpoint_of, weights_of


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that trained an adapter above another one, with its only checkpoint."""
    base = write_model(tmp_path / "base")
    adapter = AdapterConfig(r=2, path=str(write_sft_adapter(base, tmp_path / "sft")), on_top=True)
    config = RunConfig(
        model=ModelConfig(path=str(base), dtype=Dtype.fp32, adapter=adapter),
        reference=ReferenceConfig(store=str(tmp_path / "store")),
        run=FolderConfig(dir=str(tmp_path / "run")),
    )
    start = start_folder(config.model)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    weights = weights_of(replace(config, model=replace(config.model, adapter=AdapterConfig(r=2))))
    checkpoint = checkpoint_of(weights, tmp_path / "run" / "checkpoints" / "step-000001")
    state = {"world_size": 1, "model": digest_model(base, adapter=start).digest}
    (checkpoint / "state.json").write_text(json.dumps(state))
    return config


def export(config: RunConfig, output: Path, **options: Any) -> None:
    chosen = replace(config, export=ExportConfig(check=False, **options))
    checkpoint = Path(str(config.run.dir)) / "checkpoints" / "step-000001"
    export_model(chosen, checkpoint, output, Console(None))


def test_a_changed_base_is_refused_where_it_becomes_part_of_the_result(
    config: RunConfig, tmp_path: Path
) -> None:
    export(config, tmp_path / "whole", merge=True)
    write_model(tmp_path / "base", seed=1)
    for options in ({"merge": True}, {}):
        with pytest.raises(ConfigError, match="started from has changed") as found:
            export(config, tmp_path / "out", **options)
        assert "model.adapter.path" in found.value.where
        assert not (tmp_path / "out").exists()


def test_a_changed_adapter_below_the_trained_one_is_refused(config: RunConfig, tmp_path: Path) -> None:
    export(config, tmp_path / "whole")
    write_sft_adapter(tmp_path / "base", tmp_path / "sft", seed=4)
    with pytest.raises(ConfigError, match="started from has changed"):
        export(config, tmp_path / "out")


def test_a_checkpoint_that_its_run_removes_meanwhile_is_no_full_disk(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_remove(*given: Any) -> None:
        write_tokenizer(*given)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000001")

    monkeypatch.setattr(checkpoint_export, "write_tokenizer", write_and_remove)
    with pytest.raises(CheckpointError, match="the checkpoint has been removed") as found:
        export(config, tmp_path / "out")
    assert found.value.where.endswith("step-000001")
    assert not (tmp_path / "out").exists()
