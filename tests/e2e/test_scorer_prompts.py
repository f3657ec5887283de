"""A reference and a teacher read other prompts than the policy, before the same responses."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from dpo_dist.data.config import UnpairedDataConfig
from dpo_dist.encoded.partners import with_partners
from tests.e2e.conftest import Overrides
from tests.support import tiny
from tests.support.cache import opened
from tests.support.families import tiny_causal_lm, tiny_config
from tests.support.image_model import write_image_model, write_pictures
from tests.support.invented import write_pairs
from tests.support.killed_runs import die_in_shard
from tests.support.launch import assert_same_history, constants, history, run_verb, summary, train
from tests.support.records import jsonl
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
    tokens = torch.tensor(tokenizer(whole.removeprefix(before), add_special_tokens=False)["input_ids"])
    return forward(model, prompt, tokens), tokens


def forward(model: Any, prompt: list[Any], tokens: Tensor) -> Tensor:
    tokenizer = tiny.qwen()
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor(tokenizer(before, add_special_tokens=False)["input_ids"])
    logits = model(torch.cat((ids, tokens))[None]).logits[0, len(ids) - 1 : -1]
    return torch.log_softmax(logits, -1)


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
    [(2, None), (2, SAILOR)],
    ids=["half", "half, and a system message"],
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
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
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
        rows = rows_of(file)
        return loss_of_pairs(policy, reference, rows, lambda row: row.get("reference_prompt", row["prompt"]))

    loss = loss_of(file)
    loss.backward()
    rows = history(tmp_path / "run")
    before = next(row for row in rows if "eval_loss" in row)
    assert before["eval_loss"] == pytest.approx(loss_of(held_out).item(), rel=1e-6)
    assert first_step(tmp_path / "run")["loss"] == pytest.approx(loss.item(), rel=1e-6)
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
    [("kto", as_labelled), ("plackett_luce", as_ranking)],
    ids=["labelled", "ranking"],
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
    responses = {"kto": 24, "plackett_luce": 36}[loss]
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
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
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
        assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
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


def write_mixture(folder: Path) -> Path:
    wide = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 16, "mlp_only_layers": []}
    tiny_causal_lm(tiny_config("qwen3_moe", len(tiny.qwen()), **wide)).save_pretrained(folder)
    tiny.qwen().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("write", "options", "live"),
    [
        pytest.param(write_mixture, [], ["parallelism={kind: zero3, experts: 2}"], id="shared experts"),
        pytest.param(write_model, [], ["reference.offload=cpu"], id="offloaded"),
        pytest.param(partial(write_model, hidden_size=64), ["reference.quantization=nf4"], [], id="4 bits"),
        pytest.param(write_image_model, [], [], id="images"),
    ],
)
def test_models_of_every_kind_read_another_prompt_alike_live_and_stored(
    overrides: Overrides, tmp_path: Path, write: Callable[[Path], Path], options: list[str], live: list[str]
) -> None:
    """A reference's system message; images stand behind it as before."""
    if "reference.quantization" in str(options):
        pytest.importorskip("bitsandbytes")
    command = [f"model.path={write(tmp_path / 'model')}", "trainer.max_steps=2", "optim.lr=1e-3", *options]
    if write is write_image_model:
        command += [f"data.train=[{write_pictures(tmp_path)}]", "trainer.global_batch_pairs=3"]
        command.append("model.images.train=none")
    else:
        command.append(f"data.train=[{write_pairs(tmp_path / 'some.jsonl', 12, seed=1)}]")
    other = f"reference.system='{SAILOR['content']}'"
    train(overrides(*command, other))
    beside = [f"run.dir={tmp_path}/live", f"reference.store={tmp_path}/no", "reference.mode=live"]
    train(overrides(*command, other, *beside, *live), processes=2)
    assert_same_history(history(tmp_path / "live"), history(tmp_path / "run"), 2e-4)
    train(overrides(*command, f"run.dir={tmp_path}/without"))
    assert first_step(tmp_path / "without")["loss"] != pytest.approx(
        first_step(tmp_path / "run")["loss"], 1e-3
    )


