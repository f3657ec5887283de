"""Rules between the keys of how models respond."""

from dpo_dist.foundation.fields import schema_fields
from dpo_dist.kit import LOSS, VERBS, Rule, RunConfig, unused, unused_beside, without_evaluations
from dpo_dist.tools.sampling.keys import (
    CompareConfig,
    PairsConfig,
    PairsMethod,
    SamplingConfig,
)

SAMPLING_KEYS = [
    f"sampling.{name}" for name in schema_fields(SamplingConfig) if name not in ("endpoint", "prompts")
]
"""The keys of how responses are drawn, without the prompts and a server."""


def _is_for_others(config: RunConfig) -> bool:
    """Return whether `sampling` is for `pairs` or `compare`: one file may have keys of several verbs."""
    method = config.section_of(PairsConfig).method
    responds = method in (PairsMethod.samples, PairsMethod.delta)
    return responds or bool(config.section_of(CompareConfig).models)


def _prompts(config: RunConfig) -> int | None:
    return config.section_of(SamplingConfig).prompts


def _responds(config: RunConfig) -> bool:
    """Return whether the trained model gives responses."""
    return not config.loss.of_scores


_NO_RESPONSES = "choose another loss: a reward model gives no responses"
_RULES = [
    without_evaluations("sampling.prompts", lambda c: _prompts(c) == 0),
    unused_beside("sampling.prompts", LOSS, _NO_RESPONSES, lambda c: _responds(c) or _prompts(c) == 0),
    unused("sampling.top_p", "sampling.temperature!=0"),
    unused("sampling.top_k", "sampling.temperature!=0"),
]
# Where models respond only to the prompts of evaluations.
_SAMPLES_ONLY = list[Rule]()
for _key in SAMPLING_KEYS:
    _SAMPLES_ONLY.append(without_evaluations(_key, _is_for_others))
    _SAMPLES_ONLY.append(
        unused_beside(_key, LOSS, _NO_RESPONSES, lambda c: _responds(c) or _is_for_others(c))
    )
    _SAMPLES_ONLY.append(unused(_key, "sampling.prompts!=0", "set sampling.prompts=16", _is_for_others))


def rules_of_verb(verb: str) -> list[Rule]:
    """Return the rules of a verb; "": of any."""
    takes_training = bool(verb) and VERBS[verb].takes_training
    return [*_RULES, *_SAMPLES_ONLY] if takes_training else _RULES
