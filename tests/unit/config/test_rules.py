"""Values that contradict each other are an error with keys and a remedy (law L5); others are accepted."""

import contextlib
from typing import Any

import pytest

from dpo_dist.config import load
from dpo_dist.config.keys import all_keys, choices
from dpo_dist.config.losses import KINDS, LossKind
from dpo_dist.config.rules import RULES
from dpo_dist.foundation.errors import ConfigError
from tests.support.own_loss import function_of
from tests.unit.config.support import check_refused, configured
from tests.unit.config.test_rules_reference import NO_REFERENCE, REFUSED_REFERENCES

ADAPTER = {"model.adapter": {"r": 8}}
QUANTIZED = ADAPTER | {"model.quantization": "nf4", "reference.mode": "adapter", "parallelism.kind": "ddp"}

_EVALUATED = {"data.eval_share": 0.1, "trainer.eval_every": 10}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"run.name": ""}, "run.name"),
    ({"run.name": "a/b"}, "run.name"),
    ({"model.dtype": "fp32", "model.attention": "varlen"}, "model.attention, model.dtype"),
    ({"model.gradient_checkpointing": False}, "model.gradient_checkpointing"),
    ({"model.gradient_checkpointing": True}, "model.gradient_checkpointing"),
    ({"model.gradient_checkpointing": "some"}, "model.gradient_checkpointing"),
    ({"model.gradient_checkpointing": 1}, "model.gradient_checkpointing"),
    ({"model.compile": True, "model.liger": True}, "model.compile, model.liger"),
    ({"model.activation_offload": True}, "model.activation_offload, model.gradient_checkpointing"),
    ({"trainer.deterministic": True, "model.liger": True}, "trainer.deterministic, model.liger"),
    ({"loss.router.aux_coefficient": "own"}, "loss.router.aux_coefficient"),
    ({"loss.router.aux_coefficient": 0}, "loss.router.aux_coefficient"),
    (
        {"loss.router.z_coefficient": 0.1, "model.compile": True},
        "model.compile, loss.router.aux_coefficient, loss.router.z_coefficient",
    ),
    ({"optim.warmup_steps": 10, "optim.warmup_ratio": 0.03}, "optim.warmup_steps, optim.warmup_ratio"),
    ({"optim.warmup_steps": 11, "trainer.max_steps": 10}, "optim.warmup_steps, trainer.max_steps"),
    (
        {"optim.schedule": "constant_with_warmup", "optim.warmup_ratio": 0},
        "optim.schedule, optim.warmup_ratio, optim.warmup_steps",
    ),
    (
        {"optim.schedule": "constant_with_warmup", "optim.warmup_steps": 0},
        "optim.schedule, optim.warmup_ratio, optim.warmup_steps",
    ),
    ({"optim.min_lr_ratio": 0.1, "optim.schedule": "constant"}, "optim.min_lr_ratio, optim.schedule"),
    ({"optim.min_lr_ratio": 0.1, "optim.schedule": "inverse_sqrt"}, "optim.min_lr_ratio, optim.schedule"),
    ({"trainer.ema_decay": 0.9, "trainer.keep_last": 0}, "trainer.ema_decay, trainer.keep_last"),
    (
        {"optim.kind": "adamw_8bit", "parallelism.offload_optimizer": "cpu"},
        "optim.kind, parallelism.offload_optimizer",
    ),
    ({"export.weights": "ema"}, "export.weights, trainer.ema_decay"),
    ({"data.eval": [{"path": "b", "weight": 2}]}, "data.eval"),
    (
        {"data.train": [{"path": "a", "format": "text"}], "data.ranked": "all_pairs"},
        "data.ranked, data.train",
    ),
    ({"data.max_prompt_length": 64, "data.max_length": 64}, "data.max_prompt_length, data.max_length"),
    ({"loss.label_smoothing": 0.5, "loss.kind": "robust"}, "loss.label_smoothing"),
    ({"loss.label_smoothing": 0.1, "loss.kind": "hinge"}, "loss.label_smoothing, loss.kind"),
    ({"loss.length_average": False}, "loss.length_average, loss.kind"),
    ({"loss.simpo_gamma": 1.0}, "loss.simpo_gamma, loss.kind"),
    ({"loss.kind": "orpo", "loss.beta": 0.2} | NO_REFERENCE, "loss.beta, loss.kind"),
    ({"loss.kind": "nca_pair", "loss.divergence": "js"}, "loss.divergence, loss.kind"),
    ({"loss.divergence": "js", "loss.alpha_coefficient": 0.3}, "loss.alpha_coefficient, loss.divergence"),
    (
        {"loss.terms": [{"kind": "sigmoid"}, {"kind": "nca_pair"}], "loss.divergence": "js"},
        "loss.divergence, loss.terms",
    ),
    (
        {"loss.terms": [{"kind": "sigmoid"}, {"kind": "aot"}], "loss.weighting": "wpo"},
        "loss.weighting, loss.terms",
    ),
    ({"loss.kind": "sft", "loss.ld_alpha": 0.5} | NO_REFERENCE, "loss.ld_alpha, loss.kind"),
    ({"loss.kind": "aot", "loss.weighting": "wpo"}, "loss.weighting, loss.kind"),
    ({"loss.kind": "plackett_luce", "loss.weighting": "wpo"}, "loss.weighting, loss.kind"),
    ({"loss.bco_delta": "running_mean"}, "loss.bco_delta, loss.kind"),
    ({"loss.discopop_tau": 0.1}, "loss.discopop_tau, loss.kind"),
    ({"loss.kind": "discopop", "loss.discopop_tau": 2.0}, "loss.discopop_tau"),
    ({"loss.dpop_lambda": 5.0}, "loss.dpop_lambda, loss.kind"),
    ({"loss.offset_alpha": 0.5}, "loss.offset_alpha, loss.kind"),
    ({"loss.orpo_lambda": 0.2}, "loss.orpo_lambda, loss.kind"),
    ({"loss.cpo_nll_weight": 0.5}, "loss.cpo_nll_weight, loss.kind"),
    ({"loss.beta_alpha": 0.5}, "loss.beta_alpha, loss.kind"),
    ({"loss.beta_momentum": 0.5}, "loss.beta_momentum, loss.kind"),
    ({"loss.kind": "exo_pair", "loss.label_smoothing": 0.0}, "loss.label_smoothing, loss.kind"),
    ({"loss.kind": "exo_pair", "loss.label_smoothing": 0.5}, "loss.label_smoothing"),
    ({"loss.kind": "sft", "loss.reference_free": True} | NO_REFERENCE, "loss.reference_free, loss.kind"),
    ({"loss.terms": [{"kind": "sigmoid"}, {"kind": "sigmoid"}]}, "loss.terms"),
    ({"loss.terms": [{"kind": "sigmoid"}], "loss.kind": "ipo"}, "loss.kind, loss.terms"),
    ({"loss.kind": "custom", "run.dir": "here"}, "loss.function, loss.kind"),
    ({"loss.function": "my_losses:my_loss"}, "loss.function, loss.kind"),
    ({"optim.betas": [0.9]}, "optim.betas"),
    ({"loss.terms": [{"kind": "sigmoid", "weight": 0}]}, "loss.terms"),
    ({"data.train": ["a", {"path": "a", "weight": 2}]}, "data.train"),
    ({"data.eval": ["b", "b"]}, "data.eval"),
    ({"data.eval": ["b.jsonl"], "data.eval_share": 0.1}, "data.eval, data.eval_share"),
    ({"data.eval_share": 0.1, "data.drop_eval_prompts": True}, "data.drop_eval_prompts, data.eval"),
    ({"trainer.eval_every": 10}, "trainer.eval_every, data.eval"),
    ({"samples.prompts": 4}, "samples.prompts, data.eval"),
    ({"samples.max_new_tokens": 9}, "samples.max_new_tokens, samples.prompts"),
    ({"samples.temperature": 0.0}, "samples.temperature, samples.prompts"),
    ({"trainer.keep_best": "eval_loss"}, "trainer.keep_best, data.eval"),
    ({"trainer.keep_best": "eval_loss", "data.eval_share": 0.1}, "trainer.keep_best, trainer.eval_every"),
    ({"trainer.keep_best": "loss", **_EVALUATED}, "trainer.keep_best"),
    (
        {"trainer.keep_best": "eval_logps/chosen", **_EVALUATED},
        "trainer.keep_best",
    ),
    (
        {"parallelism.kind": "zero2", "parallelism.offload_parameters": "cpu"},
        "parallelism.offload_parameters, parallelism.kind",
    ),
    (
        {"parallelism.kind": "ddp", "parallelism.offload_optimizer": "cpu"},
        "parallelism.offload_optimizer, parallelism.kind",
    ),
    ({"model.adapter": {"dropout": 0.05}}, "model.adapter.dropout"),
    ({"model.adapter": {"target_modules": []}}, "model.adapter.target_modules"),
    ({"model.adapter": {"target_modules": "all_linear"}}, "model.adapter.target_modules"),
    (
        {"model.adapter": {"modules_to_save": ["norm", "q_proj"], "target_modules": ["q_proj"]}},
        "model.adapter.modules_to_save, model.adapter.target_modules",
    ),
    ({"model.adapter": {"modules_to_save": ["norm", "norm"]}}, "model.adapter.modules_to_save"),
    ({"model.adapter": {"on_top": True}}, "model.adapter.on_top, model.adapter.path"),
    (
        {"model.adapter": {"on_top": True, "path": "sft", "variant": "dora"}},
        "model.adapter.on_top, model.adapter.variant",
    ),
    ({"model.adapter": {"path": "sft"}, "pairs.rounds": 2}, "model.adapter, pairs.rounds"),
    ({"export.merge": True}, "export.merge, model.adapter"),
    (
        {"export.average": ["step-000001", "b"], "export.checkpoint": "best"},
        "export.checkpoint, export.average",
    ),
    ({"export.average": ["step-000001"]}, "export.average"),
    (
        {"export.average": ["a", "b"], "export.merge": True, "model.adapter": {"r": 2}},
        "export.average, export.merge, export.weights",
    ),
    ({"model.quantization": "int8"}, "model.quantization, model.adapter"),
    (QUANTIZED | {"parallelism.kind": "zero3"}, "model.quantization, parallelism.kind"),
    (QUANTIZED | {"parallelism.kind": "zero2"}, "model.quantization, parallelism.kind"),
    (
        QUANTIZED | {"model.adapter": {"variant": "dora"}, "model.quantization": "int8"},
        "model.adapter.variant, model.quantization",
    ),
    (QUANTIZED | {"model.compile": True}, "model.compile, model.quantization"),
    ({"data.template_arguments": 3}, "data.template_arguments"),
    ({"data.trained_roles": []}, "data.trained_roles"),
    ({"data.trained_roles": ["assistant", "gpt"]}, "data.trained_roles"),
    ({"data.trained_roles": ["assistants"]}, "data.trained_roles"),
    ({"data.untrained": ["empty_thought"]}, "data.untrained"),
    ({"data.untrained": ["thoughts", "...</note>"]}, "data.untrained"),
    ({"evaluation.model": ["a", "a"]}, "evaluation.model"),
    ({"evaluation.model": []}, "evaluation.model"),
    ({"evaluation.data": ["b", "b"]}, "evaluation.data"),
    ({"evaluation.data": [{"path": "b", "weight": 2}]}, "evaluation.data"),
    ({"parallelism.offload_parameters": "nvme"}, "parallelism.offload_parameters"),
    ({"parallelism.offload_optimizer": "nvme"}, "parallelism.offload_optimizer"),
]


