"""Step-0 check: a run starts only if its policy scores like its reference."""

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.step_batch import collate
from dpo_dist.config.losses import DistillOptions, LossConfig, LossKind
from dpo_dist.config.schema import (
    Dtype,
    ModelConfig,
    Quantization,
    ReferenceConfig,
    RunConfig,
    TeacherConfig,
    TrainerConfig,
)
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.distributed.processes.world import ExpertGroup, World
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ReferenceModelError
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from dpo_dist.training import reference as reference_module
from dpo_dist.training import teacher as teacher_module
from dpo_dist.training.reference import check_drift, choose_sample, prepare_reference
from dpo_dist.training.start.open_run import Run
from dpo_dist.training.steps.step import Objective
from dpo_dist.training.teacher import prepare_teacher
from tests.support import tiny
from tests.support.families import tiny_config
from tests.support.packing import COSTS
from tests.support.records import jsonl
from tests.support.tiny_model import write_model

CPU = torch.device("cpu")
PAIRS = 6
ROWS = [
    {"prompt": f"q {n}", "chosen": f"right {n}" * 20, "rejected": f"wrong {n}" * n}
    for n in range(1, 1 + PAIRS)
]


@dataclass
class Policy:
    """A model of fixed log-probs, which depend on the tokens; `drift` is added to one pair's responses."""

    pair: int = 0
    chosen_drift: float = 0.0
    rejected_drift: float = 0.0
    key: int = 0

    def token_logps(self, batch: PackedBatch) -> Tensor:
        logps = -1 - torch.frac(batch.targets.float() / 7)
        if len(batch.keys):
            parts = list(torch.split(logps, batch.response_tokens.tolist()))
            for number, key in enumerate(batch.keys[::2]):
                if int(key[0]) == self.key:
                    parts[2 * number] = parts[2 * number] + self.chosen_drift
                    parts[2 * number + 1] = parts[2 * number + 1] + self.rejected_drift
            logps = torch.cat(parts)
        return logps


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(None, 0, 1, CPU, ())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    folder = tmp_path_factory.mktemp("data")
    config = DataConfig(cache=str(folder / "cache"))
    written = Preparation([SourceConfig(jsonl(folder, *ROWS))], config, tiny.qwen(), "qwen").whole()
    return open_dataset(written, config)


@pytest.fixture(scope="module")
def reference(data: PreferenceDataset, tmp_path_factory: pytest.TempPathFactory) -> ReferenceProvider:
    root, space = tmp_path_factory.mktemp("store"), ReferenceFingerprint("weights", {})
    batch = collate(data, range(PAIRS))
    values = torch.split(Policy().token_logps(batch), batch.response_tokens.tolist())
    LogpStore.open(root, space).write(batch.keys, [logps.numpy() for logps in values])
    return ReferenceProvider(store=LogpStore.open(root, space))


@pytest.fixture
def check(world: World, data: PreferenceDataset, reference: ReferenceProvider) -> Any:
    def check(policy: Policy, dtype: Dtype = Dtype.fp32) -> dict[str, Any]:
        policy.key = int(data.keys[2 * policy.pair, 0])
        run = Run(RunConfig(model=ModelConfig(dtype=dtype)), world, Console(None))
        objective = Objective(LossConfig(), reference)
        sample = choose_sample(run, reference.store, [(data, np.arange(PAIRS))], "reference")
        return check_drift(run, policy.token_logps, objective, sample, COSTS)

    return check


def test_a_policy_equal_to_the_reference_passes_without_drift(check: Any) -> None:
    assert check(Policy()) == {
        "responses": 2 * PAIRS,
        "mean_token_drift": 0.0,
        "largest_token_drift": 0.0,
        "rms_response_drift": 0.0,
        "largest_response_drift": 0.0,
    }


