"""A policy learns from a teacher that is asked once, by the command line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.reference.store import LogpStore, list_shards, open_shard, read_fingerprints
from tests.e2e.conftest import Overrides, last_evaluation
from tests.support import tiny
from tests.support.invented import write_pairs
from tests.support.launch import assert_same_history, constants, history, run_verb, summary, train
from tests.support.pairs import encode
from tests.support.tiny_model import write_model

WHOLE = "teacher.k=100000"
PADDING = 24
K = 20


def longer(folder: Path) -> Path:
    """The model of a folder after its output layer was padded, as those of Qwen2.5 are, with likely ids."""
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    causal_lm.resize_token_embeddings(causal_lm.config.vocab_size + PADDING, mean_resizing=False)
    causal_lm.get_input_embeddings().weight.data[-PADDING:].normal_(std=0.3)
    causal_lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "larger"
    return longer(write_model(folder, seed=5, hidden_size=48, layers=3))


@torch.no_grad()
def dense(student: Path, teacher: Path, assets: Path, temperature: float) -> tuple[float, float]:
    """The mean divergence over the tokens of chosen evaluation responses, and the share of equal choices."""
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(each).double() for each in (student, teacher)]
    divergences = []
    equal = []
    for record in read_records(f"{assets}/eval.jsonl"):
        assert isinstance(record, PreferenceRecord)
        pair = encode(record, tiny.qwen())
        ids = torch.tensor([*pair.prompt_ids, *pair.responses[0]])[None]
        place = slice(len(pair.prompt_ids) - 1, -1)
        logits = [model(ids).logits[0, place, : models[0].config.vocab_size] for model in models]
        student_logps, teacher_logps = (torch.log_softmax(each / temperature, -1) for each in logits)
        divergences.append((teacher_logps.exp() * (teacher_logps - student_logps)).sum(-1))
        equal.append(logits[0].argmax(-1) == logits[1].argmax(-1))
    return torch.cat(divergences).mean().item(), torch.cat(equal).double().mean().item()


def _full_disk(_: Path) -> SimpleNamespace:
    return SimpleNamespace(total=2**30, free=2**10)


def of_teacher(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = summary(run)["reference"]["teacher"]
    return report


def test_a_whole_teacher_is_the_dense_divergence_on_any_number_of_processes(
    overrides: Overrides, assets: Path, teacher: Path, tmp_path: Path
) -> None:
    command = [f"teacher.path={teacher}", f"data.eval=[{assets}/eval.jsonl]", "optim.lr=1e-3", "loss=distill"]
    command += [WHOLE, "loss.options.temperature=1.5"]
    train(overrides(*command))
    rows = history(tmp_path / "run")
    last = last_evaluation(tmp_path / "run")
    first = next(row for row in rows if "eval_loss" in row)
    for model, row in ((assets / "model", first), (tmp_path / "run" / "model", last)):
        divergence, agreement = dense(model, teacher, assets, 1.5)
        assert row["eval_loss"] == pytest.approx(divergence, rel=1e-5)
        assert row["eval_teacher/agreement"] == pytest.approx(agreement, abs=1e-6)
    assert last["eval_loss"] < first["eval_loss"]
    assert of_teacher(tmp_path / "run")["computed"] == 28
    # Beside the policy, on two processes, with another store: the same trajectory.
    train(
        overrides(
            *command, "teacher.mode=live", f"run.dir={tmp_path}/live", f"reference.store={tmp_path}/no"
        ),
        processes=2,
    )
    assert_same_history(history(tmp_path / "live"), rows, 2e-5)
    assert not list((tmp_path / "no").glob("*/*.safetensors"))


@pytest.mark.parametrize("mix", [0.4, 1.0])
def test_whole_distributions_beside_the_policy(
    overrides: Overrides, assets: Path, teacher: Path, tmp_path: Path, mix: float
) -> None:
    """The divergence of the definition and its gradient, however the models are sharded; a store cannot."""
    file = write_pairs(tmp_path / "six.jsonl", 6, seed=1)
    command = ["loss=distill", f"loss.options.mix={mix}", "loss.options.temperature=1.5"]
    command += [f"teacher.path={teacher}", f"data.train=[{file}]", f"data.eval=[{assets}/eval.jsonl]"]
    command += ["trainer.max_steps=2", "optim.max_grad_norm=1e9", "optim.lr=1e-3"]
    student, larger = (
        AutoModelForCausalLM.from_pretrained(each).double() for each in (assets / "model", teacher)
    )
    divergences = []
    for record in read_records(str(file)):
        assert isinstance(record, PreferenceRecord)
        pair = encode(record, tiny.qwen())
        ids = torch.tensor([*pair.prompt_ids, *pair.responses[0]])[None]
        place = slice(len(pair.prompt_ids) - 1, -1)
        known = student.config.vocab_size
        p, q = (torch.softmax(model(ids).logits[0, place, :known] / 1.5, -1) for model in (student, larger))
        m = mix * q.detach() + (1 - mix) * p
        apart = p * (p / (q if mix == 1 else m)).log()
        of_teacher = 0 if mix == 1 else mix * q * (q / m).log()
        divergences.append((of_teacher + (1 if mix == 1 else 1 - mix) * apart).sum(-1))
    loss = torch.cat(divergences).mean()
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in student.parameters()]).norm()
    runs = {
        "one": ([], 1),
        "sharded": ([], 2),
        "replicas": (["parallelism=ddp"], 3),
        "sequence": (["parallelism.sequence_parallel=2"], 2),
    }
    for name, (more, processes) in runs.items():
        beside = ["teacher.mode=live", *more, f"run.dir={tmp_path}/{name}"]
        train(overrides(*command, *beside), processes=processes)
        rows = history(tmp_path / name)
        first = next(row for row in rows if "loss" in row)
        assert first["loss"] == pytest.approx(loss.item(), rel=1e-5), name
        assert first["grad_norm"] == pytest.approx(gradient.item(), rel=1e-5), name
        assert_same_history(rows, history(tmp_path / "one"), 2e-5)
    assert "eval_teacher/agreement" in last_evaluation(tmp_path / "one")
    ended = run_verb("train", overrides(*command, f"run.dir={tmp_path}/stored"))
    assert ended.code == 2
    assert "set teacher.mode=live" in ended.output


def test_the_teacher_is_asked_once(overrides: Overrides, assets: Path, teacher: Path, tmp_path: Path) -> None:
    """Beside a preference loss, by `precompute` on two processes; again for what changes distributions."""
    terms = "loss.terms=[{kind: ipo, weight: 1}, {kind: distill, weight: 0.5, options: {temperature: 2}}]"
    command = [f"teacher.path={teacher}", terms]
    done = run_verb("precompute", overrides(*command), processes=2)
    assert done.code == 0, done.output
    runs = {
        "same": [],
        "reordered": ["trainer.seed=3", "optim.lr=1e-5", "loss.beta=0.2", "trainer.epochs=2"],
        "part": [
            f"data.train=[{{path: {assets}/train.jsonl, limit: 9}}]",
            f"data.eval=[{assets}/eval.jsonl]",
        ],
        "other rows": ["teacher.k=47"],
        "warmer": [terms.replace("temperature: 2", "temperature: 1")],
        "more ids": [f"model.path={longer(write_model(tmp_path / 'student'))}"],
    }
    computed = {}
    for name, more in runs.items():
        train(overrides(*command, *more, f"run.dir={tmp_path}/{name}", "trainer.max_steps=2"))
        computed[name] = of_teacher(tmp_path / name)["computed"]
    visited = 12  # in two steps of six pairs
    assert computed == {
        "same": 0,
        "reordered": 0,
        "part": 5,  # of the evaluation, also of a policy that is the reference
        "other rows": visited,
        "warmer": visited,
        "more ids": 0,  # that no text has, as those of Qwen2.5
    }
    # The disk needs room for what is not there yet, whatever else the teacher has been asked.
    other = write_pairs(tmp_path / "other.jsonl", 6, seed=3)
    asks = overrides(*command, f"data.train=[{other}]")
    ended = run_verb("precompute", asks, prepare=constants(**{"shutil.disk_usage": _full_disk}))
    assert ended.code == 2, ended.output
    assert "teacher: distributions of 6 responses take" in ended.output
    assert "the disk has no room for the teacher's distributions" in ended.output
    # Log-probs of the reference are other entries, also where it is the teacher.
    more = [f"reference.path={teacher}", "trainer.max_steps=2", f"run.dir={tmp_path}/both"]
    train(overrides(*command, *more))
    assert of_teacher(tmp_path / "both")["computed"] == 0
    assert summary(tmp_path / "both")["reference"]["computed"] == 2 * visited
    (evaluated,) = [row for row in history(tmp_path / "same") if row["step"] == 1]
    assert {"loss/terms/ipo", "loss/terms/distill"} <= evaluated.keys()


def test_a_changed_teacher_is_asked_again(overrides: Overrides, teacher: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=6)
    command = ["loss=distill", "trainer.max_steps=1"]
    train(overrides(*command, f"teacher.path={other}"))
    write_model(other, seed=7)
    run = f"run.dir={tmp_path}/again"
    train(overrides(*command, f"teacher.path={other}", run))
    assert of_teacher(tmp_path / "again")["computed"] == 6
    assert history(tmp_path / "again")[0]["loss"] != history(tmp_path / "run")[0]["loss"]
    replaced = run_verb("train", overrides(*command, f"teacher.path={other}"))
    assert replaced.code == 2, replaced.output
    assert "teacher" in replaced.output
    stale = run_verb("train", overrides(*command, f"teacher.path={teacher}", "run.resume=must"))
    assert stale.code == 2, stale.output


def move_probability(root: Path) -> None:
    """Let each stored distribution have a hundredth more of its likeliest token, and less of the second."""
    (fingerprint,) = [each for each in read_fingerprints(root) if each.width > 1]
    folder = root / fingerprint.name
    for name in list_shards(folder):
        shard = open_shard(folder / name)
        assert shard is not None
        entries = [rows.copy() for rows in np.split(shard.values, shard.ends[:-1])]
        for entry in entries:
            rows = entry.reshape(-1, fingerprint.width)
            rows[:, K] += np.float32(0.01)
            rows[:, K + 1] -= np.float32(0.01)
        (folder / name).unlink()
        LogpStore(root, fingerprint, []).write(shard.keys, entries)


def test_what_a_teacher_said_is_compared_with_it_while_it_is_loaded(
    overrides: Overrides, assets: Path, teacher: Path, tmp_path: Path
) -> None:
    command = [f"teacher.path={teacher}", "loss=distill", f"teacher.k={K}"]
    part = f"data.train=[{{path: {assets}/train.jsonl, limit: 9}}]"
    first = train(overrides(*command, part), processes=2)
    assert "teacher check passed" in first.output
    assert of_teacher(tmp_path / "run")["largest_difference"] < 1e-5
    stored = train(overrides(*command, part, f"run.dir={tmp_path}/stored"))
    assert "it is not loaded to compare a sample with them" in stored.output
    assert "largest_difference" not in of_teacher(tmp_path / "stored")
    more = overrides(*command, f"run.dir={tmp_path}/more")
    move_probability(tmp_path / "store")
    ended = run_verb("train", more, processes=2)
    assert ended.code == 2, ended.output
    assert "sampled distributions of the teacher differ from a fresh computation" in ended.output
    assert f"{assets}/train.jsonl:" in ended.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss=distill"], "set teacher.path to a model with the tokenizer of model.path"),
        (["teacher.path=somewhere"], "teacher.path has no effect with this loss"),
        (
            ["loss=distill", "teacher.path={other}"],
            "set teacher.path to a model with the tokenizer of model.path",
        ),
    ],
    ids=["no teacher", "no loss", "other tokenizer"],
)
def test_a_teacher_that_cannot_teach(
    overrides: Overrides, tmp_path: Path, words: list[str], said: str
) -> None:
    other = write_model(tmp_path / "other", tiny.llama3())
    for check in ([], ["--check"]):
        ended = run_verb("train", overrides(*(word.format(other=other) for word in words), *check))
        assert ended.code == 2, ended.output
        assert said in " ".join(ended.output.split()), ended.output
