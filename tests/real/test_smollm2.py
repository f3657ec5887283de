"""A real chat model: its log-probs and gradients, the noise of bf16, and the page for beginners."""

import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist import api
from dpo_dist.config.schema import Dtype
from dpo_dist.config.verbs import VERBS
from dpo_dist.data.encode import EncodedExample
from dpo_dist.model.numerics import has_products
from examples.demo.make import make_records
from tests.real.smollm2 import model_folder
from tests.support.launch import ROOT, environment, history, run_verb, summary
from tests.support.packing import plain_logps
from tests.support.padded import gradients_of, padded_logps, rows_of
from tests.support.shared_data import shared_data_dir
from tests.support.warm import run_warm_apart

MAX_LENGTH = 192
PAIRS = 4
RULE = "Aye, captain!"
ADDED = [
    "trainer.global_batch_pairs=4",
    "sampling.max_new_tokens=20",
    *([] if has_products(Dtype.bf16) else ["model.dtype=fp32"]),
]
"""Half of the page's batch and of its samples' length, which halve their time, and what the page says to add
without bf16."""


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
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    # Its end of turn is also its padding: without padding, this row of the embedding has a gradient, too.
    causal_lm.get_input_embeddings().padding_idx = None
    return causal_lm


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
    few = pairs[:1]
    logps = api.token_logps(packed, few)
    ours = gradients_of(packed.causal_lm, margins(logps))
    with torch.no_grad():
        logps += api.token_logps(packed, pairs[1:])
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


@pytest.mark.skipif(not has_products(Dtype.bf16), reason="bf16 is emulated on this CPU, which takes minutes")
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
        # Eight responses: in two runs on one CPU the same padded batches gave 0.24 and 0.32.
        by_chance = 3 / math.sqrt(len(own)) if of == "response" else 0.0  # three standard errors
        assert rms(own) <= (1 + by_chance) * rms(other)


def getting_started() -> tuple[list[str], list[list[str]]]:
    """The Python files of the page, and its commands after `$`."""
    page = (ROOT / "docs/getting_started.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (.+)$", page, re.MULTILINE)
    return re.findall(r"```python\n(.+?)```", page, re.DOTALL), [shlex.split(line) for line in commands]


def says(module: str, words: list[str], cwd: Path, standard_input: str = "") -> str:
    """What a module, of this package or a file in `cwd`, prints on a warm process."""
    (lines := cwd / "lines").write_text(standard_input, encoding="utf-8")
    code, output, errors = run_warm_apart(module, words, environment(), cwd, 300, partial(_enter, lines))
    assert code == 0, errors
    return output


def _enter(lines: Path) -> None:
    """Read lines as the standard input, and import the modules of the working directory, as python does."""
    sys.stdin = lines.open(encoding="utf-8")
    sys.path.insert(0, "")


@pytest.mark.timeout(1800)
def test_getting_started_trains_answers_and_goes_on_as_its_page_says(model: Path, tmp_path: Path) -> None:
    files, commands = getting_started()
    making, (_, *training), piping, (_, *exporting), asking, (_, *longer) = commands
    for (_, name), text in zip((making, asking), files, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    says(Path(making[1]).stem, [], tmp_path)
    added = [f"model.path={model}", *ADDED]
    ended = run_verb(training[0], [*training[1:], *added], cwd=tmp_path, seconds=900)
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
    # A busy machine asks fewer than the page's eight prompts: as many as it answers in a minute.
    assert sum(row["responses"]["policy"]["text"].startswith(RULE) for row in rows) >= len(rows) - 1, rows
    assert sum(row["responses"]["policy"]["finished"] for row in rows) >= len(rows) - 1, rows
    assert not any(row["responses"]["reference"]["text"].startswith(RULE) for row in rows)
    assert summary(tmp_path / run)["verdict"]["findings"] == []
    assert "r: 16" in (tmp_path / run / "model/README.md").read_text(encoding="utf-8")

    _, question, _, _, verb, *words = piping  # echo QUESTION | dpo-dist chat RUN --temperature 0
    assert says(VERBS[verb].module, words, tmp_path, f"{question}\n").startswith(RULE)

    ended = run_verb(exporting[0], exporting[1:], cwd=tmp_path)
    assert ended.code == 0, ended.output
    (merged,) = (tmp_path / run).parent.glob("*-merged")
    assert (
        AutoTokenizer.from_pretrained(merged).chat_template
        == AutoTokenizer.from_pretrained(model).chat_template
    )
    assert says(Path(asking[1]).stem, [], tmp_path).startswith(RULE)

    ended = run_verb(longer[0], [*longer[1:], *added, "sampling.prompts=1"], cwd=tmp_path, seconds=900)
    assert ended.code == 0, ended.output
    assert "step-000012, after step 12" in ended.output
    assert summary(tmp_path / run)["steps"] == 14
