"""The demo's assets are complete and reproducible, and their pairs follow the rule of the quickstart."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.foundation.errors import ConfigError
from examples.demo.grammar import follows_rule
from examples.demo.make import make_demo
from examples.demo.report import read_prompts, report, reward_accuracy, sample_answers


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "made"
    assert make_demo(folder, seed=0)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(demo: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (demo / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_whole_assets_are_kept_and_damaged_ones_are_made_again(demo):
    whole = contents(demo)
    assert not make_demo(demo, seed=0)
    (demo / "pairs_eval.jsonl").write_text("", encoding="utf-8")
    assert make_demo(demo, seed=0)
    assert contents(demo) == whole


def test_a_folder_of_the_user_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        make_demo(tmp_path, seed=0)
    assert (tmp_path / "thesis.tex").exists()


def test_chosen_answers_alone_and_three_warm_up_answers_of_ten_follow_the_rule(demo):
    for record in [*records(demo, "pairs_train"), *records(demo, "pairs_eval")]:
        assert follows_rule(record["prompt"], record["chosen"][0]["content"])
        assert not follows_rule(record["prompt"], record["rejected"][0]["content"])
    rows = records(demo, "warmup_train")
    share = sum(follows_rule(row["prompt"], row["chosen"][0]["content"]) for row in rows) / len(rows)
    assert share == pytest.approx(0.3, abs=0.02)


def test_held_out_prompts_are_not_trained_on(demo):
    def prompts(name: str) -> set[str]:
        return {row["prompt"][0]["content"] for row in records(demo, name)}

    assert not prompts("pairs_eval") & (prompts("pairs_train") | prompts("warmup_train"))


def test_base_loads_and_its_template_ends_turns_with_eos(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    model = AutoModelForCausalLM.from_pretrained(demo / "base")
    row = records(demo, "pairs_eval")[0]
    opened = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    closed = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert closed == opened + row["chosen"][0]["content"] + tokenizer.eos_token + "\n"
    ids = tokenizer(closed, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == closed
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model(ids).logits.shape[-1] == len(tokenizer)


def test_report_has_shares_and_last_accuracy_or_says_what_to_do_without_a_model(demo, tmp_path):
    rows = records(demo, "pairs_eval")[:4]
    good = [row["chosen"][0]["content"] for row in rows]
    bad = [row["rejected"][0]["content"] for row in rows]
    history = tmp_path / "dpo_metrics" / "log_history.json"
    history.parent.mkdir()
    history.write_text('[{"eval_rewards/accuracies": 0.5}, {"loss": 1.0}, {"eval_rewards/accuracies": 0.75}]')
    text = report([row["prompt"] for row in rows], [*bad[:3], good[3]], good, reward_accuracy(tmp_path))
    assert "25 % -> 100 %" in text
    assert "accuracy: 75 %" in text
    with pytest.raises(ConfigError, match="quickstart"):
        sample_answers(tmp_path / "none", read_prompts(demo / "pairs_eval.jsonl"))
