"""Every bound declared at a field is checked, with the key and the range in the error."""

import re
from typing import Any

import pytest

from dpo_dist.config.data import SourceConfig
from dpo_dist.config.keys import all_keys, as_written
from dpo_dist.config.losses import LossKind
from dpo_dist.config.schema import AdapterConfig
from dpo_dist.foundation.errors import ConfigError
from tests.unit.config.support import configured

BOUNDED = {name: row.bounds for name, row in all_keys().items() if row.bounds and "[]" not in name}
OUT_OF_RANGE = {
    "data.max_length": 1,
    "data.eval_share": 1.0,
    "loss.beta": float("nan"),
    "loss.label_smoothing": 0.5,
    "loss.discopop_tau": 2.0,
    "optim.lr": float("inf"),
    "optim.warmup_ratio": 1.5,
    "trainer.epochs": 0.0,
    "parallelism.timeout_seconds": 10**8,
    "pairs.top_p": 1.1,
    "trainer.global_batch_pairs": 10**20,
}
IN_MAPPINGS: dict[str, dict[str, Any]] = {
    "data.train[0].weight": {"data.train": [{"path": "a", "weight": 0}]},
    "data.eval[0].weight": {"data.eval": [{"path": "a", "weight": 0}]},
    "data.train[0].limit": {"data.train": [{"path": "a", "limit": 0}]},
    "data.eval[1].limit": {"data.eval": ["a", {"path": "b", "limit": 0}]},
    "evaluation.data[0].weight": {"evaluation.data": [{"path": "a", "weight": 0}]},
    "evaluation.data[0].limit": {"evaluation.data": [{"path": "a", "limit": 0}]},
    "data.train[1].weight": {"data.train": ["a", {"path": "b", "weight": 1e18}]},
    "model.adapter.r": {"model.adapter": {"r": 0}},
    "model.adapter.alpha": {"model.adapter": {"alpha": 0}},
    "optim.betas[1]": {"optim.betas": [0.9, 1.0]},
    "export.average[1].weight": {"export.average": ["a", {"path": "b", "weight": 0.0}]},
}
EMPTY: dict[str, Any] = {
    "data.train[0].path": {"data.train": [{"path": " "}]},
    "data.eval[0].path": {"data.eval": [""]},
}


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE.items())
def test_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match="is out of range") as caught:
        configured({key: value})
    assert caught.value.where == key
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("key", BOUNDED)
def test_each_declared_bound_is_checked(key: str) -> None:
    for sign, text in re.findall(r"([<>]=?) (\S+)", BOUNDED[key]):
        bound = int(float(text)) if float(text).is_integer() else float(text)
        outside = {"<": bound, ">": bound, "<=": bound + 1, ">=": bound - 1}[sign]
        with pytest.raises(ConfigError, match="is out of range"):
            configured({key: outside})


@pytest.mark.parametrize(("where", "values"), IN_MAPPINGS.items(), ids=str)
def test_out_of_range_inside_of_lists_and_mappings(where: str, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is out of range") as caught:
        configured(values)
    assert caught.value.where == where


@pytest.mark.parametrize("label", ["", "a/b", "a b", "<b>", "a\n"])
def test_a_label_is_part_of_a_name(label: str) -> None:
    with pytest.raises(ConfigError, match="no such value") as caught:
        configured({"data.train": ["a", {"path": "b", "label": label}]})
    assert caught.value.where == "data.train[1].label"
    configured({"data.train": [{"path": "b", "label": "math_2.1+数学-x"}]})


def test_null_is_named_where_the_key_accepts_it() -> None:
    with pytest.raises(ConfigError) as caught:
        configured({"trainer.max_steps": 0})
    assert (caught.value.got, caught.value.expected) == ("0", ">= 1 or null")
    assert caught.value.remedy.endswith(", or null")


@pytest.mark.parametrize(
    "key", ["run.dir", "run.root", "model.path", "data.cache", "export.output", "reference.path"]
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
