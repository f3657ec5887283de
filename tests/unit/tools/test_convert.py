"""Files of other trainers become files for `train`, with the reason for each key that is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_dist.compat.convert import __main__ as convert
from dpo_dist.compat.convert.translate import translate
from dpo_dist.compat.other_trainers import other_trainers
from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import ConfigError

FILES = Path(__file__).parents[2] / "assets" / "foreign"

# A file's keys; ours; a part of the comments.
TRANSLATED: list[tuple[str, dict[str, Any], str]] = [
    (
        "{learning_rate: 1.0e-6, num_train_epochs: 2}",
        {"optim.lr": 1e-6, "trainer.epochs": 2},
        "defaults here",
    ),
    (
        "{torch_dtype: float16, optim: paged_adamw_8bit}",
        {"model.dtype": "fp16"},
        "optim.kind=adamw_bf16 keeps",
    ),
    ("{per_device_train_batch_size: 2}", {}, "2 — set trainer.global_batch_pairs"),
    ("{packing: true, foo_bar: 3}", {}, "foo_bar: 3 — no counterpart is known"),
    ("{learning_rate: fast}", {}, "fast — optim.lr cannot be fast"),
    ("{hub_token: hf_abc, wandb_api_key: xyz}", {}, "hub_token: ***"),
    # Losses, and ways of training.
    ("{rl: ipo, beta: 0.2}", {"loss.kind": "ipo", "loss.beta": 0.2}, ""),
    ("{stage: dpo, pref_loss: simpo, simpo_gamma: 1}", {"loss.kind": "simpo", "loss.options.gamma": 1}, ""),
    (
        "{stage: rm, center_rewards_coefficient: 0.01}",
        {"loss.kind": "reward", "loss.options.centre": 0.01},
        "",
    ),
    ("{rlhf_type: gkd, teacher_model: t}", {"loss.kind": "distill", "teacher.path": "t"}, ""),
    ("{loss_type: [simpo]}", {"loss.kind": "simpo"}, ""),
    (
        "{loss_type: [sigmoid, bco], loss_weights: [0.8, 0.2]}",
        {"loss.terms": [{"kind": "sigmoid", "weight": 0.8}, {"kind": "bco_pair", "weight": 0.2}]},
        "",
    ),
    ("{loss_type: [sigmoid, nope]}", {}, "loss.terms cannot be"),
    # Keys inside of mappings.
    ("{peft_config: {r: 16, lora_alpha: 32}}", {"model.adapter.r": 16, "model.adapter.alpha": 32}, ""),
    ("{model_init_kwargs: {torch_dtype: bfloat16}}", {"model.dtype": "bf16"}, ""),
    ("{fsdp_config: {activation_checkpointing: true}}", {"model.gradient_checkpointing": "full"}, ""),
    ("{dataset_mixer: {org/name: 0.5}}", {}, "dataset_mixer.org/name: 0.5"),
    # Adapters.
    ("{finetuning_type: lora, lora_rank: 4}", {"model.adapter.r": 4}, ""),
    ("{use_peft: true}", {"model.adapter.r": 16}, "without a rank"),
    ("{finetuning_type: full, lora_rank: 4}", {}, "the file trains all weights"),
    (
        "{lora_target: all, lora_rank: 4}",
        {"model.adapter.target_modules": "all-linear", "model.adapter.r": 4},
        "",
    ),
    ("{quantization_bit: 4}", {"model.quantization": "nf4", "parallelism.kind": "ddp"}, ""),
    # Names of 2026.
    ("{ep_size: 8}", {"parallelism.experts": 8}, ""),
    ("{hsdp: true}", {"parallelism.kind": "zero3", "parallelism.shard_size": 8}, ""),
    # Data.
    (
        "{stage: dpo, dataset: 'a, b', dataset_dir: d, max_samples: 5}",
        {"data.train": [{"path": "d", "name": "a", "limit": 5}, {"path": "d", "name": "b", "limit": 5}]},
        "",
    ),
    (
        "{base_model: m, datasets: [{path: org/n, split: train, type: chat_template.default}]}",
        {"model.path": "m", "data.train": [{"path": "org/n", "split": "train"}]},
        "",
    ),
]


@pytest.mark.parametrize(("text", "values", "comment"), TRANSLATED)
def test_keys_of_other_trainers_become_ours(text: str, values: dict[str, Any], comment: str) -> None:
    translation = translate(yaml.safe_load(text))
    assert translation.values == values
    written = translation.as_file()
    assert comment in "".join(line for line in written.splitlines(keepends=True) if line.startswith("#"))
    assert "hf_abc" not in written


@pytest.mark.parametrize("text", ["{rl: grpo}", "{stage: pt}", "{loss_type: ppo}"])
def test_another_way_of_training_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a method that is not translated") as refused:
        translate(yaml.safe_load(text))
    assert refused.value.remedy


@pytest.mark.parametrize("file", sorted(FILES.iterdir()), ids=lambda file: str(file.stem))
def test_a_recipe_is_accepted_by_train(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours.yaml"
    assert convert.main([str(file), str(ours)]) == 0
    assert f"next: dpo-dist train {ours} --check" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists"):
        convert.main([str(file), str(ours)])
    words = ["data.train=[a.jsonl]", "data.eval_share=0.05", "parallelism=ddp"]
    config = load_run_config([str(ours), *words])
    theirs = yaml.safe_load(file.read_text())
    assert config.optim.lr == theirs["learning_rate"]
    left_out = [line for line in ours.read_text().splitlines() if line.startswith("#")]
    for name in ("micro_batch_size", "per_device_train_batch_size"):
        assert (name in theirs) == any(line.startswith(f"# {name}: ") for line in left_out)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.sh", "trl dpo --beta 0.1", "no file of keys"),
        ("ours.yaml", "loss: {beta: 0.1}", "a file of dpo-dist"),
        ("broken.yaml", "a: [", "cannot be read"),
    ],
)
def test_what_cannot_be_translated_is_one_error(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as refused:
        convert.main([str(tmp_path / name)])
    assert said in str(refused.value)


NAMES = [name for names in other_trainers()["keys"].values() for name in names.split()]
NAMES += [name for row in other_trainers()["advice"] for name in row["names"].split()]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.lists(st.text(max_size=3), max_size=2),
)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), VALUES, max_size=8))
def test_any_file_becomes_one_that_yaml_reads_or_one_error(keys: dict[str, Any]) -> None:
    try:
        written = translate(json.loads(json.dumps(keys, default=str))).as_file()
    except ConfigError:
        return
    assert isinstance(yaml.safe_load(written), dict)
