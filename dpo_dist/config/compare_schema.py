"""The keys of `compare`: responses of several models to the same prompts; see `schema`."""

from dataclasses import dataclass

from dpo_dist.config.fields import key


@dataclass(frozen=True)
class CompareConfig:
    """Models that `python -m dpo_dist.compare` asks the same prompts of `data.eval`; judge: see `pairs`."""

    models: list[str] = key(
        [],
        "Models to compare, each PATH or NAME=PATH: a run directory (its trained model), a checkpoint, a "
        "folder of a model or an adapter, or a hub name. The first is the base of KL and win rates.",
    )
    prompts: int = key(
        128, "Different prompts, chosen by a hash of `seed` and prompt; all, if there are fewer.", at_least=1
    )
    max_new_tokens: int = key(256, "Most tokens of a response.", at_least=1)
    temperature: float = key(
        1.0,
        "Temperature of sampling; 0: the likeliest token each time. Only at 1 the KL has no bias.",
        at_least=0,
    )
    seed: int = key(0, "Seed of prompts, samples and intervals.", at_least=0)
    batch_tokens: int = key(
        16384,
        "Most tokens of a batch of one process: its rows times the longest prompt with its response.",
        at_least=1,
    )
    part_prompts: int = key(
        16, "Prompts of one part: processes share the parts, and finished ones are not repeated.", at_least=1
    )
    resamples: int = key(
        1000, "Resamples of the prompts for 95 % confidence intervals; 0: no intervals.", at_least=0
    )