Read = Callable[[Row], list[Any]]


def loss_of_pairs(policy: Any, reference: Any, rows: list[Row], read: Read) -> Tensor:
    ratios = log_ratios(policy, reference, rows, read)
    return torch.stack([-logsigmoid(0.3 * (chosen - rejected)) for chosen, rejected in ratios]).mean()


def loss_of_ipo(policy: Any, reference: Any, rows: list[Row], read: Read) -> Tensor:
    losses = []
    for row, (chosen, rejected) in zip(rows, log_ratios(policy, reference, rows, read), strict=True):
        lengths = [len(answered(policy, row["prompt"], row[side])[1]) for side in ("chosen", "rejected")]
        losses.append((chosen / lengths[0] - rejected / lengths[1] - 1 / 0.6) ** 2)
    return torch.stack(losses).mean()


def loss_of_labelled(policy: Any, reference: Any, rows: list[Row], read: Read) -> Tensor:
    """Of kto, whose partners are those of the data."""
    with TemporaryDirectory() as folder:
        file = jsonl(Path(folder), *rows)
        data = opened(Path(folder), file, kind=UnpairedDataConfig)
        data = with_partners(data, UnpairedDataConfig().max_length)
        responses = [data.example(index).responses for index in range(len(rows))]
    ratios = []
    for which in (0, 1):
        for row, own in zip(rows, responses, strict=True):
            tokens = torch.from_numpy(own[which].astype("int64"))[:, None]
            logps = forward(policy, row["prompt"], tokens[:, 0]).gather(1, tokens).sum()
            others = forward(reference, read(row), tokens[:, 0]).gather(1, tokens).sum()
            ratios.append(logps - others.detach())
    start = torch.stack(ratios[len(rows) :]).mean().detach()
    assert start > 0
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in rows]).double()
    return torch.sigmoid(0.3 * signs * (start - torch.stack(ratios[: len(rows)]))).mean()


def loss_of_rankings(policy: Any, reference: Any, rows: list[Row], read: Read) -> Tensor:
    losses = []
    for row in rows:
        rewards = []
        for response in row["responses"]:
            said = [{"role": "assistant", "content": response["content"]}]
            ratio = logp(policy, row["prompt"], said) - logp(reference, read(row), said).detach()
            rewards.append(0.3 * ratio)
        from_here = torch.stack(rewards).flip(0).logcumsumexp(0).flip(0)
        losses.append((from_here - torch.stack(rewards)).sum())
    return torch.stack(losses).mean()


