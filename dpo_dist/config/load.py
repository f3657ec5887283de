"""Load the configuration of a run: turn a command, or YAML, into one frozen and checked `RunConfig`.

Hydra composes presets, experiments, files and words of the command; pydantic checks the types.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from dpo_dist.config.compose import Composition
from dpo_dist.config.identity import RunIdentity
from dpo_dist.config.keys import group_folders
from dpo_dist.config.losses import ReferenceFreeLossConfig
from dpo_dist.config.mistakes import FAILURES, explained, unknown_preset, wrong_values
from dpo_dist.config.named_code import check_code_allowed
from dpo_dist.config.rules import check_rules, reset_unused, resolve_reference, rules_of
from dpo_dist.config.schema import SCHEMA, ReferenceMode, RunConfig
from dpo_dist.config.verbs import VERBS
from dpo_dist.data import UnpairedDataConfig
from dpo_dist.foundation.errors import ConfigError, first_line, raise_all
from dpo_dist.foundation.fields import plain_values, validated
from dpo_dist.foundation.text import without_secrets
from dpo_dist.foundation.user_code import find_function


def load_run_config(
    words: Sequence[str],
    own_folder: Path | None = None,
    *,
    verb: str = "",
    saved: Mapping[str, Any] | None = None,
    mistakes: Iterable[ConfigError] = (),
) -> RunConfig:
    """Return the checked configuration of one run; with `verb`, the keys that this verb needs must be set.

    `words` are a command's words: `["my.yaml", "+experiment=qwen7b", "loss.beta=0.2"]`; `own_folder` is the
    folder of `--config-dir`. A `verb` must read all keys of the command.
    `saved` are the values of a run's config.yaml, which the command changes; `mistakes` were found before.

    Raises:
        ConfigError: all mistakes in keys, presets and values; without any, all contradictions between values.
    """
    find_function.cache_clear()
    return load_command(Composition(words, group_folders(own_folder), saved, mistakes, verb=verb), verb)


def load_command(composition: Composition, verb: str) -> RunConfig:
    """Return the checked configuration of a parsed command. Raises ConfigError, as `load_run_config`."""
    mistakes = composition.mistakes
    config = None
    try:
        values = composition.compose()
        if verb:
            trains = verb == "pairs" and bool((values.get("pairs") or {}).get("rounds"))
            mistakes += composition.unread_keys(verb, trains=trains)
        config = validated(SCHEMA, values)
    except ValidationError as error:
        mistakes += wrong_values(error, composition.origin)
    except FAILURES as error:
        mistakes += explained(error, composition.origin(getattr(error, "full_key", None) or "a file"))
    raise_all([*mistakes, *(unknown_preset(*each) for each in composition.unknown_presets)])
    assert config is not None, "without mistakes"
    if composition.is_saved:
        check_code_allowed(config, composition.set_keys)
    return complete_config(config, composition.set_keys, verb, composition.set_by_presets)


def complete_config(
    config: RunConfig, set_keys: Collection[str] = (), verb: str = "", set_by_presets: Iterable[str] = ()
) -> RunConfig:
    """Check all rules, and fill in `reference.mode` and `run.dir`.

    `set_keys`: the keys of the command; `set_by_presets`: those that its presets set.
    """
    if config.reference.mode is ReferenceMode.auto:  # resets what the mode does not use
        set_by_presets = (*set_by_presets, "reference.mode")
    rules = rules_of(verb)
    config = reset_unused(resolve_reference(config), set_keys, set_by_presets, rules)
    check_rules(config, rules)
    if config.loss.of_scores and (not verb or VERBS[verb].takes_training):
        config = config.with_scores()
    if config.reference.mode is ReferenceMode.none and config.loss.needs_reference:
        config = replace(config, loss=ReferenceFreeLossConfig(**vars(config.loss)))
    if config.loss.is_unpaired:
        config = replace(config, data=UnpairedDataConfig(**vars(config.data)))
    folder = config.identity.default_dir if config.run.dir is None else Path(config.run.dir)
    return replace(config, run=replace(config.run, dir=str(folder)))


def to_yaml(config: RunConfig) -> str:
    """Return `config` as YAML without secrets, as config.yaml has it; also the text of an experiment."""
    return OmegaConf.to_yaml(OmegaConf.create(without_secrets(plain_values(config))))


def read_saved(file: Path) -> dict[str, Any]:
    """Return the values of a run's config.yaml, perhaps a stranger's; nothing in the file is evaluated.

    Raises:
        ConfigError: the file cannot be read, has no keys, or has an alias or an interpolation.
    """
    try:
        text = file.read_bytes()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has an alias (*), which no run writes")
        content = yaml.safe_load(text)
        if not isinstance(content, dict):
            raise ValueError("it has no keys")
        if "${" in str(content):
            raise ValueError("it has an interpolation (${...}), which no run writes")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            "the configuration of this run cannot be read",
            where=str(file),
            got=first_line(error),
            remedy="restore the file, or write the run's whole command: model.path=... and its other keys",
        ) from error
    return content


def saved_config(file: Path) -> RunConfig:
    """Return the configuration in a run's config.yaml, perhaps a stranger's."""
    values = read_saved(file)
    try:
        return complete_config(validated(SCHEMA, values))
    except ValidationError as error:
        raise_all(wrong_values(error, lambda key: f"{key} in {file}"))
        raise


def differing_keys(old: RunIdentity, new: RunIdentity) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values give `old` and `new` different digests: `{"loss.beta": (0.1, 0.2)}`."""
    return {key: (value, new.values[key]) for key, value in old.values.items() if value != new.values[key]}


def changed_keys(file: Path, identity: RunIdentity) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which a run differs from the config.yaml `file`: `{KEY: (OLD, NEW)}`.

    Empty if this version cannot read the file. Secrets, which the file lacks, are not compared.
    """
    try:
        keys = differing_keys(saved_config(file).identity, identity)
    except ConfigError:
        return {}
    return {key: (old, new) for key, (old, new) in keys.items() if old != without_secrets(new)}
