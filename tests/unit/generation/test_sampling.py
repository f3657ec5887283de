"""Batched generation equals that of each prompt alone; samples follow from seed, prompt and number."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from dpo_dist.generation.sampling.generate import (
    NotFiniteError,
    Request,
    Sample,
    Sampling,
    batches,
    generate,
    random_numbers,
    truncated,
)
from tests.support.tiny_model import write_model

STOPS = [2, 7, 30]
RARE = 430  # never drawn here
LENGTHS = [3, 11, 1, 6, 6, 24, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_model(tmp_path_factory.mktemp("model"))
    # Defaults of a folder, which no setting here asks for.
    GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = Path(tmp_path_factory.mktemp("plain"))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def requests(numbers: tuple[int, ...] = (0,)) -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [random.integers(40, 250, length).astype(np.int32) for length in LENGTHS]
    return [Request(ids, f"key {at}", number) for at, ids in enumerate(prompts) for number in numbers]


def test_greedy_is_that_of_plain_generation_of_each_prompt(model: Any, plain: Any) -> None:
    sampling = Sampling(12, temperature=0)
    samples = generate(model, requests(), sampling, STOPS, budget=120)
    for request, sample in zip(requests(), samples, strict=True):
        ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
        alone = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=STOPS,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        expected = alone[:-1] if alone[-1] in STOPS else alone
        assert sample == Sample(expected, alone[-1] in STOPS)


def test_samples_are_the_same_in_any_batch_and_order(model: Any) -> None:
    wanted = requests((0, 1, 2))
    sampling = Sampling(16, temperature=1.3, top_p=0.9, top_k=50, seed=3)
    together = generate(model, wanted, sampling, STOPS, budget=10**6)
    order = np.random.default_rng(1).permutation(len(wanted))
    for budget in (1, 150):
        again = generate(model, [wanted[at] for at in order], sampling, STOPS, budget)
        assert [together[at] for at in order] == again
    assert len({tuple(sample.ids) for sample in together}) == len(wanted)
    assert {sample.is_finished for sample in together} == {True, False}


@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.1}])
def test_each_setting_has_an_effect(model: Any, other: dict[str, Any]) -> None:
    usual = {"temperature": 1.3, "seed": 0}
    first = generate(model, requests(), Sampling(8, **usual), STOPS, 10**6)
    assert first != generate(model, requests(), Sampling(8, **usual | other), STOPS, 10**6)


def test_a_longer_limit_continues_the_same_response(model: Any) -> None:
    short = generate(model, requests(), Sampling(5), STOPS, 10**6)
    long = generate(model, requests(), Sampling(15), STOPS, 10**6)
    assert [sample.ids for sample in short] == [sample.ids[:5] for sample in long]


def test_a_response_ends_at_every_stop_token_and_only_there(model: Any) -> None:
    for sample in generate(model, requests(tuple(range(30))), Sampling(30, temperature=2.0), STOPS, 10**6):
        assert not set(STOPS) & set(sample.ids)
        assert sample.is_finished or len(sample.ids) == 30


def test_the_tokens_of_a_batch_are_bounded() -> None:
    wanted = requests((0, 1))
    found = list(batches(wanted, new_tokens=10, budget=60))
    assert sorted(index for batch in found for index in batch) == list(range(len(wanted)))
    for batch in found:
        longest = max(len(wanted[index].prompt_ids) for index in batch)
        assert len(batch) * (longest + 10) <= 60
    assert [len(batch) for batch in batches(wanted, 10, budget=5)] == [1] * len(wanted)


def test_random_numbers_differ_by_seed_prompt_and_number() -> None:
    one = requests()[0]
    draws = [
        random_numbers(Sampling(4, seed=seed), Request(one.prompt_ids, key, number))
        for seed in (0, 1)
        for key in ("a", "b")
        for number in (0, 1)
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == 8


def test_samples_have_the_distribution_of_the_model(model: Any) -> None:
    prompt = requests()[1].prompt_ids
    many = [Request(prompt, "key", number) for number in range(3000)]
    drawn = [sample.ids[0] for sample in generate(model, many, Sampling(1), [10**6], 10**6)]
    with torch.inference_mode():
        logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    expected = logits.softmax(-1).numpy()
    observed = np.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert np.abs(np.cumsum(observed) - np.cumsum(expected)).max() < 0.03  # Kolmogorov: 1.7 / sqrt(3000)


def test_truncation_keeps_the_likeliest_tokens() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = {
        "all": truncated(logits, Sampling(1)),
        "top_k": truncated(logits, Sampling(1, top_k=2)),
        "top_p": truncated(logits, Sampling(1, top_p=0.6)),
    }
    assert {name: (row[0] > 0).tolist() for name, row in kept.items()} == {
        "all": [True, True, True, True],
        "top_k": [False, True, False, True],
        "top_p": [False, True, False, True],
    }
    assert torch.allclose(kept["all"], torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@contextlib.contextmanager
def broken(model: Any, row: int, value: float) -> Iterator[None]:
    """Set a logit of one row to `value` from the second token on."""
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_their_response(model: Any, temperature: float, value: float) -> None:
    wanted = sorted(requests((0, 1)), key=lambda request: -len(request.prompt_ids))
    with broken(model, 2, value), pytest.raises(NotFiniteError) as caught:
        generate(model, wanted, Sampling(8, temperature=temperature), [RARE], 10**6)
    assert caught.value.request is wanted[2]


def test_logits_after_the_end_of_a_response_may_be_anything(
    model: Any,
) -> None:
    wanted = requests()[:2]
    whole = generate(model, wanted, Sampling(8), [RARE], 10**6)
    stop = whole[1].ids[0]
    expected = generate(model, wanted, Sampling(8), [stop], 10**6)
    assert [sample.is_finished for sample in expected] == [False, True]
    with broken(model, 0, float("nan")):  # the longer prompt is in row 0
        assert generate(model, wanted, Sampling(8), [stop], 10**6) == expected


@pytest.mark.parametrize("temperature", [1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy(model: Any, temperature: float) -> None:
    greedy = generate(model, requests(), Sampling(8, temperature=0), STOPS, 10**6)
    assert generate(model, requests(), Sampling(8, temperature=temperature), STOPS, 10**6) == greedy


def test_top_p_ends_where_the_sum_is_reached() -> None:
    assert truncated(torch.zeros(1, 2), Sampling(1, top_p=0.5)).tolist() == [[0.5, 0.0]]


def test_the_smallest_random_number_draws_no_token_of_probability_0(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = generate(model, requests(), Sampling(3, temperature=0), STOPS, 10**6)
    zeros = torch.zeros(3, dtype=torch.float64)
    monkeypatch.setattr("dpo_dist.generation.sampling.generate.random_numbers", lambda *_: zeros)
    assert generate(model, requests(), Sampling(3, top_k=1), STOPS, 10**6) == greedy
