"""Reward models: packed scores and gradients are those of transformers' own class, row by row."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig, RewardModelConfig
from dpo_dist.data.config import ScoredDataConfig
from dpo_dist.data.example import Example
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.architectures import check_positions, context_length, own_coefficient, switch_off_noise
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.files.load import (
    check_has_score,
    check_same_vocabulary,
    load_config,
    load_weights,
    without_weights,
)
from dpo_dist.model.files.save import write_weights
from dpo_dist.model.files.stops import set_padding
from dpo_dist.model.packed import PackedCausalLM
from tests.support import tiny
from tests.support.families import FAMILIES, tiny_config
from tests.support.multimodal import write_multimodal
from tests.support.packing import branching, pack_unkeyed, random_pairs
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SHAPES = [(7, 5, 9), (1, 1, 4), (12, 3, 1), (4, 3, 2, 6)]
# Dense, with windows, with experts, with states that are forked, without packing.
KINDS = ("llama", "qwen3", "gemma2", "gpt2", "qwen3_moe", "qwen3_next", "zamba2", "jamba")


def reward_model(model_type: str, **own: Any) -> Any:
    """A model of transformers' class with one score, large enough that scores differ."""
    config = tiny_config(model_type, **own)
    config.num_labels = 1
    switch_off_noise(config)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.score.weight.normal_()
    return model


def settled(model: Any, texts: list[Example] | None = None) -> PackedCausalLM:
    """Arranged as the check at start finds it exact."""
    packed = PackedCausalLM(model, AttentionBackend.sdpa, arrangement=Arrangement.padded)
    StartCheck(packed, packed, CPU, 64, texts=texts or []).choose_arrangement()
    return packed


def judged(example: Example) -> Example:
    """The example with the position of a score behind each response, as encoded data have it."""
    responses = tuple(np.append(ids, np.int32(0)) for ids in example.responses)
    return Example(
        example.prompt_ids, responses, tuple(np.arange(len(ids)) == len(ids) - 1 for ids in responses)
    )


def gradients(model: Any, scores: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    scores.square().sum().backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("model_type", KINDS)
def test_packed_scores_and_gradients_are_those_of_the_class(model_type: str) -> None:
    model = reward_model(model_type)
    pairs = branching(random_pairs(SHAPES))
    rows = [(pair.prompt_ids, ids) for pair in pairs for ids in pair.responses]
    texts = [torch.tensor(np.concatenate(row))[None].long() for row in rows]
    expected = torch.cat(
        [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0] for ids in texts]
    )
    expected_gradients = gradients(model, expected)
    packed = settled(model)
    assert packed.arrangement is FAMILIES[model_type][1]
    batch = pack_unkeyed(list(map(judged, pairs)))
    assert batch.response_tokens.tolist() == [1] * len(rows)
    assert batch.lengths.tolist() == [len(ids) for _, ids in rows]
    scores = packed(batch)
    assert (scores - expected).norm() <= 1e-5 * expected.norm()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    ours = gradients(model, scores)
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 0.1 * largest), name


def test_a_class_that_reads_another_token_is_refused() -> None:
    """transformers skips a text's own last token if it is the padding token."""
    model = reward_model("llama")
    [example] = random_pairs([(5, 4, 6)])
    settled(model, [judged(example)])
    model.config.pad_token_id = int(example.responses[1][-1])
    with pytest.raises(ConfigError, match="gives other scores than training would") as error:
        settled(model, [judged(example)])
    assert "pad_token" in error.value.remedy


def test_the_longest_text_fits_a_table_of_positions() -> None:
    """Its last token is an input, too."""
    model = reward_model("gpt2")
    positions = context_length(model.config)
    assert positions is not None
    check_positions(model, ScoredDataConfig(max_length=positions).longest)
    with pytest.raises(ConfigError) as error:
        check_positions(model, ScoredDataConfig(max_length=positions + 1).longest)
    assert error.value.got.startswith(f"{positions + 1},")
    assert error.value.remedy == f"set data.max_length to {positions} or less"


