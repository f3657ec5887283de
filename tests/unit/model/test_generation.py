"""Models by which transformers generates wrongly, after padding or at all: rows of one length, or none."""

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_dist.config.schema import FolderConfig, ModelConfig, RunConfig
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.generation import NotFiniteError, WrongGenerationError
from dpo_dist.tools.chat.conversation import Conversation
from dpo_dist.tools.report.samples import RunSamples, SamplePrompt
from dpo_dist.tools.sampling.generate import Request, generate
from dpo_dist.tools.sampling.respond import Responder, respond
from dpo_dist.tools.sampling.settings import Sampling
from dpo_dist.training.start.open_run import Run
from tests.support import tiny
from tests.support.alone import ALONE
from tests.support.families import tiny_causal_lm, tiny_config, with_rope
from tests.support.packing import VOCABULARY
from tests.support.pairs import WIDE

pytestmark = pytest.mark.slow


STOPS = [2]
LENGTHS = (3, 9, 5, 9, 5, 21)
GREEDY = Sampling(8, temperature=0)
STATES_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
THREE_LAYERS = {"num_hidden_layers": 3}  # recurrent, recurrent, attention
HEALTHY = """
bamba falcon_h1 gemma3_text gpt2 granitemoehybrid jamba kimi_linear lfm2 llama mamba mamba2 qwen2 qwen3_moe
qwen3_next zamba2
"""


def requests(lengths: tuple[int, ...] = LENGTHS) -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]
    return [Request(ids, f"key {at}", 0) for at, ids in enumerate(prompts)]


