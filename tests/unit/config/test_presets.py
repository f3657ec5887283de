"""Presets and experiments set only what differs from the defaults of the schema."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dpo_dist.config.keys import all_keys
from dpo_dist.config.load import config_dir

FILES = sorted(config_dir().glob("*/*.yaml"))
EXPERIMENTS = [file for file in FILES if file.parent.name == "experiment"]
# A preset is called after one of these, and sets it even where it is the default; smoke resets another
# experiment's evaluations.
EXEMPT = {"loss.kind", "reference.mode", "parallelism.kind", "tracking.wandb", "trainer.eval_every in smoke"}


def content(file: Path) -> dict[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(loaded, dict)
    return {str(name): value for name, value in loaded.items()}


def leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys with their values; an adapter is one value, as only the keys that it sets can be overridden."""
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name != "model.adapter":
            yield from leaves(value, f"{prefix}{name}.")
        elif name != "defaults":
            yield prefix + name, value


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_no_preset_restates_a_default(file: Path) -> None:
    found = leaves(content(file), "" if file in EXPERIMENTS else f"{file.parent.name}.")
    restated = {key for key, value in found if value == all_keys()[key].default}
    assert {key for key in restated if not {key, f"{key} in {file.stem}"} & EXEMPT} == set()
