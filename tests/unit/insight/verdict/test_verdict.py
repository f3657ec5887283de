"""Each rule of the verdict finds its fault in a run that has nothing else; a healthy run has no finding."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dpo_dist.config.losses import KINDS, LossConfig, LossKind
from dpo_dist.insight.doctor.findings import Finding
from dpo_dist.insight.verdict.rules import MOST_FINDINGS, RULES, sample_alarms, verdict
from dpo_dist.objective.logps import PairLogps
from dpo_dist.objective.losses import preference_loss

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
        "kl/chosen": 0.05,
        "kl/rejected": 0.1,
        "tokens/chosen": 110.0,
        "tokens/rejected": 100.0,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-6,
        "pairs": 64.0,
    }


def evaluation_row(step: int) -> Row:
    metrics = {key: value for key, value in step_row(step).items() if key not in ("step", "grad_norm")}
    sampled = {"samples/length": 100.0, "samples/finished": 1.0, "samples/distinct_3": 0.9}
    shares = {
        "samples/empty": 0.0,
        "samples/refusals": 0.02,
        "samples/language_changed": 0.0,
        "samples/prompts": 50.0,
    }
    return {"step": step} | {
        f"eval_{key}": value for key, value in (metrics | sampled | shares | {"pairs": 400.0}).items()
    }


def steps(**changes: Any) -> list[Row]:
    """Return the rows of steps of `rows`."""
    return [row for row in rows(**changes) if "loss" in row]


def changed(index: int, row: Row, **changes: Any) -> list[Row]:
    """Return `rows` with one changed row."""
    found = rows(**changes)
    found[index] |= row
    return found


def rows(
    every: Mapping[str, float] | None = None, late: Mapping[str, float] | None = None, since: int = 10
) -> list[Row]:
    """Return the rows of a healthy run with other values: in `every` row, and in those from step `since`."""
    found = []
    for step in range(1, STEPS + 1):
        found += [step_row(step), evaluation_row(step)] if step % 5 == 0 else [step_row(step)]
    for row in found:
        changes = dict(every or {}) | (dict(late or {}) if row["step"] >= since else {})
        row |= {
            key: value for key, value in changes.items() if ("eval_loss" in row) == key.startswith("eval_")
        }
    return found


@pytest.mark.parametrize("last", [4, STEPS])  # before the first evaluation after a step, and at the end
def test_the_evaluation_before_the_first_step_is_no_evidence(last: int) -> None:
    of_run = [row for row in rows() if row["step"] <= last]
    untrained = {"eval_rewards/accuracies": 0.1, "eval_kl/rejected": 9.0, "eval_loss": 0.01}
    start = evaluation_row(0) | untrained | {"eval_samples/length": 900.0, "eval_samples/finished": 0.0}
    facts = summary(steps=last, exit="completed" if last == STEPS else "preempted")
    assert verdict([start, *of_run], facts) == verdict(of_run, facts)
    assert sample_alarms([start, *of_run]) == sample_alarms(of_run)


def counts(**changes: Any) -> dict[str, Any]:
    sources = [{"label": "a", "pairs": 200}, {"label": "b", "pairs": 200}]
    return {"read": 400, "kept": 400, "pairs": 400, "response_truncated": 3, "sources": sources} | changes


def summary(**changes: Any) -> dict[str, Any]:
    data = {"train": counts(), "eval": counts(prompts_also_in_train=0)}
    drift = {"drift": {"mean_token_drift": 1e-6}}
    return {
        "steps": STEPS,
        "settings": SETTINGS,
        "data": data,
        "reference": drift,
        "exit": "completed",
    } | changes


def with_beta(beta: float) -> dict[str, Any]:
    return {"settings": SETTINGS | {"loss.beta": beta}}


LEAK = {"rule": "label_leak", "level": "error", "share": 0.93, "text": "of the words 'quoted'"}
DISAGREES = {"rule": "reference_disagrees", "level": "warning", "share": 0.4, "source": "a"}
AT_ONCE = {"rewards/accuracies": 0.99, "eval_rewards/accuracies": 0.99}
FLAT = {"loss": 0.693}
COLLAPSED = {
    "grad_norm": 0.0,
    "loss": 0.9,
    "logps/chosen_per_token": -6.0661,
    "logps/rejected_per_token": -6.0661,
}
Case = tuple[str, list[Row], dict[str, Any], list[dict[str, Any]], tuple[str, ...]]


def case(
    rule: str,
    *words: str,
    ended: Mapping[str, Any] | None = None,
    doctor: Sequence[dict[str, Any]] = (),
    history: list[Row] | None = None,
    **changes: Any,
) -> Case:
    """Return a rule, rows of a run and its files, and words that the finding has."""
    return rule, history or rows(**changes), summary(**(ended or {})), [*doctor], words


CASES = [
    case(
        "diverged",
        "the formula of the loss has no finite value for log-probs that are finite; the loss was the first",
        "at step 12; before it the loss was 0.558 and the gradient norm 3",
        late={"loss": math.nan, "grad_norm": math.inf},
        since=12,
    ),
    case(
        "diverged",
        "the policy has collapsed: from step 11 on",
        "-6.07 nats per token",
        "the loss was 0.57",
        ended={"exit": "diverged"},
        late=COLLAPSED,
        since=11,
    ),
    case("diverged", "in 2 steps of 20, which taught nothing", ended={"bad_steps": 2}),
    case("diverged", "; the gradient norm was the first", late={"grad_norm": math.inf}, since=20),
    case("diverged", "; the loss was the first", late={"eval_loss": math.nan}, since=20),
    case(
        "diverged",
        "not finite, at step 18",
        ended={"bad_in_a_row": 3, "exit": "diverged"},
        history=steps(late={"loss": math.nan}, since=20),
    ),
    case("beta_wrong", "loss.beta=10 is too large", "0.08 nats", ended=with_beta(10.0), late={"loss": 1e-5}),
    case("beta_wrong", "loss.beta=1e-4 is too small", "8e+03 nats", ended=with_beta(1e-4), every=FLAT),
    case(
        "learning_rate_too_high",
        *("the loss rose from 0.678 to 1.2", "optim.lr=1e-6"),
        late={"loss": 1.2},
        since=4,
    ),
    case("learning_rate_too_high", "moved 1.5 nats", late={"eval_kl/rejected": 1.5}),
    case("learning_rate_too_high", "moved 1.4 nats", history=steps(late={"kl/rejected": 1.4})),
    case(
        "learning_rate_too_high",
        "moved more nats than float32 can express per token",
        late={"eval_kl/rejected": math.inf},
    ),
    case(
        "learning_rate_too_high",
        "fell by 2.5 nats per token by step 4 of 20",
        late={"logps/chosen_per_token": -3.5},
        since=4,
    ),
    case(
        "labels_swapped",
        *("0.30 on 400 pairs", "training accuracy is 0.725"),
        late={"eval_rewards/accuracies": 0.3},
    ),
    case(
        "labels_swapped",
        "training accuracy is 0.20 on 320 pairs",
        every={"rewards/accuracies": 0.2, "eval_rewards/accuracies": 0.2},
    ),
    case(
        "evaluation_leak",
        *("100 of 400", "25 %"),
        ended={"data": {"train": counts(), "eval": counts(prompts_also_in_train=100)}},
    ),
    case("evaluation_too_good", "0.95", "0.725", "noise", late={"eval_rewards/accuracies": 0.95}),
    case(
        "label_leak",
        *("0.99 at step 1", "by length", "300 tokens, rejected ones 100"),
        every=AT_ONCE | {"tokens/chosen": 300.0},
    ),
    case(
        "does_not_generalise",
        *("rose from 0.57 at step 10 to 0.9", "fell from 0.57 to 0.474"),
        late={"eval_loss": 0.9},
        since=15,
    ),
    case(
        "over_optimised",
        *("2.3x longer", "16 % of the sampled responses do not end", "30 % of the", "2 % before", "step 5"),
        late={"eval_samples/length": 230.0, "eval_samples/finished": 0.84, "eval_samples/refusals": 0.3},
    ),
    case(
        "over_optimised",
        "3.0x longer (60 -> 180 tokens) compared with the reference",
        every={"eval_samples/length": 180.0, "eval_samples/reference_length": 60.0},
    ),
    case(
        "learnt_nothing",
        *("0.52 on 400 pairs is within its noise", "training accuracy 0.51"),
        every={"rewards/accuracies": 0.51, "eval_rewards/accuracies": 0.52, "eval_rewards/margins": 0.01},
    ),
    case(
        "responses_cut",
        "80 of 400 training records (20 %)",
        ended={"data": {"train": counts(response_truncated=80), "eval": counts()}},
    ),
    case(
        "doctor_errors",
        "errors in the data: doubled_bos",
        doctor=[DISAGREES | {"share": 0.1}, {"rule": "doubled_bos", "level": "error"}],
    ),
    case("doctor_errors", "prefers the rejected response by far in 40 % of a", doctor=[DISAGREES]),
    case(
        "displacement",
        *("-1.00 -> -1.40", "60 % of the pairs", "likelihood displacement"),
        late={"eval_rewards/both_fall": 0.6, "logps/chosen_per_token": -1.4},
    ),
]


@pytest.mark.parametrize(("rule", "history", "ended", "doctor", "words"), CASES)
def test_a_rule_finds_its_fault_and_no_other_rule_does(
    rule: str,
    history: list[Row],
    ended: dict[str, Any],
    doctor: list[dict[str, Any]],
    words: tuple[str, ...],
) -> None:
    judged = verdict(history, ended, doctor)
    [finding] = judged.findings
    assert finding.rule == rule
    assert [word for word in words if word not in finding.text] == []
    written = f"{finding.text}. Try: {finding.remedy}"
    assert judged.as_dict()["findings"] == [{"rule": rule, "text": written}]
    if rule == "displacement":
        assert judged.sentence.startswith("no fault found: ")
        assert judged.lines() == [f"verdict: {judged.sentence}", f"  - {written}"]
    else:
        assert judged.sentence == f"{RULES[rule].text}: {finding.text}"
        assert judged.lines() == [f"verdict: {judged.sentence}", f"  try: {finding.remedy}"]


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, *_ in CASES} == set(RULES)


def with_settings(**changes: Any) -> dict[str, Any]:
    return {"settings": SETTINGS | {f"loss.{name}": value for name, value in changes.items()}}


OTHER = {"settings": SETTINGS | {"reference.path": "other"}}
UNSURE = {"eval_rewards/accuracies": 0.58, "eval_rewards/margins": 0.1, "rewards/accuracies": 0.57}
SAMPLED = {"eval_samples/reference_finished": 10 / 16, "eval_samples/reference_refusals": 2 / 16}
SAMPLED |= {"eval_samples/prompts": 16.0}
RISEN = rows(every={"pairs": 20.0}, late={"loss": 0.9}, since=2)
STILL = {"loss": 0.69, "rewards/margins": 3.0, "eval_rewards/margins": 3.0}
AT_CHANCE = FLAT | {"rewards/accuracies": 0.5, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 1e-3}


def samples(prompts: float, **late: float) -> list[Row]:
    named = {f"eval_samples/{name}": value for name, value in late.items()}
    return rows(every={"eval_samples/prompts": prompts}, late=named)


@pytest.mark.parametrize(
    ("history", "ended", "rules"),
    [
        # What a loss does by design.
        (
            rows(late={"eval_rewards/both_fall": 0.9, "logps/chosen_per_token": -1.4}),
            with_settings(kind="apo_down"),
            [],
        ),
        # A distance that float32 cannot hold.
        (rows(late={"kl/chosen": math.inf, "eval_kl/chosen": math.inf}), {}, []),
        # Responses as long as the chosen ones.
        (rows(late={"eval_samples/length": 180.0, "eval_tokens/chosen": 200.0}), {}, []),
        # One row by chance.
        (rows(late={"loss": 0.679}, since=20), with_settings(beta=0.02), []),
        (changed(0, {"tokens/chosen": 300.0}, every=AT_ONCE), {}, []),
        (changed(2, {"loss": 0.95}), {}, []),
        (changed(6, {"grad_norm": 900.0, "loss": 0.95}), {}, []),
        (changed(2, {"logps/chosen_per_token": -9.0}), {}, []),
        (changed(4, {"logps/chosen_per_token": -3.0}, every={"pairs": 4.0}), {}, []),
        ([*steps()[:-1], step_row(STEPS) | {"kl/rejected": math.inf}], {}, []),
        # Few pairs.
        (rows(every=UNSURE | {"eval_pairs": 10.0}), {}, []),
        (rows(every=UNSURE | {"eval_pairs": 50.0}), {}, ["learnt_nothing"]),
        (rows(every=UNSURE | {"eval_pairs": 5000.0}), {}, []),
        (changed(1, {"rewards/accuracies": 1.0}, every={"tokens/chosen": 180.0, "pairs": 2.0}), {}, []),
        (changed(1, {"rewards/accuracies": 1.0}, every={"tokens/chosen": 180.0}), {}, ["label_leak"]),
        (rows(every={"pairs": 4.0}, late={"loss": 1.2}), {}, []),
        (rows(every={"pairs": 20.0}, late={"loss": 1.2}), {}, ["learning_rate_too_high"]),
        # Few responses.
        (samples(8.0, refusals=0.15), {}, []),
        (samples(80.0, refusals=0.15), {}, ["over_optimised"]),
        (samples(8.0, finished=0.875), {}, []),
        (samples(80.0, finished=0.875), {}, ["over_optimised"]),
        (samples(8.0, length=190.0), {}, []),
        (samples(8.0, length=230.0), {}, ["over_optimised"]),
        (samples(64.0, length=190.0), {}, ["over_optimised"]),
        (rows(every=SAMPLED | {"eval_samples/finished": 8 / 16, "eval_samples/refusals": 4 / 16}), {}, []),
        (rows(every=SAMPLED | {"eval_samples/finished": 3 / 16}), {}, ["over_optimised"]),
        # A resumed run may have shorter samples: then the reference has responded again.
        (rows(late={"eval_samples/finished": 0.5, "eval_samples/reference_finished": 0.52}), {}, []),
        (
            rows(late={"eval_samples/finished": 0.5, "eval_samples/reference_finished": 1.0}),
            {},
            ["over_optimised"],
        ),
        # The first loss is the start only if it is the same for all pairs.
        (RISEN, {}, ["learning_rate_too_high"]),
        (RISEN, with_settings(kind="ipo"), ["learning_rate_too_high"]),
        (RISEN, with_settings(weighting="none"), ["learning_rate_too_high"]),
        (RISEN, with_settings(kind="odpo"), []),
        (RISEN, with_settings(weighting="wpo"), []),
        (RISEN, OTHER, []),
        # Without a reference, or with another one, a margin at the start is no change.
        (rows(every=STILL), with_settings(reference_free=True, beta=0.05), ["learnt_nothing"]),
        (rows(every=STILL), with_settings(kind="cpo"), ["learnt_nothing"]),
        (rows(every=STILL), with_settings(kind=None, terms=[{"kind": "simpo"}]), ["learnt_nothing"]),
        (rows(every=STILL | {"rewards/margins": 0.1}), OTHER, ["learnt_nothing"]),
        # A run that fits its training pairs has learnt something.
        (rows(every={"rewards/accuracies": 1.0}), {}, ["does_not_generalise"]),
        (rows(every={"rewards/accuracies": 1.0, "eval_rewards/accuracies": 0.95}), {}, []),
        (rows(every=FLAT | {"eval_rewards/margins": 1e-3}), {}, ["learnt_nothing"]),
        (rows(every=AT_CHANCE), {"exit": "preempted"}, []),
        # Skipped steps do not explain other faults.
        (rows(late={"loss": 1.2}, since=4), {"bad_steps": 2}, ["diverged", "learning_rate_too_high"]),
    ],
)
def test_which_faults_are_found(history: list[Row], ended: dict[str, Any], rules: list[str]) -> None:
    assert [finding.rule for finding in verdict(history, summary(**ended)).findings] == rules


def spoilt(eval_loss: float, pairs: float, **training: float) -> list[Row]:
    """Rows of a run that fits its training pairs, with one evaluation at its end."""
    fitted = {"loss": 0.02, "rewards/accuracies": 1.0} | training
    metrics = {"eval_loss": eval_loss, "eval_rewards/accuracies": 0.62, "eval_pairs": pairs}
    return [*steps(late=fitted), {"step": float(STEPS), **metrics}]


def rules_of(history: list[Row], doctor: Sequence[dict[str, Any]] = (), **ended: Any) -> list[str]:
    return [finding.rule for finding in verdict(history, summary(**ended), doctor).findings]


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (spoilt(1.5, 2000.0), "rose from 0.693 at the start to 1.5, while training loss fell"),
        (spoilt(1.5, 2000.0), "accuracy 1.00 is far above evaluation accuracy 0.62 on 2,000 pairs"),
        (spoilt(1.5, 2000.0, **{"rewards/accuracies": 0.6}), "evaluation loss rose"),
        (spoilt(0.66, 2000.0), "training accuracy 1.00 is far above"),
        (spoilt(0.9, 30.0, **{"rewards/accuracies": 0.7}), None),  # by chance
        (spoilt(0.66, 8.0, **{"rewards/accuracies": 0.8}), None),  # by chance
        (spoilt(0.72, 2000.0, **{"rewards/accuracies": 0.7}), None),  # by little
        (spoilt(1.5, 2000.0, **{"rewards/accuracies": 0.6, "loss": 1.4}), None),  # not over-fitting
    ],
)
def test_one_evaluation_at_the_end_shows_that_a_run_does_not_generalise(
    history: list[Row], words: str | None
) -> None:
    found = {one.rule: one.text for one in verdict(history, summary()).findings}
    assert "learnt_nothing" not in found
    assert ("does_not_generalise" in found) is (words is not None)
    assert words is None or words in found["does_not_generalise"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_loss_is_compared_with_that_of_a_policy_that_is_the_reference(kind: LossKind) -> None:
    """Where pairs differ in it, it is compared with that of step 0, if it was measured."""
    zeros, ones = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    logps = PairLogps(zeros, zeros, ones, ones)
    settings = SETTINGS | {"loss.kind": str(kind)}
    unknown = (LossKind.odpo, LossKind.plackett_luce, LossKind.custom)
    is_known = KINDS[kind].needs_reference and kind not in unknown
    start = float(preference_loss(logps, logps, LossConfig(kind=kind))) if is_known else 1.0
    fell = {"loss": 0.3 * start, "rewards/accuracies": 0.65}
    first = {"step": 0.0, "eval_loss": start, "eval_rewards/accuracies": 0.6, "eval_pairs": 1e6}
    for times in (1.04, 1.06):
        history, is_worse = spoilt(times * start, 1e6, **fell), times > 1.05
        for of_run, is_found in ((history, is_known and is_worse), ([first, *history], is_worse)):
            assert ("does_not_generalise" in rules_of(of_run, settings=settings)) is is_found
    weighted = settings | {"loss.weighting": "wpo"}
    assert "does_not_generalise" not in rules_of(spoilt(9 * start, 1e6, **fell), settings=weighted)


def pushes(advice: str) -> set[tuple[str, bool]]:
    """Keys that advice pushes, and whether up."""
    found = re.findall(r"\b(lower|smaller|fewer|higher|larger|more) ([a-z_.]+)", advice)
    return {(key, word in ("higher", "larger", "more")) for word, key in found}


def test_findings_of_one_verdict_never_push_a_key_both_ways() -> None:
    """Of every two faults together, by what each changes in a healthy run; the more severe one is heard."""
    usual, lost = rows(), 0
    faults = [each for each in CASES if len(each[1]) == len(usual)]
    for pair in itertools.combinations(faults, 2):
        together, changed, data_findings = rows(), summary(), [*pair[0][3], *pair[1][3]]
        for _, history, ended, _, _ in pair:
            changed |= {key: value for key, value in ended.items() if value != summary().get(key)}
            for row, other, healthy in zip(together, history, usual, strict=True):
                row |= {key: value for key, value in other.items() if value != healthy.get(key)}
        findings = verdict(together, changed, data_findings).findings
        pushed = {push for finding in findings for push in pushes(finding.remedy)}
        assert not {(key, not is_up) for key, is_up in pushed} & pushed
        for number, finding in enumerate(findings):
            without = pushes(RULES[finding.rule].remedy) - pushes(finding.remedy)
            assert not (without and number == 0)
            lost += len(without)
    assert lost > 0


def test_a_perfect_accuracy_at_once_needs_evidence_to_be_a_leak() -> None:
    assert rules_of(rows(every=AT_ONCE)) == []
    [leak, _] = verdict(rows(every=AT_ONCE), summary(), [LEAK]).findings
    assert leak.rule == "label_leak"
    assert "by form: the doctor found label_leak, which alone guesses 93 %" in leak.text
    assert "quoted" not in leak.text
    every = {"rewards/accuracies/a": 0.98, "rewards/accuracies/b": 0.7}
    longer = {"eval_tokens/chosen/a": 30.0, "eval_tokens/rejected/a": 90.0}
    assert rules_of(rows(every=every)) == []
    [leak] = verdict(rows(every=every | longer), summary()).findings
    assert "accuracy of a is 0.98 at step 2 already, by length" in leak.text


@pytest.mark.parametrize(
    ("chosen", "rejected", "is_found"), [(54, 23, True), (23, 54, True), (54, 38, False)]
)
def test_lengths_that_tell_the_label_need_no_accuracy(chosen: float, rejected: float, is_found: bool) -> None:
    history = rows(every={"tokens/chosen": chosen, "tokens/rejected": rejected})
    found = verdict(history, summary()).findings
    assert [one.rule for one in found] == ["label_leak"] * is_found
    said = f"the label shows by length: chosen responses have {chosen} tokens, rejected ones {rejected}"
    assert all(one.text.startswith(said) for one in found)


def test_swapped_labels_of_one_source_are_named() -> None:
    swapped = {"eval_rewards/accuracies/a": 0.2, "eval_rewards/accuracies/b": 0.9}
    [finding] = verdict(rows(every=swapped), summary()).findings
    assert finding.rule == "labels_swapped"
    assert "0.20 on 200 pairs of a" in finding.text
    assert rules_of([row for row in rows(every=swapped) if row["step"] <= 5], steps=5) == []


BROKEN = {"logps/chosen": math.nan, "loss": math.nan, "grad_norm": math.nan}


@pytest.mark.parametrize(
    ("earlier", "value", "since", "cause"),
    [
        ({}, BROKEN, 1, "the model gives no finite log-probs from the start"),
        ({}, BROKEN, 12, "an update damaged the weights"),
        ({"loss": 2.0}, BROKEN, 20, "the learning rate is too high: the loss rose from 0.678 to 2"),
        ({}, {"loss": math.nan, "grad_norm": math.nan}, 12, "the formula of the loss"),
        ({}, {"grad_norm": math.inf}, 12, "the backward overflows"),
        ({}, {"eval_loss": math.nan}, 10, "the evaluation data have pairs"),
    ],
)
def test_the_cause_of_a_divergence(
    earlier: dict[str, float], value: dict[str, float], since: int, cause: str
) -> None:
    history = rows(late=earlier)
    for row in history:
        if row["step"] >= since and ("eval_loss" in row) == ("eval_loss" in value):
            row.update(value)
    judged = verdict(history, summary())
    assert judged.findings[0].rule == "diverged"
    assert judged.sentence.startswith(f"diverged: {cause}")


def test_at_most_five_findings_the_worst_first() -> None:
    late = {"eval_samples/length": 300.0, "eval_kl/rejected": 2.0, "eval_rewards/accuracies": 0.95}
    data = {"train": counts(response_truncated=200), "eval": counts(prompts_also_in_train=50)}
    found = rules_of(rows(every={"tokens/chosen": 300.0}, late=late), [DISAGREES], data=data)
    assert len(found) == MOST_FINDINGS
    assert found == [
        *("learning_rate_too_high", "evaluation_leak", "evaluation_too_good"),
        *("label_leak", "over_optimised"),
    ]


def test_chosen_log_probs_are_compared_on_the_same_responses() -> None:
    """The rows of other batches have other responses."""
    late = {
        "eval_rewards/both_fall": 0.6,
        "eval_logps/chosen_per_token": -1.4,
        "logps/chosen_per_token": -3.0,
    }

    def fallen(nats: float) -> Finding | None:
        of_rewards = dict.fromkeys(("rewards/chosen", "eval_rewards/chosen"), -nats * 110.0 * 0.1)
        return next(iter(verdict(rows(late=late | of_rewards, since=4), summary()).findings), None)

    assert fallen(0.02) is None
    assert (little := fallen(0.4)) is not None
    assert "-1.00 -> -1.40 nats per token" in little.text
    assert (far := fallen(2.0)) is not None
    assert (little.rule, far.rule) == ("displacement", "learning_rate_too_high")
    assert "fell by 2 nats per token by step 4 of 20" in far.text


def test_a_loss_that_differs_among_pairs_is_compared_over_more_of_them() -> None:
    """Without a reference the first row is a sample too."""
    simpo = with_settings(kind="simpo")
    history = changed(0, {"loss": 0.3})
    assert rules_of(history, **simpo) == []
    assert rules_of(history) == ["learning_rate_too_high"]
    [finding] = verdict(rows(late={"loss": 1.2}, since=9), summary(**simpo)).findings
    assert "the loss rose from 0.66 to 1.2" in finding.text


def test_a_policy_that_starts_far_from_another_reference_is_not_accused_of_it() -> None:
    start = {"kl/rejected": 3.0, "eval_kl/rejected": 3.5}
    assert rules_of(rows(every=start)) == ["learning_rate_too_high"]
    assert rules_of(rows(every=start), **OTHER) == []
    assert rules_of(rows(every=start | {"eval_kl/rejected": 5.0}), **OTHER) == [], "other pairs"
    [finding] = verdict(rows(every=start, late={"kl/rejected": 5.0}), summary(**OTHER)).findings
    assert "moved 2 nats" in finding.text


@pytest.mark.parametrize(("rows_of_run", "pairs"), [(20, 16), (200, 8), (600, 4)])
def test_noise_of_few_pairs_is_no_sign_of_the_learning_rate(rows_of_run: int, pairs: int) -> None:
    """Of 60 healthy runs at most one is accused; of 60 whose margins get wild, most are found."""
    accused = {"healthy": 0, "wild": 0}
    for seed in range(60):
        generator = np.random.default_rng(seed)
        for kind, (mean, spread) in {"healthy": (1.5, 1.2), "wild": (0.0, 8.0)}.items():
            grown = 1 - np.exp(-3 * np.arange(rows_of_run) / rows_of_run)
            margins = generator.normal(mean, spread, (pairs, rows_of_run)) * grown
            losses = np.logaddexp(0, -margins).mean(axis=0)
            norms = np.exp(generator.normal(0, 0.7, rows_of_run))
            norms[generator.choice(rows_of_run, 3)] *= 20
            history = [
                {"step": step, "loss": loss, "grad_norm": norm, "pairs": float(pairs)}
                for step, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), 1)
            ]
            found = verdict(history, {"steps": rows_of_run, "settings": SETTINGS}).findings
            accused[kind] += "learning_rate_too_high" in [finding.rule for finding in found]
    assert accused["healthy"] <= 1
    assert accused["wild"] >= 48


@pytest.mark.parametrize(("length", "width"), [(20, 1), (50, 3), (100, 6), (300, 10)])
@pytest.mark.parametrize("height", [1.2, 3.0, 30.0])
def test_a_spike_that_recovers_is_no_sign_of_the_learning_rate(
    length: int, width: int, height: float
) -> None:
    spike = {"loss": height, "grad_norm": 50.0, "logps/chosen_per_token": -4.0}
    for at in (length // 8, length // 2, length - 2 * width - 2):
        history: list[Row] = [
            {"step": step, "loss": 0.69 - 0.2 * step / length - 0.01 * (step % 3), "grad_norm": 1.0}
            | {"logps/chosen_per_token": -1.0, "pairs": 64.0}
            | (spike if at <= step < at + width else {})
            for step in range(length)
        ]
        judged = verdict(history, {"steps": length, "settings": SETTINGS})
        assert (judged.findings, judged.sentence[:14]) == ((), "no fault found")


def test_a_loss_that_rises_by_a_large_beta_is_not_blamed_on_the_learning_rate() -> None:
    risen = {"loss": 6.0, "eval_rewards/margins": 0.08}
    [finding] = verdict(rows(late=risen), summary(**with_beta(10.0))).findings
    assert finding.rule == "beta_wrong"
    assert "the loss rose from 0.678 to 6, although" in finding.text
    assert "changed by 0.008 nats" in finding.text
    collapsed = rows(late=risen | {"logps/chosen_per_token": -7.0})
    assert rules_of(collapsed, **with_beta(10.0))[0] == "learning_rate_too_high"


def test_alarms_are_the_faults_of_the_samples_so_far() -> None:
    history = rows(late={"eval_samples/empty": 0.5, "eval_samples/length": 400.0, "loss": math.nan})
    assert sample_alarms(history[:10]) == []
    [alarm] = sample_alarms(history)
    assert alarm.rule == "over_optimised"
    assert "4.0x longer" in alarm.text
    assert "50 % of the sampled responses are empty" in alarm.text


@pytest.mark.parametrize(
    ("history", "ended", "sentence"),
    [
        (
            rows(),
            {},
            "no fault found: evaluation accuracy 0.75 on 400 pairs, margin 0.8, "
            "training loss 0.678 -> 0.45 in 20 steps",
        ),
        (
            rows()[:18],
            {"exit": "preempted", "steps": 15},
            "stopped after step 15; so far: no fault found: evaluation accuracy",
        ),
        (steps(every=AT_CHANCE)[:4], {"steps": 4}, "too short to be judged"),
        (
            steps(),
            {},
            "no fault found (nothing was evaluated after a step: data.eval): training accuracy 0.72",
        ),
    ],
)
def test_the_sentence_about_a_run_without_a_fault(
    history: list[Row], ended: dict[str, Any], sentence: str
) -> None:
    judged = verdict(history, summary(**ended))
    assert judged.sentence.startswith(sentence)
    assert (judged.findings, len(judged.lines())) == ((), 1)


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 2.0}], [{"step": 3, "eval_loss": 1.0}]])
@pytest.mark.parametrize(
    "ended",
    [
        {},
        {"data": None, "settings": None, "reference": None},
        {"data": {"train": {"sources": [{"path": "a.jsonl"}]}}, "reference": {"mode": "none"}},
    ],
)
def test_a_verdict_needs_no_input(history: list[Row], ended: dict[str, Any]) -> None:
    assert verdict(history, ended).findings == ()
