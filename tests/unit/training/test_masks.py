"""Losses over some tokens of the responses: the plain padded model with labels of -100, in float64."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.step_batch import RankBatch, collate, shard_batch
from dpo_dist.config.losses import KINDS, LossConfig, LossKind, LossTermConfig, Weighting
from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.example import Example
from dpo_dist.distributed.processes.world import Stops, World
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.model.files.load import load_packed
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import BatchFacts, RunningMeans, preference_loss
from dpo_dist.objective.token_logps import Statistic
from dpo_dist.reference.engine import ReferenceProvider
from dpo_dist.reference.fill import FillReport, StoreFiller
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint
from dpo_dist.training.steps.step import Objective, evaluate, train_step
from tests.support.masks import masked
from tests.support.packing import COSTS, dataset_of, random_pairs
from tests.support.padded import assert_same_gradients, gradients_of
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FINGERPRINT = ReferenceFingerprint("tiny", {"dtype": "fp32"})
PAIRS = [
    masked(pair)
    for pair in random_pairs([(9, 14, 7), (3, 5, 22), (17, 8, 8), (4, 30, 3), (6, 11, 16), (2, 4, 9)], seed=3)
]
RANKINGS = [
    masked(pair) for pair in random_pairs([(9, 14, 7, 5), (3, 5, 22), (8, 6, 12, 9, 15), (2, 7, 8)], seed=4)
]
CASES = {
    "sigmoid": LossConfig(beta=0.5),
    "ld_alpha": LossConfig(beta=0.5, ld_alpha=0.3),
    "ipo": LossConfig(LossKind.ipo, beta=0.5),
    "simpo": LossConfig(LossKind.simpo, beta=2.0),
    "orpo": LossConfig(LossKind.orpo),
    "sft": LossConfig(LossKind.sft),
    "aot": LossConfig(LossKind.aot, beta=0.5),
    "plackett_luce": LossConfig(LossKind.plackett_luce, beta=0.5),
    "wpo": LossConfig(beta=0.5, weighting=Weighting.wpo),
    "sigmoid and sft": LossConfig(
        beta=0.5, terms=[LossTermConfig(LossKind.sigmoid, 1.0), LossTermConfig(LossKind.sft, 0.3)]
    ),
}


class OneProcess:
    """A trained model on one process in place of an engine."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def token_logps(self, batch: PackedBatch, statistics: Sequence[Statistic] = ()) -> Tensor:
        logps: Tensor = self.model(batch, statistics=statistics)
        return logps

    @torch.no_grad()
    def scored(
        self, batch: PackedBatch, statistics: Sequence[Statistic] = (), *, without_adapter: bool = False
    ) -> Tensor:
        assert without_adapter
        return self.token_logps(batch, statistics)

    def backward(self, loss: Any, is_last: bool) -> None:
        loss.backward()

    def step(self, rate: float) -> Tensor:
        return torch.zeros(())


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(None, 0, 1, CPU, ())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and reference."""
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "policy", seed=1), write_model(root / "reference", seed=2, tied=False)


def packed(folder: Path) -> PackedCausalLM:
    return load_packed(folder, ModelConfig(dtype=Dtype.fp32), 1024, CPU)


def filled(
    dataset: PreferenceDataset, folder: Path, store: Path, world: World
) -> tuple[ReferenceProvider, FillReport]:
    model = packed(folder)
    score = torch.no_grad()(model)
    empty, stops = LogpStore(store, FINGERPRINT, []), Stops(StopRequest(), world)
    filler = StoreFiller(empty, lambda: score, world, 80, COSTS, 4, stops)
    report = filler.fill(dataset, np.arange(len(dataset)), lambda _done, _total: None)
    return ReferenceProvider(store=filler.open_filled()), report


def pairs_from_results(loss: LossConfig) -> list[Example]:
    return RANKINGS if loss.kind is LossKind.plackett_luce else PAIRS


def plan_of(dataset: PreferenceDataset, loss: LossConfig, budget: int = 60) -> RankBatch:
    return shard_batch(dataset, np.arange(len(dataset)), 0, 1, budget, COSTS, loss)


def labelled_logps(causal_lm: torch.nn.Module, pairs: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Return three values of a padded batch, [responses, tokens] each.

    Log-probs; the log of the sum of squared probabilities; whether the label is not -100. The first two are 0
    where it is.
    """
    ids, labels = [], []
    for pair in pairs:
        for response, mask in zip(pair.responses, pair.masks, strict=True):
            whole = torch.from_numpy(np.concatenate((pair.prompt_ids, response)).astype(np.int64))
            label = whole.clone()
            label[: len(pair.prompt_ids)] = -100
            label[len(pair.prompt_ids) :][~torch.from_numpy(mask)] = -100
            ids.append(whole)
            labels.append(label)
    padded = pad_sequence(ids, batch_first=True)
    attention = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    label = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
    logits = causal_lm(input_ids=padded, attention_mask=attention, use_cache=False).logits[:, :-1]
    log_probs = logits.log_softmax(-1)
    counted = label != -100
    logps = log_probs.gather(2, label.clamp(min=0)[..., None])[..., 0] * counted
    return logps, (2 * log_probs).logsumexp(-1) * counted, counted


