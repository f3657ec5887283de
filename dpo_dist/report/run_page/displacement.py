"""Section about likelihood displacement: chosen responses that become less likely in training."""

import math

from dpo_dist.diagnostics.run_facts import last, values
from dpo_dist.diagnostics.run_rules import RULES
from dpo_dist.number_text import number, percent
from dpo_dist.report.blocks import paragraph, section
from dpo_dist.report.run_page.facts import PageFacts

_CHOSEN, _REJECTED = "logps/chosen_per_token", "logps/rejected_per_token"
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
    chosen, rejected = values(facts.run.steps, _CHOSEN), values(facts.run.steps, _REJECTED)
    if len(chosen) < 2 or chosen[0][1] - chosen[-1][1] < _LEAST_FALL:
        return ""
    (first_step, first), (last_step, final) = chosen[0], chosen[-1]
    fall = (
        f"From step {first_step:,.0f} to step {last_step:,.0f} the chosen responses of the training "
        f"data became less likely: {first:.2f} to {final:.2f} nats per token, so that a token is on average "
        f"{percent(math.exp(final - first))} as likely as before."
    )
    other = f"The rejected ones: {rejected[0][1]:.2f} to {rejected[-1][1]:.2f}." if len(rejected) > 1 else ""
    both = last(facts.run.last_rows, "rewards/both_fall")
    share = (
        f"In {percent(both)} of the {facts.run.part} pairs both are less likely than under the reference."
        if both
        else ""
    )
    return section(
        "displacement",
        "Chosen responses became less likely",
        paragraph(fall, other, share, _judgement(first - final, both)),
        paragraph(_WHY),
        paragraph(_HELP),
    )


def _judgement(fall: float, both: float | None) -> str:
    limits = RULES["displacement"].limits
    if fall >= limits["fall"] and both is not None and both >= limits["both_fall"]:
        return "Both are beyond the verdict's limits: read the sampled responses before you use the model."
    named = f"{number(limits['fall'], 3)} nats per token and {percent(limits['both_fall'])} of the pairs"
    return f"The verdict objects when both reach {named}."
