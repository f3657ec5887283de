"""Batched generation equals that of each prompt alone; samples follow from seed, prompt and number."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
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

from dpo_dist.generation.sampling.generate import (
    NotFiniteError,
    Request,
    Sample,
    Sampling,
    batches,
    generate,
    random_numbers,
)

STOPS = [2, 7, 30]
RARE = 99  # never drawn here
LENGTHS = [3, 11, 1, 6, 6, 40, 90]
SIZES: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15},
    **{"pad_token_id": 0, "bos_token_id": None, "sliding_window": 8},
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(use_sliding_window=True, max_window_layers=2, **SIZES),
    "mistral": lambda: MistralConfig(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(head_dim=8, **SIZES),
}


def opened(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    # Defaults of a folder, which no setting here asks for.
    model.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return opened("qwen2")


def requests(numbers: tuple[int, ...] = (0,)) -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [random.integers(31, 99, length).astype(np.int32) for length in LENGTHS]
    return [Request(ids, f"key {at}", number) for at, ids in enumerate(prompts) for number in numbers]


def drawn(model: Any, request: Request, sampling: Sampling) -> Sample:
    ids, prompt = request.prompt_ids.tolist(), len(request.prompt_ids)
    warpers = [TemperatureLogitsWarper(sampling.temperature), TopKLogitsWarper(sampling.top_k)]
    warpers.append(TopPLogitsWarper(sampling.top_p))
    for number in random_numbers(sampling, request):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[:, -1]
        for warper in warpers:
            logits = warper(None, logits)
        chances = logits.softmax(-1).double().cumsum(-1)[0]
        ids.append(int(torch.searchsorted(chances, number * chances[-1], right=True)))
    return Sample.of(ids[prompt:], STOPS)


def greedy(model: Any, request: Request) -> Sample:
    ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
    config = GenerationConfig(max_new_tokens=12, eos_token_id=STOPS, pad_token_id=0)
    model.generation_config = GenerationConfig()
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return Sample.of(found[0, ids.shape[1] :].tolist(), STOPS)


@pytest.mark.parametrize("name", CONFIGS)
def test_responses_are_those_of_each_prompt_alone(name: str) -> None:
    model, sampling = opened(name), Sampling(12, temperature=0.8, top_p=0.9, top_k=20, seed=5)
    wanted = [drawn(model, request, sampling) for request in requests()]
    for budget in (10**6, 350):
        assert generate(model, requests(), sampling, STOPS, budget) == wanted
    likeliest = generate(model, requests(), Sampling(12, temperature=0), STOPS, 200)
    assert likeliest == [greedy(model, request) for request in requests()]
    for same in (Sampling(12, top_k=1, seed=1), Sampling(12, temperature=1e-40)):
        assert generate(model, requests(), same, STOPS, 10**6) == likeliest


def test_samples_of_a_prompt_and_of_two_seeds_differ(model: Any) -> None:
    wanted = requests((0, 1, 2))
    sampling = Sampling(16, temperature=1.3, top_p=0.9, top_k=50, seed=3)
    found = generate(model, wanted, sampling, STOPS, budget=10**6)
    assert len({tuple(sample.ids) for sample in found}) > 0.8 * len(wanted)
    assert generate(model, wanted, replace(sampling, seed=4), STOPS, 10**6) != found
    assert {sample.is_finished for sample in found} == {True, False}
    for sample in found:
        assert not set(STOPS) & set(sample.ids)
        assert sample.is_finished or len(sample.ids) == 16


@contextlib.contextmanager
def broken(model: Any, row: int, value: float) -> Iterator[None]:
    calls = itertools.count()

    def changed(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        if next(calls):
            logits[row, :, 5] = value
        return logits

    hook = model.lm_head.register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(("temperature", "value"), [(0.0, float("nan")), (1.0, float("inf"))])
def test_logits_that_are_not_finite_name_their_response(model: Any, temperature: float, value: float) -> None:
    wanted = sorted(requests((0, 1)), key=lambda request: -len(request.prompt_ids))
    with broken(model, 2, value), pytest.raises(NotFiniteError) as caught:
        generate(model, wanted, Sampling(8, temperature=temperature), [RARE], 10**6)
    assert caught.value.request is wanted[2]


def test_logits_after_the_end_of_a_response_may_be_anything(model: Any) -> None:
    wanted = requests()[:2]
    whole = generate(model, wanted, Sampling(8), [RARE], 10**6)
    stop = whole[1].ids[0]
    expected = generate(model, wanted, Sampling(8), [stop], 10**6)
    assert [sample.is_finished for sample in expected] == [False, True]
    with broken(model, 0, float("nan")):  # the longer prompt is in row 0
        assert generate(model, wanted, Sampling(8), [stop], 10**6) == expected


def test_the_tokens_of_a_batch_are_bounded() -> None:
    wanted = requests((0, 1))
    found = list(batches(wanted, new_tokens=10, budget=200))
    assert sorted(index for batch in found for index in batch) == list(range(len(wanted)))
    for batch in found:
        assert len(batch) * (max(len(wanted[index].prompt_ids) for index in batch) + 10) <= 200
    assert [len(batch) for batch in batches(wanted, 10, budget=5)] == [1] * len(wanted)
