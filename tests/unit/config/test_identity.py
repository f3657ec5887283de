"""Digest, run directory, settings and title of a run, and its difference from another run."""

import json
from pathlib import Path

import pytest

from dpo_dist.config.identity import differing_keys, run_digest, run_dir, settings, title
from dpo_dist.config.load import load_run_config

RUN = ["model.path=m", "data.train=[a.jsonl]"]


def run_directory(*overrides: str) -> str:
    return str(load_run_config([*RUN, *overrides]).run.dir)


@pytest.mark.parametrize(
    "change",
    [
        "loss.router.aux_coefficient=model",
        "loss.beta=0.2",
        "model.path=n",
        "data.train=[b.jsonl]",
        "optim.lr=2e-6",
        "trainer.seed=1",
        "loss=ipo",
    ],
)
def test_keys_that_define_the_result_change_the_run_directory(change: str) -> None:
    assert run_directory(change) != run_directory()


@pytest.mark.parametrize(
    "change",
    [
        "trainer.micro_batch_tokens=100",
        "trainer.stop_after_steps=3",
        "trainer.max_seconds=3",
        "trainer.save_every=7",
        "model.gradient_checkpointing=full",
        "model.gradient_checkpointing=2",
        "model.compile=true",
        "model.liger=true",
        "model.attention=sdpa",
        "parallelism=zero2",
        "parallelism.offload_parameters=cpu",
        "reference.offload=cpu",
        "tracking=off",
        "run.resume=must",
        "loss.beta=1e-1",
    ],
)
def test_other_keys_do_not_change_the_run_directory(change: str) -> None:
    assert run_directory(change) == run_directory()


def test_the_run_directory_has_root_and_name() -> None:
    config = load_run_config([*RUN, "run.root=/r", "run.name=n"])
    assert run_dir(config).parent == Path("/r")
    assert run_dir(config).name.startswith("n-")
    assert run_directory("run.dir=/mine") == "/mine"


def test_the_label_of_a_source_does_not_define_the_result() -> None:
    plain = [*RUN, "data.train=[{path: a.jsonl, weight: 2}]"]
    labelled = [*RUN, "data.train=[{path: a.jsonl, weight: 2, label: math}]"]
    old, new = map(load_run_config, (plain, labelled))
    assert run_digest(old) == run_digest(new)
    assert differing_keys(old, new) == {}
    assert settings(new)["data.train"] == [{"path": "a.jsonl", "weight": 2.0}]


def test_settings_are_the_usual_keys_and_those_not_at_their_default() -> None:
    found = settings(load_run_config([*RUN, "loss=simpo", "optim.lr=5e-7", "data.truncation=drop"]))
    assert found == {
        "model.path": "m",
        "data.train": [{"path": "a.jsonl"}],
        "data.truncation": "drop",
        "loss.kind": "simpo",
        "loss.beta": 2.0,
        "loss.simpo_gamma": 1.0,
        "reference.mode": "none",
        "optim.lr": 5e-7,
        "trainer.epochs": 1.0,
        "trainer.global_batch_pairs": 64,
        "trainer.seed": 0,
    }
    assert json.loads(json.dumps(found)) == found
    found = settings(
        load_run_config([*RUN, "loss=sigmoid_sft", "model.adapter={r: 8}", "trainer.save_every=7"])
    )
    assert found["loss.terms"] == [{"kind": "sigmoid"}, {"kind": "sft", "weight": 0.1}]
    assert found["model.adapter"] == {"r": 8}
    assert not {"loss.kind", "trainer.save_every"} & set(found)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["loss=ipo", "run.name=mine"], "mine ipo beta=0.1 lr=1e-06 {digest}"),
        (["loss=sft", "optim.lr=2e-5"], "run sft lr=2e-05 {digest}"),
        (
            ["loss=sigmoid_sft", "trainer.seed=3", "run.dir=/x/there"],
            "there sigmoid+sft beta=0.1 lr=1e-06 seed=3",
        ),
        (["model.adapter={r: 8, variant: dora}"], "run sigmoid beta=0.1 lr=1e-06 dora r=8 {digest}"),
    ],
)
def test_a_title_has_loss_beta_rate_adapter_and_seed(overrides: list[str], name: str) -> None:
    config = load_run_config([*RUN, *overrides])
    assert title(config, Path(str(config.run.dir))) == name.format(digest=run_digest(config))


def test_keys_that_define_the_result_differ_with_both_values() -> None:
    old = load_run_config([*RUN, "loss.beta=0.2", "model.adapter={r: 8}"])
    new = load_run_config([*RUN, "model.adapter={r: 8, alpha: 64}", "run.dir=/x", "trainer.log_every=7"])
    adapters = {"r": 8}, {"r": 8, "alpha": 64.0}
    assert differing_keys(old, new) == {"loss.beta": (0.2, 0.1), "model.adapter": adapters}
    assert differing_keys(new, new) == {}
