"""A reference and a teacher read other prompts than the policy, before the same responses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import Overrides
from tests.support import tiny
from tests.support.invented import write_pairs
from tests.support.launch import assert_same_history, history, run_verb, summary, train
from tests.support.tiny_model import write_model

Row = dict[str, Any]
SAILOR = {"role": "system", "content": "You are a sailor. Say yes to the sea."}
SHOWN = [{"role": "user", "content": "the capital?"}, {"role": "assistant", "content": "Paris, sorry"}]
NO_CLIPPING = "optim.max_grad_norm=1e9"


def with_prompts(file: Path, name: str, change: Callable[[list[Any]], Any], every: int = 1) -> Path:
    """Six pairs of which every n-th has another prompt for a scorer."""
    write_pairs(file, 6, seed=1)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::every]:
        row[name] = change(row["prompt"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows_of(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def answered(model: Any, prompt: list[Any], response: list[Any]) -> tuple[Tensor, Tensor]:
    """Logits at the tokens of a response by a plain forward after the chat template alone, and the tokens."""
    tokenizer = tiny.qwen()
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *response], tokenize=False).rstrip("\n")
    ids, tokens = (
        torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (before, whole.removeprefix(before))
    )
    logits = model(torch.cat((ids, tokens))[None]).logits[0, len(ids) - 1 : -1]
    return torch.log_softmax(logits, -1), tokens


def logp(model: Any, prompt: list[Any], response: list[Any]) -> Tensor:
    logps, tokens = answered(model, prompt, response)
    return logps.gather(1, tokens[:, None]).sum()


def doubles(*folders: Path) -> list[Any]:
    return [
        AutoModelForCausalLM.from_pretrained(each, attn_implementation="eager").double() for each in folders
    ]


def gradient_norm(model: Any) -> float:
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat(gradients).norm().item()


def log_ratios(
    policy: Any, reference: Any, rows: list[Row], read: Callable[[Row], list[Any]]
) -> list[Tensor]:
    """[chosen, rejected] of each row: log-probs by the policy minus those of the reference."""
    ratios = []
    for row in rows:
        sides = [row["chosen"], row["rejected"]]
        own = [logp(policy, row["prompt"], side) for side in sides]
        others = [logp(reference, read(row), side).detach() for side in sides]
        ratios.append(torch.stack(own) - torch.stack(others))
    return ratios


def first_step(run: Path) -> dict[str, float]:
    return next(row for row in history(run) if "loss" in row)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "larger", seed=5, hidden_size=48, layers=3)


@pytest.mark.parametrize(
    ("every", "system"),
    [(1, None), (2, None), (1, SAILOR), (7, SAILOR)],
    ids=["all", "half", "both", "system"],
)
def test_a_teacher_with_another_prompt(
    overrides: Overrides, assets: Path, teacher: Path, tmp_path: Path, every: int, system: Row | None
) -> None:
    """Its distributions are those of a plain forward of its own prompt; it is asked for what has changed."""
    file = with_prompts(
        tmp_path / "six.jsonl", "teacher_prompt", lambda prompt: [*SHOWN, *prompt[-1:]], every
    )
    command = [f"teacher.path={teacher}", "loss=distill", "teacher.k=100000", f"data.train=[{file}]"]
    command += ["trainer.max_steps=1", NO_CLIPPING]
    if system is not None:
        command.append(f"teacher.system='{system['content']}'")
    train(overrides(*command))
    student, larger = doubles(assets / "model", teacher)
    losses = []
    for row in rows_of(file):
        read = row.get("teacher_prompt", row["prompt"])
        if system is not None:
            read = [system, *(turn for turn in read if turn["role"] != "system")]
        wanted = answered(larger, read, row["chosen"])[0].detach()
        got = answered(student, row["prompt"], row["chosen"])[0]
        losses.append((wanted.exp() * (wanted - got)).sum(-1))
    loss = torch.cat(losses).mean()
    loss.backward()
    first = first_step(tmp_path / "run")
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(gradient_norm(student), rel=1e-5)
    report = summary(tmp_path / "run")["reference"]["teacher"]
    assert (report["computed"], report["hits"]) == (6, 0)
    train(overrides(*command, f"run.dir={tmp_path}/again"))
    report = summary(tmp_path / "again")["reference"]["teacher"]
    assert (report["computed"], report["hits"]) == (0, 6)
    live = [f"run.dir={tmp_path}/live", f"reference.store={tmp_path}/no", "teacher.mode=live"]
    train(overrides(*command, *live), processes=2)
    assert_same_history(history(tmp_path / "live"), history(tmp_path / "run"), 2e-5)


@pytest.mark.parametrize("mode", ["cached", "live", "adapter"])
def test_a_reference_with_another_prompt(
    overrides: Overrides, assets: Path, tmp_path: Path, mode: str
) -> None:
    """The first step and the evaluation before it are those of plain forwards, on one process and on two."""
    file = with_prompts(tmp_path / "six.jsonl", "reference_prompt", lambda prompt: prompt[-1:])
    held_out = with_prompts(tmp_path / "eval.jsonl", "reference_prompt", lambda prompt: [*SHOWN, *prompt], 2)
    command = [f"data.train=[{file}]", f"data.eval=[{held_out}]", "trainer.max_steps=1", NO_CLIPPING]
    command += [f"reference.mode={mode}", "loss.beta=0.3"]
    if mode == "adapter":
        command.append("model.adapter={r: 4}")
    train(overrides(*command))
    policy, reference = doubles(assets / "model", assets / "model")

    def loss_of(file: Path) -> Tensor:
        ratios = log_ratios(
            policy, reference, rows_of(file), lambda row: row.get("reference_prompt", row["prompt"])
        )
        return torch.stack([-logsigmoid(0.3 * (chosen - rejected)) for chosen, rejected in ratios]).mean()

    loss = loss_of(file)
    loss.backward()
    rows = history(tmp_path / "run")
    before = next(row for row in rows if "eval_loss" in row)
    assert before["eval_loss"] == pytest.approx(loss_of(held_out).item(), rel=1e-5)
    assert first_step(tmp_path / "run")["loss"] == pytest.approx(loss.item(), rel=1e-5)
    if mode != "adapter":  # of which the matrices alone are trained
        assert first_step(tmp_path / "run")["grad_norm"] == pytest.approx(gradient_norm(policy), rel=1e-5)
    train(overrides(*command, f"run.dir={tmp_path}/two"), processes=2)
    assert_same_history(history(tmp_path / "two"), rows, 2e-5)
    if mode == "cached":
        report = summary(tmp_path / "two")["reference"]
        assert (report["computed"], report["hits"]) == (0, 24)
        assert report["drift"]["largest_token_drift"] < 1e-4


def as_labelled(row: Row, number: int) -> Row:
    side = "chosen" if number % 2 else "rejected"
    return {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}


def as_ranking(row: Row, number: int) -> Row:
    middle = [{"role": "assistant", "content": f"perhaps {number}"}]
    texts = [side[-1]["content"] for side in (row["chosen"], middle, row["rejected"])]
    return {
        "prompt": row["prompt"],
        "responses": [{"content": text, "score": -n} for n, text in enumerate(texts)],
    }


@pytest.mark.parametrize(
    ("loss", "change"),
    [("kto", as_labelled), ("plackett_luce", as_ranking), ("ipo", lambda row, _: row)],
    ids=["labelled", "ranking", "pairs"],
)
def test_every_kind_of_record_is_read_alike_live_and_stored(
    overrides: Overrides, tmp_path: Path, loss: str, change: Callable[[Row, int], Row]
) -> None:
    """A reference's system message, and own prompts beside it; kto's partners stand behind them, too."""
    file = write_pairs(tmp_path / "some.jsonl", 12, seed=3)
    rows = [change(row, number) for number, row in enumerate(rows_of(file))]
    for row in rows[::3]:
        row["reference_prompt"] = [*SHOWN, *row["prompt"][-1:]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [f"loss={loss}", f"data.train=[{file}]", "trainer.max_steps=2"]
    other = f"reference.system='{SAILOR['content']}'"
    train(overrides(*command, other))
    train(
        overrides(
            *command,
            other,
            "reference.mode=live",
            f"run.dir={tmp_path}/live",
            f"reference.store={tmp_path}/no",
        ),
        processes=2,
    )
    assert_same_history(history(tmp_path / "live"), history(tmp_path / "run"), 5e-5)
    # Without the system message other log-probs, computed for the records that it changed.
    train(overrides(*command, f"run.dir={tmp_path}/without"))
    assert first_step(tmp_path / "without")["loss"] != first_step(tmp_path / "run")["loss"]
    responses = {"kto": 24, "plackett_luce": 36, "ipo": 24}[loss]
    assert summary(tmp_path / "without")["reference"]["computed"] == responses


def test_a_scorer_s_prompt_that_cannot_be_read_is_a_bad_record(
    overrides: Overrides, teacher: Path, tmp_path: Path
) -> None:
    long = [{"role": "user", "content": "sea " * 3000}]
    file = with_prompts(tmp_path / "six.jsonl", "teacher_prompt", lambda prompt: [*long, *prompt[1:]])
    command = [f"teacher.path={teacher}", "loss=distill", f"data.train=[{file}]"]
    ended = run_verb("train", overrides(*command))
    assert ended.code == 2
    assert "scorer_prompt_too_long" in ended.output
    assert "data.max_scorer_length" in ended.output


def test_a_policy_that_is_its_own_teacher(overrides: Overrides, assets: Path, tmp_path: Path) -> None:
    """Its present weights, or with `adapter` those of the base, read the system message; else an error."""
    file = write_pairs(tmp_path / "six.jsonl", 6, seed=1)
    command = ["loss=distill", "teacher.k=100000", f"data.train=[{file}]", NO_CLIPPING, "trainer.max_steps=2"]
    system = f"teacher.system='{SAILOR['content']}'"
    train(overrides(*command, "teacher.mode=policy", system))
    (policy,) = doubles(assets / "model")
    losses = []
    for row in rows_of(file):
        with torch.no_grad():
            wanted = answered(policy, [SAILOR, *row["prompt"]], row["chosen"])[0]
        got = answered(policy, row["prompt"], row["chosen"])[0]
        losses.append((wanted.exp() * (wanted - got)).sum(-1))
    loss = torch.cat(losses).mean()
    loss.backward()
    first = first_step(tmp_path / "run")
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(gradient_norm(policy), rel=1e-5)
    # KL(policy, teacher) by whole distributions, its own on two processes with sharded weights.
    policy.zero_grad()
    losses = []
    for row in rows_of(file):
        with torch.no_grad():
            wanted = answered(policy, [SAILOR, *row["prompt"]], row["chosen"])[0]
        got = answered(policy, row["prompt"], row["chosen"])[0]
        losses.append((got.exp() * (got - wanted)).sum(-1))
    loss = torch.cat(losses).mean()
    loss.backward()
    whole = [*command[:1], *command[2:], "loss.options.mix=1", system]
    for processes in (1, 2):
        run = f"run.dir={tmp_path}/{processes}"
        train(overrides(*whole, "teacher.mode=policy", run), processes=processes)
        first = first_step(tmp_path / f"{processes}")
        assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert first["grad_norm"] == pytest.approx(gradient_norm(policy), rel=1e-5)
    assert_same_history(history(tmp_path / "2"), history(tmp_path / "1"), 2e-5)
    # Without its adapter the policy is the model that a live teacher would be.
    adapted = [*command, system, "model.adapter={r: 4}", "optim.lr=1e-2"]
    train(overrides(*adapted, "teacher.mode=adapter", f"run.dir={tmp_path}/base"))
    beside = ["teacher.mode=live", f"teacher.path={assets}/model", f"run.dir={tmp_path}/beside"]
    train(overrides(*adapted, *beside), processes=2)
    assert_same_history(history(tmp_path / "beside"), history(tmp_path / "base"), 5e-5)
    # On the same prompt there is nothing to learn.
    ended = run_verb("train", overrides(*command, "teacher.mode=policy", f"run.dir={tmp_path}/none"))
    assert ended.code == 2
    assert "teacher.system=TEXT" in ended.output
    ended = run_verb("train", overrides("loss=reverse_kl", f"run.dir={tmp_path}/none"))
    assert ended.code == 2
    assert "reference.path=TEACHER" in ended.output
