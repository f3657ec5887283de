"""Code of a script on the layers of a model is found; that of libraries is none."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2

from dpo_dist.model.library_internals import attention_function
from dpo_dist.trl.others_code import foreign_code
from tests.support.families import FAMILIES, tiny_family
from tests.unit.trl.test_trainers import CODE, Recorder

pytestmark = pytest.mark.slow


def own(*arguments: Any, **options: Any) -> Any:
    """Code of this script, which is never called here."""


def attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, model.config._attn_implementation, own)
    assert attention_function(model) is own


def activation(model: Any, _patch: pytest.MonkeyPatch) -> None:
    del model.model.layers[0].mlp.act_fn
    model.model.layers[0].mlp.act_fn = own


REPLACED: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "attention": attention,
    "a function of the module": lambda model, patch: patch.setattr(modeling_qwen2, "rotate_half", own),
    "an activation": activation,
    "a call": lambda model, patch: patch.setattr(modeling_qwen2.Qwen2MLP, "__call__", own),
    "a forward of the class": lambda model, patch: patch.setattr(modeling_qwen2.Qwen2MLP, "forward", own),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_script_replaced_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("qwen2")
    assert foreign_code(model) == ""
    REPLACED[name](model, monkeypatch)
    assert foreign_code(model) == "tests"


@pytest.mark.parametrize("name", CODE)
def test_what_a_script_put_on_a_layer_is_found_until_it_is_removed(name: str) -> None:
    model = tiny_family("qwen2")
    placed = CODE[name](Recorder(), model.model.layers[1])
    assert foreign_code(model) == "tests"
    if hasattr(placed, "remove"):
        placed.remove()
        assert foreign_code(model) == ""


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_code_of_a_library_is_a_scripts(kind: str) -> None:
    assert foreign_code(tiny_family(kind)) == ""
