"""A real chat model: its log-probs and gradients, the noise of bf16, and the run that README.md shows."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist import api
from dpo_dist.data.encode import EncodedExample
from examples.demo.grammar import follows_rule
from examples.demo.make import make_records
from tests.real.smollm2 import model_folder
from tests.support.launch import ROOT, environment, history, run_verb, summary
from tests.support.packing import plain_logps
from tests.support.padded import gradients_of, padded_logps, rows_of
from tests.support.shared_data import shared_data_dir
from tests.support.warm import run_warm_apart

MAX_LENGTH = 192
PAIRS = 8


@pytest.fixture(scope="module")
def model() -> Path:
    folder = model_folder()
    if folder is None:
        pytest.skip("the packages with SmolLM2 do not install")
    return folder


@pytest.fixture(scope="module")
def pairs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EncodedExample]:
    """Short pairs of HH-RLHF; without the shared data, of the demo."""
    shared, file = shared_data_dir(), tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    if shared is None:
        lines = list(map(json.dumps, make_records(0)["pairs_eval"]))
    else:
        lines = (shared / "hh_rlhf_sample.jsonl").read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:40]), encoding="utf-8")
    limits = api.DataConfig(max_length=MAX_LENGTH, truncation="drop")
    kept, _ = api.read_pairs(str(file), api.load_tokenizer(str(model)), limits)
    return kept[:PAIRS]


@pytest.fixture(scope="module")
def plain(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact(plain: torch.nn.Module, pairs: list[EncodedExample]) -> list[Tensor]:
    """Log-probs of the tokens of each response by transformers in float32, a response at a time."""
    with torch.no_grad():
        return list(plain_logps(plain, pairs).split([len(row[1]) for row in rows_of(pairs)]))


def drifts(logps: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Differences of all tokens, and of the sums of responses, in nats."""
    parts = [ours.detach() - theirs for ours, theirs in zip(logps, exact, strict=True)]
    return torch.cat(parts), torch.stack([part.sum() for part in parts])


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def margins(logps: Sequence[Tensor]) -> Tensor:
    sums = torch.stack([part.sum() for part in logps])
    return (sums[::2] - sums[1::2]).sum()


def test_log_probs_and_gradients_in_float32_are_those_of_transformers(
    model: Path, plain: torch.nn.Module, pairs: list[EncodedExample], exact: list[Tensor]
) -> None:
    packed = api.load_model(str(model), max_length=MAX_LENGTH)
    few = pairs[:2]
    logps = api.token_logps(packed, few)
    ours = gradients_of(packed.causal_lm, margins(logps))
    with torch.no_grad():
        logps += api.token_logps(packed, pairs[2:])
    of_tokens, of_responses = drifts(logps, exact)
    print(f"float32: {of_tokens.abs().max():.2g} nats a token, {of_responses.abs().max():.2g} a response")
    assert of_tokens.abs().max() < 1e-4
    assert of_responses.abs().max() < 1e-3

    rows = [part for pair in few for part in plain_logps(plain, [pair]).split(list(map(len, pair.responses)))]
    expected = gradients_of(plain, margins(rows))
    assert ours.keys() == expected.keys()
    largest = max(gradient.norm().item() for gradient in expected.values())
    relative = {
        name: ((ours[name] - gradient).norm() / max(gradient.norm().item(), 1e-3 * largest)).item()
        for name, gradient in expected.items()
    }
    print(f"gradients: {max(relative.values()):.2g} of a parameter's norm")
    assert max(relative.values()) < 1e-4


@torch.no_grad()
def test_packed_bf16_is_not_noisier_than_padded_batches_of_transformers(
    model: Path, pairs: list[EncodedExample], exact: list[Tensor]
) -> None:
    packed = api.load_model(str(model), dtype=api.Dtype.bf16, max_length=MAX_LENGTH)
    ours = drifts(api.token_logps(packed, pairs, 2048), exact)
    rows, padded = rows_of(pairs), AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    batches = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    theirs = drifts([logps for batch in batches for logps in padded_logps(padded, batch)], exact)
    for own, other, of in zip(ours, theirs, ("token", "response"), strict=True):
        print(f"bf16: {rms(own):.2g} nats a {of}, padded {rms(other):.2g}")
        assert rms(own) <= rms(other)


def readme_commands() -> list[list[str]]:
    """The commands of the section about a real model, each as a module and its arguments."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("\n## A real model\n")[1].split("\n## ")[0]
    )
    found = re.findall(r"^    python -m (.+)$", section, re.MULTILINE)
    return [shlex.split(line) for line in found]


def test_the_run_of_the_readme_learns_the_rule_and_its_answers_still_end(model: Path, tmp_path: Path) -> None:
    (made, *making), (trained, *training), (exported, *exporting) = readme_commands()
    code, _, errors = run_warm_apart(made, making, environment(), tmp_path, 120)
    assert code == 0, errors
    assert (trained, exported) == ("dpo_dist.train", "dpo_dist.export")
    ended = run_verb("train", [*training, f"model.path={model}"], cwd=tmp_path)
    assert ended.code == 0, ended.output

    (run,) = (argument.partition("=")[2] for argument in training if argument.startswith("run.dir="))
    accuracies = [row["eval_rewards/accuracies"] for row in history(tmp_path / run) if "eval_loss" in row]
    assert accuracies[0] == 0.5
    assert accuracies[-1] > 0.95
    steps = summary(tmp_path / run)["steps"]
    assert steps <= 20
    rows = [
        json.loads(line)
        for line in (tmp_path / run / f"samples/step-{steps:06d}.jsonl").read_text().splitlines()
    ]
    follow = [follows_rule([{"content": asked_of(row)}], row["policy"]) for row in rows]
    assert sum(follow) >= 7, rows
    assert sum(row["policy_finished"] for row in rows) >= 7, rows
    assert not any(follows_rule([{"content": asked_of(row)}], row["reference"]) for row in rows)

    verdict = summary(tmp_path / run)["verdict"]
    assert verdict["findings"] == [], verdict
    card = (tmp_path / run / "model/README.md").read_text(encoding="utf-8")
    assert "'r': 16" in card

    ended = run_verb("export", exporting, cwd=tmp_path)
    assert ended.code == 0, ended.output
    (merged,) = (tmp_path / run / "exported").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template
    assert greedy(merged, rows[0]["prompt"]).startswith(rows[0]["policy"][:8])


def asked_of(row: dict[str, str]) -> str:
    """The last user's message of a rendered prompt."""
    return row["prompt"].rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def greedy(folder: Path, prompt: str) -> str:
    """The beginning of a model's likeliest answer by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**asked, do_sample=False, max_new_tokens=8)[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))
