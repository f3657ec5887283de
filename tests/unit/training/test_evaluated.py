"""The models of an evaluation: their kinds, their names, and the weights of which precision is used."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.config.load import to_yaml
from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.insight.console import Console
from dpo_dist.training import evaluate as loading
from dpo_dist.training.evaluate import check_origin, load_evaluated
from dpo_dist.training.start import Run
from dpo_dist.training.targets import Evaluated, Kind
from tests.support import tiny
from tests.support.alone import ALONE
from tests.support.tiny_model import write_model
from tests.unit.training.test_targets import configured


def test_only_the_base_of_a_quantized_run_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("base", "other"):
        write_model(tmp_path / place)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    qlora = ("model.adapter={r: 4}", "model.quantization=nf4", "reference.mode=adapter", "parallelism=ddp")
    config = configured(tmp_path, *qlora)
    inputs: Any = SimpleNamespace(
        policy_files=SimpleNamespace(folder=tmp_path / "base"), tokenizer=tiny.qwen()
    )
    monkeypatch.setattr(
        loading, "load_scored", lambda folder, model, *_: (folder.resolve().name, model.quantization)
    )

    run = Run(config, ALONE, Console(None))

    def loaded(name: str, kind: Kind) -> Any:
        return load_evaluated(run, Evaluated(str(tmp_path / name), kind), inputs)[0]

    assert loaded("base", Kind.model) == ("base", "nf4")
    assert loaded("link", Kind.model) == ("base", "nf4")
    assert loaded("lora", Kind.adapter) == ("base", "nf4")
    assert loaded("other", Kind.model) == ("other", None)


@pytest.mark.parametrize(("base", "adapter", "fault"), [("n", "", "model"), ("m", "{r: 4}", "adapter")])
def test_a_checkpoint_of_another_run_is_refused_before_it_is_loaded(
    tmp_path: Path, base: str, adapter: str, fault: str
) -> None:
    """The log-probs of the reference, computed in between, would take hours."""
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"model": "m", "world_size": 1}')
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(configured(tmp_path)))
    config = configured(tmp_path, *([f"model.adapter={adapter}"] if adapter else []))
    inputs: Any = SimpleNamespace(policy_files=SimpleNamespace(digest=base))
    with pytest.raises(CheckpointError, match=f"of a run with another {fault}"):
        check_origin(Evaluated(str(folder), Kind.checkpoint), config, inputs)
    inputs.policy_files.digest = "m"
    check_origin(Evaluated(str(folder), Kind.checkpoint), configured(tmp_path), inputs)
