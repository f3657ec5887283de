"""Digest, run directory, settings and title of a run, and its difference from another run."""

import copy
import hashlib
import json
from pathlib import Path

import pytest

from dpo_dist.config.identity import settings, title
from dpo_dist.config.load import differing_keys
from dpo_dist.foundation.fields import plain
from tests.unit.config.support import configured

DEFINING = """
loss.router.aux_coefficient=model loss.beta=0.2 model.path=n data.train=[b.jsonl] optim.lr=2e-6 trainer.seed=1
loss=ipo model.adapter={r:8} model.adapter={r:9} reference.quantization=nf4
"""
FREE = """
trainer.micro_batch_tokens=100 trainer.stop_after_steps=3 trainer.max_seconds=3 trainer.save_every=7
model.gradient_checkpointing=full model.fused=compile model.attention=sdpa parallelism=zero2
parallelism.offload_parameters=cpu reference.offload=cpu tracking=off run.resume=must loss.beta=1e-1
data.train=[{path:a.jsonl,label:math}]
"""


@pytest.mark.slow
def test_only_keys_that_define_the_result_change_the_run_directory() -> None:
    own = configured().run.dir
    assert {configured(word).run.dir for word in FREE.split()} == {own}
    others = [configured(word).run.dir for word in DEFINING.split()]
    assert len({*others, own}) == len(others) + 1
    assert str(configured("run.root=/r run.name=n").run.dir).startswith("/r/n-")
    assert configured("run.dir=/mine").run.dir == "/mine"


def test_images_define_the_result_of_their_runs_only() -> None:
    runs = [configured(f"model.images.train={train}") for train in ("none", "projector", "tower")]
    runs += [configured("model.images={max_pixels:9}"), configured()]
    assert len({run.identity.digest for run in runs}) == len(runs)
    text = json.dumps(plain(configured(), with_defaults=True), sort_keys=True, separators=(",", ":"))
    assert configured().identity.digest == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert settings(runs[0])["model.images"] == {"train": "none"}
    assert configured("model.images={}") == runs[0]


@pytest.mark.slow
def test_a_teacher_defines_the_result_of_its_runs_but_not_where_it_is_computed() -> None:
    taught = "loss=distill teacher.path=t"
    changes = ("", "teacher.k=9", "teacher.system=sea", "data.max_scorer_length=9")
    changes += ("reference.accept=rounding", f"teacher.digest={'ab' * 16}")
    runs = [configured(f"{taught} {change}") for change in changes]
    runs += [
        configured(f"loss=distill teacher.mode={mode} model.adapter.r=8") for mode in ("policy", "adapter")
    ]
    assert len({run.identity.digest for run in runs}) == len(runs)
    beside = configured(f"{taught} teacher.mode=live teacher.offload=cpu")
    assert beside.identity.digest == runs[0].identity.digest


def test_settings_are_the_usual_keys_and_those_not_at_their_default() -> None:
    found = settings(configured("loss=simpo optim.lr=5e-7 data.truncation=drop"))
    assert found == {
        "model.path": "m",
        "data.train": [{"path": "a.jsonl"}],
        "data.truncation": "drop",
        "loss.kind": "simpo",
        "loss.beta": 2.0,
        "loss.options": {"gamma": 1.0},
        "reference.mode": "none",
        "optim.lr": 5e-7,
        "trainer.epochs": 1.0,
        "trainer.global_batch_pairs": 64,
        "trainer.seed": 0,
    }
    assert json.loads(json.dumps(found)) == found
    found = settings(configured("loss=sigmoid_sft model.adapter.r=8 trainer.save_every=7"))
    assert found["loss.terms"] == [{"kind": "sigmoid"}, {"kind": "sft", "weight": 0.1}]
    assert found["model.adapter"] == {"r": 8, "alpha": 32.0}
    assert not {"loss.kind", "trainer.save_every"} & set(found)


def test_settings_leave_the_identity_as_it_is() -> None:
    config = configured("model.adapter.r=8 model.images.train=none")
    before = copy.deepcopy(config.identity.values)
    settings(config)
    assert config.identity.values == before


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("loss=ipo run.name=mine", "mine ipo beta=0.1 lr=1e-06 {digest}"),
        ("loss=sft optim.lr=2e-5", "run sft lr=2e-05 {digest}"),
        ("loss=sigmoid_sft trainer.seed=3 run.dir=/x/there", "there sigmoid+sft beta=0.1 lr=1e-06 seed=3"),
        ("model.adapter={r:8,variant:dora}", "run sigmoid beta=0.1 lr=1e-06 dora r=8 {digest}"),
    ],
)
def test_a_title_has_loss_beta_rate_adapter_and_seed(typed: str, name: str) -> None:
    config = configured(typed)
    assert title(config, Path(str(config.run.dir))) == name.format(digest=config.identity.digest)


def test_keys_that_define_the_result_differ_with_both_values() -> None:
    old = configured("loss.beta=0.2 model.adapter.r=8")
    new = configured("model.adapter={r:8,alpha:64} run.dir=/x trainer.log_every=7")
    adapters = {"r": 8}, {"r": 8, "alpha": 64.0}
    assert differing_keys(old.identity, new.identity) == {"loss.beta": (0.2, 0.1), "model.adapter": adapters}
    assert differing_keys(new.identity, new.identity) == {}


def test_null_of_an_adapter_is_a_default_or_the_value_of_the_one_that_is_continued() -> None:
    written = "{r:16,alpha:32,target_modules:all-linear,variant:lora,modules_to_save:[]}"
    new, whole = configured("model.adapter={r:null}"), configured(f"model.adapter={written}")
    assert new.model.adapter == whole.model.adapter
    continued, named = configured("model.adapter={path:sft}"), configured("model.adapter={path:sft,r:16}")
    assert (continued.model.adapter.r, named.model.adapter.r) == (None, 16)  # type: ignore[union-attr]
    assert continued.identity.digest == named.identity.digest
    assert differing_keys(continued.identity, named.identity) == {}