def plain_logps(
    values: Tensor, counted: Tensor, pairs: Sequence[Example], ld_alpha: float | None
) -> PairLogps:
    """Sum log-probs by response; of a ranking, the first, the last and those between, padded."""
    tokens, rows = counted.sum(1).double(), iter(range(len(values)))
    groups = [[next(rows) for _ in pair.responses] for pair in pairs]

    def total(row: int, group: list[int]) -> Tensor:
        if ld_alpha is None:
            return values[row].sum()
        order = counted[row].cumsum(0)
        return (values[row] * torch.where(order > min(tokens[one] for one in group), ld_alpha, 1.0)).sum()

    sums = {row: total(row, group) for group in groups for row in group}
    most = max(map(len, groups))
    none = torch.zeros((), dtype=torch.float64)
    between = [[sums[row] for row in group[1:-1]] + [none] * (most - len(group)) for group in groups]
    between_tokens = [[tokens[row] for row in group[1:-1]] + [none] * (most - len(group)) for group in groups]
    return PairLogps(
        torch.stack([sums[group[0]] for group in groups]),
        torch.stack([sums[group[-1]] for group in groups]),
        torch.stack([tokens[group[0]] for group in groups]),
        torch.stack([tokens[group[-1]] for group in groups]),
        between=torch.stack(list(map(torch.stack, between))) if most > 2 else None,
        between_tokens=torch.stack(list(map(torch.stack, between_tokens))) if most > 2 else None,
        whole_chosen=None if ld_alpha is None else torch.stack([values[group[0]].sum() for group in groups]),
    )


def plain_loss_and_gradients(
    loss: LossConfig, folders: tuple[Path, Path]
) -> tuple[float, dict[str, Tensor], PairLogps]:
    pairs = pairs_from_results(loss)
    policy, reference = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float64) for each in folders)
    values, collisions, counted = labelled_logps(policy, pairs)
    logps = plain_logps(values, counted, pairs, loss.ld_alpha)
    with torch.no_grad():
        theirs = plain_logps(labelled_logps(reference, pairs)[0], counted, pairs, loss.ld_alpha)
        typical = (values - collisions).sum(1) / counted.sum(1)
        weights = typical.view(-1, 2).sum(1).exp() if loss.weighting is Weighting.wpo else None
    losses = preference_loss(logps, theirs, loss, BatchFacts(pair_weights=weights))
    return losses.mean().item(), gradients_of(policy, losses.mean()), logps


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_padded_model_with_labels(
    case: str, folders: tuple[Path, Path], world: World, tmp_path: Path
) -> None:
    """From the store filled with whole responses to the gradient of several micro-batches."""
    loss = CASES[case]
    dataset = dataset_of(pairs_from_results(loss))
    needs = any(KINDS[kind].needs_reference for kind in loss.kinds)
    reference = filled(dataset, folders[1], tmp_path / "store", world)[0] if needs else ReferenceProvider()
    objective, model = Objective(loss, reference), packed(folders[0])
    plan = plan_of(dataset, loss)
    assert len(plan.micro_batches) > 1
    ready = objective.ready_step(plan, CPU)
    policy = OneProcess(model)
    sums, _ = train_step(policy, objective, ready, 1.0, world, RunningMeans())  # type: ignore[arg-type]
    expected_loss, expected_gradients, logps = plain_loss_and_gradients(loss, folders)
    means = sums.means()
    assert means["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert means["logps/chosen"] == pytest.approx(logps.chosen.mean().item(), rel=1e-5)
    gradients = {n: p.grad for n, p in model.causal_lm.named_parameters() if p.grad is not None}
    expected = {name: gradient for name, gradient in expected_gradients.items() if name in gradients}
    assert len(expected) == len(expected_gradients)
    assert_same_gradients(gradients, expected)
    evaluated, _ = evaluate(policy, objective, plan_of(dataset, loss, 8192), world, RunningMeans())  # type: ignore[arg-type]
    assert evaluated["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)


def test_a_store_filled_without_masks_serves_every_mask(
    folders: tuple[Path, Path], world: World, tmp_path: Path
) -> None:
    """An entry is of the whole response: examples of the same ids and other masks share it."""
    whole = dataset_of([replace(pair, trained=()) for pair in PAIRS])
    other = dataset_of([masked(pair, seed=7) for pair in PAIRS] + PAIRS)
    _, first = filled(whole, folders[1], tmp_path, world)
    provider, second = filled(other, folders[1], tmp_path, world)
    assert first.computed == len(whole.keys)
    assert (second.hits, second.computed) == (len(whole.keys), 0)
    batch = provider.add_stored_logps(collate(other, range(len(other))))
    live = ReferenceProvider(engine=OneProcess(packed(folders[1])))  # type: ignore[arg-type]
    adapter = ReferenceProvider(policy=OneProcess(packed(folders[1])))  # type: ignore[arg-type]
    assert batch.mask is not None
    assert not batch.mask.all()
    for model in (live, adapter):
        torch.testing.assert_close(provider.token_logps(batch), model.token_logps(batch), rtol=0, atol=2e-5)
