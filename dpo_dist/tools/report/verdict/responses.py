"""Rules about responses: chosen ones that become less likely, and samples that become worse."""

import math
from collections.abc import Iterator

from dpo_dist.foundation.text import percent
from dpo_dist.tools.report.verdict.facts import (
    FEWEST_STEPS,
    Find,
    RunFacts,
    digits,
    first,
    last,
)

_REFERENCE = "samples/reference_"


def _responses_forgotten(facts: RunFacts) -> Iterator[str]:
    start, end = facts.chosen_logps() or (0.0, 0.0)
    if start - end < _least_fall(start):
        return
    share = last(facts.last_rows, "rewards/both_fall") or 0.0
    if facts.unit == "record":
        yield f"good responses became far less likely, {start:.2f} -> {end:.2f} nats per token"
    elif share >= 0.5 and "apo_down" not in facts.kinds:
        yield (
            f"chosen responses became far less likely, {start:.2f} -> {end:.2f} nats per token, and both "
            f"responses did in {percent(share)} of the pairs, at an accuracy of "
            f"{digits(last(facts.last_rows, facts.accuracy_key))}"
        )


def _least_fall(start: float) -> float:
    """Return a fall of chosen responses, in nats per token, that healthy runs do not reach.

    In published runs of a 7B model the log-probs fell from about -1 by 0.06 to 0.95 of that. Responses that
    are almost certain after an SFT stage break sooner.
    """
    return min(max(-start, 0.5), 1.0)


def _over_optimised(facts: RunFacts) -> Iterator[str]:
    if symptoms := ", ".join(_worse_samples(facts)):
        is_known = any(key.startswith(_REFERENCE) for row in facts.evaluations for key in row)
        yield f"{symptoms} compared with {'the reference' if is_known else 'the first samples'}"


def _worse_samples(facts: RunFacts) -> Iterator[str]:
    rows = facts.evaluations
    prompts = last(rows, "samples/prompts") or math.inf

    def ends(name: str) -> tuple[float, float] | None:
        """Return a metric of the reference's responses (else of the first samples) and of the last ones."""
        start, end = last(rows, _REFERENCE + name), last(rows, f"samples/{name}")
        start = first(rows, f"samples/{name}") if start is None else start
        return None if start is None or end is None else (start, end)

    if lengths := ends("length"):
        start, end = lengths
        # Lengths of few responses differ by chance; from 36 prompts on, 1.5 times is enough.
        least = start * max(1.5, 1 + 3 / math.sqrt(prompts))
        if start and end >= least and end > (last(rows, "tokens/chosen") or 0.0):
            yield f"sampled responses are {end / start:.1f}x longer ({start:.0f} -> {end:.0f} tokens)"
    if (distinct := ends("distinct_3")) and distinct[0] > 0 and distinct[1] <= 0.7 * distinct[0]:
        yield "they repeat themselves (distinct 3-grams {} -> {})".format(*map(percent, distinct))
    for metric, meaning in (
        ("finished", "do not end by themselves"),
        ("empty", "are empty"),
        ("refusals", "are refusals"),
        ("language_changed", "are in another language than the chosen response"),
    ):
        if shares := ends(metric):
            start, end = (1 - value if metric == "finished" else value for value in shares)
            both = (start + end) / 2
            # In healthy runs, too, half of the samples may not end: only a rise far above chance counts.
            if end - start >= max(0.1, 2.5 * math.sqrt(2 * both * (1 - both) / prompts)):
                yield f"more sampled responses {meaning} ({percent(start)} -> {percent(end)})"


def _samples_loop(facts: RunFacts) -> Iterator[str]:
    repeated, start = (last(facts.evaluations, name + "longest_repeat") for name in ("samples/", _REFERENCE))
    if repeated is not None and repeated >= 0.5 and facts.total_steps >= FEWEST_STEPS:
        yield (
            f"the longest passage that a sampled response repeats has {percent(repeated)} of its words"
            + (f", and {percent(start)} in the reference's responses" if start is not None else "")
        )


def _good_responses_fall(facts: RunFacts) -> Iterator[str]:
    falls = facts.falls(facts.last_rows)
    if facts.unit == "record" and falls and falls[-1][1] >= 0.1:
        yield (
            f"good responses lost {falls[-1][1]:.2g} nats per token against the reference, although the loss "
            f"rewards them ({facts.part} reward {digits(last(facts.last_rows, 'rewards/chosen'))})"
        )


def _displacement(facts: RunFacts) -> Iterator[str]:
    share, logps = last(facts.last_rows, "rewards/both_fall"), facts.chosen_logps()
    if share is None or logps is None or "apo_down" in facts.kinds:  # this loss lowers both by design
        return
    start, end = logps
    if share >= 0.5 and start - end >= 0.1:
        yield (
            f"chosen responses became less likely, {start:.2f} -> {end:.2f} nats per token, "
            f"and in {percent(share)} of the pairs both responses did (likelihood displacement): usual, and "
            "harmful only if probability moves to texts that are neither"
        )


RESPONSES_RULES: tuple[Find, ...] = (
    _responses_forgotten,
    _over_optimised,
    _samples_loop,
    _good_responses_fall,
    _displacement,
)
