"""Checks of `pairs` before torch is imported and processes join."""

import os
from pathlib import Path

from dpo_dist.config.pairs_schema import PairsConfig, PairsMethod
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import NO_MODEL, RunConfig
from dpo_dist.data.sources import check_source
from dpo_dist.errors import ConfigError

OUTPUT_KINDS = (".jsonl", ".parquet")
_ALONE = (PairsMethod.scores, PairsMethod.people)


def check_pairs(config: RunConfig) -> None:
    """Check everything that needs no torch, network or other processes.

    Raises:
        ConfigError: keys of `pairs` contradict each other, or a folder cannot be written.
        DataError: a local source is missing.
    """
    _check_keys(config.pairs)
    _check_model(config)
    _check_rounds(config.pairs)
    for source in config.data.train:
        check_source(source)


def needs_this_process(config: RunConfig) -> bool:
    """Return whether this process has work: methods without a model run on rank 0 alone."""
    return config.pairs.method not in _ALONE or os.environ.get("RANK", "0") == "0"


def output_file(config: RunConfig) -> Path:
    """Return the file of the preference records."""
    output = config.pairs.output
    return RunFolder.of(config).pairs_file if output is None else Path(output).expanduser()


def _check_model(config: RunConfig) -> None:
    if config.pairs.method not in _ALONE and not config.pairs.models and config.model.path == NO_MODEL:
        raise ConfigError(
            "no model responds to the prompts",
            where="pairs.models",
            got="an empty list, and no model.path",
            remedy="set pairs.models=[FOLDER] or model.path=FOLDER",
        )


def _check_rounds(pairs: PairsConfig) -> None:
    """Check the part of the prompts, and that no key of rounds is given without them."""
    if pairs.prompt_part >= pairs.prompt_parts:
        raise ConfigError(
            "there is no such part of the prompts",
            where="pairs.prompt_part",
            got=str(pairs.prompt_part),
            expected=f"0 to {pairs.prompt_parts - 1}, as pairs.prompt_parts={pairs.prompt_parts}",
            remedy="correct one of them",
        )
    for key, value, default in (
        ("launcher", pairs.launcher, PairsConfig.launcher),
        ("reference", pairs.reference, PairsConfig.reference),
    ):
        if not pairs.rounds and value != default:
            raise ConfigError(
                f"pairs.{key} has no effect without rounds",
                where=f"pairs.{key}",
                got=str(value),
                remedy=f"set pairs.rounds, or remove pairs.{key}",
            )


def _check_keys(pairs: PairsConfig) -> None:
    if pairs.output is not None and Path(pairs.output).suffix not in OUTPUT_KINDS:
        raise ConfigError(
            "this kind of file cannot be written",
            where="pairs.output",
            got=pairs.output,
            expected=f"a name that ends with {' or '.join(OUTPUT_KINDS)}",
            remedy="rename the file",
        )
