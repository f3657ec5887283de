"""What `export` and `evaluate` are asked for; the models of an evaluation, and the weights they are from."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config, to_yaml
from dpo_dist.config.schema import ExportConfig, RunConfig
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.evaluation import models as loading
from dpo_dist.training.evaluation.models import load_evaluated
from dpo_dist.training.start.inputs import folder_of_own_tokenizer
from dpo_dist.training.start.named_models import EvaluatedModel, find_evaluation_models, find_export_paths
from dpo_dist.training.start.open_run import Run
from tests.support import tiny
from tests.support.alone import ALONE
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with checkpoints after steps 100 and 200, of which the first is the best."""
    run = load_run_config(["model.path=org/model", "data.train=[pairs.jsonl]", f"run.dir={tmp_path}"])
    for name in ("step-000100", "step-000200"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "best").write_text("step-000100\n")
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    return run


def named(config: RunConfig, checkpoint: str | None) -> RunConfig:
    return replace(config, export=ExportConfig(checkpoint=checkpoint))


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [(None, "step-000100"), ("latest", "step-000200"), ("best", "step-000100"), ("step-100", "step-000100")],
)
def test_a_checkpoint_by_name(checkpoint: str | None, found: str, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000200" / "state.json").unlink()  # its files are checked later
    source, output = find_export_paths(named(config, checkpoint))
    assert source == tmp_path / "checkpoints" / found
    assert output == tmp_path / "exported" / found
    merged = replace(config, export=ExportConfig(checkpoint=checkpoint, merge=True))
    assert find_export_paths(merged)[1] == tmp_path / "exported" / f"{found}-merged"


def test_by_default_the_checkpoint_of_the_model_is_exported(config: RunConfig, tmp_path: Path) -> None:
    assert find_export_paths(config)[0].name == "step-000100"
    (tmp_path / "checkpoints" / "best").unlink()  # no `trainer.keep_best`, or no finite value of it
    assert find_export_paths(config)[0].name == "step-000200"


def test_what_is_missing_is_named(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not have this checkpoint") as missing:
        find_export_paths(named(config, "step-000300"))
    assert missing.value.expected == "step-000200, step-000100"
    (tmp_path / "checkpoints" / "best").unlink()
    with pytest.raises(ConfigError, match="does not have this checkpoint"):
        find_export_paths(named(config, "best"))
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="does not have this checkpoint") as missing:
        find_export_paths(config)
    assert "has no checkpoint" in missing.value.expected


def configured(folder: Path, *overrides: str) -> RunConfig:
    paths = [
        f"run.dir={folder}/run",
        f"model.path={folder}/base",
        "data.train=[a.jsonl]",
        "data.eval=[b.jsonl]",
    ]
    return load_run_config([*paths, *overrides])


def test_checkpoints_are_found_by_their_files(tmp_path: Path) -> None:
    files = {"base": "config.json", "lora": "adapter_config.json", "step-000003": "state.json"}
    for name, file in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "base" / "model.safetensors").touch()
    (tmp_path / "lora" / "adapter_model.safetensors").touch()
    several = f"evaluation.model=[{','.join(f'{tmp_path}/{name}' for name in files)},org/name]"
    _, found = find_evaluation_models(configured(tmp_path, several))
    assert [one.is_checkpoint for one in found] == [False, False, True, False]
    with pytest.raises(ConfigError, match="this run directory has no model"):
        find_evaluation_models(configured(tmp_path))


@pytest.mark.parametrize(
    ("run", "quantization"),
    [
        (
            ("reference.mode=adapter", "model.adapter={r: 4}", "model.quantization=nf4", "parallelism=ddp"),
            "nf4",
        ),
        (("reference.mode=live", "reference.path=org/other", "reference.quantization=int8"), "int8"),
    ],
)
def test_an_evaluation_takes_the_same_reference_from_the_store(
    run: tuple[str, ...], quantization: str, tmp_path: Path
) -> None:
    config, _ = find_evaluation_models(configured(tmp_path, "evaluation.model=org/name", *run))
    assert (config.reference.mode, config.reference.quantization) == ("cached", quantization)
    without, _ = find_evaluation_models(configured(tmp_path, "evaluation.model=org/name", "loss=simpo"))
    assert without.reference.mode == "none"


def test_names_of_results_differ_by_model_pairs_reference_and_loss(tmp_path: Path) -> None:
    def name(place: str = "step-000003", *overrides: str, pairs: str = "1", label: str = "b") -> str:
        data: Any = SimpleNamespace(fingerprint=pairs, source_labels=[label])
        digest = configured(tmp_path, *overrides).identity.digest
        return EvaluatedModel(str(tmp_path / place), is_checkpoint=True).name(data, digest)

    for place in ("step-000003", "other/step-000003"):
        (tmp_path / place).mkdir(parents=True)
    names = [name(), name("other/step-000003"), name(pairs="2"), name(label="c")]
    distill = "loss=distill", "teacher.path=larger"
    changes = [
        ["loss.beta=0.2"],
        ["model.dtype=fp32"],
        ["reference.path=other"],
        distill,
        [*distill, "teacher.k=7"],
    ]
    names += [name("step-000003", *change) for change in changes]
    assert len(set(names)) == len(names) == 9
    assert all(each.startswith("step-000003-") for each in names)
    assert name() == names[0]


def test_only_the_base_of_a_quantized_run_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("base", "other"):
        write_model(tmp_path / place)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_model.safetensors").touch()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    qlora = ("model.adapter={r: 4}", "model.quantization=nf4", "reference.mode=adapter", "parallelism=ddp")
    config = configured(tmp_path, *qlora, f"reference.store={tmp_path}/store")
    inputs: Any = SimpleNamespace(
        policy_files=SimpleNamespace(folder=tmp_path / "base"), tokenizer=tiny.qwen(), processor=None
    )
    monkeypatch.setattr(
        loading,
        "load_for_scoring",
        lambda folder, model, *_, **__: (folder.resolve().name, model.quantization),
    )

    run = Run(config, ALONE, Console(None))

    def loaded(name: str) -> Any:
        return load_evaluated(run, EvaluatedModel(str(tmp_path / name), is_checkpoint=False), inputs)[0]

    assert loaded("base") == ("base", "nf4")
    assert loaded("link") == ("base", "nf4")
    assert loaded("lora") == ("base", "nf4")
    assert loaded("other") == ("other", None)


def test_another_model_in_a_runs_folder_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    config = configured(tmp_path)
    assert folder_of_own_tokenizer(config) is None, "the run has no model yet"
    write_model(tmp_path / "run/model")
    (tmp_path / "run/config.yaml").write_text(to_yaml(config))
    assert folder_of_own_tokenizer(configured(tmp_path, "loss.beta=0.2")) == tmp_path / "run/model"
    assert folder_of_own_tokenizer(configured(tmp_path, f"model.path={tmp_path}/other")) is None
