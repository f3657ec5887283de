"""The check at start tells a fault of the model from one of another rank."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.distributed.world import World
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.engine import Engine, settle_engine
from tests.support.families import tiny_family
from tests.support.packing import VOCABULARY

TIMEOUT = "[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 4000ms for send operation to complete"
CUT = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1234"


def settle_failing(error: Exception, *, is_synchronised: bool) -> None:
    def token_logps(*_arguments: Any) -> None:
        raise error

    model = PackedCausalLM(tiny_family("olmo3", VOCABULARY), AttentionBackend.sdpa)
    engine = SimpleNamespace(model=model, is_synchronised=is_synchronised, token_logps=token_logps)
    world = SimpleNamespace(
        size=2,
        device=torch.device("cpu"),
        sequence=None,
        barrier=lambda: None,
        first_fault=lambda fault, _seconds: fault,
    )
    settle_engine(cast(Engine, engine), 64, cast(World, world))


@pytest.mark.parametrize("text", [TIMEOUT, CUT])
def test_a_forward_that_waits_in_vain_is_no_error_of_the_model(text: str) -> None:
    """The world makes it the error that names the rank, whose exit code lets clusters start the job again."""
    with pytest.raises(RuntimeError, match=r"Timed out|closed by peer"):
        settle_failing(RuntimeError(text), is_synchronised=True)


@pytest.mark.parametrize(
    ("text", "is_synchronised"), [("sizes of tensors must match", True), ("the hub timed out", False)]
)
def test_a_forward_that_fails_is_an_error_of_the_model(text: str, is_synchronised: bool) -> None:
    with pytest.raises(ConfigError, match="own forward cannot score"):
        settle_failing(RuntimeError(text), is_synchronised=is_synchronised)
