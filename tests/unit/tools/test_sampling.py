"""Batched generation equals that of each prompt alone; training reads the tokens that were generated."""

import copy
import itertools
import json
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, Message, Origin, PreferenceRecord, Response
from dpo_dist.distributed.processes.world import Interrupted, Stops
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.model.generation import NotFiniteError
from dpo_dist.reference.model_source import find_model
from dpo_dist.tools.pairs.files import pair_fields, write_results
from dpo_dist.tools.sampling.generate import (
    Request,
    Sample,
    batches,
    dummy_request,
    generate,
    generate_together,
    random_numbers,
)
from dpo_dist.tools.sampling.keys import SamplingConfig
from dpo_dist.tools.sampling.respond import Completion, Responder, open_generator, respond
from dpo_dist.tools.sampling.settings import Sampling, sampling_for
from dpo_dist.training.export import merge_adapter
from tests.support import tiny
from tests.support.alone import ALONE
from tests.support.chat_tokenizers import tokenizer_of
from tests.support.pairs import WIDE
from tests.support.tiny_model import write_model
from tests.unit.data.test_message_keys import MARKS, thinking
from tests.unit.data.test_template_kinds import tokenizer_with

pytestmark = pytest.mark.slow

STOPS = [2, 7, 30]
RARE = 99  # never drawn here
LENGTHS = [3, 11, 1, 6, 6, 40, 90]
SIZES: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15},
    **{"pad_token_id": 0, "bos_token_id": None, "sliding_window": 8},
}
SHORT_CONTEXT = 42
GPT2_SIZES: dict[str, Any] = {"vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4}
GPT2_SIZES |= {"initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 0}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(use_sliding_window=True, max_window_layers=2, **SIZES),
    "mistral": lambda: MistralConfig(**SIZES),
    "gpt2": lambda: GPT2Config(n_positions=SHORT_CONTEXT, **GPT2_SIZES),
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
    made = opened("qwen2")
    generate(made, requests()[:1], Sampling(1), STOPS, 1)  # the first call checks the model
    return made


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
    return Sample.from_tokens(ids[prompt:], STOPS)


def greedy(model: Any, request: Request) -> Sample:
    ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
    config = GenerationConfig(max_new_tokens=12, eos_token_id=STOPS, pad_token_id=0)
    model.generation_config = GenerationConfig()
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return Sample.from_tokens(found[0, ids.shape[1] :].tolist(), STOPS)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt2"])  # its context is too short
def test_responses_are_those_of_each_prompt_alone(name: str) -> None:
    model, sampling = opened(name), Sampling(12, temperature=0.8, top_p=0.9, top_k=20, seed=5)
    wanted = [drawn(model, request, sampling) for request in requests()]
    for budget in (10**6, 350):
        assert generate(model, requests(), sampling, STOPS, budget) == wanted
    likeliest = generate(model, requests(), Sampling(12, temperature=0), STOPS, 200)
    assert likeliest == [greedy(model, request) for request in requests()]
    for same in (Sampling(12, top_k=1, seed=1), Sampling(12, temperature=1e-40)):
        assert generate(model, requests(), same, STOPS, 10**6) == likeliest


def test_null_is_the_verbs_own_value() -> None:
    usual = {"train": (256, 0.7), "compare": (256, 1.0), "pairs": (512, 1.0)}
    given = SamplingConfig(max_new_tokens=9, temperature=0.0, top_p=0.5, top_k=3)
    for verb, values in usual.items():
        own = sampling_for(verb, SamplingConfig(), 5)
        assert own == Sampling(*values, top_p=1.0, top_k=0, seed=5, is_default=True)
        assert sampling_for(verb, given) == Sampling(9, 0.0, 0.5, 3, 0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_responses_end_where_the_context_ends_whatever_is_in_their_batch(temperature: float) -> None:
    """GPT-2 has no position after its last one: a row that waits for a longer response would be an error."""
    model, sampling = opened("gpt2"), Sampling(80, temperature=temperature, is_default=True)
    wanted = [
        replace(request, room=sampling.room(len(request.prompt_ids), SHORT_CONTEXT))
        for request in requests((0, 1))
        if sampling.room(len(request.prompt_ids), SHORT_CONTEXT)
    ]
    alone = [sample for request in wanted for sample in generate(model, [request], sampling, [RARE], 1)]
    ends = [SHORT_CONTEXT - len(request.prompt_ids) for request in wanted]
    cut = [len(sample.ids) == end for sample, end in zip(alone, ends, strict=True) if not sample.is_finished]
    assert all(cut)
    assert len(cut) > 5
    assert generate(model, wanted, sampling, [RARE], 10**6) == alone


def test_a_request_whose_sample_is_not_used_has_the_room_of_the_rows_beside_it() -> None:
    images: Any = ("image",)
    rows = [Request(np.arange(500), "row", 0, room=12)]
    pictures = [Request(np.arange(100), "picture", 0, images, room=256)]
    [dummy] = dummy_request(rows, rows + pictures, STOPS)
    assert (dummy.images, dummy.room) == (images, 12)
    assert dummy_request(pictures, rows + pictures, STOPS) == dummy_request(rows, rows, STOPS) == []
    assert dummy_request([], rows + pictures, STOPS)[0].images == images


@pytest.mark.parametrize(
    ("most", "prompt", "longest", "default", "given"),
    [
        (9, 5, None, 9, 9),
        (9, 5, 14, 9, 9),
        (9, 6, 14, 0, 0),
        (40, 5, 45, 40, 40),
        (40, 6, 45, 39, 0),
        (40, 29, 45, 16, 0),
        (40, 30, 45, 0, 0),
        (40, 46, 45, 0, 0),
    ],
)
def test_a_default_takes_what_is_left_if_it_is_an_answer_and_a_number_of_the_user_must_fit(
    most: int, prompt: int, longest: int | None, default: int, given: int
) -> None:
    assert Sampling(most, is_default=True).room(prompt, longest) == default
    assert Sampling(most).room(prompt, longest) == given


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


def broken(model: Any, row: int, value: float) -> Any:
    """Give a row of the logits a value within the block, except at the first token."""
    calls = itertools.count()

    def changed(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        if next(calls):
            logits[row, :, 5] = value
        return logits

    return model.lm_head.register_forward_hook(changed)


@pytest.mark.parametrize(("temperature", "value"), [(0.0, float("nan")), (1.0, float("inf"))])
def test_logits_that_are_not_finite_are_an_error(model: Any, temperature: float, value: float) -> None:
    with broken(model, 2, value), pytest.raises(NotFiniteError):
        generate(model, requests((0, 1)), Sampling(8, temperature=temperature), [RARE], 10**6)


def test_logits_after_the_end_of_a_response_may_be_anything(model: Any) -> None:
    wanted = requests()[:2]
    stop = generate(model, wanted, Sampling(8), [RARE], 10**6)[1].ids[0]
    expected = generate(model, wanted, Sampling(8), [stop], 10**6)
    assert [sample.is_finished for sample in expected] == [False, True]
    with broken(model, 0, float("nan")):  # the longer prompt is in row 0
        assert generate(model, wanted, Sampling(8), [stop], 10**6) == expected


def test_a_stop_is_answered_at_the_next_token(model: Any) -> None:
    request, forwards = StopRequest(), itertools.count(1)

    def asked_at_the_third(*_: Any) -> None:
        if next(forwards) == 3:
            request.ask("SIGTERM")

    engine: Any = SimpleNamespace(
        is_synchronised=False, ready_to_generate=lambda without_adapter: nullcontext(model)
    )
    stops = Stops(request, ALONE)
    with model.lm_head.register_forward_hook(asked_at_the_third), pytest.raises(Interrupted):
        generate_together(engine, requests(), Sampling(50), [RARE], 10**6, stops)
    assert next(forwards) == 4


def test_the_tokens_of_a_batch_are_bounded() -> None:
    wanted = requests((0, 1))
    found = list(batches(wanted, Sampling(10), budget=200))
    assert sorted(index for batch in found for index in batch) == list(range(len(wanted)))
    for batch in found:
        assert len(batch) * (max(len(wanted[index].prompt_ids) for index in batch) + 10) <= 200
    assert [len(batch) for batch in batches(wanted, Sampling(10), budget=5)] == [1] * len(wanted)


DIALOGUE = PreferenceRecord(Dialogue("\n\nHuman: hi\n\nAssistant:"), (), Origin("here", 1))
CHAT = PreferenceRecord((Message("user", "What is 2+2?"),), (), Origin("here", 1))
PLAIN = copy.deepcopy(tiny.qwen())
PLAIN.chat_template = None


def answered(
    record: PreferenceRecord, tokenizer: PreTrainedTokenizerFast, *texts: str, finished: bool = True
) -> tuple[list[Completion], list[list[int]]]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    source: Any = SimpleNamespace(name="my_model")
    responder = Responder(source, tokenizer, WIDE, frozenset(), None)
    samples = [Sample(each, RARE if finished else None) for each in ids]
    (row,) = respond([record], responder, lambda *_: samples, Sampling(50), range(len(texts)))
    return row.completions, ids


def trained(folder: Path, record: PreferenceRecord, tokenizer: Any, *sides: Response) -> list[list[int]]:
    pair = pair_fields(record, (sides[0], sides[1]), None, {})
    write_results(folder / "pairs.jsonl", [pair], {}, Counter(), lambda _: None)
    (read,) = read_records(str(folder / "pairs.jsonl"))
    assert isinstance(read, PreferenceRecord)
    example = encode_pair(read, WIDE, tokenizer)
    assert isinstance(example, EncodedExample)
    return [response[:-1].tolist() for response in example.responses]


FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>add<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("family", "chosen", "rejected"),
    [
        (None, " yes", "no"),
        (None, "\n yes", "no"),
        ("gptoss", f"{ANALYSIS}{FINAL}four", f"{FINAL}five"),
        ("gptoss", f"{ANALYSIS}{FINAL}four", f"{ANALYSIS.replace('add', 'sum')}{FINAL}four"),
        ("qwen3", "<think>\nadd\n</think>\n\nfour", "<think>\n\n</think>\n\nfive"),
        ("qwen3_instruct_2507", "<think>\nadd\n</think>\n\nfour", "five"),
        ("deepseek_r1_distill", "add\n</think>\n\nfour", "subtract\n</think>\n\nzero"),
    ],
)
def test_training_reads_the_generated_tokens(
    tmp_path: Path, family: str | None, chosen: str, rejected: str
) -> None:
    record, tokenizer = (CHAT, tokenizer_of(family)) if family else (DIALOGUE, PLAIN)
    samples, ids = answered(record, tokenizer, chosen, rejected)
    assert [sample.same_ids for sample in samples] == [True, True]
    assert trained(tmp_path, record, tokenizer, samples[0].response, samples[1].response) == ids


@pytest.mark.parametrize("name", MARKS)
def test_a_thought_that_the_template_opens_in_marks_of_its_own_is_continued(name: str) -> None:
    opening, closing, around = MARKS[name]
    tokenizer = tokenizer_with(thinking(opening, closing, around))
    texts = [
        f"{thought}{closing}{around.replace('{{ m.content }}', answer)}"
        for thought, answer in (("add", "four"), ("sum", "five"))
    ]
    samples, _ = answered(CHAT, tokenizer, *texts)
    assert [sample.same_ids for sample in samples] == [True, True]


@pytest.mark.parametrize("turn", ["Human: and you?", "Assistant: more"])
def test_a_response_ends_before_a_further_turn(turn: str) -> None:
    [sample], _ = answered(DIALOGUE, PLAIN, f" yes\n\n{turn}", finished=False)
    tokens = len(PLAIN(" yes")["input_ids"])
    assert (sample.content, sample.tokens, sample.finished, sample.same_ids) == (" yes", tokens, True, True)
    assert answered(DIALOGUE, PLAIN, f"\n\n{turn}")[0][0].content == ""


REQUEST = Request(np.arange(40, 50, dtype=np.int32), "key", 3)


def config_of(base: Path) -> RunConfig:
    return load_run_config(
        [f"model.path={base}", "model.dtype=fp32", "data.train=[a.jsonl]", f"run.root={base.parent}"]
    )


def sampled(folder: Path, base: Path) -> tuple[list[Sample], str]:
    config = config_of(base)
    source = find_model(str(folder), config.model, Path(config.reference.store), "pairs.models")
    _, generator = open_generator(source, config.model, config.data, torch.device("cpu"))
    return generator([REQUEST], Sampling(12)), source.digest


def test_adapters_also_merged_shards_and_other_ends_of_a_response(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    whole, digest = sampled(base, base)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sharded = write_model(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    loaded.save_pretrained(sharded, max_shard_size="30KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert sampled(sharded, base)[0] == whole
    lora = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(loaded, lora)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    adapted, other = sampled(tmp_path / "adapter", base)
    assert adapted != whole
    assert other != digest
    left = tmp_path / "merged.tmp-0123456789ab"  # by a start that was killed
    left.mkdir()
    os.utime(left, (0, 0))
    config = config_of(base)
    facts = config.model, config.data, Path(config.reference.store)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", *facts)
    assert not left.exists()
    assert sampled(tmp_path / "merged", base)[0] == adapted
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [5]}))
    assert sampled(base, base)[1] != digest, "responses of before would be used again"
    merge_adapter(tmp_path / "adapter", tmp_path / "again", *facts)
    stops = GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id
    assert stops == [5, tiny.qwen().eos_token_id]