def loss_of_distributions(policy: Any, teacher: Any, rows: list[Row], read: Read) -> Tensor:
    losses = []
    for row in rows:
        wanted = answered(teacher, read(row), row["chosen"])[0].detach()
        got = answered(policy, row["prompt"], row["chosen"])[0]
        losses.append((wanted.exp() * (wanted - got)).sum(-1))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    ("loss", "change", "plain"),
    [
        ("distill", lambda row, _: row, loss_of_distributions),
        ("sigmoid", lambda row, _: row, loss_of_pairs),
        ("ipo", lambda row, _: row, loss_of_ipo),
        ("kto", as_labelled, loss_of_labelled),
        ("plackett_luce", as_ranking, loss_of_rankings),
    ],
)
def test_loss_and_gradients_are_those_of_float64(
    overrides: Overrides,
    assets: Path,
    teacher: Path,
    tmp_path: Path,
    loss: str,
    change: Callable[[Row, int], Row],
    plain: Callable[[Any, Any, list[Row], Read], Tensor],
) -> None:
    """On 1, 2 and 3 processes, of a larger reference that reads another prompt in every second record."""
    scorer = "teacher" if loss == "distill" else "reference"
    rows = [change(row, n) for n, row in enumerate(rows_of(write_pairs(tmp_path / "six", 6, seed=1)))]
    for row in rows[::2]:
        row[f"{scorer}_prompt"] = [*SHOWN, *row["prompt"][-1:]]
    command = [f"loss={loss}", f"data.train=[{jsonl(tmp_path, *rows)}]", f"{scorer}.path={teacher}"]
    command += ["trainer.max_steps=1", "optim.lr=1", "optim.warmup=0", NO_CLIPPING]
    command += ["teacher.k=100000"] if loss == "distill" else ["loss.beta=0.3"]
    policy, larger = doubles(assets / "model", teacher)
    wanted = plain(policy, larger, rows, lambda row: row.get(f"{scorer}_prompt", row["prompt"]))
    wanted.backward()
    before = dict(policy.named_parameters())
    # The first step of Adam is g / (|g| + 1), from which the gradient g is known.
    adam = constants(**{"dpo_dist.distributed.zero.ADAM_EPS": 1.0})
    for processes in (1, 2, 3):
        run = tmp_path / str(processes)
        ended = run_verb("train", overrides(*command, f"run.dir={run}"), processes=processes, prepare=adam)
        assert ended.code == 0, ended.output
        assert first_step(run)["loss"] == pytest.approx(wanted.item(), rel=1e-6)
        (after,) = doubles(run / "model")
        errors = []
        for name, weight in after.named_parameters():
            step = (before[name] - weight).detach()
            errors.append((step / (1 - step.abs()) - before[name].grad).flatten())
        assert torch.cat(errors).norm().item() < 1e-5 * gradient_norm(policy)


def die_in_the_third_shard() -> None:
    """A shard has the responses of two pairs; the process is killed when half of the third is written."""
    die_in_shard(3)
    constants(
        **{"dpo_dist.training.reference.ENTRIES_PER_SHARD": 4, "dpo_dist.training.teacher._ROWS_PER_SHARD": 4}
    )()


@pytest.mark.parametrize(("name", "a_pair"), [("reference", 2), ("teacher", 1)])
def test_a_kill_while_a_view_is_filled_keeps_its_shards(
    overrides: Overrides, teacher: Path, tmp_path: Path, name: str, a_pair: int
) -> None:
    """The next start computes what is missing, and trains as an uninterrupted run."""
    file = with_prompts(tmp_path / "six.jsonl", f"{name}_prompt", lambda prompt: [*SHOWN, *prompt[-1:]], 2)
    command = [f"data.train=[{file}]", "trainer.max_steps=1", f"{name}.path={teacher}"]
    command += ["loss=distill"] if name == "teacher" else []
    train(overrides(*command, f"reference.store={tmp_path}/whole", f"run.dir={tmp_path}/whole-run"))
    ended = run_verb("train", overrides(*command), prepare=die_in_the_third_shard)
    assert ended.code == -signal.SIGKILL, ended.output
    train(overrides(*command))
    report = summary(tmp_path / "run")["reference"]
    report = report["teacher"] if name == "teacher" else report
    assert (report["hits"], report["computed"]) == (4 * a_pair, 2 * a_pair)
    assert_same_history(history(tmp_path / "run"), history(tmp_path / "whole-run"), 1e-6)


def test_the_base_as_teacher_has_its_own_output_layer(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    """Not the copy that an adapter trains: it is the teacher that the base beside the policy would be."""
    file = write_pairs(tmp_path / "six.jsonl", 6, seed=1)
    command = ["loss=distill", "loss.options.mix=0.5", f"data.train=[{file}]", "trainer.max_steps=3"]
    command += ["optim.lr=1e-2", "optim.warmup=0", f"teacher.system='{SAILOR['content']}'"]
    command.append("model.adapter={r: 4, modules_to_save: [lm_head, embed_tokens]}")
    train(overrides(*command, "teacher.mode=adapter", f"run.dir={tmp_path}/base"))
    beside = ["teacher.mode=live", f"teacher.path={assets}/model", f"run.dir={tmp_path}/beside"]
    train(overrides(*command, *beside))
    assert_same_history(history(tmp_path / "base"), history(tmp_path / "beside"), 2e-5)
