"""The keys of `samples`: responses of the policy to held-out prompts during training; see `schema`."""

from dataclasses import dataclass

from dpo_dist.config.fields import key


@dataclass(frozen=True)
class SamplesConfig:
    """Responses of the policy to held-out prompts at evaluations."""

    prompts: int = key(
        0, "Prompts of the evaluation data that the policy responds to at evaluations; 0: none.", at_least=0
    )
    every: int = key(
        1, "Evaluations between samples; the last evaluation of a run always has them.", at_least=1
    )
    max_new_tokens: int = key(256, "Most tokens of a response.", at_least=1)
    temperature: float = key(0.7, "Temperature of sampling; 0: the likeliest token each time.", at_least=0)
    batch_tokens: int = key(
        16384,
        "Most tokens of a batch of one process: its rows times the longest prompt with its response.",
        at_least=1,
    )
