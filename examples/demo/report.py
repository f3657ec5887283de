"""Print answers to held-out prompts before and after the demo's training, and how many follow the rule.

python -m examples.demo.report --before MODEL --after MODEL --pairs FILE [--run RUN_DIR]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dpo_dist.foundation.errors import ConfigError, DpoDistError
from dpo_dist.foundation.text import percent
from examples.demo.grammar import follows_rule

PROMPTS = 200
SHOWN = 5
MAX_NEW_TOKENS = 32

Messages = list[dict[str, str]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="model folder before DPO")
    parser.add_argument("--after", type=Path, required=True, help="model folder after DPO")
    parser.add_argument("--pairs", type=Path, required=True, help="held-out pairs (.jsonl)")
    parser.add_argument(
        "--run", type=Path, help="run directory of the DPO training, to print its reward accuracy"
    )
    arguments = parser.parse_args()
    disable_progress_bar()
    try:
        prompts = read_prompts(arguments.pairs)
        before, after = (sample_answers(folder, prompts) for folder in (arguments.before, arguments.after))
        accuracy = None if arguments.run is None else reward_accuracy(arguments.run)
    except DpoDistError as error:
        print(error.block(), file=sys.stderr)
        return error.exit_code
    print(report(prompts, before, after, accuracy))
    return 0


def read_prompts(pairs: Path) -> list[Messages]:
    """Return the conversations of the first `PROMPTS` pairs.

    Raises:
        ConfigError: the file does not exist.
    """
    _require(pairs, "run `python -m examples.demo.make` first")
    with pairs.open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line, _ in zip(lines, range(PROMPTS), strict=False)]


def sample_answers(folder: Path, prompts: list[Messages], seed: int = 0) -> list[str]:
    """Return one answer per prompt, sampled at temperature 1 from the model in `folder`.

    Raises:
        ConfigError: the model does not exist.
    """
    _require(folder / "config.json", "train it first: scripts/quickstart.sh does everything in order")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    encoded = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(device)
    torch.manual_seed(seed)
    generated = model.generate(
        **encoded,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[str] = tokenizer.batch_decode(
        generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return answers


def reward_accuracy(run: Path) -> float:
    """Return a run's last `eval_rewards/accuracies`.

    Raises:
        ConfigError: the run has no evaluation.
    """
    history = run / "dpo_metrics" / "log_history.json"
    _require(history, "give the run directory of a DPO training")
    key = "eval_rewards/accuracies"
    values = [row[key] for row in json.loads(history.read_text(encoding="utf-8")) if key in row]
    if not values:
        raise ConfigError("the run has no evaluation", where=str(history), remedy="train with data.eval set")
    return float(values[-1])


def report(prompts: list[Messages], before: list[str], after: list[str], accuracy: float | None) -> str:
    """Return a text with some answers before and after, and the shares of answers that follow the rule."""
    lines = ['The rule: a good answer begins with "Dear " and the name of the asker.', ""]
    for prompt, *answers in list(zip(prompts, before, after, strict=True))[:SHOWN]:
        lines.append(f"  prompt   {prompt[-1]['content']}")
        for label, answer in zip(("before", "after"), answers, strict=True):
            mark = "+" if follows_rule(prompt, answer) else "-"
            lines.append(f"  {label:<6} {mark} {answer}")
        lines.append("")
    shares = [
        sum(follows_rule(*one) for one in zip(prompts, answers, strict=True)) / len(prompts)
        for answers in (before, after)
    ]
    lines.append(
        f"Answers that follow the rule ({len(prompts)} held-out prompts): "
        f"{percent(shares[0])} -> {percent(shares[1])}"
    )
    if accuracy is not None:
        lines.append(f"Held-out reward accuracy: {percent(accuracy)}")
    return "\n".join(lines)


def _require(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise ConfigError("the file does not exist", where=str(path), remedy=remedy)


if __name__ == "__main__":
    sys.exit(main())
