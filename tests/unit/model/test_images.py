"""Images in prompts: log-probs and gradients are those of transformers' rows; each image is encoded once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_dist.batching.costs import Arrangement
from dpo_dist.batching.pack import PackedBatch, dummy_batch, pack
from dpo_dist.config.schema import AttentionBackend, Dtype, ImagesConfig, ModelConfig
from dpo_dist.data.example import Example, ImageInput
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model import packed as packed_module
from dpo_dist.model.architectures import ImageMask
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.files import load
from dpo_dist.model.layers import other_weights
from dpo_dist.model.packed import PackedCausalLM
from tests.support.invented_images import READERS, image_examples, image_reader, invented_images, row_logps
from tests.support.packing import pack_unkeyed
from tests.support.padded import gradients_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PACKED, PADDED, SINGLE = Arrangement
REFUSED = "paligemma"  # text before a response sees later text
ARRANGED = dict.fromkeys(READERS.keys() - {REFUSED}, PACKED)
# The whole class does not scale logits, as its text class does.
OWN_LOGITS = {"aya_vision", "cohere2_vision"}
IN_ROWS = ["gemma3", "gemma4 vision", "llava", "qwen3_vl"]


def reader(name: str, arrangement: Arrangement = PADDED) -> PackedCausalLM:
    model = PackedCausalLM(image_reader(name), AttentionBackend.sdpa, reads_images=True).eval()
    model.arrange(arrangement, own_logits=name in OWN_LOGITS)
    return model


def counted(model: PackedCausalLM) -> Mock:
    """Count the calls of the encoder from now on."""
    body = model.causal_lm.base_model
    body.get_image_features = Mock(wraps=body.get_image_features)
    return body.get_image_features


def dummied(examples: list[Example], image: ImageInput) -> PackedBatch:
    keys = np.zeros((sum(len(example.responses) for example in examples), 2), dtype=np.uint64)
    return pack(examples, keys, dummy_image=image)


@pytest.mark.parametrize(
    ("name", "arrangement"),
    [*sorted(ARRANGED.items()), *((name, rows) for name in IN_ROWS for rows in (PADDED, SINGLE))],
)
def test_log_probs_and_gradients_are_those_of_rows_of_the_whole_class(
    name: str, arrangement: Arrangement
) -> None:
    images = invented_images(name)
    examples = image_examples(images)
    plain, model = image_reader(name), reader(name, arrangement)
    expected = row_logps(plain, examples)
    slopes = torch.randn(len(expected), generator=torch.Generator().manual_seed(0))
    wanted = gradients_of(plain, (expected * slopes).sum())
    encoder = counted(model)
    logps = model(pack_unkeyed(examples))
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    found = gradients_of(model.causal_lm, (logps * slopes).sum())
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for weight, gradient in wanted.items():
        assert (found[weight] - gradient).norm() <= 1e-4 * max(float(gradient.norm()), 1e-2 * largest), weight
    encoder.assert_called_once()
    rows = sum(len(image.inputs["pixel_values"]) for image in images)
    assert len(encoder.call_args.kwargs["pixel_values"]) == rows


@pytest.mark.parametrize("name", READERS)
def test_the_check_at_start_finds_the_arrangement_by_images(name: str) -> None:
    model = reader(name)
    check = StartCheck(model, model, CPU, 64, images=invented_images(name)[:2])
    if name == REFUSED:
        with pytest.raises(ConfigError, match="not causal"):
            check.choose_arrangement()
        return
    check.choose_arrangement()
    check.check_training()
    check.check_use()
    assert (model.arrangement, model.own_logits) == (ARRANGED[name], name in OWN_LOGITS)
    assert (
        getattr(model.causal_lm.base_model, "rope_deltas", None) is None
    )  # generation would go on from there


Trap = Callable[[PackedCausalLM, pytest.MonkeyPatch], None]


def positions_of_one_axis(model: PackedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.images, "prompt_positions", lambda prompt, _grids: np.arange(len(prompt))[None])


def grids_in_other_order(model: PackedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model.images.prompt_positions  # type: ignore[union-attr]
    monkeypatch.setattr(
        model.images,
        "prompt_positions",
        lambda prompt, grids: own(prompt, None if grids is None else grids.flip(0)),
    )


def mask(kind: ImageMask) -> Trap:
    return lambda model, monkeypatch: monkeypatch.setattr(model.images, "mask", kind)


def features(change: Callable[[Any], None]) -> Trap:
    """A fault in what the encoder gives to the packed forward."""

    def plant(model: PackedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        own = model.images.encode  # type: ignore[union-attr]

        def encode(batch: PackedBatch) -> Any:
            encoded = own(batch)
            if encoded is not None:
                change(encoded.features)
            return encoded

        monkeypatch.setattr(model.images, "encode", encode)

    return plant


def no_deepstack(found: Any) -> None:
    found.deepstack_features = [[0 * part for part in layer] for layer in found.deepstack_features]


def other_order(found: Any) -> None:
    images = found.pooler_output
    found.pooler_output = images.flip(0) if isinstance(images, Tensor) else tuple(images[::-1])


def one_attention_for_all(_model: PackedCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "text_attention", lambda _model, name: name)


@pytest.mark.parametrize(
    ("trap", "names"),
    [
        (positions_of_one_axis, ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm46v", "qwen3_5"]),
        (grids_in_other_order, ["qwen2_5_vl", "qwen3_vl"]),
        (mask(ImageMask.causal), ["gemma3", "gemma4 vision"]),
        (mask(ImageMask.whole), ["gemma4 vision"]),
        (features(no_deepstack), ["qwen3_vl", "qwen3_vl_moe"]),
        (features(other_order), ["gemma3", "internvl", "mistral3"]),
        (one_attention_for_all, ["qwen2_5_vl", "gemma3", "llava"]),
    ],
)
def test_the_check_at_start_finds_every_known_fault(
    trap: Trap, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        model = reader(name)
        with monkeypatch.context() as patched:
            trap(model, patched)
            check = StartCheck(model, model, CPU, 64, images=invented_images(name)[:2])
            if trap is one_attention_for_all:  # rows of the model's own attention have no fault
                check.choose_arrangement()
                assert model.arrangement is PADDED, name
            else:
                with pytest.raises(ConfigError, match="would not compute the log-probs of this model"):
                    check.choose_arrangement()


@pytest.mark.parametrize("arrangement", Arrangement)
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_a_rank_without_an_image_encodes_a_dummy_before_the_text(name: str, arrangement: Arrangement) -> None:
    image, model = invented_images(name)[0], reader(name, arrangement)
    examples = image_examples(invented_images(name))
    text = [example for example in examples if not example.images]
    used = gradients_of(model.causal_lm, model(pack_unkeyed(examples)).sum()).keys()
    expected = model(pack_unkeyed(text))
    encoder, called = counted(model), list[str]()
    encoder.side_effect = lambda **_inputs: called.append("images") or DEFAULT
    model.causal_lm.get_decoder().register_forward_pre_hook(lambda *_: called.append("text"))
    for batch in (dummied(text, image), dummy_batch(image)):
        called.clear()
        logps = model(batch)
        assert called[0] == "images"
        assert called.count("images") == 1
        assert gradients_of(model.causal_lm, logps.sum()).keys() == used
        if batch.keys.size:
            torch.testing.assert_close(logps, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_an_encoder_without_trained_weights_keeps_no_activations(name: str) -> None:
    model = reader(name, PACKED)
    assert model.images is not None
    batch = pack_unkeyed(image_examples(invented_images(name)))
    others = other_weights(model.causal_lm)

    def keeps_graph() -> bool:
        encoded = model.images.encode(batch)  # type: ignore[union-attr]
        return any(part.requires_grad for part in encoded.features.pooler_output)  # type: ignore[union-attr]

    assert keeps_graph()
    for weight in others:
        weight.requires_grad_(False)
    assert not keeps_graph()


def test_routing_of_image_tokens_is_counted_as_in_rows() -> None:
    batch = pack_unkeyed(image_examples(invented_images("qwen3_vl_moe")))
    sums = [reader("qwen3_vl_moe", arrangement)(batch, with_routing=True)[1] for arrangement in Arrangement]
    torch.testing.assert_close(sums[0], sums[2])
    torch.testing.assert_close(sums[1], sums[2])


def test_each_distinct_image_is_in_a_batch_once_and_moves_with_it() -> None:
    images = invented_images("mistral3")
    batch = pack_unkeyed(image_examples(images))
    for moved in (batch, batch.to(torch.device("meta")), batch.with_one_target()):
        assert moved.images is not None
        assert moved.images.order == ((0,), (1, 2), (), (0, 0), (0,), (1,))
        assert moved.images.tokens == tuple(image.tokens for image in images)
        assert moved.images.inputs["pixel_values"].shape == (3, 3, 56, 56)  # padded as by a processor
        assert moved.images.inputs["pixel_values"].device == moved.input_ids.device
    assert pack_unkeyed([example for example in image_examples(images) if not example.images]).images is None
    assert not batch.images.is_dummy  # type: ignore[union-attr]
    assert dummy_batch(images[0]).images.is_dummy  # type: ignore[union-attr]


@pytest.mark.parametrize(("images", "mask"), [(None, ImageMask.causal), (ImagesConfig(), ImageMask.whole)])
def test_a_kernel_is_tried_with_images_before_a_model_that_reads_them_is_loaded(
    images: ImagesConfig | None, mask: ImageMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_reader("gemma3").save_pretrained(tmp_path)
    check = Mock()
    monkeypatch.setattr(load, "check_kernel", check)
    config = ModelConfig(str(tmp_path), dtype=Dtype.fp32, images=images)
    assert (load.load_packed(tmp_path, config, 64, CPU).images is None) is (images is None)
    assert mask in check.call_args.args