def test_drift_is_reported_per_token_and_per_response(check: Any, data: PreferenceDataset) -> None:
    report = check(Policy(2, chosen_drift=-0.01, rejected_drift=0.02), Dtype.bf16)
    _, chosen, rejected = data.lengths(2)
    assert report["largest_token_drift"] == pytest.approx(0.02, rel=1e-3)
    assert report["mean_token_drift"] == pytest.approx(0.03 / (2 * PAIRS), rel=1e-3)
    sums = np.array([0.01 * chosen, 0.02 * rejected])
    assert report["largest_response_drift"] == pytest.approx(max(sums), rel=1e-3)
    assert report["rms_response_drift"] == pytest.approx(np.sqrt((sums**2).sum() / (2 * PAIRS)), rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "drift"),
    [(Dtype.fp32, 2e-4), (Dtype.bf16, 0.2), (Dtype.bf16, -0.2), (Dtype.bf16, float("nan"))],
)
def test_an_example_that_drifts_beyond_the_precision_is_named(
    check: Any, data: PreferenceDataset, dtype: Dtype, drift: float
) -> None:
    with pytest.raises(ReferenceModelError, match="1 of 12 sampled") as raised:
        check(Policy(4, rejected_drift=drift), dtype)
    assert str(data.origin(4)) + " response 1" in raised.value.where


def test_a_sample_has_what_was_fetched_and_a_failure_leaves_none_of_it(
    world: World,
    data: PreferenceDataset,
    reference: ReferenceProvider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pairs 0 to 2 are from here; of pair 3 one response is from `a`, of 4 and 5 both are from `b`."""
    monkeypatch.setattr(reference_module, "_CHECKED_PAIRS", 1)
    assert reference.store is not None
    space = reference.store.fingerprint
    values = reference.store.read(data.keys)
    for rows, url in ((range(7), ""), (range(7, 8), "a"), (range(8, 12), "b")):
        written = [values[row] for row in rows]
        LogpStore.open(tmp_path, space).write(data.keys[list(rows)], written, url)
    run = Run(RunConfig(model=ModelConfig(dtype=Dtype.fp32)), world, Console(None))

    def sample_of(*datasets: Any) -> tuple[set[int], set[str], Any]:
        store = LogpStore.open(tmp_path, space)
        sample = choose_sample(run, store, datasets, "reference")
        return set(sample.indices.tolist()), set(sample.urls), sample

    ours = data, np.arange(3)
    _, urls, sample = sample_of((data, np.arange(4)), (data, np.arange(4, PAIRS)))
    assert (urls, sample.unsampled) == ({"a"}, ["b"]), "it is said that b is not compared"
    every = data, np.arange(PAIRS)
    assert sample_of(ours)[1] == set()
    indices, urls, _ = sample_of(ours, every)  # the evaluation's, if only they are fetched
    assert urls == {"a", "b"}
    store = LogpStore.open(tmp_path, space)
    for seed in range(8):
        seeded = Run(replace(run.config, trainer=TrainerConfig(seed=seed)), world, Console(None))
        indices = set(choose_sample(seeded, store, [every], "reference").indices.tolist())
        assert 3 in indices
        assert indices & {4, 5}
        assert len(indices) <= 3
    indices, urls, sample = sample_of((data, np.arange(4)))
    objective = Objective(LossConfig(), ReferenceProvider(store=sample.store))
    check_drift(run, Policy().token_logps, objective, sample, COSTS)
    indices, urls, sample = sample_of(every)
    assert urls == {"b"}, "a has been compared"
    wrong = Policy(chosen_drift=1.0, key=int(data.keys[2 * max(indices), 0]))
    objective = Objective(LossConfig(), ReferenceProvider(store=sample.store))
    with pytest.raises(ReferenceModelError, match="differ from a fresh computation") as raised:
        check_drift(run, wrong.token_logps, objective, sample, COSTS)
    assert "remove b from reference.behind" in raised.value.remedy
    left = LogpStore.open(tmp_path, space).contains(data.keys)
    assert left.tolist() == 8 * [True] + 4 * [False]


@pytest.fixture
def teachers_store(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The name of the folder in the store from which a run takes what its teacher says."""
    folder = write_model(tmp_path / "model")
    smaller = Path(shutil.copytree(folder, tmp_path / "smaller"))
    settings = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] - 8}))
    names = list[str]()

    def keep(_store: Path, fingerprint: ReferenceFingerprint, _: Any) -> None:
        names.append(fingerprint.name)
        raise InterruptedError

    monkeypatch.setattr(teacher_module, "LogpStore", keep)

    def name_of(temperature: float = 1.0, *, is_smaller: bool = False, **teacher: Any) -> str:
        loss = LossConfig(LossKind.distill, options=DistillOptions(temperature=temperature))
        settings = TeacherConfig(path=str(folder), **{"k": 8, **teacher})
        config = RunConfig(model=ModelConfig(dtype=Dtype.fp32), loss=loss, teacher=settings)
        files = SimpleNamespace(folder=folder, digest="files")
        policy = SimpleNamespace(folder=smaller if is_smaller else folder)
        inputs: Any = SimpleNamespace(
            teacher_files=files, policy_files=policy, tokenizer=tiny.qwen(), processor=None
        )
        with pytest.raises(InterruptedError):
            prepare_teacher(Run(config, world, Console(None)), inputs)
        return names[-1]

    return name_of


