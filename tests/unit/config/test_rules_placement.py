"""Where the reference lies, in what precision, and whether it moves: what does not go together is refused."""

import importlib.util
from typing import Any

import pytest

from dpo_dist.config.identity import run_digest
from dpo_dist.config.load import load_run_config
from dpo_dist.config.loss_kinds import SyncReferenceConfig
from dpo_dist.config.schema import Quantization
from dpo_dist.errors import ConfigError
from dpo_dist.model.optional_packages import check_bitsandbytes

RUN = ["model.path=m", "data.train=[a.jsonl]"]
LIVE = "reference.mode=live"
ADAPTER = "model.adapter={r: 8}"
EVERY = "loss.sync_reference.every=2"
NVME = ["reference.offload=nvme", "reference.nvme_path=/nvme"]


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([LIVE, "loss.sync_reference.every=0"], "loss.sync_reference.every"),
        ([LIVE, EVERY, "loss.sync_reference.mixup=0"], "loss.sync_reference.mixup"),
        ([LIVE, EVERY, "loss.sync_reference.mixup=1.1"], "loss.sync_reference.mixup"),
        ([LIVE, "loss.sync_reference.mixup=0.5"], "loss.sync_reference"),
        ([EVERY], "loss.sync_reference.every, reference.mode"),
        ([EVERY, "loss=simpo", "reference=none"], "loss.sync_reference.every, reference.mode"),
        ([LIVE, EVERY, "reference.quantization=nf4"], "loss.sync_reference.every, reference.quantization"),
        ([LIVE, EVERY, *NVME], "loss.sync_reference.every, reference.offload"),
        ([LIVE, EVERY, ADAPTER], "loss.sync_reference.every, model.adapter"),
        (
            [ADAPTER, "model.quantization=nf4", "parallelism=ddp", "reference=cached"],
            "reference.quantization, model.quantization",
        ),
        (["reference.offload=nvme"], "reference.offload, reference.nvme_path"),
        (["reference.nvme_path=/nvme"], "reference.offload, reference.nvme_path"),
        (["reference.offload=cpu", "reference.nvme_path=/nvme"], "reference.offload, reference.nvme_path"),
        ([*NVME, "model.compile=true"], "model.compile, reference.offload"),
        (["parallelism.offload_parameters=nvme"], "parallelism.offload_parameters"),
        (["parallelism.offload_optimizer=nvme"], "parallelism.offload_optimizer"),
        (
            ["reference.quantization=int8", "reference.offload=cpu"],
            "reference.quantization, reference.offload",
        ),
        (
            ["reference.quantization=int8", "loss=simpo", "reference=none"],
            "reference.quantization, reference.mode",
        ),
        (["reference.quantization=nf4", "model.compile=true"], "model.compile, reference.quantization"),
        ([*NVME, "loss=simpo", "reference=none"], "reference.offload, reference.mode"),
    ],
)
def test_refused(overrides: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*RUN, *overrides])
    assert caught.value.where == where
    assert caught.value.remedy


@pytest.mark.parametrize(
    "overrides",
    [
        NVME,
        [LIVE, *NVME],
        [ADAPTER, "model.quantization=nf4", "parallelism=ddp"],
        [ADAPTER, "model.quantization=nf4", "parallelism=ddp", "reference.quantization=nf4"],
        ["reference.quantization=nf4"],
        [LIVE, "reference.quantization=int8"],
        [LIVE, EVERY, "loss.sync_reference.mixup=1", "reference.offload=cpu"],
    ],
)
def test_accepted(overrides: list[str]) -> None:
    load_run_config([*RUN, *overrides])


def digest(*overrides: str) -> str:
    return run_digest(load_run_config([*RUN, LIVE, *overrides]))


def test_what_changes_the_reference_s_values_changes_the_run_and_where_it_lies_does_not() -> None:
    assert len({digest(), digest(EVERY), digest("reference.quantization=nf4")}) == 3
    assert digest(*NVME) == digest()


def test_sync_can_be_written_as_one_mapping() -> None:
    config = load_run_config([*RUN, LIVE, "loss.sync_reference={every: 512, mixup: 0.3}"])
    assert config.loss.sync_reference == SyncReferenceConfig(512, 0.3)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.sync_reference.evry=2", "loss.sync_reference.every"),
        ("loss.sync_reference={evry: 2}", "loss.sync_reference.every"),
        ("loss.sync_reference.every=often", "a whole number or null"),
        ("reference.quantization=int4", "one of nf4, int8 or null"),
    ],
)
def test_a_slip_names_what_was_meant(override: str, expected: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*RUN, LIVE, override])
    assert caught.value.expected == expected


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_key_that_needs_it_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_bitsandbytes(Quantization.nf4, "reference.quantization")
    assert caught.value.where == "reference.quantization"
    assert "dpo-dist[quantization]" in str(caught.value.remedy)
