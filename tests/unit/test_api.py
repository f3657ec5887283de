"""Names that users' scripts import keep their place."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("dpo_dist.objective.losses", "preference_loss"),
        ("dpo_dist.data.formats", "read_records"),
        ("dpo_dist.data.encode", "encode_pair"),
        ("dpo_dist.reference.store", "LogpStore"),
        ("dpo_dist.config.load", "load_run_config"),
    ],
)
def test_public_names_keep_their_place(module: str, name: str) -> None:
    assert callable(vars(importlib.import_module(module))[name])
