"""Checks of `pairs` before torch is imported."""

from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.generation.pairs.start import check_pairs


def check(*overrides: str) -> None:
    check_pairs(load_run_config(["model.path=base", "data.train=[prompts.jsonl]", *overrides]))


def test_a_missing_function_is_found_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/adapter_config.json").touch()
    Path("rule_of_startup.py").write_text(
        "def score(prompt, responses):\n    return [0.0 for _ in responses]\n"
    )
    with pytest.raises(ConfigError, match="no such function") as found:
        check("pairs.method=samples", "pairs.function=rule_of_startup:scores")
    assert "one of score" in str(found.value)


@pytest.mark.parametrize("models", ["[a]", "[a,a]", "[a,./a]"])
def test_delta_pairs_need_two_different_models(models: str) -> None:
    with pytest.raises(ConfigError, match="delta pairs need two models"):
        check("pairs.method=delta", f"pairs.models={models}")


SAMPLED = ("pairs.method=samples", "pairs.reward_model=r", "pairs.samples=2")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pairs.method=scores", "run.resume=must"], "run.resume has no effect"),
        (
            ["pairs.method=delta", "pairs.models=[a/b,c/d]", "model.revision=x"],
            "model.revision has no effect",
        ),
    ],
)
def test_an_option_without_effect_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["pairs.method=people"],
        ["pairs.method=scores", "pairs.select=best_random"],
        ["pairs.method=delta", "pairs.models=[a/b,c/d]"],
        ["pairs.method=delta", "model.path=a/b", "pairs.models=[a/b,c/d]", "model.revision=x"],
        [*SAMPLED, "pairs.models=[a/b,c/d]"],
    ],
)
def test_an_option_with_effect_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "q"}\n')
    check(*overrides)
