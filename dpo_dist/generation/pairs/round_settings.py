"""Checks of rounds: the configuration, and that the earlier rounds of a folder had the same settings."""

import os
from dataclasses import asdict, fields, replace

from dpo_dist.config.identity import differing_keys, plain
from dpo_dist.config.load import from_yaml, to_yaml
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import NO_MODEL, RunConfig, TrackingConfig
from dpo_dist.config.user_code import read_config
from dpo_dist.config.verb_options import PairsConfig, PairsMethod
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.text import without_secrets

# Keys of `pairs` that another start may change: the length, the hardware, and methods that rounds do not use.
_FREE = ("rounds", "launcher", "batch_tokens", "part_prompts", "people")


def check_rounds(config: RunConfig) -> None:
    """Check that rounds can be done with this configuration, by one process.

    Raises:
        ConfigError: they cannot.
    """
    pairs = config.pairs
    for is_broken, message, where, got, remedy in (
        (
            int(os.environ.get("WORLD_SIZE", "1")) > 1,
            "rounds start their own processes",
            "pairs.rounds",
            "a launcher of several processes",
            "run python -m dpo_dist.pairs, and set pairs.launcher='accelerate launch ...'",
        ),
        (
            pairs.method is not PairsMethod.samples,
            "rounds need samples of the policy",
            "pairs.method",
            str(pairs.method),
            "set pairs.method=samples, or remove pairs.rounds",
        ),
        (
            bool(pairs.models),
            "rounds take their samples from the policy",
            "pairs.models",
            ", ".join(pairs.models),
            "set model.path to the policy of the first round, and remove pairs.models",
        ),
        (
            config.model.path == NO_MODEL,
            "rounds need a policy",
            "model.path",
            "nothing",
            "set model.path=FOLDER",
        ),
        (
            pairs.output is not None,
            "every round writes pairs of its own",
            "pairs.output",
            str(pairs.output),
            "remove it: the pairs are in <run.dir>/rounds",
        ),
    ):
        if is_broken:
            raise ConfigError(message, where=where, got=got, remedy=remedy)
    _check_secrets(config)


def _check_secrets(config: RunConfig) -> None:
    """Check that the configuration without secrets, which the stages get in a file, does the same."""
    stage = replace(config, tracking=TrackingConfig(), pairs=replace(config.pairs, launcher=None))
    for section, values in asdict(stage).items():
        for name, value in values.items():
            if without_secrets(plain(value)) != plain(value):
                raise ConfigError(
                    "a secret in the configuration would be written to a file of each round",
                    where=f"{section}.{name}",
                    expected="no credentials in addresses, no tokens, no values of variables like HF_TOKEN",
                    remedy="remove it; the programs of a round get the variables of the environment",
                )


def check_settings(config: RunConfig, folder: RunFolder) -> None:
    """Check that earlier rounds in this folder had the same settings; write those of a first start.

    Until a stage is finished, every start is a first one: mistakes can be corrected.

    Raises:
        ConfigError: they had others.
    """
    file = folder.rounds_config
    if not file.exists() or not folder.round(1).round_result.exists():
        write_text(file, to_yaml(config))
        return
    before, now = from_yaml(read_config(file)), from_yaml(to_yaml(config))  # without secrets
    changed = differing_keys(before, now)
    for field in fields(PairsConfig):
        old, new = plain(getattr(before.pairs, field.name)), plain(getattr(now.pairs, field.name))
        if field.name not in _FREE and old != new:
            changed[f"pairs.{field.name}"] = (old, new)
    if changed:
        shown = "; ".join(f"{key}: {old} before, {new} now" for key, (old, new) in changed.items())
        raise ConfigError(
            "the rounds in this run directory have other settings",
            where=str(file),
            got=shown,
            remedy="set another run.dir; or, to do further rounds with the new settings, delete this file",
        )
