"""Values about the reference model that contradict each other are an error; others are accepted."""

import importlib.util
from typing import Any

import pytest

from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import SyncReferenceConfig
from dpo_dist.config.schema import Quantization
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.optional_packages import check_bitsandbytes
from tests.unit.config.support import check_refused, configured

RUN = ["model.path=m", "data.train=[a.jsonl]", "reference.mode=live"]
NO_REFERENCE = {"reference.mode": "none"}
LIVE = {"reference.mode": "live"}
CACHED = {"reference.mode": "cached"}
ADAPTER = {"model.adapter": {"r": 8}}
WITH_ADAPTER_OFF = ADAPTER | {"reference.mode": "adapter"}
SFT = {"loss.kind": "sft"} | NO_REFERENCE
EVERY = {"loss.sync_reference.every": 2}
NVME = {"reference.offload": "nvme", "reference.nvme_path": "/nvme"}
NF4 = ADAPTER | {"model.quantization": "nf4", "parallelism.kind": "ddp"}

UNUSED = "reference.mode, loss.kind, loss.reference_free"

REFUSED_REFERENCES: list[tuple[dict[str, Any], str]] = [
    (NO_REFERENCE, "reference.mode, loss.kind"),
    ({"loss.terms": [{"kind": "sft"}, {"kind": "sigmoid"}]} | NO_REFERENCE, "reference.mode, loss.terms"),
    ({"loss.kind": "simpo", "reference.mode": "cached"}, UNUSED),
    ({"loss.reference_free": True, "reference.mode": "live"}, UNUSED),
    (
        {"reference.mode": "live", "reference.rows_per_shard": 64},
        "reference.rows_per_shard, reference.mode",
    ),
    ({"loss.kind": "sft", "reference.path": "m"} | NO_REFERENCE, "reference.path, reference.mode"),
    ({"loss.kind": "sft", "reference.mode": "auto", "reference.path": "m"}, "reference.path, reference.mode"),
    (
        {"loss.kind": "sft", "reference.offload": "cpu"} | NO_REFERENCE,
        "reference.offload, reference.mode",
    ),
    (
        {"reference.mode": "live", "reference.numerics": "tolerant"},
        "reference.numerics, reference.mode",
    ),
    (LIVE | {"loss.sync_reference.every": 0}, "loss.sync_reference.every"),
    (LIVE | EVERY | {"loss.sync_reference.mixup": 0}, "loss.sync_reference.mixup"),
    (LIVE | EVERY | {"loss.sync_reference.mixup": 1.1}, "loss.sync_reference.mixup"),
    (
        LIVE | {"loss.sync_reference.mixup": 0.5},
        "loss.sync_reference.mixup, loss.sync_reference.every",
    ),
    (EVERY, "loss.sync_reference.every, reference.mode"),
    (EVERY | SFT, "loss.sync_reference.every, reference.mode"),
    (LIVE | EVERY | {"reference.quantization": "nf4"}, "loss.sync_reference.every, reference.quantization"),
    (LIVE | EVERY | NVME, "loss.sync_reference.every, reference.offload"),
    (LIVE | EVERY | ADAPTER, "loss.sync_reference.every, model.adapter"),
    ({"reference.mode": "adapter"}, "reference.mode, model.adapter"),
    (WITH_ADAPTER_OFF | {"reference.path": "other"}, "reference.path, reference.mode"),
    (WITH_ADAPTER_OFF | {"reference.offload": "cpu"}, "reference.offload, reference.mode"),
    (WITH_ADAPTER_OFF | {"loss.kind": "simpo"}, UNUSED),
    (NF4 | CACHED, "reference.quantization, model.quantization"),
    (NF4 | LIVE, "reference.quantization, model.quantization"),
    ({"reference.offload": "nvme"}, "reference.offload, reference.nvme_path"),
    ({"reference.nvme_path": "/nvme"}, "reference.nvme_path, reference.offload"),
    ({"reference.offload": "cpu", "reference.nvme_path": "/nvme"}, "reference.nvme_path, reference.offload"),
    (SFT | {"reference.nvme_path": "/nvme"}, "reference.nvme_path, reference.mode"),
    (SFT | NVME, "reference.offload, reference.mode"),
    (NVME | {"model.compile": True}, "model.compile, reference.offload"),
    (
        {"reference.quantization": "int8", "reference.offload": "cpu"},
        "reference.quantization, reference.offload",
    ),
    (SFT | {"reference.quantization": "int8"}, "reference.quantization, reference.mode"),
    (SFT | {"reference.path": "m"}, "reference.path, reference.mode"),
    ({"reference.quantization": "nf4", "model.compile": True}, "model.compile, reference.quantization"),
]


@pytest.mark.parametrize(("values", "where"), REFUSED_REFERENCES)
def test_refused(values: dict[str, Any], where: str) -> None:
    check_refused(values, where)


@pytest.mark.parametrize(
    "values",
    [
        NVME,
        LIVE | NVME,
        NF4,
        NF4 | {"reference.quantization": "nf4"},
        {"reference.quantization": "nf4"},
        LIVE | {"reference.quantization": "int8"},
        LIVE | EVERY | {"loss.sync_reference.mixup": 1, "reference.offload": "cpu"},
        CACHED | {"reference.rows_per_shard": 4},
    ],
)
def test_accepted(values: dict[str, Any]) -> None:
    configured(values)


def digest(*overrides: str) -> str:
    return run_digest(load_run_config([*RUN, *overrides]))


def test_options_that_change_reference_log_probs_are_in_the_digest_and_offload_is_not() -> None:
    every = "loss.sync_reference.every=2"
    assert len({digest(), digest(every), digest("reference.quantization=nf4")}) == 3
    assert digest("reference.offload=nvme", "reference.nvme_path=/nvme") == digest()


def test_sync_can_be_written_as_one_mapping() -> None:
    config = load_run_config([*RUN, "loss.sync_reference={every: 512, mixup: 0.3}"])
    assert config.loss.sync_reference == SyncReferenceConfig(512, 0.3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.sync_reference.evry=2", "loss.sync_reference.every"),
        ("loss.sync_reference={evry: 2}", "loss.sync_reference.every"),
        ("loss.sync_reference.every=often", "a whole number or null"),
        ("reference.quantization=int4", "one of int8, nf4 or null"),
    ],
)
def test_a_slip_names_the_intended_key_or_value(override: str, expected: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*RUN, override])
    assert caught.value.expected == expected


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_key_that_needs_it_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_bitsandbytes(Quantization.nf4, "reference.quantization")
    assert caught.value.where == "reference.quantization"
    assert "dpo-dist[quantization]" in str(caught.value.remedy)
