"""How responses are generated: the keys of `sampling`; a key that is null has a default of its verb."""

import math
from dataclasses import dataclass

from dpo_dist.tools.sampling.keys import SamplingConfig

_USUAL = {"train": (256, 0.7), "compare": (256, 1.0), "pairs": (512, 1.0)}

LEAST_ROOM = 16
"""Tokens of a response that a default must leave room for: a shorter one says nothing about a model."""


@dataclass(frozen=True)
class Sampling:
    """Settings of generation; see `SamplingConfig`."""

    max_new_tokens: int  # the end of the turn included; see `room`
    temperature: float = 1.0  # 0 is greedy: top_p and top_k have no effect
    top_p: float = 1.0  # applied after top_k
    top_k: int = 0  # 0 is no limit
    seed: int = 0
    is_default: bool = False  # `max_new_tokens` is not the user's number

    def room(self, prompt_tokens: int, longest: int | None) -> int:
        """Return the most tokens of a response to a prompt; 0: the model cannot be asked.

        A default takes what a context of `longest` tokens leaves, if that is not too little for an answer; a
        number of the user must fit. `longest` is None if no limit is known.
        """
        room = math.inf if longest is None else longest - prompt_tokens
        if room >= self.max_new_tokens:
            return self.max_new_tokens
        return int(room) if self.is_default and room >= LEAST_ROOM else 0


def sampling_for(verb: str, config: SamplingConfig, seed: int = 0) -> Sampling:
    """Return the settings with which a verb samples; `train` samples at evaluations."""
    tokens, temperature = _USUAL[verb]
    return Sampling(
        config.max_new_tokens or tokens,
        temperature if config.temperature is None else config.temperature,
        config.top_p,
        config.top_k,
        seed,
        is_default=config.max_new_tokens is None,
    )
