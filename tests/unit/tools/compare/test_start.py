"""Models, data and judge of a comparison are checked before processes join."""

from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.compare.start import check_comparison, compared_models
from tests.support.records import TEXT, jsonl

TWO = "compare.models=[{0}/base,{0}/run]"


def folder(path: Path, *files: str) -> Path:
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    weights = ("config.json", "model.safetensors")
    folder(tmp_path / "base", *weights)
    run = folder(tmp_path / "run", "config.yaml", *(f"model/{name}" for name in weights))
    folder(run / "checkpoints" / "step-000100", "state.json")
    folder(tmp_path / "lora" / "model", "adapter_config.json", "adapter_model.safetensors")
    folder(
        tmp_path / "open",
        "config.yaml",
        *(f"checkpoints/step-{n}/state.json" for n in ("000002", "1000000", "999999")),
    )
    return tmp_path


def config(tmp_path: Path, models: str, *overrides: str) -> RunConfig:
    data = f"data.eval=[{jsonl(tmp_path, TEXT)}]"
    return load_run_config(["model.path=x", "data.train=[x.jsonl]", models, data, *overrides])


def test_models_are_found_by_path_or_hub_name(models: Path) -> None:
    def found(*written: str) -> list[tuple[str, str]]:
        return [(model.name, model.location) for model in compared_models([*written])]

    assert found(f"{models}/base", f"beta={models}/run") == [
        ("base", f"{models}/base"),
        ("beta", f"{models}/run/model"),
    ]
    checkpoint = f"{models}/run/checkpoints/step-000100"
    assert found(f"same={models}/run/model", checkpoint) == [
        ("same", f"{models}/run/model"),
        ("run/step-000100", checkpoint),
    ]
    assert found(f"lora 2={models}/lora/model", "org/small") == [
        ("lora 2", f"{models}/lora/model"),
        ("small", "org/small"),
    ]
    assert compared_models([f"{models}/base", f"beta={models}/run"])[1].path == f"{models}/run"
    with pytest.raises(ConfigError, match=r"this run directory has no model(?s:.*)step-1000000"):
        compared_models([f"{models}/base", f"{models}/open"])
    # On the command line names need no quotes.
    line = f"compare.models=[a={models}/base, b c={models}/lora/model]"
    assert [model.name for model in check_comparison(config(models, line))] == ["a", "b c"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["a"], "a comparison has two models"),
        (["a", "b", "c"], "a comparison has two models"),
        (["org/a", "other/a"], "both models have the same name"),
    ],
)
def test_a_comparison_has_two_models_of_different_names(entries: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compared_models(entries)


def test_keys_that_contradict_each_other(models: Path) -> None:
    two = TWO.format(models)
    check_comparison(config(models, two, "pairs.function=json:dumps"))
    for override, message in (
        ("pairs.endpoint.criterion=short", "has no effect with this pairs.endpoint.url"),
        ("pairs.function=json:nothing", "nothing"),
        ("model.revision=main", "no effect on a comparison without model.path"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_comparison(config(models, two, override))


def test_a_comparison_has_at_most_one_judge(models: Path) -> None:
    two = config(models, TWO.format(models), "pairs.reward_model=a", "pairs.function=a:b")
    with pytest.raises(ConfigError, match="a comparison has one judge"):
        check_comparison(two)
