"""The model card: valid for the hub, complete, without paths of this machine, inert."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from dpo_dist.config.identity import settings
from dpo_dist.config.load import load_run_config
from dpo_dist.tools.report.card import model_card

COUNTS = {"read": 1200, "kept": 1190, "pairs": 1190, "dropped": {"too_long": 4, "empty_response": 6}}
VERSIONS = {"dpo-dist": "0.1.0", "torch": "2.13.0"}
OF_ALL = {
    "eval_pairs": 40,
    "eval_rewards/accuracies": 0.75,
    "eval_rewards/margins": 1.25,
    "eval_loss": 0.5,
    "eval_loss/terms/sft": 2.5,
    "intervals": {"eval_rewards/accuracies": [0.7, 0.8]},
}


def summary(train: list[str], evaluated: list[str], **verdict: Any) -> dict[str, Any]:
    data = {
        name: {"sources": [{"label": label, **COUNTS} for label in labels]}
        for name, labels in (("train", train), ("eval", evaluated))
        if labels
    }
    judged = {"sentence": "learnt: accuracy 0.75", "findings": []} | verdict
    return {"pairs_seen": 2380, "steps": 38, "data": data, "verdict": judged}


def card(
    overrides: list[str], content: dict[str, Any], evaluation: dict[str, Any] | None = None
) -> ModelCard:
    config = load_run_config(overrides)
    text = model_card(config, {**content, "settings": settings(config)}, evaluation or {}, VERSIONS)
    found = ModelCard(text)
    assert ModelCardData(**found.data.to_dict()).to_dict() == found.data.to_dict()
    return found


def test_a_card_of_hub_names_has_everything_that_the_hub_reads() -> None:
    overrides = ["model.path=org/base-7B", "loss.beta=0.3", "optim.lr=2e-6"]
    overrides += ["data.train=[org/pairs, a.jsonl]", "data.eval=[{path: org/pairs, split: t, label: held}]"]
    found = card(overrides, summary(["pairs", "local"], ["held"]), {"all": OF_ALL, "held": OF_ALL})
    data = found.data
    assert (data.base_model, data["base_model_relation"]) == ("org/base-7B", "finetune")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.datasets, data.license) == (["org/pairs"], None)
    assert "dpo" in data.tags
    for part in (
        *("[org/base-7B](https://huggingface.co/org/base-7B)", "2,380 pairs in 38 steps", "arXiv"),
        *("| `held` | 40 | 0.500 | 0.750 [0.700, 0.800] | 1.250 | 2.500 |", "4 too\\_long", "1,190"),
        *("| `loss.beta` | `0.3` |", "| `optim.lr` | `2e-06` |", "| `torch` | `2.13.0` |"),
        *("AutoModelForCausalLM.from_pretrained", "learnt: accuracy 0.75", "states no licence"),
    ):
        assert part in found.text, part
    others = summary(["pairs", "local"], ["held"]) | {"reference": {"reads_other_prompts": True}}
    assert (
        "reference, which reads other prompts."
        in card(overrides, others, {"all": OF_ALL, "held": OF_ALL}).text
    )
    assert "reads other prompts" not in found.text
    adapter = ["model.adapter={r: 8}", "reference.mode=adapter"]
    once = card(["model.path=org/base", "data.train=[org/pairs]", *adapter], summary(["pairs"], []))
    assert (once.data.library_name, once.data["base_model_relation"]) == ("peft", "adapter")
    for part in (
        "1,190 pairs (2,380 with repetitions) in 38 steps",
        "AutoPeftModelForCausalLM",
        "`org/base`",
        "`{r: 8, alpha: 32.0}`",
    ):
        assert part in once.text, part
    assert "Evaluation" not in once.text


@pytest.mark.parametrize("adapter", [[], ["model.adapter={r: 8}"]])
def test_the_card_of_a_reward_model_says_how_to_read_a_score(adapter: list[str]) -> None:
    overrides = ["model.path=org/base", "data.train=[org/pairs]", "loss=reward", *adapter]
    found = card(overrides, summary(["pairs"], []) | {"global_batch_pairs": 2}, {"all": OF_ALL})
    assert "| `trainer.global_batch_pairs` | `2` |" in found.text
    assert (found.data.pipeline_tag, found.data.tags[1]) == ("text-classification", "reward-model")
    loader = "AutoPeftModelForSequenceClassification" if adapter else "AutoModelForSequenceClassification"
    for part in (loader, "num_labels=1", "A reward is the score of a response", "Bradley-Terry"):
        assert part in found.text, part
    kind = "a LoRA adapter of" if adapter else "a fine-tuned"
    assert f"A reward model: {kind} [org/base]" in found.text
    assert "generates no text; its loss has no beta and no reference model" in found.text
    for part in (
        "log-ratio",
        "loss.beta",
        "reference.",
        "sampl",
        "dpo-dist chat",
        "CausalLM",
        "generation_config",
    ):
        assert part not in found.text, part


def test_local_folders_are_named_without_their_place(tmp_path: Path) -> None:
    home = tmp_path / "home" / "alice"
    for name in ("my-base", "sft", "start"):
        (home / name).mkdir(parents=True)
    (home / "chat.jinja").write_text("x")
    overrides = [f"model.path={home}/my-base", f"data.train=[{home}/a.jsonl]", f"data.eval=[{home}/b.jsonl]"]
    overrides += [f"data.chat_template={home}/chat.jinja", f"run.dir={home}/run"]
    found = card(
        [*overrides, f"reference.path={home}/sft"], summary(["a"], ["b"]), {"all": OF_ALL, "b": OF_ALL}
    )
    adapter = [f"model.adapter={{path: {home}/start}}", "reference.mode=adapter"]
    other = card([*overrides, *adapter], summary(["a"], ["b"]))
    for each in (found, other):
        assert "alice" not in each.content
        assert str(tmp_path) not in each.content
        assert each.data.base_model is None, "no model of the hub"
    assert [name for name in ("`my-base`", "`sft`", "`chat.jinja`") if name not in found.text] == []
    assert "LoRA adapter of `my-base`, which started from the adapter `start`" in other.text
    assert other.text.count("start") >= 3, "among the settings, too"


@pytest.mark.parametrize("name", ["a: [b", "x\n---\nlicense: mit", "`|<img src=x>|``", "yes"])
def test_names_and_texts_are_inert(name: str, tmp_path: Path) -> None:
    base = tmp_path / name
    base.mkdir()
    overrides = ["data.train=[a.jsonl]", "data.eval=[b.jsonl]"]
    config = load_run_config(["model.path=placeholder", *overrides])
    object.__setattr__(config.model, "path", str(base))
    content = summary(
        ["a"], ["b"], sentence=f"<script> {name}", findings=[{"rule": "x", "text": f"[a](b) {name}"}]
    )
    evaluation = {"all": OF_ALL, "b": OF_ALL}
    text = model_card(config, {**content, "settings": settings(config)}, evaluation, VERSIONS)
    found = ModelCard(text)
    assert found.data.license is None
    assert found.data.library_name == "transformers"
    assert "<script>" not in text.replace("\\<script>", "")
    assert "\n## How to load it\n" in found.text
    assert found.text.count("\n---\n") == 0