def test_a_store_of_a_teacher_knows_everything_that_changes_its_rows(
    teachers_store: Callable[..., str],
) -> None:
    others = [
        {"k": 9},
        {"temperature": 2.0},
        {"is_smaller": True},  # a student with fewer token ids
    ]
    name = teachers_store()
    assert teachers_store() == name
    assert len({name, *(teachers_store(**other) for other in others)}) == 1 + len(others)


def store_of(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the folder in the store from which a run takes the log-probs of its reference."""
    names = list[str]()

    def keep(store: Path, fingerprint: ReferenceFingerprint, _: Any) -> None:
        names.append(fingerprint.name)
        raise InterruptedError

    monkeypatch.setattr(reference_module, "LogpStore", keep)
    files: Any = SimpleNamespace(folder=model, digest="files")
    inputs: Any = SimpleNamespace(reference_files=files, policy_files=files, processor=None)
    with pytest.raises(InterruptedError):
        prepare_reference(run, inputs)
    return names[0]


@pytest.mark.parametrize(("kind", "names"), [("qwen3_5_text", 2), ("jamba", 2), ("qwen3", 1)])
def test_a_store_of_recurrent_layers_is_not_that_of_other_kernels(
    kind: str, names: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where transformers takes these kernels; other models keep their store."""
    tiny_config(kind).save_pretrained(tmp_path)
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h200)
    on_gpu = replace(world, device=torch.device("cuda"))
    run = Run(RunConfig(model=ModelConfig(str(tmp_path), dtype=Dtype.fp32)), on_gpu, Console(None))
    version = importlib.metadata.version
    stores = set[str]()
    for fla in ("0.6.0", "0.7.0"):
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda name, fla=fla: fla if name == "fla-core" else version(name),
        )
        stores.add(store_of(run, tmp_path, monkeypatch))
    assert len(stores) == names


@pytest.mark.parametrize(("kind", "names"), [(Quantization.nf4, 2), (Quantization.int8, 1)])
def test_a_store_of_experts_in_nf4_that_processes_share_is_not_that_of_whole_ones(
    kind: Quantization, names: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales have scales of their own in nf4 alone."""
    pytest.importorskip("bitsandbytes")
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    config = RunConfig(
        model=ModelConfig(str(tmp_path), dtype=Dtype.fp32, quantization=kind),
        reference=ReferenceConfig(quantization=kind),
    )
    shared = replace(world, experts=ExpertGroup(0, 2, None, None, None))
    runs = (Run(config, each, Console(None)) for each in (world, shared))
    assert len({store_of(run, tmp_path, monkeypatch) for run in runs}) == names
