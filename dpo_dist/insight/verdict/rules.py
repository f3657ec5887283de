"""The rules of the verdict about a run: limits, text, remedy, the worst fault first; see docs/verdict.md."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RunRule:
    """One rule.

    Attributes:
        headline: the fault in two to five words; the verdict's sentence starts with it.
        limits: the numbers that decide, by name.
        compared: the metrics and counts that are compared with them.
        text: the finding's sentence, a template of `str.format`.
        remedy: pieces of advice, joined by "; "; "a lower KEY", "more KEY" and the like push a key.
        explains: rules that are not reported beside this one, because they are its consequences.
        is_remark: it is no fault in itself, so the verdict's sentence does not name it.
    """

    headline: str
    limits: Mapping[str, float]
    compared: str
    text: str
    remedy: str
    explains: tuple[str, ...] = ()
    is_remark: bool = False


FEWEST_STEPS = 10
"""A shorter run has learnt too little to be judged by it."""

_OF_LOST_WEIGHTS = (
    "learning_rate_too_high",
    "far_from_reference",
    "does_not_generalise",
    "displacement",
    "learnt_nothing",
    "prefers_rejected",
    "over_optimised",
    "samples_degrade",
)
"""Findings that follow from weights that compute nothing usable any more."""

RULES: dict[str, RunRule] = {
    "diverged": RunRule(
        "diverged",
        {"values": 1},
        "the number of values of a row that are not finite",
        "{cause}; {quantity} was the first value that is not finite, at step {step}; before it the loss was "
        "{loss} and the gradient norm {grad_norm}, with a learning rate of {rate}",
        "a lower optim.lr; a larger optim.warmup_ratio; model.dtype=fp32 on a small part of the data; look "
        "at the pairs of this step",
        explains=(*_OF_LOST_WEIGHTS, "bad_steps"),
    ),
    "collapsed": RunRule(
        "the policy has collapsed",
        {"nats": 50.0},
        "the last rows with a `grad_norm` of exactly 0, in which `logps/chosen_per_token` and "
        "`logps/rejected_per_token` are the same, or the former is below -`nats`",
        "from step {step} on the gradient is 0, and chosen responses have {chosen} nats per token, as if "
        "all tokens were alike; before it the loss was {loss}, with optim.lr={rate}",
        "a lower optim.lr; a larger optim.warmup_ratio; if it is so from the first step, other weights",
        explains=_OF_LOST_WEIGHTS,
    ),
    "beta_too_large": RunRule(
        "beta too large",
        {"loss_share": 0.01, "margin": 5.0, "beta": 1.0, "fall": 1.0},
        "with a logistic loss and a beta of at least `beta`, while `rewards/margins` divided by beta is at "
        "most `margin` nats: the last loss as a share of the first; or the rise of the loss as for "
        "`learning_rate_too_high`, while `logps/chosen_per_token` fell by at most `fall` nats",
        "with loss.beta={beta} {symptom}",
        "a smaller loss.beta, between 0.01 and 0.5",
        explains=("learning_rate_too_high", "does_not_generalise"),
    ),
    "learning_rate_too_high": RunRule(
        "learning rate too high",
        {
            "loss_rise": 1.2,
            "pairs": 50,
            "varied_pairs": 200,
            "fall": 1.0,
            "steps_share": 0.25,
            "spike": 10.0,
            "rows": 2,
            "chance": 0.01,
        },
        "the mean loss of 3, 6, 12, ... rows with at least `pairs` pairs relative to the first row (if that "
        "is not the same for all pairs, to the first rows with `varied_pairs` pairs), by more than rows "
        "differ by chance in a share of `chance` of the runs, without the highest 10 %; the fall of "
        "`logps/chosen_per_token` below the reference's (if that is not known, of rows with at least `pairs` "
        "pairs since the first) within the first `steps_share` of the run and in half of the rows since, in "
        "nats; `grad_norm` relative "
        "to the median of the rows before it, and above its start, if the loss ends higher by more than "
        "chance; the last two in at least `rows` rows",
        "{symptom}, with optim.lr={rate}",
        "a lower optim.lr, by ten times; a larger optim.warmup_ratio",
        explains=("far_from_reference", "displacement"),
    ),
    "labels_swapped": RunRule(
        "labels look swapped",
        {"accuracy": 0.45, "standard_errors": 3, "steps": FEWEST_STEPS},
        "the last evaluation accuracy, also of each source, which is below `accuracy` by more than chance, "
        "while the training accuracy is not, in a run of at least `steps` steps: one step moves all pairs of "
        "a source together",
        "evaluation accuracy is {accuracy:.2f} on {pairs:,} pairs{source}, clearly below one half, while "
        "training accuracy is {training}: the policy learns the opposite of these labels",
        "compare chosen and rejected of some records of both files; swap the fields of the wrong one "
        "(`columns` of a source)",
        explains=("does_not_generalise",),
    ),
    "prefers_rejected": RunRule(
        "the policy prefers rejected responses",
        {"accuracy": 0.45, "standard_errors": 3},
        "the training accuracy of the last quarter of the steps, below `accuracy` by more than chance",
        "training accuracy is {accuracy:.2f} on {pairs:,} pairs: the loss teaches the opposite of the labels",
        "another loss than discopop, which has a minimum at small negative margins; the other sign of a "
        "custom loss",
        explains=("learnt_nothing",),
    ),
    "evaluation_leak": RunRule(
        "evaluation data leaked into training",
        {"share": 0.01},
        "the share of evaluation pairs whose prompt is in the training data too (`prompts_also_in_train`)",
        "{count:,} of {pairs:,} evaluation pairs ({share}) have a prompt that is also in the training "
        "data: the evaluation measures memory",
        "data.drop_eval_prompts=true, or data.eval_share for a split by prompt",
    ),
    "evaluation_too_good": RunRule(
        "evaluation better than training",
        {"difference": 0.05, "standard_errors": 3, "steps": FEWEST_STEPS},
        "the last evaluation accuracy minus the accuracy of the last quarter of at least `steps` steps",
        "evaluation accuracy {accuracy:.2f} on {pairs:,} pairs is above training accuracy {training}: the "
        "evaluation data are easier, or copies of training data, or some training labels are noise",
        "python -m dpo_dist.doctor, which also finds near copies; evaluate on other data; read pairs of "
        "the training source with the lowest accuracy",
    ),
    "label_leak": RunRule(
        "the label leaks",
        {
            "accuracy": 0.95,
            "pairs": 30,
            "steps_share": 0.1,
            "steps": 10,
            "length_ratio": 1.3,
            "sure_ratio": 2.0,
        },
        "the training accuracy of rows with at least `pairs` pairs, also of each source, within the first "
        "`steps` or `steps_share` of the run, if the doctor found a leak, or one side is `length_ratio` "
        "times longer on average; one side that is `sure_ratio` times longer needs no accuracy",
        "{symptom}",
        "python -m dpo_dist.doctor names the feature; make both sides alike in it, or use a "
        "length-normalised loss",
        explains=("far_from_reference",),
    ),
    "does_not_generalise": RunRule(
        "does not generalise",
        {"rise": 0.05, "difference": 0.1, "standard_errors": 3, "steps": FEWEST_STEPS},
        "of a run of at least `steps` steps: the last `eval_loss` above its lowest, also above that of a "
        "policy that is the reference (ln 2 for sigmoid) or of step 0, relative to the first, and by more "
        "than `standard_errors` of `eval_loss` / sqrt(pairs), while the training loss fell; the training "
        "accuracy of the last quarter of the steps minus the last evaluation accuracy, by more than chance",
        "{symptom}",
        "an earlier checkpoint, if its evaluation loss is lower than that at the start; fewer steps; a lower "
        "optim.lr; a larger loss.beta, or loss.label_smoothing; other evaluation data if they are of another "
        "kind",
    ),
    "over_optimised": RunRule(
        "over-optimised",
        {
            "length_ratio": 1.5,
            "length_spread": 0.7,
            "unfinished": 0.1,
            "unfinished_rise": 0.05,
            "distinct_fall": 0.7,
            "responses": 2,
            "standard_errors": 2,
        },
        "`eval_samples/length` (if it is also above the chosen responses' `tokens/chosen`, and above chance "
        "if lengths of responses to a prompt differ by a factor of exp(`length_spread`)), `finished` (a "
        "change of at least `responses` responses, and by more than chance) and `distinct_3` of the last "
        "evaluation with those of the reference, or of the first evaluation if they are unknown",
        "{symptoms} compared with {start}",
        "an earlier checkpoint; fewer steps; a larger loss.beta; a lower optim.lr; a length-normalised "
        "loss if responses grow",
    ),
    "samples_degrade": RunRule(
        "sampled responses degrade",
        {"rise": 0.1, "responses": 2, "standard_errors": 2},
        "`eval_samples/empty`, `refusals` and `language_changed` of the last evaluation minus those of the "
        "reference, or of the first evaluation; a change of at least `responses` responses, and by more than "
        "chance",
        "{symptoms} compared with {start}",
        "read the samples; look for such responses among the chosen ones",
    ),
    "far_from_reference": RunRule(
        "far from the reference",
        {"kl": 1.0},
        "`kl/rejected` of the last evaluation, else the median of the last quarter of the rows, in nats per "
        "token; `kl/chosen` also grows where the policy learns texts that the reference did not "
        "expect",
        "the policy moved {distance} per token away from the reference on the rejected responses, with "
        "loss.beta={beta}: beta restrains it too little",
        "a larger loss.beta; a lower optim.lr; fewer steps",
    ),
    "beta_too_small": RunRule(
        "beta too small",
        {"fall": 0.01, "margin": 2.0},
        "with a logistic loss: the training loss of the last quarter of the steps relative to the first row, "
        "and `rewards/margins` divided by beta, in nats",
        "with loss.beta={beta} the loss stays at its start ({first:.4g} -> {last:.4g}) although the log-prob "
        "of chosen minus rejected changed by {margin:.2g} nats: nothing keeps the policy near the reference",
        "a larger loss.beta, between 0.01 and 0.5",
    ),
    "learnt_nothing": RunRule(
        "learnt nothing",
        {
            "standard_errors": 3,
            "accuracy": 0.6,
            "pairs": 30,
            "steps": FEWEST_STEPS,
            "fall": 0.01,
            "rows": 3,
            "margin": 2.0,
        },
        "of a run of at least `steps` steps that reached its end: the last evaluation accuracy of at least "
        "`pairs` pairs, within so many standard errors of one half, if it and the training accuracy of the "
        "last quarter of the steps are below `accuracy`; or the training loss of this quarter relative to "
        "the first row, of at least `rows` rows, unless `rewards/margins` divided by beta reached `margin` "
        "nats",
        "{symptom}",
        "a higher optim.lr; more steps; if the accuracy is near one half, check that the labels are not "
        "random, and evaluate more pairs if there are few",
    ),
    "noisy_source": RunRule(
        "a source of noise",
        {"standard_errors": 2, "accuracy": 0.6, "others": 0.65, "pairs": 50},
        "the accuracy of each source of at least `pairs` pairs, of the last evaluation, else of training in "
        "the second half of the first epoch: not distinguishable from one half and below `accuracy` by more "
        "than chance, while another source is above `others`",
        "{part} accuracy of {sources} is {accuracy:.2f} on {pairs:,} pairs, as for random labels, while "
        "{other} reaches {best:.2f}",
        "read some of its pairs: its labels are noise, or of another preference; remove it or lower its "
        "`weight`",
        explains=("evaluation_too_good",),
    ),
    "bad_steps": RunRule(
        "steps were skipped",
        {"steps": 1},
        "`bad_steps` of summary.json: steps whose loss or gradient was not finite",
        "{count} of {steps:,} taught nothing, because loss or gradient was not finite",
        "read the pairs that logs/bad-step-*.json names; a lower optim.lr if their losses are finite",
    ),
    "responses_cut": RunRule(
        "responses are cut",
        {"share": 0.05},
        "`response_truncated` of the data as a share of the kept records",
        "{count:,} of {kept:,} {name} records ({share}) have a response whose end data.max_length cuts: "
        "the policy does not learn to end",
        "a larger data.max_length; data.truncation=keep_end or drop",
    ),
    "reference_drift": RunRule(
        "reference log-probs drift",
        {"drift": 0.01},
        "`mean_token_drift` of the step-0 check, in nats",
        "at step 0 a fresh computation differs from the stored reference by {drift:.2g} nats per token on "
        "average: margins below that are noise",
        "reference.numerics=strict, or model.dtype=fp32",
    ),
    "reference_disagrees": RunRule(
        "the reference disagrees with the labels",
        {"share": 0.2},
        "the share of the doctor's finding `reference_disagrees`",
        "the reference prefers the rejected response by far in {share} of {source}: labels may be swapped",
        "read the records that doctor.html lists",
    ),
    "doctor_errors": RunRule(
        "faults in the data",
        {"errors": 1},
        "the findings of level `error` in doctor.json of the run directory",
        "the doctor found errors in the data: {names}",
        "doctor.html lists records and remedies",
    ),
    "displacement": RunRule(
        "both responses become less likely",
        {"both_fall": 0.5, "fall": 0.1},
        "the last `rewards/both_fall`, and the fall of `logps/chosen_per_token` below the reference's (if "
        "that is not known, since the first step), in nats; a remark",
        "chosen responses became less likely, {first:.2f} -> {last:.2f} nats per token, and in {share} "
        "of the pairs both responses did (likelihood displacement): usual, and harmful only if probability "
        "moves to texts that are neither",
        "read the samples; if they are worse, a lower optim.lr; a larger loss.beta; loss=sigmoid_sft or "
        "loss=dpop (docs/metrics.md)",
        is_remark=True,
    ),
}
"""All rules by name; a verdict reports them in this order."""