def by_plain_forwards(model: Any, request: Request) -> list[int]:
    """The likeliest tokens, each by a forward of the whole row without a cache."""
    ids = request.prompt_ids.tolist()
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in STOPS:
            break
        ids.append(token)
    return ids[len(request.prompt_ids) :]


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The attention mask of each batch that transformers generates."""
    masks, own = list[Tensor](), model.generate

    def call(**inputs: Any) -> Any:
        masks.append(inputs["attention_mask"])
        return own(**inputs)

    monkeypatch.setattr(model, "generate", call)
    return masks


@pytest.mark.parametrize(
    ("family", "options"), [("minimax", STATES_FIRST), ("recurrent_gemma", THREE_LAYERS)]
)
def test_where_padding_is_wrong_rows_of_one_length_give_the_tokens_of_plain_forwards(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_causal_lm(tiny_config(family, **options))
    asked = requests()
    samples = generate(model, asked, GREEDY, STOPS, 10**6)
    assert [sample.ids for sample in samples] == [by_plain_forwards(model, each) for each in asked]
    masks = counted(model, monkeypatch)
    assert generate(model, asked, GREEDY, STOPS, 10**6) == samples
    assert [list(mask.shape) for mask in masks] == [[1, 21], [2, 9], [2, 5], [1, 3]], "checked once"
    assert all(bool(mask.all()) for mask in masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HEALTHY.split())
def test_healthy_models_stay_batched(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_causal_lm(tiny_config(family)).to(dtype)
    generate(model, requests((4,)), GREEDY, STOPS, 10**6)
    masks = counted(model, monkeypatch)
    generate(model, requests(), GREEDY, STOPS, 10**6)
    assert [len(mask) for mask in masks] == [len(LENGTHS)]


@pytest.mark.parametrize(
    ("family", "options"), [("minimax", STATES_FIRST), ("recurrent_gemma", THREE_LAYERS)]
)
def test_wrong_padding_is_larger_than_rounding_in_16_bits(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_causal_lm(tiny_config(family, **options)).to(torch.bfloat16)
    generate(model, requests((4,)), GREEDY, STOPS, 10**6)
    masks = counted(model, monkeypatch)
    generate(model, requests(), GREEDY, STOPS, 10**6)
    assert [len(mask) for mask in masks] == [1, 2, 2, 1]


@pytest.mark.parametrize(("family", "said"), [("rwkv", "log-probs differ"), ("xlstm", "Error")])
def test_models_that_generate_wrongly_have_no_samples_and_a_run_says_so_once(
    family: str, said: str, tmp_path: Path
) -> None:
    model = tiny_causal_lm(tiny_config(family))
    with pytest.raises(WrongGenerationError, match=f"{family}.*{said}"):
        generate(model, requests((4,)), GREEDY, STOPS, 10**6)
    lines: list[str] = []
    config = RunConfig(model=ModelConfig("unused"), run=FolderConfig(dir=str(tmp_path)))
    run = Run(config, ALONE, Console(LineScreen(lines.append)))
    engine: Any = SimpleNamespace(
        is_synchronised=False, ready_to_generate=lambda without_adapter: nullcontext(model)
    )
    prompts = tuple(SamplePrompt(request, {"prompt_id": "id", "chosen": "Yes."}) for request in requests())
    asked = RunSamples(run, GREEDY, prompts, frozenset(STOPS), tiny.qwen())
    assert [asked.write_responses(step, engine, is_last=False) for step in (0, 1, 2)] == [{}, {}, {}]
    [line] = lines
    assert "no samples: " in line
    assert family in line
    assert not run.folder.samples.exists()


def test_pairs_and_chat_name_a_model_that_generates_wrongly() -> None:
    model, tokenizer = tiny_causal_lm(tiny_config("rwkv", len(tiny.qwen()))), tiny.qwen()
    source: Any = SimpleNamespace(name="my_model")
    responder = Responder(source, tokenizer, WIDE, frozenset([tokenizer.eos_token_id]), None)
    record = PreferenceRecord((Message("user", "What is 2+2?"),), (), Origin("here", 1))

    def samples(asked: Any, sampling: Sampling) -> Any:
        return generate(model, asked, sampling, responder.stop_ids, 10**6)

    with pytest.raises(ConfigError, match="does not generate rightly") as raised:
        respond([record], responder, samples, GREEDY, range(1))
    assert (raised.value.where, "rwkv" in raised.value.got) == ("my_model", True)
    conversation = Conversation("run", responder, model, print, max_new_tokens=4)
    with pytest.raises(ConfigError, match="does not generate rightly") as raised:
        conversation.answer("What is 2+2?", ())
    assert (raised.value.where, "rwkv" in raised.value.got) == ("run", True)


def test_logits_that_are_no_numbers_are_not_taken_for_wrong_generation() -> None:
    model = tiny_causal_lm(tiny_config("llama"))
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(NotFiniteError):
        generate(model, requests(), GREEDY, STOPS, 10**6)
    torch.nn.init.normal_(model.lm_head.weight)
    assert len(generate(model, requests(), GREEDY, STOPS, 10**6)) == len(LENGTHS)


def test_a_token_that_the_model_excludes_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm(tiny_config("llama"))

    def exclude(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([7]), -torch.inf)

    model.lm_head.register_forward_hook(exclude)
    generate(model, requests((4,)), GREEDY, STOPS, 10**6)
    masks = counted(model, monkeypatch)
    generate(model, requests(), GREEDY, STOPS, 10**6)
    assert [len(mask) for mask in masks] == [len(LENGTHS)]


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_long_prompt_does_not_change_the_frequencies_of_others(rope: str) -> None:
    model = tiny_causal_lm(with_rope(tiny_config("llama"), rope, 24))
    asked, sampling = requests((40, 30, 30, 26, *range(6, 16))), Sampling(8)
    # Each by a new model: frequencies of a long sequence may stay.
    alone = [generate(copy.deepcopy(model), [each], sampling, STOPS, 10**6)[0] for each in asked]
    assert generate(model, asked, sampling, STOPS, 10**6) == alone
    assert generate(model, asked[::-1], sampling, STOPS, 10**6) == alone[::-1]


def conversation_with(model: Any) -> Conversation:
    tokenizer, source = tiny.qwen(), SimpleNamespace(name="my_model")
    responder = Responder(source, tokenizer, WIDE, frozenset([tokenizer.eos_token_id]), None)  # type: ignore[arg-type]
    return Conversation("run", responder, model, print)


def test_a_conversation_keeps_the_sampling_settings_of_the_models_folder() -> None:
    model = tiny_causal_lm(tiny_config("llama", len(tiny.qwen())))
    settings = {"do_sample": True, "top_k": 7, "repetition_penalty": 1.3, "max_new_tokens": 3}
    model.generation_config.update(**settings)
    conversation = conversation_with(model)
    for _ in range(2):
        conversation.answer("What is 2+2?", ())
        assert model.generation_config.to_dict().items() >= settings.items()


def test_a_conversation_names_a_model_whose_logits_are_no_numbers() -> None:
    model = tiny_causal_lm(tiny_config("llama", len(tiny.qwen())))
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        conversation_with(model).answer("What is 2+2?", ())
