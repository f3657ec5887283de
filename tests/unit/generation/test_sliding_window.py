"""Batches of very different lengths, with sliding-window attention: as each prompt alone, by transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    MistralConfig,
    Qwen2Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpo_dist.generation.sampling.generate import Request, Sample, Sampling, generate, random_numbers

STOPS = [2, 7, 30]
SIZES: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15},
    **{"pad_token_id": 0, "bos_token_id": None, "sliding_window": 8},
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(use_sliding_window=True, max_window_layers=2, **SIZES),
    "mistral": lambda: MistralConfig(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(head_dim=8, **SIZES),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.float32).eval()


def requests() -> list[Request]:
    random = np.random.default_rng(0)
    lengths = (3, 40, 1, 17, 90)
    return [Request(random.integers(31, 100, n).astype(np.int32), f"key {n}", 0) for n in lengths]


def drawn(model: Any, request: Request, sampling: Sampling) -> Sample:
    """The sample by whole forwards and transformers' own temperature, top-k and top-p."""
    ids, prompt = request.prompt_ids.tolist(), len(request.prompt_ids)
    warpers = (
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k),
        TopPLogitsWarper(sampling.top_p),
    )
    for number in random_numbers(sampling, request):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[:, -1]
        for warper in warpers:
            logits = warper(None, logits)
        chances = logits.softmax(-1).double().cumsum(-1)[0]
        ids.append(int(torch.searchsorted(chances, number * chances[-1], right=True)))
    return Sample.of(ids[prompt:], STOPS)


def test_samples_are_those_of_each_prompt_alone(model: Any) -> None:
    sampling = Sampling(12, temperature=0.8, top_p=0.9, top_k=20, seed=5)
    expected = [drawn(model, request, sampling) for request in requests()]
    assert generate(model, requests(), sampling, STOPS, 10**6) == expected


@pytest.mark.parametrize("greedy", [Sampling(12, temperature=0), Sampling(12, top_k=1, seed=1)])
def test_greedy_responses_are_those_of_each_prompt_alone(model: Any, greedy: Sampling) -> None:
    for request, sample in zip(requests(), generate(model, requests(), greedy, STOPS, 10**6), strict=True):
        ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
        alone = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=12, eos_token_id=STOPS, pad_token_id=0),
        )[0, ids.shape[1] :].tolist()
        assert sample == Sample.of(alone, STOPS)
