"""Packed rows have the values and gradients of TRL's own forward, in TRL's places."""

import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from dpo_dist.trl.forward import IGNORED, VALUES, CountedRows, Fallback, PackedForward
from dpo_dist.trl.reference import KeptReference
from tests.support.families import tiny_family
from tests.support.lookups import recorded_lookups
from tests.support.packing import VOCABULARY

pytestmark = pytest.mark.slow


def padded(*rows: tuple[list[int], list[int], list[int] | None], at_left: bool = False) -> dict[str, Tensor]:
    """A batch of rows with a prompt, a response, and the counted tokens of the response (None: all)."""
    longest = max(len(prompt) + len(response) for prompt, response, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (prompt, response, counted) in enumerate(rows):
        tokens = len(prompt) + len(response)
        begin = longest - tokens if at_left else 0
        ids[row, begin : begin + tokens] = torch.tensor(prompt + response)
        mask[row, begin : begin + tokens] = 1
        for place in range(len(response)) if counted is None else counted:
            labels[row, begin + len(prompt) + place] = response[place]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


LONG = tokens(21, 0)
BATCHES = {
    "a shared prompt": padded((LONG, tokens(5, 1), None), (LONG, tokens(9, 2), None)),
    "prompts that begin alike": padded((LONG, tokens(5, 1), None), (LONG[:18], tokens(3, 2), None)),
    "another order": padded(
        (LONG, tokens(3, 1), None), (tokens(4, 3), tokens(6, 4), None), (LONG, tokens(7, 2), None)
    ),
    "one row": padded((LONG, tokens(5, 1), None)),
    "equal rows": padded((LONG, tokens(5, 1), None), (LONG, tokens(5, 1), None)),
    "no prompt": padded(([], tokens(5, 1), None), (LONG, tokens(4, 2), None)),
    "gaps": padded((LONG, tokens(6, 1), [0, 1, 4]), (LONG, tokens(6, 2), [2, 5])),
    "a row without counted tokens": padded((LONG, tokens(5, 1), []), (tokens(4, 3), tokens(6, 4), None)),
}


def computed(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The values of a forward, and the gradients of some function of them."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    (outputs.log_probs.sin() + 0.1 * outputs.entropy).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return {name: getattr(outputs, name).detach() for name in VALUES}, gradients


def packed_and_own(model_type: str) -> tuple[Any, Any, Fallback]:
    own = tiny_family(model_type)
    add_fused_lm_head(own, outputs=VALUES)
    packed, fallback = copy.deepcopy(own), Fallback("")
    PackedForward(packed, fallback, None)
    return packed, own, fallback


def assert_equal(packed: Any, own: Any, batch: dict[str, Tensor]) -> None:
    values, gradients = computed(packed, batch)
    wanted, wanted_gradients = computed(own, batch)
    for name in VALUES:
        assert values[name].shape == wanted[name].shape
        torch.testing.assert_close(values[name], wanted[name], rtol=1e-5, atol=2e-5, msg=name)
    for gradient, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BATCHES)
def test_values_and_gradients_are_those_of_the_padded_forward(name: str) -> None:
    packed, own, fallback = packed_and_own("llama")
    assert_equal(packed, own, BATCHES[name])
    assert not fallback.reason


@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1", "gemma3_text", "gpt2", "qwen3_moe"])
def test_families_are_packed(model_type: str) -> None:
    packed, own, fallback = packed_and_own(model_type)
    assert_equal(packed, own, BATCHES["another order"])
    assert not fallback.reason


def test_eager_attention_is_packed_and_elsewhere_its_own() -> None:
    packed, own, fallback = packed_and_own("llama")
    for model in (packed, own):
        model.set_attn_implementation("eager")
    PackedForward(packed, fallback, None)
    assert_equal(packed, own, BATCHES["a shared prompt"])
    ids = torch.tensor([LONG])
    torch.testing.assert_close(packed(ids).logits, own(ids).logits, rtol=0, atol=0)


def test_each_shared_token_is_computed_once() -> None:
    packed, _, _ = packed_and_own("llama")
    with recorded_lookups(packed) as shapes:
        computed(packed, BATCHES["a shared prompt"])
        assert shapes[-1] == (1, 21 + 4 + 8), "the last token of a response predicts nothing"
        assert shapes[0] == (2, 30), "the first batch is also computed as TRL does"
        computed(packed, BATCHES["prompts that begin alike"])
    assert len(shapes) == 4, "others are computed once"
    assert shapes[-1][1] < 21 + 4 + 18 + 2, "what prompts begin with is shared, too"


def test_a_model_that_differs_when_packed_is_computed_by_trl(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, own, fallback = packed_and_own("llama")

    def mixing(hidden: Tensor, inplace: bool = False) -> Tensor:
        """Mix neighbours, whatever the positions are."""
        return hidden + 0.5 * hidden.roll(1, 1)

    monkeypatch.setattr(torch.nn.functional, "silu", mixing)
    assert_equal(packed, own, BATCHES["another order"])
    assert "log-probs differ by" in fallback.reason
    assert_equal(packed, own, BATCHES["another order"])
    assert caplog.text.count("TRL's own forward, with padding: log-probs differ by") == 1


def test_noise_of_a_models_own_code_is_that_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, own, fallback = packed_and_own("llama")
    batch = BATCHES["another order"]

    def noisy(hidden: Tensor, inplace: bool = False) -> Tensor:
        return hidden + packed.training * torch.rand_like(hidden)

    monkeypatch.setattr(torch.nn.functional, "silu", noisy)
    assert_equal(packed, own, batch)
    assert not fallback.reason
    values = []
    for model in (packed, own):
        model.train()
        torch.manual_seed(0)
        values.append(computed(model, batch)[0]["log_probs"])
    assert torch.equal(*values)
    assert "log-probs differ by" in fallback.reason


def test_rows_may_be_padded_at_the_left() -> None:
    batch = padded((LONG, tokens(5, 1), None), (tokens(4, 3), tokens(6, 4), None), at_left=True)
    packed, own, fallback = packed_and_own("llama")
    assert_equal(packed, own, batch)
    assert not fallback.reason


def test_a_copy_of_a_model_computes_by_its_own_weights() -> None:
    packed, _, _ = packed_and_own("llama")
    other = copy.deepcopy(packed)
    with torch.no_grad():
        other.lm_head.weight.mul_(2.0)
        ours, copied = (
            model(**BATCHES["one row"], fused_lm_head=True).log_probs for model in (packed, other)
        )
    assert (ours - copied).abs().max() > 1e-2


def test_without_its_trainer_a_model_computes_by_trl() -> None:
    model = tiny_family("llama")
    add_fused_lm_head(model, outputs=VALUES)
    PackedForward(model, Fallback(""), None)
    with recorded_lookups(model) as shapes:
        computed(model, BATCHES["a shared prompt"])
    assert shapes == [(2, 30)]


def test_a_fallback_is_said_once_by_the_first_rank(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fallback("it is so")
    fallback = Fallback("")
    fallback.say("a line")
    fallback.say("a line")
    monkeypatch.setenv("RANK", "1")
    Fallback("on another rank")
    assert [record.getMessage() for record in caplog.records] == [
        "dpo_dist: computed by TRL's own forward, with padding: it is so",
        "dpo_dist: a line",
    ]


def test_a_batch_with_other_inputs_is_computed_by_trl(caplog: pytest.LogCaptureFixture) -> None:
    packed, own, _ = packed_and_own("llama")
    batch = BATCHES["another order"]
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) * 2
    assert_equal(packed, own, batch | {"position_ids": positions})
    assert "with padding: batches with position_ids" in caplog.text


def test_what_of_trl_is_relied_on() -> None:
    """A version that changes one of these changes what our forward has to do."""
    fields = {field.name for field in dataclasses.fields(FusedCausalLMOutput)}
    assert fields == {*VALUES, "loss", "label_mask", "aux_loss"}
    model, batch = tiny_family("llama"), BATCHES["a shared prompt"]
    add_fused_lm_head(model, outputs=VALUES)
    assert inspect.ismethod(model.forward)
    ids, labels = batch["input_ids"], batch["labels"]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    by_labels = model(input_ids=ids, labels=labels, fused_lm_head=True)
    by_shifted = model(input_ids=ids, shift_labels=shifted, fused_lm_head=True)
    for name in VALUES:
        assert torch.equal(getattr(by_labels, name), getattr(by_shifted, name)[:, :-1]), name


def test_the_store_has_whole_responses_whatever_labels_count(tmp_path: Path) -> None:
    own, fallback = tiny_family("llama"), Fallback("")
    add_fused_lm_head(own)
    packed = copy.deepcopy(own)
    kept = KeptReference(tmp_path, "tiny", frozenset(), fallback.say)
    PackedForward(packed, fallback, kept, is_reference=True)
    for counted in ([0, 1, 4], [0, 2, 5], None):
        batch = padded((LONG, tokens(6, 1), counted), (LONG, tokens(6, 2), None))
        with torch.no_grad():
            values, wanted = (model(**batch, fused_lm_head=True).log_probs for model in (packed, own))
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=2e-5)


def test_rows_count_what_labels_count() -> None:
    batch = padded(([5, 6], [7, 8, 9], [0, 2]), ([5, 6], [10, 11], None))
    rows = CountedRows.from_padded(*batch.values())
    (example,) = rows.examples
    assert example.prompt_ids.tolist() == [5, 6]
    assert [part.tolist() for part in example.responses] == [[7, 8, 9], [10, 11]]
    assert [part.tolist() for part in example.trained] == [[True, False, True], [True, True]]
    assert rows.places.tolist() == [[False, True, False, True], [False, True, True, False]]
    values = rows.in_rows([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    assert values.tolist() == [[0, 1, 0, 2], [0, 3, 4, 0]]