@pytest.mark.parametrize(("values", "where"), REFUSED)
def test_refused(values: dict[str, Any], where: str) -> None:
    check_refused(values, where)


RULES_OF_OPTIONS = {rule: rule.keys.split()[0] for rule in RULES if rule.why.endswith("with this loss")}


@pytest.mark.parametrize("key", RULES_OF_OPTIONS.values())
def test_an_option_of_another_kind_is_refused(key: str) -> None:
    row, option = all_keys()[key], key.removeprefix("loss.")
    kind = next(kind for kind, facts in KINDS.items() if option not in facts.options)
    reference = {} if KINDS[kind].needs_reference else NO_REFERENCE
    value = row.default / 2 if isinstance(row.default, float) else [not row.default, *choices(row.type)][-1]
    value = 0.1 if row.default is None else value
    check_refused({"loss.kind": kind.name, key: value} | reference, f"{key}, loss.kind")


def test_every_rule_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "check", lambda *_: None)
    configurations = []
    for values, _ in [*REFUSED, *REFUSED_REFERENCES]:
        with contextlib.suppress(ConfigError):  # refused by the schema
            configurations.append(configured(values))
    broken = {rule for rule in RULES for config in configurations if rule.broken(config)}
    assert [(rule.keys, rule.why) for rule in RULES if rule not in {*broken, *RULES_OF_OPTIONS}] == []


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
        {"trainer.eval_every": 10, "data.eval": ["b.jsonl"]},
        {"trainer.eval_every": 10, "samples.prompts": 4, "data.eval_share": 0.1},
        {"data.eval": ["b.jsonl"], "data.drop_eval_prompts": True},
        {"optim.warmup_steps": 10, "optim.warmup_ratio": 0, "trainer.max_steps": 10},
        {"optim.warmup_steps": 10, "optim.schedule": "constant_with_warmup"},
        {"optim.min_lr_ratio": 0.1, "optim.schedule": "linear"},
        {"optim.betas": [0.0, 0.999], "optim.warmup_ratio": 1.0, "data.max_bad_share": 1.0},
    ],
)
def test_accepted(values: dict[str, Any]) -> None:
    configured(values)


@pytest.mark.parametrize("kind", LossKind)
def test_every_kind_says_whether_it_needs_a_reference(kind: LossKind) -> None:
    """A kind runs with exactly one of: a reference, none."""
    fits, other = ("cached", "none") if KINDS[kind].needs_reference else ("none", "cached")
    loss = {"loss.kind": kind.name, "loss.function": function_of(kind)}
    configured({**loss, "reference.mode": fits})
    with pytest.raises(ConfigError, match="reference"):
        configured({**loss, "reference.mode": other})


def test_a_term_that_needs_a_reference_makes_the_loss_need_it() -> None:
    with pytest.raises(ConfigError, match="needs a reference"):
        configured({"loss.terms": [{"kind": "sft"}, {"kind": "sigmoid"}]} | NO_REFERENCE)


@pytest.mark.parametrize(("old", "new"), [(True, "full"), (False, "none")])
def test_checkpointing_of_earlier_versions_names_its_new_value(old: bool, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured({"model.gradient_checkpointing": old})
    assert caught.value.remedy == f"did you mean model.gradient_checkpointing={new}?"