def loaded(folder: Path, seed: int | None = 0, config: ModelConfig | None = None) -> Any:
    config = config or RewardModelConfig(path=str(folder), dtype=Dtype.fp32)
    return load_weights(folder, load_config(folder, config), config, CPU, seed=seed)


def test_a_causal_model_becomes_a_reward_model_with_a_drawn_score(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", tied=False)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = loaded(folder)
    assert type(model).__name__ == "Qwen2ForSequenceClassification"
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.equal(model.score.weight, loaded(folder).score.weight)
    assert not torch.equal(model.score.weight, loaded(folder, seed=1).score.weight)
    assert 0.05 < model.score.weight.std() < 0.2  # of `initializer_range`


def test_a_reward_model_keeps_its_score(tmp_path: Path) -> None:
    model = loaded(write_model(tmp_path / "base"), seed=3)
    model.save_pretrained(tmp_path / "reward")
    again = loaded(tmp_path / "reward", seed=4)
    assert torch.equal(again.score.weight, model.score.weight)
    config = ModelConfig(path=str(tmp_path / "reward"), dtype=Dtype.fp32)
    with pytest.raises(ConfigError, match="reward model") as error:
        load_config(tmp_path / "reward", config)
    assert "loss=reward" in error.value.remedy
    with pytest.raises(ConfigError, match="reward model") as error:
        check_same_vocabulary(tmp_path / "reward", tiny.qwen(), config, None, "teacher.path")
    assert error.value.where == "teacher.path"
    # A head by another name is not replaced by a drawn one.
    file = tmp_path / "reward" / "model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("score.", "v_head."): value for name, value in tensors.items()}, file)
    with pytest.raises(ConfigError, match="lacks weights"):
        loaded(tmp_path / "reward")


@pytest.mark.parametrize(("in_full", "is_refused"), [(None, True), (["score"], False)])
def test_an_adapter_without_a_score_is_refused_on_a_base_without_one(
    tmp_path: Path, in_full: list[str] | None, is_refused: bool
) -> None:
    """Its scores would be those of a drawn output layer, which no file has."""
    base = write_model(tmp_path / "base")
    model = get_peft_model(loaded(base), LoraConfig(target_modules=["q_proj"], modules_to_save=in_full))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="has the output layer") if is_refused else nullcontext():
        check_has_score(base, tmp_path / "adapter", "model.adapter.path")


def test_models_that_give_no_score_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    with pytest.raises(ConfigError, match="lacks weights"):
        loaded(folder, seed=None)
    model = loaded(folder)
    model.config.num_labels = 3
    model.save_pretrained(tmp_path / "classes")
    with pytest.raises(ConfigError, match="is no reward model"):
        loaded(tmp_path / "classes")
    AutoConfig.for_model("granite").save_pretrained(tmp_path / "other")
    config = RewardModelConfig(path=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="no class of reward models") as error:
        load_config(tmp_path / "other", config)
    assert error.value.got == "granite"


def test_a_model_of_several_parts_reads_its_padding_token_in_its_text_part(tmp_path: Path) -> None:
    """The folder's config.json is the base's, with the padding of the reward model."""
    base = write_multimodal(tmp_path / "base", "gemma3", vocab_size=40)
    config = RewardModelConfig(path=str(base), dtype=Dtype.fp32)
    model = without_weights(load_config(base, config), config, None, keeps_others=True)
    set_padding(model.config, 7)
    assert model.config.get_text_config().pad_token_id == 7
    weights = {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}
    write_weights(tmp_path / "reward", model, weights, base)
    written = AutoConfig.from_pretrained(tmp_path / "reward")
    assert (written.num_labels, written.pad_token_id, written.get_text_config().pad_token_id) == (1, 7, 7)


def test_routers_of_a_reward_model_keep_their_coefficient() -> None:
    model = reward_model("qwen3_moe", router_aux_loss_coef=0.02)
    assert own_coefficient(model) == 0.02
