"""Each rule of the verdict finds its fault in a run that has nothing else; a healthy run has no finding."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from dpo_dist.tools.report.verdict import RUN_RULES, Verdict, sample_alarm, verdict
from dpo_dist.training.reporting import metrics_log
from dpo_dist.training.reporting.metrics_log import RowSample, loss_before_spike

STEPS = 20
SETTINGS = {"loss.kind": "sigmoid", "loss.beta": 0.1, "optim.lr": 1e-6}
Row = dict[str, float]


def between(first: float, last: float, step: int) -> float:
    return first + (last - first) * step / STEPS


def step_row(step: int) -> Row:
    return {
        "step": step,
        "loss": between(0.69, 0.45, step),
        "rewards/accuracies": between(0.5, 0.75, step),
        "rewards/margins": between(0.0, 0.8, step),
        "rewards/both_fall": 0.3,
        "logps/chosen_per_token": between(-1.0, -1.02, step),
        "distance/chosen": 0.1,
        "distance/rejected": 0.2,
        "tokens/chosen": 110.0,
        "tokens/rejected": 100.0,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-6,
        "pairs": 64.0,
    }


def evaluation_row(step: int) -> Row:
    metrics = {key: value for key, value in step_row(step).items() if key not in ("step", "grad_norm")}
    sampled = {"length": 100.0, "finished": 1.0, "distinct_3": 0.9, "empty": 0.0, "refusals": 0.02}
    sampled |= {"language_changed": 0.0, "prompts": 50.0}
    metrics |= {f"samples/{key}": value for key, value in sampled.items()} | {"pairs": 400.0}
    return {"step": step} | {f"eval_{key}": value for key, value in metrics.items()}


def steps(**changes: Any) -> list[Row]:
    return [row for row in rows(**changes) if "loss" in row]


def changed(index: int, row: Row, **changes: Any) -> list[Row]:
    found = rows(**changes)
    found[index] |= row
    return found


def rows(
    every: Mapping[str, float] | None = None, late: Mapping[str, float] | None = None, since: int = 10
) -> list[Row]:
    found = []
    for step in range(1, STEPS + 1):
        found += [step_row(step), evaluation_row(step)] if step % 5 == 0 else [step_row(step)]
    for row in found:
        changes = dict(every or {}) | (dict(late or {}) if row["step"] >= since else {})
        row |= {
            key: value for key, value in changes.items() if ("eval_loss" in row) == key.startswith("eval_")
        }
    return found


def counts(**changes: Any) -> dict[str, Any]:
    sources = [{"label": "a", "pairs": 200}, {"label": "b", "pairs": 200}]
    return {"read": 400, "kept": 400, "pairs": 400, "response_truncated": 3, "sources": sources} | changes


def summary(**changes: Any) -> dict[str, Any]:
    data = {"train": counts(), "eval": counts(prompts_also_in_train=0)}
    return {"steps": STEPS, "settings": SETTINGS, "data": data, "exit": "completed"} | changes


LEAK = {"rule": "label_leak", "level": "error", "share": 0.93, "text": "of the words 'quoted'"}
DISAGREES = {"rule": "reference_disagrees", "level": "warning", "share": 0.4, "source": "a"}
AT_ONCE = {"rewards/accuracies": 0.99, "eval_rewards/accuracies": 0.99}
FLAT = {"loss": 0.693}
COLLAPSED = {"grad_norm": 0.0, "loss": 0.9}
COLLAPSED |= {"logps/chosen_per_token": -6.0661, "logps/rejected_per_token": -6.06610000000001}
BROKEN = {"loss": math.nan, "grad_norm": math.inf}
CUT = {"data": {"train": counts(response_truncated=80), "eval": counts()}}
SEEN = {"data": {"train": counts(), "eval": counts(prompts_also_in_train=100)}}
LONGER = {"eval_samples/length": 180.0, "eval_samples/reference_length": 60.0}
HALF = {"rewards/accuracies": 0.51, "eval_rewards/accuracies": 0.52, "eval_rewards/margins": 0.01}
FALLEN = {"eval_rewards/both_fall": 0.6, "eval_logps/chosen_per_token": -1.4}
WORSE = {"eval_samples/finished": 0.84, "eval_samples/refusals": 0.3}
OPPOSITE = {"rewards/accuracies": 0.2, "eval_rewards/accuracies": 0.2}
DOUBLED = {"rule": "doubled_bos", "level": "error"}


def with_settings(**changes: Any) -> dict[str, Any]:
    return {"settings": SETTINGS | {f"loss.{name}": value for name, value in changes.items()}}


def spoilt(eval_loss: float, pairs: float, **training: float) -> list[Row]:
    fitted = {"loss": 0.02, "rewards/accuracies": 1.0} | training
    metrics = {"eval_loss": eval_loss, "eval_rewards/accuracies": 0.62, "eval_pairs": pairs}
    start = {"step": 0.0, "eval_loss": 0.693, "eval_rewards/accuracies": 0.5}
    return [start, *steps(late=fitted), {"step": float(STEPS), **metrics}]


def judge(history: list[Row], findings: Sequence[dict[str, Any]] = (), **ended: Any) -> Verdict:
    return verdict(history, summary(**ended), findings)


def rules_of(history: list[Row], **ended: Any) -> list[str]:
    return [finding.rule for finding in judge(history, **ended).findings]


def fallen(nats: float, others: Mapping[str, float] = MappingProxyType({})) -> list[Row]:
    late = {
        "eval_rewards/both_fall": 0.6,
        "logps/chosen_per_token": -3.0,
        "eval_logps/chosen_per_token": -1.4,
    }
    of_rewards = dict.fromkeys(("rewards/chosen", "eval_rewards/chosen"), -nats * 110.0 * 0.1)
    return rows(late=late | of_rewards | dict(others), since=4)


def of_alphabet(start: float, end: float) -> list[Row]:
    """Rows of a model of few tokens, whose chosen responses have these nats per token."""
    return [
        {"step": 0.0, "eval_loss": 0.69, "eval_logps/chosen_per_token": start},
        *rows(every={"eval_logps/chosen_per_token": end}),
    ]


HEALED = [row for row in fallen(0.02) if "loss" in row]
FAR = {"distance/rejected": 3.0, "eval_distance/rejected": 3.5}
OF_A = {"eval_tokens/chosen/a": 30.0, "eval_tokens/rejected/a": 90.0}
SWAPPED = {"eval_rewards/accuracies/a": 0.2, "eval_rewards/accuracies/b": 0.9}
SWAPPED_IN_TRAINING = {"rewards/accuracies/a": 0.1, "rewards/accuracies/b": 0.9}
NOISY = {"rewards/accuracies": 0.87, "eval_rewards/accuracies": 1.0}
UNSURE = {"eval_rewards/accuracies": 0.58, "eval_rewards/margins": 0.1, "rewards/accuracies": 0.57}
SAMPLED = {"eval_samples/reference_finished": 10 / 16, "eval_samples/reference_refusals": 2 / 16}
SAMPLED |= {"eval_samples/prompts": 16.0}
STILL = {"loss": 0.69, "rewards/margins": 3.0, "eval_rewards/margins": 3.0}
SOFT = {"loss/excess": 0.13}
AT_CHANCE = FLAT | {"rewards/accuracies": 0.5, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 1e-3}


def samples(prompts: float, **late: float) -> list[Row]:
    named = {f"eval_samples/{name}": value for name, value in late.items()}
    return rows(every={"eval_samples/prompts": prompts}, late=named)


BETA_20 = with_settings(beta=20.0)
ROUNDED = {"reference": {"drift": {"rms_response_drift": 0.5, "mean_token_drift": 0.03}}}
LOST = {"logps/chosen": math.nan, "loss": math.nan, "grad_norm": math.nan}
# Labelled records: AUC in place of accuracy.
KTO = {
    "settings": SETTINGS | {"loss.kind": "kto"},
    "data": {name: counts(labels={"good": 150, "bad": 250}) for name in ("train", "eval")},
}
ONE_LABEL = {**KTO, "data": {"train": counts(labels={"good": 400, "bad": 0})}}
PLAIN = {"data": {"train": counts(chat_template_not_applied=240), "eval": counts()}}
RANDOM = {"logps/chosen_per_token": -7.0, "eval_logps/chosen_per_token": -7.0}
FEW = {"rewards/accuracies": 0.62, "eval_rewards/accuracies": 0.55, "eval_pairs": 12.0}
RISEN = {"loss": 0.75, "eval_loss": 0.75}
BY_HEART = {"rewards/accuracies": 0.68, "eval_rewards/accuracies": 0.5, "eval_pairs": 40.0}
RARE = {**KTO, "data": {"train": counts(labels={"good": 380, "bad": 20})}}


def labelled(kl: float = 10.0, auc: float = 0.8, **late: float) -> list[Row]:
    """Rows of labelled records; now and then those of a step have one label, and lack what compares both."""
    found = []
    for row in rows(late=late):
        kept = {key: value for key, value in row.items() if "accurac" not in key and "both_fall" not in key}
        prefix = "" if "loss" in row else "eval_"
        has_both = prefix or row["step"] % 4
        more = {f"{prefix}loss/kl": kl * row["step"] / STEPS}
        more |= {f"{prefix}rewards/auc": auc, f"{prefix}rewards/chosen": 0.3} if has_both else {}
        kept = {key: value for key, value in kept.items() if has_both or "chosen" not in key}
        found.append(more | kept)
    return found


ENDLESS = {"eval_samples/finished": 0.0, "eval_samples/reference_finished": 1.0}
SURE = {"rewards/accuracies": 1.0, "eval_rewards/accuracies": 1.0, "eval_rewards/margins": 0.01}
LOW_RATE = {"settings": SETTINGS | {"optim.lr": 5e-6}}
GOOD_FALLEN = {"eval_rewards/chosen": -13.2, "eval_logps/chosen_per_token": -2.4}


def certain(nats: float, start: float = -0.08) -> list[Row]:
    """Rows of a policy that gave chosen responses this log-prob per token, and takes some nats from them."""
    both = {"rewards/both_fall": 1.0, "logps/chosen_per_token": start - nats}
    both |= {"rewards/chosen": -nats * 110.0 * 0.1}
    return rows(late=both | {f"eval_{name}": value for name, value in both.items()}, since=8)


FAULTS: list[tuple[str, list[Row], dict[str, Any], str]] = [
    (
        "diverged",
        rows(late=BROKEN, since=12),
        {},
        "the loss or its gradient is not; the loss was the first value",
    ),
    ("diverged", rows(late=COLLAPSED, since=11), {"exit": "diverged"}, "collapsed: from step 11 on"),
    ("diverged", rows(), {"bad_steps": 2}, "2 steps of 20 taught nothing"),
    (
        "diverged",
        steps(late=BROKEN, since=20),
        {"bad_in_a_row": 3},
        "at step 18; before it the loss was 0.462",
    ),
    ("beta_wrong", rows(late={"loss": 1e-5}), with_settings(beta=10.0), "loss.beta=10 is too large"),
    (
        "beta_wrong",
        changed(-2, {"eval_rewards/margins": 400.0}, late={"loss": 1e-9}),
        BETA_20,
        "20 is too large",
    ),
    ("beta_wrong", rows(late={"loss": 6.0}), BETA_20, "loss of wrong pairs grew (0.68 -> 6)"),
    ("beta_wrong", rows(every=FLAT), with_settings(beta=1e-4), "loss.beta=1e-4 is too small"),
    ("beta_wrong", rows(every=FLAT | SOFT), with_settings(beta=1e-4), "the loss stays at 0.13 -> 0.13"),
    ("learning_rate_too_high", rows(late={"loss": 1.2}, since=8), {}, "the loss rose from 0.66 to 1.2"),
    ("learning_rate_too_high", rows(late={"logps/chosen_per_token": -3.5}, since=4), {}, "fell by 2.5 nats"),
    ("labels_swapped", rows(late={"eval_rewards/accuracies": 0.3}), {}, "0.300 on 400 pairs"),
    (
        "labels_swapped",
        steps(every=SWAPPED_IN_TRAINING),
        {},
        "in a quarter of the steps training accuracy of source a is 0.100 on 160 pairs",
    ),
    ("labels_swapped", rows(every=OPPOSITE), {}, "training accuracy is 0.200 on 320"),
    ("evaluation_leak", rows(), SEEN, "100 of 400 evaluation pairs (25 %)"),
    ("evaluation_too_good", rows(late={"eval_rewards/accuracies": 0.95}), {}, "0.950 on 400 pairs is above"),
    ("label_leak", rows(every=AT_ONCE | {"tokens/chosen": 300.0}), {}, "0.990 at step 1 already, by length"),
    ("does_not_generalise", rows(late={"eval_loss": 0.9}, since=15), {}, "rose from 0.57 at step 10 to 0.9"),
    ("over_optimised", rows(late=WORSE), {}, "16 %), more sampled responses are refusals (2 % -> 30 %)"),
    ("over_optimised", rows(every=LONGER), {}, "3.0x longer (60 -> 180 tokens) compared with the reference"),
    ("learnt_nothing", rows(every=HALF), {}, "0.520 on 400 pairs is within its noise"),
    ("nothing_trained", rows(every={"grad_norm": 0.0}), {}, "exactly 0 in every step of 20"),
    ("hardly_moved", rows(every=FLAT | SURE), LOW_RATE, "stayed at its start, 0.693"),
    ("hardly_moved", rows(every=FLAT | SURE), LOW_RATE, "optim.lr=5e-6"),
    (
        "responses_forgotten",
        certain(0.9),
        {},
        "-0.08 -> -0.98 nats per token, and both responses did in 100 %",
    ),
    ("responses_forgotten", [row for row in certain(0.9) if "loss" in row], {}, "-0.08 -> -0.98 nats"),
    (
        "responses_forgotten",
        labelled(**GOOD_FALLEN),
        KTO,
        "good responses became far less likely, -1.20 -> -2.40",
    ),
    ("data_faults", rows(), CUT, "80 of 400 training records (20 %)"),
    ("data_faults", rows(), {"findings": [DISAGREES | {"share": 0.1}, DOUBLED]}, "errors: doubled_bos"),
    ("data_faults", rows(), {"findings": [DISAGREES]}, "by far in 40 % of a"),
    ("displacement", rows(late=FALLEN), {}, "-1.00 -> -1.40 nats per token, and in 60 % of the pairs"),
    ("diverged", rows(late=LOST, since=1), {}, "the model gives no finite log-probs from the start"),
    ("diverged", rows(late=LOST, since=12), {}, "an update damaged the weights"),
    ("diverged", changed(-2, LOST, late={"loss": 2.0}), {}, "rate is too high: the loss rose from 0.66 to 2"),
    ("diverged", rows(late={"eval_loss": math.nan}), {}, "the evaluation data have pairs"),
    ("labels_swapped", labelled(auc=0.2), KTO, "training AUC is 0.200 on 192 records: the loss teaches the"),
    ("learnt_nothing", labelled(auc=0.52), KTO, "evaluation AUC 0.520 on 400 records is within its noise"),
    ("diverged", labelled(**COLLAPSED), KTO, "collapsed: from step 10 on"),
    ("learning_rate_too_high", labelled(kl=60.0), KTO, "is 54 nats at the end and still grows"),
    (
        "label_missing",
        labelled(),
        ONE_LABEL,
        "all 400 training responses are good",
    ),
    ("data_faults", rows(), PLAIN, "240 of 400 training records are plain text"),
    ("untrained_base", rows(every=RANDOM), {"vocabulary": 3000}, "a guess among 3,000 tokens has -8.01"),
    # docs/images.md: better than a guess, and no answer yet.
    ("untrained_base", of_alphabet(-3.18, -2.36), {"vocabulary": 25}, "a guess among 25 tokens has -3.22"),
    ("samples_loop", rows(late={"eval_samples/longest_repeat": 0.8}), {}, "has 80 % of its words"),
    ("learnt_nothing", rows(every=FEW, late=RISEN), {}, "evaluation loss 0.63 -> 0.75, training loss 0.678"),
    ("one_label", labelled(), RARE, "95 % of the training responses are good"),
    ("one_label", labelled(), RARE, "loss.undesirable_weight=16.3 balances them"),
    (
        "displacement",
        labelled(**{"eval_rewards/chosen": -2.2}),
        KTO,
        "good responses lost 0.2 nats per token",
    ),
]


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, *_ in FAULTS} == set(RUN_RULES)


@pytest.mark.parametrize(("rule", "history", "ended", "words"), FAULTS)
def test_a_rule_finds_its_fault_alone(
    rule: str, history: list[Row], ended: dict[str, Any], words: str
) -> None:
    judged = judge(history, **ended)
    [finding] = judged.findings
    assert finding.rule == rule
    assert words in finding.text
    written = {"rule": rule, "text": finding.text, "remedy": RUN_RULES[rule].remedy}
    assert judged.as_dict()["findings"] == [written]
    is_remark = rule == "displacement"
    assert judged.sentence.startswith("no fault found: " if is_remark else RUN_RULES[rule].text)
    assert judged.lines()[1].startswith("  - " if is_remark else "  try: ")
    assert judged.lines()[1].endswith(finding.remedy)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "history", "ended", "words"), FAULTS)
def test_a_long_run_is_judged_by_a_sample_of_its_rows_as_by_all(
    rule: str, history: list[Row], ended: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_log, "MOST_STEPS", 1000)
    length = 200
    every = [
        {**row, "step": row["step"] * length - back}
        for row in history
        for back in range(length - 1 if "loss" in row else 0, -1, -1)
    ]
    long = {**ended, "steps": STEPS * length}
    sample = RowSample(every).rows
    assert len(sample) < len(every) / 2
    assert rules_of(sample, **long) == rules_of(every, **long)


@pytest.mark.parametrize(
    ("history", "ended", "rules"),
    [
        # What a loss does by design.
        (rows(late=FALLEN), with_settings(kind="apo_down"), []),
        # Soft labels keep the loss above a floor, down to which it falls.
        (rows(every=FLAT | SOFT, late={"loss/excess": 0.01}), with_settings(beta=1e-4), []),
        # Responses as long as the chosen ones.
        (rows(late={"eval_samples/length": 180.0, "eval_tokens/chosen": 200.0}), {}, []),
        # A short run of several epochs learns its pairs by heart.
        (rows(late=AT_ONCE | {"epoch": 1.2}, since=3, every={"tokens/chosen": 180.0}), {}, []),
        # One row by chance.
        (changed(0, {"tokens/chosen": 300.0}, every=AT_ONCE), {}, []),
        (changed(19, {"loss": 30.0, "grad_norm": 50.0, "logps/chosen_per_token": -4.0}), {}, []),
        # No gradient, but tokens that differ: a hinge loss that every pair satisfies.
        (rows(late={"grad_norm": 0.0, "logps/rejected_per_token": -1.0215}), {}, []),
        # Few pairs.
        (rows(every=UNSURE | {"eval_pairs": 10.0}), {}, []),
        (changed(1, {"rewards/accuracies": 1.0}, every={"tokens/chosen": 180.0, "pairs": 2.0}), {}, []),
        (rows(every={"pairs": 4.0}, late={"loss": 1.2}), {}, []),
        # Few responses.
        (samples(8.0, refusals=0.15), {}, []),
        (samples(80.0, refusals=0.15), {}, ["over_optimised"]),
        (samples(8.0, length=190.0), {}, []),
        (samples(8.0, finished=0.625), {}, []),
        (samples(8.0, finished=0.25), {}, ["over_optimised"]),
        (rows(every=SAMPLED | {"eval_samples/finished": 8 / 16, "eval_samples/refusals": 4 / 16}), {}, []),
        # A resumed run may have shorter samples: then the reference has responded again.
        (rows(late={"eval_samples/finished": 0.5, "eval_samples/reference_finished": 0.52}), {}, []),
        # Without a reference, or with another one, a margin at the start is no change.
        (rows(every=STILL), with_settings(reference_free=True, beta=0.05), ["hardly_moved"]),
        # A run that fits its training pairs has learnt something.
        (rows(every={"rewards/accuracies": 1.0}), {}, ["does_not_generalise"]),
        (rows(every=FLAT | {"eval_rewards/margins": 1e-3}), {}, ["hardly_moved"]),
        (rows(every=AT_CHANCE), {}, ["learnt_nothing"]),
        (rows(every=AT_CHANCE), {"exit": "preempted"}, []),
        # Skipped steps do not explain other faults.
        (rows(late={"loss": 1.2}, since=4), {"bad_steps": 2}, ["diverged", "learning_rate_too_high"]),
        # A loss that a decaying learning rate has healed.
        (
            [row | ({"loss": 2.0} if 2 <= row["step"] <= 5 else {}) for row in HEALED],
            {},
            ["learning_rate_too_high"],
        ),
        # Healthy runs lose up to 0.95 times of what their responses had, or little of what was certain.
        (certain(0.95, start=-1.0), {}, ["displacement"]),
        (certain(0.4), {}, ["displacement"]),
        (certain(0.9), with_settings(kind="apo_down"), []),
        (certain(0.9), with_settings(terms=[{"kind": "apo_down"}, {"kind": "sft"}]), []),
        (certain(1.05, start=-3.0), {}, ["responses_forgotten"]),
        # The cause before what the samples show.
        (
            [row | (ENDLESS if "eval_loss" in row else {}) for row in certain(0.9)],
            {},
            ["responses_forgotten", "over_optimised"],
        ),
        # On the same responses.
        (fallen(0.02), {}, []),
        (fallen(2.0), {}, ["learning_rate_too_high"]),
        # Rejected responses become far less likely in healthy runs.
        (rows(every=FAR), {}, []),
        # A source that is learnt by heart later.
        (
            changed(-2, {"rewards/accuracies/a": 1.0}, every={"rewards/accuracies/a": 0.2}),
            {},
            ["labels_swapped"],
        ),
        # A cause alone, without what follows from it.
        (fallen(2.0, SWAPPED), {}, ["labels_swapped"]),
        (fallen(2.0, AT_ONCE | {"tokens/rejected": 30.0}), {}, ["label_leak"]),
        (
            [*fallen(2.0)[:-1], fallen(2.0)[-1] | {"eval_loss": 0.9}],
            {},
            ["does_not_generalise", "learning_rate_too_high"],
        ),
        # All of few pairs right by chance, and of many.
        (rows(every=NOISY | {"eval_pairs": 12.0}), {}, []),
        (rows(every=NOISY | {"eval_pairs": 64.0}), {}, ["evaluation_too_good"]),
        # What rounding alone makes of a margin, of all pairs and of a hundredth of them.
        (rows(every={"eval_rewards/margins": 0.004}), ROUNDED, ["hardly_moved"]),
        (rows(every={"eval_rewards/margins": 0.02}), ROUNDED, []),
        # A perfect accuracy at once, and lengths that tell the label.
        (rows(every=AT_ONCE), {}, []),
        (rows(every={"rewards/accuracies/a": 0.98} | OF_A), {}, ["label_leak"]),
        (rows(every={"tokens/chosen": 54.0, "tokens/rejected": 23.0}), {}, ["label_leak"]),
        # One source, and too early to say.
        (rows(every=SWAPPED), {}, ["labels_swapped"]),
        (steps(every=SWAPPED_IN_TRAINING | {"pairs": 2.0}), {}, []),
        ([row for row in rows(every=SWAPPED) if row["step"] <= 5], {"steps": 5}, []),
        # One evaluation at the end: over-fitting, chance, little, not over-fitting.
        (spoilt(0.66, 2000.0), {}, ["does_not_generalise"]),
        (spoilt(1.5, 2000.0, **{"rewards/accuracies": 0.6}), {}, ["does_not_generalise"]),
        (spoilt(0.66, 8.0, **{"rewards/accuracies": 0.8}), {}, []),
        # An accuracy of few pairs says nothing, losses that rose do: both, or of 40 pairs the evaluation's.
        (rows(every=FEW, late={"eval_loss": 0.75}), {}, []),
        (rows(every=FEW, late={"loss": 0.75}), {}, []),
        (rows(every=BY_HEART, late={"eval_loss": 0.69}), {}, ["learnt_nothing"]),
        (rows(every=BY_HEART), {}, []),
        # It is judged by its start, whatever the next evaluation was.
        (changed(11, {"eval_loss": 0.75}, every=BY_HEART, late={"eval_loss": 0.69}), {}, ["learnt_nothing"]),
        (rows(every=BY_HEART, late={"eval_loss": 0.69}), {"exit": "preempted"}, []),
        # A loss of one's own that falls below 0.
        (rows(every={"loss": -0.5}, late={"loss": -0.55}), with_settings(kind="custom"), []),
        # One label alone explains why nothing moves.
        (labelled(auc=0.5, **FLAT), ONE_LABEL, ["label_missing"]),
        (labelled(kl=60.0), ONE_LABEL, ["label_missing"]),
        # Some plain texts; the usual log-probs of a model, and of a vocabulary that is not known.
        (rows(), {"data": {"train": counts(chat_template_not_applied=200), "eval": counts()}}, []),
        (rows(), {"vocabulary": 150_000}, []),
        (rows(every=RANDOM), {}, []),
        # The alphabet of proteins, which good models hardly guess; an answer that was learnt from a guess on.
        (of_alphabet(-2.6, -2.6), {"vocabulary": 33}, []),
        (of_alphabet(-math.log(20), -2.8), {"vocabulary": 25}, []),
        (of_alphabet(-3.18, -1.9), {"vocabulary": 25}, []),
        # What the policy learns of a small vocabulary; a few steps.
        (rows(every=RANDOM, late={"eval_logps/chosen_per_token": -2.0}), {"vocabulary": 3000}, []),
        (steps(every=RANDOM)[:5], {"vocabulary": 3000, "steps": 5}, []),
        (rows(late={"eval_samples/longest_repeat": 0.3}), {}, []),
        # Of labelled records: a healthy run; weights that balance; an AUC of few bad records.
        (labelled(), KTO, []),
        (labelled(), {**RARE, "settings": KTO["settings"] | {"loss.undesirable_weight": 16.0}}, []),
    ],
)
def test_which_faults_are_found(history: list[Row], ended: dict[str, Any], rules: list[str]) -> None:
    assert rules_of(history, **ended) == rules


def test_a_source_that_starts_below_one_half_is_swapped_only_if_the_policy_starts_as_the_reference() -> None:
    """Else it prefers, say, its own responses to better ones until it learns."""
    early = {"rewards/accuracies/a": 0.9, "rewards/accuracies/b": 0.2, "rewards/chosen": 0.1}
    found = rows(every=early, late={"rewards/accuracies/b": 0.8}, since=8)
    assert rules_of(found) == ["labels_swapped"]
    assert rules_of(found, settings=SETTINGS | {"reference.path": "other"}) == []
    alone = [{key: value for key, value in row.items() if "both_fall" not in key} for row in found]
    assert rules_of(alone, **with_settings(kind="simpo", beta=2.0)) == []


def test_the_evidence_of_a_leak_quotes_no_data() -> None:
    [leak, _] = verdict(rows(every=AT_ONCE), summary(), [LEAK]).findings
    assert leak.rule == "label_leak"
    assert "by form: the doctor found label_leak, which alone guesses 93 %" in leak.text
    assert "quoted" not in leak.text


def test_only_cut_responses_get_advice_on_cutting() -> None:
    for faults, is_cut in ((PLAIN, False), (CUT, True)):
        assert ("data.truncation" in "".join(judge(rows(), **faults).lines())) is is_cut


def test_at_most_five_findings_the_worst_first() -> None:
    late = {"eval_samples/length": 300.0, "loss": 1e-4, "eval_rewards/accuracies": 0.95}
    data = {"train": counts(response_truncated=200), "eval": counts(prompts_also_in_train=50)}
    assert rules_of(rows(every={"tokens/chosen": 300.0}, late=late), findings=[DISAGREES], data=data) == [
        *("evaluation_leak", "evaluation_too_good", "label_leak"),
        *("over_optimised", "data_faults"),
    ]


@pytest.mark.parametrize("last", [4, STEPS])  # before the first evaluation after a step, and at the end
def test_the_evaluation_before_the_first_step_is_no_evidence(last: int) -> None:
    of_run = [row for row in rows() if row["step"] <= last]
    untrained = {"eval_rewards/accuracies": 0.1, "eval_loss": 0.01}
    start = evaluation_row(0) | untrained | {"eval_samples/length": 900.0, "eval_samples/finished": 0.0}
    facts = summary(steps=last, exit="completed" if last == STEPS else "preempted")
    assert verdict([start, *of_run], facts) == verdict(of_run, facts)
    assert sample_alarm([start, *of_run]) == sample_alarm(of_run)


def test_noise_of_few_pairs_is_no_sign_of_the_learning_rate() -> None:
    accused = 0
    for seed in range(60):
        losses = enumerate(healthy(seed, 200, 8), 1)
        history = [{"step": step, "loss": loss, "grad_norm": 1.0, "pairs": 8.0} for step, loss in losses]
        accused += "learning_rate_too_high" in rules_of(history, steps=200)
    assert accused <= 1


EVALUATED = "no fault found: evaluation accuracy 0.750 on 400 pairs"
NOT_EVALUATED = "no fault found (nothing was evaluated after a step, or sampled): training accuracy 0.72"
OF_SCORES = {"settings": {"loss.kind": "reward", "optim.lr": 1e-6}}
UNSAMPLED = [{key: value for key, value in row.items() if "samples/" not in key} for row in rows()]


@pytest.mark.parametrize(
    ("history", "ended", "sentence"),
    [
        (rows(), {}, EVALUATED),
        (rows()[:18], {"exit": "preempted", "steps": 15}, "stopped after step 15; so far: no fault found: "),
        (steps(every=AT_CHANCE)[:4], {"steps": 4}, "too short to be judged"),
        (steps(), {}, NOT_EVALUATED),
        (
            rows(every=UNSURE | {"eval_pairs": 10.0}),
            {},
            "no fault found (the accuracy is within",
        ),
        (UNSAMPLED, {}, "no fault found (nothing was sampled): evaluation accuracy 0.750 on 400 pairs"),
        # A reward model gives no responses.
        (UNSAMPLED, OF_SCORES, EVALUATED),
        (steps(), OF_SCORES, "no fault found (nothing was evaluated after a step): training accuracy 0.72"),
    ],
)
def test_the_sentence_without_a_fault(history: list[Row], ended: dict[str, Any], sentence: str) -> None:
    judged = verdict(history, summary(**ended))
    assert judged.sentence.startswith(sentence)
    assert (judged.findings, len(judged.lines())) == ((), 1)


def test_the_faults_of_a_reward_model_are_told_of_scores() -> None:
    broken = dict.fromkeys(("loss", "grad_norm", "rewards/chosen", "rewards/margins"), math.nan)
    history = [{"step": 1.0, "pairs": 8.0, **broken}]
    judged = verdict(history, {"steps": 1, "exit": "diverged", **OF_SCORES})
    assert "gives no finite scores from the start" in judged.sentence
    assert "log-prob" not in judged.sentence
    cut = counts(response_truncated=100)
    judged = verdict(rows(), summary(**OF_SCORES, data={"train": cut, "eval": counts()}))
    assert "have a response whose end data.max_length cuts, and is scored without it" in judged.sentence


def test_a_verdict_needs_no_input() -> None:
    bare = {"data": {"train": {"sources": [{"path": "a.jsonl"}]}}, "reference": {"mode": "none"}}
    for ended in ({}, {"data": None, "settings": None, "reference": None}, bare):
        for history in ([], [{"step": 1, "loss": 2.0, "grad_norm": 0.5}], [{"step": 3, "eval_loss": 1.0}]):
            assert verdict(history, ended).findings == ()


def healthy(seed: int, steps: int, pairs: int, kind: str = "sigmoid") -> list[float]:
    generator = np.random.default_rng(seed)
    grown = 1 - np.exp(-3 * np.arange(1, steps + 1) / steps)
    margins = generator.normal(2.0, 2.0, (pairs, steps)) * grown
    margins *= np.where(generator.random((pairs, steps)) < 0.1, -1, 1)
    losses = {
        "sigmoid": np.logaddexp(0, -margins),
        "hinge": np.maximum(0, 1 - margins),
        "ipo": (margins - 1) ** 2,
        "exponential": np.exp(-margins / 2),
    }[kind]
    return list(losses.mean(axis=0).tolist())


def spikes(losses: list[float]) -> list[int]:
    of_run: list[Row] = [{"step": 0, "eval_loss": 1.0}]
    of_run += [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    return [
        int(row["step"]) for at, row in enumerate(of_run) if loss_before_spike(of_run[:at], row) is not None
    ]


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "exponential"])
def test_healthy_runs_have_no_spike(kind: str) -> None:
    assert [seed for seed in range(10) if spikes(healthy(seed, 300, 8, kind))] == []
    assert len([seed for seed in range(20) if spikes(healthy(seed, 300, 1))]) <= 1, "wrong labels"


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([*healthy(0, 180, 16), math.nan, 12.0, *healthy(0, 18, 16), 200.0], [182, 201]),
        ([0.6931] * 60 + [0.6932], []),  # noise of rounding
        ([0.6931] * 60 + [1.3], []),  # less than twice
        ([0.7] * 40 + [9.0], []),  # too early
        ([0.7] * 60 + [9.0, 9.5], [61]),
    ],
)
def test_spikes_are_found_with_their_steps(losses: list[float], steps: list[int]) -> None:
    assert spikes(losses) == steps
