"""Section about likelihood displacement: chosen responses that become less likely in training."""

import math

from dpo_dist.diagnostics.run_facts import MovedLogps, last
from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.number_text import number, percent
from dpo_dist.report.blocks import paragraph, section
from dpo_dist.report.run_page.facts import PageFacts

_LEAST_FALL = 0.05
"""Nats per token; a smaller fall is usual and has no section."""
_WHY = (
    "The loss only sees the difference between the two responses, so it also falls when both become less "
    "likely and the rejected one faster. Some of this is usual, because the two responses share many words, "
    "which lose together. It harms when the probability moves to texts that are neither (likelihood "
    "displacement): then the curves look fine and generated responses get worse."
)
_HELP = (
    "What helps, in this order: a lower optim.lr; a larger loss.beta; an sft term beside the loss "
    "(loss=sigmoid_sft); loss=dpop, which penalises a chosen response that falls below the reference; pairs "
    "that differ more."
)


def displacement_section(facts: PageFacts) -> str:
    """Return the section; empty for a run whose chosen responses did not become less likely."""
    chosen, rejected = facts.run.moved_logps("chosen"), facts.run.moved_logps("rejected")
    if chosen is None or chosen.start - chosen.end < _LEAST_FALL:
        return ""
    fall = (
        f"The chosen responses became less likely: {_nats(chosen)} nats per token, so that a token is on "
        f"average {percent(math.exp(chosen.end - chosen.start))} as likely as before."
    )
    other = f"The rejected ones: {_nats(rejected)}." if rejected is not None else ""
    origin = (
        f"These are the {facts.run.part} pairs of the last metrics row, under reference and policy."
        if chosen.is_of_same
        else "These are the pairs of the first and of the last logged steps: a small change is noise."
    )
    both = last(facts.run.last_rows, "rewards/both_fall")
    share = (
        f"In {percent(both)} of the {facts.run.part} pairs both are less likely than under the reference."
        if both
        else ""
    )
    return section(
        "displacement",
        "Chosen responses became less likely",
        paragraph(fall, other, origin, share, _judgement(chosen.start - chosen.end, both)),
        paragraph(_WHY),
        paragraph(_HELP),
    )


def _nats(logps: MovedLogps) -> str:
    return f"{logps.start:.2f} to {logps.end:.2f}"


def _judgement(fall: float, both: float | None) -> str:
    limits = RULES["displacement"].limits
    if fall >= limits["fall"] and both is not None and both >= limits["both_fall"]:
        return "Both are beyond the verdict's limits: read the sampled responses before you use the model."
    named = f"{number(limits['fall'], 3)} nats per token and {percent(limits['both_fall'])} of the pairs"
    return f"The verdict remarks on it when both reach {named}."
