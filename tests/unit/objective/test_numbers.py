"""Numbers of a pair in its loss, against their formulas by hand; from a file to the metrics."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import KINDS, BcoDelta, BcoPairOptions, LossConfig, LossKind, LossTermConfig
from dpo_dist.config.metrics import EXCESS
from dpo_dist.data.config import Ranked
from dpo_dist.encoded.dataset import check_fits_loss
from dpo_dist.foundation.errors import DataError
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import BatchFacts, preference_loss
from dpo_dist.objective.metrics import MetricPlan, ScoredPairs, metric_sums
from tests.support.cache import opened
from tests.support.own_loss import OWN
from tests.support.packing import COSTS
from tests.support.records import TEXT, bad, good, jsonl
from tests.unit.objective.test_losses import FACTS, POLICY, REFERENCE, softplus

LABELS, MARGINS = (0.7, 1.0), (-0.5, 2.0)
LOGITS = (2.0, 0.5)  # b h of the pairs with beta 0.5
GIVEN = replace(
    FACTS,
    soft_label=torch.tensor(LABELS, dtype=torch.float64),
    margin=torch.tensor(MARGINS, dtype=torch.float64),
)


def cross_entropy(label: float, logit: float) -> float:
    return label * softplus(-logit) + (1 - label) * softplus(logit)


def divergence(label: float, logit: float) -> float:
    """Of the policy's preference from the label's, which is at most 0.999."""
    label, probability = min(label, 0.999), 1 / (1 + math.exp(-logit))
    return probability * math.log(probability / label) + (1 - probability) * math.log(
        (1 - probability) / (1 - label)
    )


BY_HAND = {
    LossKind.sigmoid: [
        cross_entropy(*pair) for pair in zip(LABELS, np.subtract(LOGITS, MARGINS), strict=True)
    ],
    LossKind.exo_pair: [divergence(*pair) for pair in zip(LABELS, LOGITS, strict=True)],
    # As in test_losses.py, b' is 0.5 * 1.6.
    LossKind.beta_dpo: [cross_entropy(*pair) for pair in zip(LABELS, np.multiply(LOGITS, 1.6), strict=True)],
    LossKind.hinge: [max(0, 1 - 2 - 0.5), 1 - 0.5 + 2],
    LossKind.odpo: [softplus(-2 + math.log(2) - 0.5), softplus(-0.5 - math.log(2) + 2)],
    LossKind.simpo: [softplus(-0.75 + 0.5 - 0.5), softplus(-1.25 + 0.5 + 2)],
    LossKind.cpo: [softplus(-5 - 0.5) + 2.5, softplus(1.5 + 2) + 2],
    # Of the scores themselves: h is 10 and -3.
    LossKind.reward: [
        cross_entropy(*pair) for pair in zip(LABELS, np.subtract((10, -3), MARGINS), strict=True)
    ],
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_soft_labels_and_margins_by_hand(kind: LossKind) -> None:
    pairs = [
        replace(part, chosen=part.chosen.double(), rejected=part.rejected.double())
        for part in (POLICY, REFERENCE)
    ]
    taken = {name: getattr(GIVEN, name) for name in KINDS[kind].numbers - {"loss_weight"}}
    losses = preference_loss(*pairs, LossConfig(kind, 0.5), replace(FACTS, **taken))
    assert losses.tolist() == pytest.approx(BY_HAND[kind], rel=1e-6)


def test_a_function_of_ones_own_has_the_numbers_in_its_argument_facts() -> None:
    config = LossConfig(LossKind.custom, 0.5, function=f"{__name__}:with_numbers")
    assert preference_loss(POLICY, REFERENCE, config, GIVEN).tolist() == [0.7 - 0.5, 1.0 + 2.0]


def with_numbers(policy: PairLogps, _reference: PairLogps, _config: LossConfig, facts: BatchFacts) -> Tensor:
    assert facts.soft_label is not None
    assert facts.margin is not None
    return facts.soft_label + facts.margin + 0 * policy.chosen


@pytest.mark.parametrize("kind", [LossKind.sigmoid, LossKind.reward])
def test_the_loss_is_a_weighted_mean_shown_above_the_entropy_of_the_labels(kind: LossKind) -> None:
    facts = replace(GIVEN, loss_weight=torch.tensor([3.0, 1.0]))
    losses = torch.tensor([2.0, 4.0])
    scored = ScoredPairs(POLICY, REFERENCE, torch.ones(2), facts)
    means = metric_sums(MetricPlan(LossConfig(kind), has_floor=True), losses, scored).means()
    entropy = -0.7 * math.log(0.7) - 0.3 * math.log(0.3)
    assert means["loss"] == 2.5
    assert means[EXCESS] == pytest.approx(2.5 - 3 / 4 * entropy)
    margins = [0.4, 0.1] if kind is LossKind.sigmoid else [10, -3]
    assert means["rewards/margins"] == pytest.approx(sum(margins) / 2)  # of pairs, as the accuracy
    best = replace(POLICY, chosen=REFERENCE.chosen + 10 * math.log(0.7 / 0.3), rejected=REFERENCE.rejected)
    facts = BatchFacts(soft_label=torch.tensor([0.7, 0.7]))
    assert preference_loss(best, REFERENCE, LossConfig(), facts)[0] == pytest.approx(entropy, abs=1e-5)


# From a file.
VOTES = {"votes_chosen": 1, "votes_rejected": 3}
EVEN = {"votes_chosen": 2, "votes_rejected": 2}
ROWS: list[dict[str, Any]] = [
    TEXT | {"loss_weight": "2.5", "margin": 0.5},
    TEXT | VOTES | {"prompt": "two", "margin": 0.5, "score_chosen": 1, "score_rejected": 2},
    TEXT | EVEN | {"prompt": "three", "loss_weight": 1, "margin": ""},
]


def test_numbers_reach_the_batches_and_sides_are_exchanged_below_a_half(tmp_path: Path) -> None:
    data = opened(tmp_path, jsonl(tmp_path, *ROWS))
    assert {name: column.tolist() for name, column in data.numbers.items()} == {
        "loss_weight": [2.5, 1.0, 1.0],
        "soft_label": [1.0, 0.75, 0.5],
        "margin": [0.5, -0.5, 0.0],
    }
    assert [data.counts[name] for name in ("sides_exchanged", "soft_label", "margin")] == [1, 2, 2]
    assert good(TEXT | {"soft_label": 0.25}).numbers == {"soft_label": 0.75}
    assert good(ROWS[1]).responses == ("bad", "good")
    assert data.scores[2:4].tolist() == [2.0, 1.0]
    ours = (
        shard_batch(data, np.array([2, 0]), 0, 2, 1024, COSTS),
        shard_batch(data, np.array([2, 0]), 1, 2, 1024, COSTS),
    )
    assert [share.weight for share in ours] == [3.5, 3.5]
    first, second = data.trained_tokens[[4, 0]].tolist()
    assert ours[0].mean_chosen_tokens == pytest.approx((first + 2.5 * second) / 3.5)
    batches = [batch for share in ours for batch in share.batches()]
    weights = [0.0 if batch.loss_weight is None else batch.loss_weight.tolist() for batch in batches]
    assert sorted(map(str, weights)) == ["[1.0]", "[2.5]"]


def test_numbers_without_effect_leave_no_trace_and_those_of_a_ranking_are_of_its_pairs(
    tmp_path: Path,
) -> None:
    neutral = TEXT | {"loss_weight": 1.0, "margin": 0, "soft_label": 1}
    data = opened(
        tmp_path,
        jsonl(tmp_path, neutral, neutral | {"votes_chosen": "", "votes_rejected": "", "prompt": "two"}),
    )
    assert not data.numbers
    [batch] = shard_batch(data, np.array([0, 1]), 0, 1, 1024, COSTS).batches()
    assert (batch.loss_weight, batch.soft_label, batch.margin) == (None, None, None)
    ranking = {"prompt": "q", "responses": ["good", "bad", "worse"], "scores": [3, 2, 1], "loss_weight": 3}
    (tmp_path / "ranked").mkdir()
    taken_apart = opened(tmp_path / "ranked", jsonl(tmp_path, ranking), ranked=Ranked.all_pairs)
    assert taken_apart.numbers["loss_weight"].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_weight": -1},
        {"loss_weight": "heavy"},
        {"margin": math.inf},
        {"soft_label": 1.01},
        {"soft_label": True},
        {"votes_chosen": 2, "votes_rejected": -1},
    ],
)
def test_a_record_with_a_number_that_it_cannot_have_is_bad(fields: dict[str, Any]) -> None:
    assert bad(TEXT | fields).reason == "invalid_numbers"


def test_only_a_pair_has_a_soft_label_or_a_margin() -> None:
    ranking = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}
    assert bad(ranking | {"soft_label": 0.9}).reason == "invalid_numbers"
    assert bad({"prompt": "q", "completion": "a", "margin": 1}).reason == "invalid_numbers"


def test_votes_are_of_both_sides_and_replace_a_soft_label() -> None:
    assert bad(TEXT | {"votes_chosen": 0, "votes_rejected": 0}).reason == "expression_failed"
    assert bad(TEXT | {"votes_chosen": 2}).reason == "unread_column"
    assert bad(TEXT | VOTES | {"soft_label": 0.25}).reason == "unread_column"


@pytest.mark.parametrize("preset", ["sigmoid", "exo_pair", "beta_dpo"])
def test_the_preset_of_a_loss_of_soft_labels_accepts_them(preset: str, tmp_path: Path) -> None:
    data = opened(tmp_path, jsonl(tmp_path, TEXT | {"soft_label": 0.3}))
    check_fits_loss(data, load_run_config([f"loss={preset}"]).loss)


def test_a_function_without_facts_takes_the_weights_of_records(tmp_path: Path) -> None:
    data = opened(tmp_path, jsonl(tmp_path, TEXT | {"loss_weight": 2}))
    check_fits_loss(data, LossConfig(LossKind.custom, function=OWN))


def summed(*kinds: LossKind) -> LossConfig:
    return LossConfig(terms=[LossTermConfig(kind) for kind in kinds])


@pytest.mark.parametrize(
    ("loss", "row", "said"),
    [
        (LossConfig(LossKind.aot), 0, "a loss_weight of the record"),
        (
            LossConfig(LossKind.bco_pair, options=BcoPairOptions(BcoDelta.running_mean)),
            0,
            "a loss_weight of the record",
        ),
        (LossConfig(LossKind.ipo), 1, "ignore: [soft_label, votes_chosen, votes_rejected]"),
        (summed(LossKind.sigmoid, LossKind.ipo), 2, "a soft_label of the record"),
        (LossConfig(label_smoothing=0.1), 1, "set loss.label_smoothing=null"),
        (LossConfig(LossKind.custom, function=OWN), 1, "a soft_label of the record"),
        (LossConfig(LossKind.sft), 1, "a soft_label of the record"),
    ],
)
def test_a_number_that_the_loss_does_not_take_is_an_error_with_its_line(
    loss: LossConfig, row: int, said: str, tmp_path: Path
) -> None:
    data = opened(tmp_path, jsonl(tmp_path, TEXT | {"prompt": "plain"}, ROWS[row]))
    with pytest.raises(DataError) as raised:
        check_fits_loss(data, loss)
    assert said in raised.value.block()
    assert str(raised.value.where).endswith("records.jsonl:2")
    check_fits_loss(data, summed(LossKind.sigmoid, LossKind.sft))
