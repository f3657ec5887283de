"""Every bound declared at a field is checked, with the key and the range in the error."""

import re
from dataclasses import fields
from typing import Any

import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.keys import all_keys, as_written
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import AdapterConfig
from dpo_dist.foundation.errors import ConfigError
from tests.unit.config.support import configured

OUT_OF_RANGE = {
    "data.max_length": [1, 0, -5],
    "data.max_prompt_length": [0],
    "data.max_bad_share": [-0.1, 1.1],
    "data.eval_share": [-0.1, 1.0],
    "data.eval_seed": [-1, 2**63],
    "data.processes": [0],
    "loss.beta": [0.0, -0.1, float("inf"), float("nan")],
    "loss.label_smoothing": [-0.1, 0.5, 0.9, 1.0],
    "loss.alpha_coefficient": [-11.0, 11.0],
    "loss.discopop_tau": [0.0, 2.0],
    "loss.dpop_lambda": [-1.0],
    "loss.offset_alpha": [-1.0],
    "loss.simpo_gamma": [-1.0],
    "loss.orpo_lambda": [-1.0],
    "loss.cpo_nll_weight": [-1.0],
    "loss.beta_alpha": [-1.0],
    "loss.beta_momentum": [-0.1, 1.0],
    "loss.ld_alpha": [-0.1, 1.1],
    "loss.sync_reference.every": [0],
    "loss.sync_reference.mixup": [0.0, 1.1],
    "loss.router.z_coefficient": [0.0, -0.1],
    "reference.micro_batch_tokens": [0],
    "reference.rows_per_shard": [0],
    "reference.audit_pairs": [-1],
    "optim.lr": [0.0, -1e-6, float("nan")],
    "optim.warmup_ratio": [-0.1, 1.5],
    "optim.warmup_steps": [-1],
    "optim.min_lr_ratio": [-0.1, 1.0],
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
    "trainer.keep_best_count": [0],
    "trainer.max_bad_steps": [-1],
    "trainer.ema_decay": [0.0, 1.0],
    "trainer.seed": [-1],
    "trainer.stop_after_steps": [0],
    "trainer.max_seconds": [0.0],
    "model.mlp_tile_tokens": [0],
    "parallelism.sequence_parallel": [0, -1],
    "parallelism.timeout_seconds": [0, 10**8],
    "console.seconds": [0, -1],
    "evaluation.resamples": [-1],
    "compare.prompts": [0],
    "compare.max_new_tokens": [0],
    "compare.temperature": [-0.5],
    "compare.seed": [-1],
    "compare.batch_tokens": [0],
    "compare.part_prompts": [0],
    "compare.resamples": [-1],
    "tracking.price_per_gpu_hour": [-0.5],
    "tracking.samples": [-1, 1001],
    "doctor.shown_pairs": [-1],
    "samples.prompts": [-1],
    "samples.every": [0],
    "samples.max_new_tokens": [0],
    "samples.temperature": [-0.1],
    "samples.batch_tokens": [0],
    "pairs.limit": [0],
    "pairs.margin": [-0.5, float("nan")],
    "pairs.seed": [-1],
    "pairs.samples": [0],
    "pairs.max_new_tokens": [0],
    "pairs.temperature": [-1.0],
    "pairs.top_p": [0.0, 1.1],
    "pairs.top_k": [-1],
    "pairs.batch_tokens": [0],
    "pairs.part_prompts": [0],
    "pairs.endpoint.max_tokens": [0],
    "pairs.endpoint.timeout_seconds": [0.0],
    "pairs.endpoint.retries": [-1],
    "pairs.endpoint.parallel_requests": [0],
    "pairs.endpoint.requests_per_minute": [0],
    "pairs.prompt_parts": [0],
    "pairs.prompt_part": [-1],
    "pairs.rounds": [-1],
    "pairs.people.port": [-1, 65536],
    "pairs.people.overlap": [-0.1, 1.1],
}
IN_MAPPINGS: dict[str, dict[str, Any]] = {
    "data.train[0].weight": {"data.train": [{"path": "a", "weight": 0}]},
    "data.eval[0].weight": {"data.eval": [{"path": "a", "weight": 0}]},
    "data.train[0].limit": {"data.train": [{"path": "a", "limit": 0}]},
    "data.eval[1].limit": {"data.eval": ["a", {"path": "b", "limit": 0}]},
    "evaluation.data[0].weight": {"evaluation.data": [{"path": "a", "weight": 0}]},
    "evaluation.data[0].limit": {"evaluation.data": [{"path": "a", "limit": 0}]},
    "data.train[1].weight": {"data.train": ["a", {"path": "b", "weight": 1e18}]},
    "loss.terms[0].weight": {"loss.terms": [{"kind": "sigmoid", "weight": 0.0}]},
    "model.adapter.r": {"model.adapter": {"r": 0}},
    "model.adapter.alpha": {"model.adapter": {"alpha": 0}},
    "optim.betas[1]": {"optim.betas": [0.9, 1.0]},
    "export.average_weights[1]": {"export.average_weights": [1.0, 0.0]},
}
EMPTY: dict[str, Any] = {
    "data.train[0].path": {"data.train": [{"path": " "}]},
    "data.eval[0].path": {"data.eval": [""]},
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


def test_every_declared_bound_has_a_case() -> None:
    entries = {re.sub(r"\[\d\](?=\.)", "[]", key).removesuffix("[1]") for key in IN_MAPPINGS}
    options = {f"loss.{field.name}" for field in fields(LossConfig)}
    assert set(BOUNDED) - options == {*OUT_OF_RANGE, *entries} - options


BOUNDED = [key for key, row in all_keys().items() if str(row.bounds)]


@pytest.mark.parametrize("key", [key for key in BOUNDED if "[]" not in key])
def test_each_declared_bound_is_checked(key: str) -> None:
    row = all_keys()[key]
    bounds = (row.bounds.above, row.bounds.at_least)
    below = next(bound - (index == 1) for index, bound in enumerate(bounds) if bound is not None)
    is_list = key in ("optim.betas", "export.average_weights")
    with pytest.raises(ConfigError, match="is out of range"):
        configured({key: [below, below] if is_list else below})


@pytest.mark.parametrize(("where", "values"), IN_MAPPINGS.items(), ids=str)
def test_out_of_range_inside_of_lists_and_mappings(where: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is out of range") as caught:
        configured(values)
    assert caught.value.where == where


@pytest.mark.parametrize("label", ["", "a/b", "a b", "<b>", "a\n"])
def test_a_label_is_part_of_a_name(label: str) -> None:
    with pytest.raises(ConfigError, match="other characters") as caught:
        configured({"data.train": ["a", {"path": "b", "label": label}]})
    assert caught.value.where == "data.train[1].label"
    configured({"data.train": [{"path": "b", "label": "math_2.1+数学-x"}]})


def test_null_is_named_where_the_key_accepts_it() -> None:
    with pytest.raises(ConfigError) as caught:
        configured({"trainer.max_steps": 0})
    assert (caught.value.got, caught.value.expected) == ("0", ">= 1 or null")
    assert caught.value.remedy.endswith(", or null")


@pytest.mark.parametrize(
    "key", [row.name for row in all_keys().values() if row.filled and "[]" not in row.name]
)
def test_an_empty_path_is_not_the_current_folder(key: str) -> None:
    with pytest.raises(ConfigError, match="is empty") as caught:
        configured({key: ""})
    assert caught.value.where == key


@pytest.mark.parametrize(("where", "values"), EMPTY.items(), ids=str)
def test_an_empty_path_of_a_source_is_named_with_its_index(where: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is empty") as caught:
        configured(values)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (0.10, "0.1"),
        (LossKind.ipo, "ipo"),
        ("", "''"),
        ([], "[]"),
        ([SourceConfig("a", limit=3), "b"], "[{path: a, limit: 3}, b]"),
        (AdapterConfig(r=8), "{r: 8}"),
    ],
)
def test_values_are_shown_as_a_user_writes_them(value: object, text: str) -> None:
    assert as_written(value) == text


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("model.path", {"model.path": "~nobody-of-this-name/m"}),
        ("data.train[0].path", {"data.train": ["~nobody-of-this-name/a.jsonl"]}),
        ("export.output", {"export.output": "~nobody-of-this-name/x"}),
    ],
)
def test_a_home_folder_of_nobody_is_named(where: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="home folder is not known") as caught:
        configured(values)
    assert caught.value.where == where
    configured({"model.path": "~/m"})
