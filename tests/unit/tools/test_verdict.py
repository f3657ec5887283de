"""Each row of the verdict finds its fault in a run that has nothing else; a healthy run has no finding."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from dpo_dist.tools.report.verdict import RUN_RULES, Verdict, sample_alarm, verdict
from dpo_dist.training.reporting.metrics_log import loss_before_spike
from tests.support.launch import ROOT

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
    sampled = {"length": 100.0, "finished": 1.0, "distinct_3": 0.9, "empty": 0.0}
    sampled |= {"prompts": 50.0}
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


START = {"step": 0.0, "eval_loss": 0.693, "eval_rewards/margins": 0.0, "eval_logps/chosen_per_token": -1.0}


def judge(history: list[Row], **ended: Any) -> Verdict:
    return verdict(history, summary(**ended))


def rules_of(history: list[Row], **ended: Any) -> list[str]:
    return [finding.rule for finding in judge(history, **ended).findings]


def with_settings(**changes: Any) -> dict[str, Any]:
    return {"settings": SETTINGS | {f"loss.{name}": value for name, value in changes.items()}}


def counted(name: str, **changes: Any) -> dict[str, Any]:
    return {"data": {"train": counts(), "eval": counts(prompts_also_in_train=0), name: counts(**changes)}}


def certain(nats: float, start: float = -0.08, **changes: float) -> list[Row]:
    """Rows of a policy that gave chosen responses this log-prob per token, and takes some nats from them."""
    both = {"rewards/both_fall": 1.0, "logps/chosen_per_token": start - nats}
    both |= {"rewards/chosen": -nats * 110.0 * 0.1} | changes
    return rows(late=both | {f"eval_{name}": value for name, value in both.items()}, since=8)


def flat(end: float, **late: float) -> list[Row]:
    """Rows of a run whose evaluation loss ends at this value."""
    return [START, *rows(every={"eval_loss": end, "eval_rewards/margins": 1e-3, **late})]


def starting_at(logp: float, end: float) -> list[Row]:
    """Rows of a model whose chosen responses have these nats per token."""
    start = {"step": 0.0, "eval_loss": 0.69, "eval_logps/chosen_per_token": logp}
    return [start, *rows(every={"eval_logps/chosen_per_token": end})]


def repeating(end: float, reference: float) -> list[Row]:
    repeat = {"eval_samples/longest_repeat": end, "eval_samples/reference_longest_repeat": reference}
    return rows(late=repeat)


def labelled(auc: float = 0.8, **late: float) -> list[Row]:
    """Rows of labelled records; now and then those of a step have one label, and lack what compares both."""
    found = []
    for row in rows(late=late):
        kept = {key: value for key, value in row.items() if "accurac" not in key and "both_fall" not in key}
        prefix = "" if "loss" in row else "eval_"
        has_both = prefix or row["step"] % 4
        more = {f"{prefix}rewards/auc": auc, f"{prefix}rewards/chosen": 0.3} if has_both else {}
        kept = {key: value for key, value in kept.items() if has_both or "chosen" not in key}
        found.append(more | kept)
    return found


KTO = {
    "settings": SETTINGS | {"loss.kind": "kto"},
    "data": {name: counts(labels={"good": 150, "bad": 250}) for name in ("train", "eval")},
}
COLLAPSED = {"grad_norm": 0.0, "logps/chosen_per_token": -6.0661, "logps/rejected_per_token": -6.0661}
BROKEN = {"loss": math.nan, "grad_norm": math.inf}
SPOILT = {"eval_loss": 0.9}
GOOD_FALLEN = {"eval_rewards/chosen": -13.2, "eval_logps/chosen_per_token": -2.4}
SWAPPED = {"eval_rewards/accuracies/a": 0.2, "eval_rewards/accuracies/b": 0.9}
SWAPPED_IN_TRAINING = {"rewards/accuracies/a": 0.1, "rewards/accuracies/b": 0.9}
SOFT = {"loss": 0.69, "loss/excess": 0.13, "rewards/chosen": 0.0, "rewards/margins": 0.0}
OF_SCORES = {"settings": {"loss.kind": "reward", "optim.lr": 1e-6}}

FAULTS: list[tuple[str, list[Row], dict[str, Any], str]] = [
    ("diverged", rows(late=BROKEN, since=12), {"exit": "diverged"}, "loss is not finite at step 12"),
    ("diverged", rows(late={"eval_loss": math.nan}, since=15), {}, "loss is not finite at step 15"),
    ("diverged", rows(late=COLLAPSED, since=11), {"exit": "diverged"}, "collapsed: at step 20 all tokens"),
    ("diverged", rows(), {"bad_steps": 2}, "2 steps taught nothing"),
    ("nothing_trained", steps(every={"grad_norm": 0.0}), {"exit": "diverged"}, "exactly 0 in all 20 steps"),
    ("labels_swapped", rows(late={"eval_rewards/accuracies": 0.3}), {}, "accuracy is 0.300 on 400 pairs"),
    (
        "labels_swapped",
        rows(every={"rewards/accuracies": 0.2}),
        {},
        "training accuracy is 0.200 on 320 pairs",
    ),
    ("labels_swapped", rows(every=SWAPPED), {}, "evaluation accuracy is 0.200 on 200 pairs of source a"),
    ("labels_swapped", steps(every=SWAPPED_IN_TRAINING), {}, "is 0.100 on 160 pairs of source a"),
    ("labels_swapped", labelled(auc=0.2), KTO, "evaluation AUC is 0.200 on 400 records"),
    (
        "evaluation_leak",
        rows(),
        counted("eval", prompts_also_in_train=5),
        "5 of 400 evaluation pairs (1.2 %)",
    ),
    ("does_not_generalise", rows(late=SPOILT, since=15), {}, "rose from 0.57 at step 10 to 0.9, while"),
    ("learning_rate_too_high", rows(late={"loss": 1.2}, since=8), {}, "from 0.66 to 1.2, with optim.lr=1e-6"),
    (
        "answers_broken",
        repeating(0.26, 0.1),
        {},
        "repeats has 26 % of its words, and 10 %",
    ),
    ("answers_broken", certain(0.9), {}, "chosen responses became far less likely, -0.08 -> -0.98 nats"),
    ("answers_broken", [row for row in certain(0.9) if "loss" in row], {}, "-0.08 -> -0.98 nats"),
    ("answers_broken", labelled(**GOOD_FALLEN), KTO, "far less likely, -1.20 -> -2.40 nats per token"),
    ("untrained_base", starting_at(-8.2, -7.0), {"vocabulary": 3000}, "among 3,000 tokens has -8.01"),
    # docs/models.md: better than a guess, and no answer yet.
    (
        "untrained_base",
        starting_at(-3.18, -2.36),
        {"vocabulary": 25},
        "-3.18 nats per token at first and -2.36",
    ),
    ("learnt_nothing", flat(0.692), {}, "evaluation loss stayed at its start, 0.693 -> 0.692, in 20 steps"),
    ("learnt_nothing", flat(0.75), {"exit": "completed"}, "0.693 -> 0.75"),
    (
        "learnt_nothing",
        steps(every={"loss": 0.693, "rewards/chosen": 0.0, "rewards/margins": 0.0}),
        {},
        "0.693",
    ),
    (
        "data_faults",
        rows(),
        counted("train", kept=370, dropped={"empty_response": 30}),
        "30 of 400 training records",
    ),
    (
        "data_faults",
        rows(),
        counted("eval", response_truncated=80),
        "80 of 400 evaluation records (20 %) have",
    ),
    ("data_faults", rows(), counted("train", chat_template_not_applied=40), "data.text_as_messages=auto"),
]


def test_every_row_has_a_case_and_an_entry_of_the_log_and_stands_on_the_page() -> None:
    assert {rule for rule, *_ in FAULTS} == set(RUN_RULES)
    log = (ROOT / "benchmarks" / "log.md").read_text()
    page = " ".join((ROOT / "docs" / "watching.md").read_text().split())
    for name, rule in RUN_RULES.items():
        assert f"**{rule.shown_by}" in log
        assert f"| `{name}` | {rule.metric} | {rule.where} | {rule.comparison} {rule.threshold} |" in page


@pytest.mark.parametrize(("rule", "history", "ended", "words"), FAULTS)
def test_a_row_finds_its_fault_alone(
    rule: str, history: list[Row], ended: dict[str, Any], words: str
) -> None:
    judged = judge(history, **ended)
    [finding] = judged.findings
    assert finding.rule == rule
    assert words in finding.text
    assert judged.sentence == f"{RUN_RULES[rule].text}: {finding.text}"
    assert judged.as_dict()["findings"] == [
        {"rule": rule, "text": finding.text, "remedy": RUN_RULES[rule].remedy}
    ]
    assert judged.lines() == [f"verdict: {judged.sentence}", f"  try: {finding.remedy}"]


@pytest.mark.parametrize(
    ("history", "ended"),
    [
        # At a threshold, or just on its healthy side.
        (rows(), counted("eval", prompts_also_in_train=4)),
        (rows(), counted("train", response_truncated=20)),
        (rows(late={"loss": 0.78}, since=8), {}),
        (repeating(0.24, 0.1), {}),
        (flat(0.685), {}),
        (starting_at(-7.5, -7.0), {"vocabulary": 3000}),
        # What a loss does by design.
        (certain(0.9), with_settings(kind="apo_down")),
        (certain(0.9), with_settings(terms=[{"kind": "apo_down"}, {"kind": "sft"}])),
        # Soft labels keep the loss above a floor, down to which it falls.
        (steps(every=SOFT, late={"loss/excess": 0.01}), {}),
        # A loss with a large constant part, while the margin has grown by 10 nats.
        (flat(0.692, **{"eval_rewards/margins": 1.0}), {}),
        # One row by chance; a loss of one's own that falls below 0.
        (changed(19, {"loss": 30.0, "grad_norm": 50.0, "logps/chosen_per_token": -4.0}), {}),
        (rows(every={"loss": -0.5}, late={"loss": -0.55}), with_settings(kind="custom")),
        # No gradient at the end, but tokens that differ: a hinge loss that every pair satisfies.
        (rows(late={"grad_norm": 0.0, "logps/rejected_per_token": -1.0215}), {}),
        # Few pairs.
        (rows(every={"eval_pairs": 10.0, "eval_rewards/accuracies": 0.4}), {}),
        (rows(late=SPOILT | {"eval_pairs": 8.0}), {}),
        (rows(every={"pairs": 4.0}, late={"loss": 1.2}), {}),
        # Too early to say, or stopped before its end.
        ([row for row in rows(every=SWAPPED) if row["step"] <= 5], {"steps": 5}),
        (flat(0.75), {"exit": "preempted"}),
        (starting_at(-8.2, -7.0), {"vocabulary": 3000, "exit": "preempted"}),
        # Healthy runs lose up to 0.95 times of what their responses had, or little of what was certain.
        (certain(0.95, start=-1.0), {}),
        (certain(0.4), {}),
        (certain(1.05, start=-3.0, **{"rewards/both_fall": 0.4}), {}),
        # A base that repeats itself as much; samples that are longer.
        (repeating(0.8, 0.7), {}),
        # The alphabet of proteins, which good models hardly guess; an answer that was learnt from a guess on.
        (starting_at(-2.6, -2.6), {"vocabulary": 33}),
        (starting_at(-3.18, -1.9), {"vocabulary": 25}),
        # Of labelled records.
        (labelled(), KTO),
    ],
)
def test_a_healthy_run_has_no_finding(history: list[Row], ended: dict[str, Any]) -> None:
    judged = judge(history, **ended)
    assert judged.findings == ()
    assert len(judged.lines()) == 1


@pytest.mark.parametrize(
    ("history", "ended", "rules"),
    [
        # Of what a run has learnt the cause alone; the others are its consequences.
        (certain(2.0, loss=1.2), {}, ["learning_rate_too_high"]),
        (rows(late={"loss": 1.2, "eval_rewards/accuracies": 0.3}), {}, ["labels_swapped"]),
        # Skipped steps, evaluation data and records stand beside it.
        (
            rows(late={"loss": 1.2}, since=4),
            {"bad_steps": 2, **counted("eval", prompts_also_in_train=100, response_truncated=80)},
            ["diverged", "evaluation_leak", "learning_rate_too_high", "data_faults"],
        ),
        # Broken weights say nothing about what was learnt.
        (rows(every={"rewards/accuracies": 0.1}, late=BROKEN), {"exit": "diverged"}, ["diverged"]),
        # A run without a reference has its first samples.
        (
            [{**START, "eval_samples/longest_repeat": 0.1}, *rows(late={"eval_samples/longest_repeat": 0.9})],
            {},
            ["answers_broken"],
        ),
    ],
)
def test_which_rows_are_reported(history: list[Row], ended: dict[str, Any], rules: list[str]) -> None:
    judged = judge(history, **ended)
    assert [finding.rule for finding in judged.findings] == rules
    assert len(judged.lines()) == 1 + len(rules)


@pytest.mark.parametrize("end", [4, STEPS])  # before the first evaluation after a step, and at the end
def test_an_alarm_needs_samples_after_a_step(end: int) -> None:
    start = {"step": 0.0, "eval_loss": 0.69, "eval_samples/longest_repeat": 0.1}
    looping = [row for row in repeating(0.9, 0.1) if row["step"] <= end]
    alarm = sample_alarm([start, *looping])
    assert (alarm is not None and alarm.rule == "answers_broken") == (end == STEPS)


def test_noise_of_few_pairs_is_no_sign_of_the_learning_rate() -> None:
    accused = 0
    for seed in range(60):
        losses = enumerate(healthy(seed, 200, 8), 1)
        history = [{"step": step, "loss": loss, "grad_norm": 1.0, "pairs": 8.0} for step, loss in losses]
        accused += "learning_rate_too_high" in rules_of(history, steps=200)
    assert accused <= 1


WITHOUT_EVALUATION = (
    "no fault found (not looked at: does not generalise, learnt nothing): training accuracy 0.725"
)


@pytest.mark.parametrize(
    ("history", "ended", "sentence"),
    [
        (
            [START, *repeating(0.1, 0.1)],
            {"vocabulary": 3000},
            "no fault found: evaluation accuracy 0.750 on 400",
        ),
        (rows()[:18], {"exit": "preempted", "steps": 15}, "stopped after step 15; so far: no fault found"),
        (steps()[:4], {"steps": 4}, "too short to be judged: training accuracy 0.55"),
        (steps(), {"vocabulary": 3000}, WITHOUT_EVALUATION),
        ([], {}, "nothing to judge"),
        # A reward model gives no answers.
        (
            [{key: value for key, value in row.items() if "logps" not in key} for row in rows()],
            OF_SCORES,
            "no fault found (not looked at: answers broken, untrained base): evaluation accuracy 0.750",
        ),
    ],
)
def test_the_sentence_without_a_fault(history: list[Row], ended: dict[str, Any], sentence: str) -> None:
    judged = judge(history, **ended)
    assert judged.sentence.startswith(sentence)
    assert (judged.findings, len(judged.lines())) == ((), 1)


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
