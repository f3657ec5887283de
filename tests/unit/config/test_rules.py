"""What does not go together is refused, with the key and a remedy (law L5); what does is accepted."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from dpo_dist.config.load import resolve
from dpo_dist.config.loss_kinds import KINDS, LossKind
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import ConfigError

NO_REFERENCE = {"reference.mode": "none"}


def configured(values: dict[str, Any]) -> RunConfig:
    config = OmegaConf.create({"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}})
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return resolve(config)


OUT_OF_RANGE = {
    "data.max_length": [1, 0, -5],
    "data.max_prompt_length": [0],
    "data.max_bad_share": [-0.1, 1.1],
    "data.processes": [0],
    "loss.beta": [0.0, -0.1, float("inf"), float("nan")],
    "loss.label_smoothing": [-0.1, 0.5, 0.9, 1.0],
    "reference.micro_batch_tokens": [0],
    "reference.rows_per_shard": [0],
    "reference.audit_pairs": [-1],
    "optim.lr": [0.0, -1e-6, float("nan")],
    "optim.warmup_ratio": [-0.1, 1.5],
    "optim.weight_decay": [-0.1],
    "optim.eps": [0.0],
    "optim.max_grad_norm": [0.0],
    "trainer.global_batch_pairs": [0],
    "trainer.micro_batch_tokens": [0],
    "trainer.epochs": [0.0],
    "trainer.max_steps": [0],
    "trainer.eval_every": [-1],
    "trainer.save_every": [-1],
    "trainer.log_every": [-1],
    "trainer.keep_last": [-1],
    "trainer.seed": [-1],
    "trainer.stop_after_steps": [0],
    "trainer.max_seconds": [0.0],
    "parallelism.timeout_seconds": [0],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values]
)
def test_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        configured({key: value})
    assert caught.value.where == key
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"run.name": ""}, "run.name"),
        ({"run.name": "a/b"}, "run.name"),
        ({"model.dtype": "fp32", "model.attention": "varlen"}, "model.attention, model.dtype"),
        ({"model.gradient_checkpointing": True}, "model.gradient_checkpointing"),
        ({"model.gradient_checkpointing": "some"}, "model.gradient_checkpointing"),
        ({"model.gradient_checkpointing": 1}, "model.gradient_checkpointing"),
        ({"model.compile": True, "model.liger": True}, "model.compile, model.liger"),
        ({"trainer.deterministic": True, "model.liger": True}, "trainer.deterministic, model.liger"),
        ({"data.train": []}, "data.train"),
        ({"data.train": [{"path": "a", "weight": 0}]}, "data.train[0].weight"),
        ({"data.eval": ["a", {"path": "b", "limit": 0}]}, "data.eval[1].limit"),
        ({"data.eval": [{"path": "b", "weight": 2}]}, "data.eval[0].weight"),
        (
            {"data.train": [{"path": "a", "format": "text"}], "data.ranked": "all_pairs"},
            "data.ranked, data.train",
        ),
        ({"reference.revision": "main"}, "reference.revision, reference.path"),
        ({"data.max_prompt_length": 64, "data.max_length": 64}, "data.max_prompt_length, data.max_length"),
        ({"loss.label_smoothing": 0.5, "loss.kind": "robust"}, "loss.label_smoothing"),
        ({"loss.label_smoothing": 0.1, "loss.kind": "hinge"}, "loss.label_smoothing"),
        ({"loss.length_average": False}, "loss.length_average"),
        ({"loss.simpo_gamma": 1.0}, "loss.simpo_gamma"),
        ({"loss.kind": "orpo", "loss.beta": 0.2} | NO_REFERENCE, "loss.beta"),
        ({"loss.kind": "nca_pair", "loss.divergence": "js"}, "loss.divergence"),
        ({"loss.divergence": "js", "loss.alpha_coefficient": 0.3}, "loss.alpha_coefficient, loss.divergence"),
        (
            {"loss.terms": [{"kind": "sigmoid"}, {"kind": "nca_pair"}], "loss.divergence": "js"},
            "loss.divergence",
        ),
        ({"loss.kind": "sft", "loss.ld_alpha": 0.5} | NO_REFERENCE, "loss.ld_alpha"),
        ({"loss.kind": "aot", "loss.weighting": "wpo"}, "loss.weighting"),
        ({"loss.kind": "plackett_luce", "loss.weighting": "wpo"}, "loss.weighting"),
        ({"loss.bco_delta": "running_mean"}, "loss.bco_delta"),
        ({"loss.discopop_tau": 0.1}, "loss.discopop_tau"),
        ({"loss.kind": "discopop", "loss.discopop_tau": 2.0}, "loss.discopop_tau"),
        ({"loss.dpop_lambda": 5.0}, "loss.dpop_lambda"),
        ({"loss.offset_alpha": 0.5}, "loss.offset_alpha"),
        ({"loss.orpo_lambda": 0.2}, "loss.orpo_lambda"),
        ({"loss.cpo_nll_weight": 0.5}, "loss.cpo_nll_weight"),
        ({"loss.beta_alpha": 0.5}, "loss.beta_alpha"),
        ({"loss.beta_momentum": 0.5}, "loss.beta_momentum"),
        ({"loss.kind": "exo_pair", "loss.label_smoothing": 0.0}, "loss.label_smoothing"),
        ({"loss.kind": "exo_pair", "loss.label_smoothing": 0.5}, "loss.label_smoothing"),
        ({"loss.kind": "sft", "loss.reference_free": True} | NO_REFERENCE, "loss.reference_free"),
        ({"loss.terms": [{"kind": "sigmoid", "weight": 0.0}]}, "loss.terms[0].weight"),
        ({"loss.terms": [{"kind": "sigmoid"}, {"kind": "sigmoid"}]}, "loss.terms[1].kind"),
        ({"loss.terms": [{"kind": "sigmoid"}], "loss.kind": "ipo"}, "loss.kind, loss.terms"),
        ({"loss.kind": "simpo", "reference.mode": "cached"}, "reference.mode"),
        ({"loss.reference_free": True, "reference.mode": "live"}, "reference.mode"),
        (
            {"reference.mode": "live", "reference.micro_batch_tokens": 64},
            "reference.micro_batch_tokens, reference.mode",
        ),
        (
            {"reference.mode": "live", "reference.rows_per_shard": 64},
            "reference.rows_per_shard, reference.mode",
        ),
        (
            {"loss.kind": "sft", "reference.audit_pairs": 4} | NO_REFERENCE,
            "reference.audit_pairs, reference.mode",
        ),
        (
            {"loss.kind": "sft", "reference.micro_batch_tokens": 64} | NO_REFERENCE,
            "reference.micro_batch_tokens, reference.mode",
        ),
        ({"loss.kind": "sft", "reference.path": "m"} | NO_REFERENCE, "reference.path, reference.mode"),
        (
            {"loss.kind": "sft", "reference.offload": "cpu"} | NO_REFERENCE,
            "reference.offload, reference.mode",
        ),
        ({"optim.betas": [0.9]}, "optim.betas"),
        ({"optim.betas": [0.9, 1.0]}, "optim.betas[1]"),
        ({"trainer.eval_every": 10}, "trainer.eval_every, data.eval"),
        ({"trainer.eval_at_start": True}, "trainer.eval_at_start, data.eval"),
        (
            {"parallelism.kind": "zero2", "parallelism.offload_parameters": "cpu"},
            "parallelism.offload_parameters, parallelism.kind",
        ),
        (
            {"parallelism.kind": "ddp", "parallelism.offload_optimizer": "cpu"},
            "parallelism.offload_optimizer, parallelism.kind",
        ),
    ],
)
def test_refused(values: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(values)
    assert caught.value.where == where
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model.gradient_checkpointing": "full", "model.compile": True},
        {"model.gradient_checkpointing": 2, "model.liger": True},
        {"data.train": [{"path": "a", "format": "text"}, "b"], "data.ranked": "all_pairs"},
        {"loss.label_smoothing": 0.49},
        {"loss.kind": "robust", "loss.label_smoothing": 0.4},
        {"loss.kind": "ipo", "loss.length_average": False},
        {"loss.kind": "simpo", "loss.simpo_gamma": 1.0} | NO_REFERENCE,
        {"loss.reference_free": True} | NO_REFERENCE,
        {"loss.terms": [{"kind": "sigmoid"}, {"kind": "sft", "weight": 0.1}]},
        {"loss.terms": [{"kind": "ipo"}, {"kind": "sft", "weight": -0.1}], "loss.kind": "ipo"},
        {"loss.terms": [{"kind": "sigmoid"}, {"kind": "sft"}], "loss.divergence": "js"},
        {"loss.kind": "ipo", "loss.divergence": "alpha", "loss.alpha_coefficient": 0.3},
        {"loss.kind": "beta_dpo", "loss.weighting": "wpo", "loss.ld_alpha": 0.2},
        {"loss.kind": "exo_pair"},
        {"loss.kind": "bco_pair", "loss.bco_delta": "running_mean"},
        {"data.max_prompt_length": 63, "data.max_length": 64},
        {"parallelism.kind": "zero2", "parallelism.offload_optimizer": "cpu"},
        {"parallelism.offload_parameters": "cpu", "parallelism.offload_optimizer": "cpu"},
        {"trainer.eval_every": 10, "trainer.eval_at_start": True, "data.eval": ["b.jsonl"]},
        {"optim.betas": [0.0, 0.999], "optim.warmup_ratio": 1.0, "data.max_bad_share": 1.0},
    ],
)
def test_accepted(values: dict[str, Any]) -> None:
    configured(values)


@pytest.mark.parametrize("kind", LossKind)
def test_every_kind_says_whether_it_needs_a_reference(kind: LossKind) -> None:
    """A kind runs with exactly one of: a reference, none."""
    fits, other = ("cached", "none") if KINDS[kind].needs_reference else ("none", "cached")
    configured({"loss.kind": kind.name, "reference.mode": fits})
    with pytest.raises(ConfigError, match="reference"):
        configured({"loss.kind": kind.name, "reference.mode": other})


def test_a_term_that_needs_a_reference_makes_the_loss_need_it() -> None:
    with pytest.raises(ConfigError, match="needs a reference"):
        configured({"loss.terms": [{"kind": "sft"}, {"kind": "sigmoid"}]} | NO_REFERENCE)


@pytest.mark.parametrize(("old", "new"), [(True, "full"), (False, "none")])
def test_checkpointing_told_as_before_names_its_new_word(old: bool, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured({"model.gradient_checkpointing": old})
    assert caught.value.remedy == f"set model.gradient_checkpointing={new}"
