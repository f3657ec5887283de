"""Where responses end: the written generation_config.json has the tokens with which training ends them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dpo_dist.data.config import DataConfig
from dpo_dist.data.text.render import trained_stops
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.stops import find_stop_ids, padding_token, stop_notes, write_stops
from tests.support import tiny
from tests.support.chat_tokenizers import tokenizer_of

QWEN_BASE = tiny.with_template(tiny.qwen(), tiny.CHATML)
QWEN_BASE.eos_token = "<|endoftext|>"
GPT2 = tiny.with_template(tiny.qwen(), None)
GPT2.unk_token = GPT2.eos_token
SAMPLING = {"do_sample": True, "temperature": 0.6, "pad_token_id": 0}
# A tokenizer, the eos of the base's generation_config.json, and the tokens that are added to them.
BASES = {
    "Qwen2.5 base": (QWEN_BASE, 0, ["<|im_end|>"]),
    "Llama 3 base": (tiny.llama3(), [1], ["<|eot_id|>"]),
    "Gemma 3 base": (tokenizer_of("gemma3"), 1, ["<end_of_turn>"]),
    "Command R7B of another eos": (tokenizer_of("cohere2"), 0, ["<|END_OF_TURN_TOKEN|>"]),
    "no template": (tiny.with_template(tiny.qwen(), None), [0], ["<|im_end|>"]),
    "GPT-2, whose unknown token is its end": (GPT2, [0], ["<|im_end|>"]),
    "a template that renders nothing": (
        tiny.with_template(QWEN_BASE, "{{ nothing.of.it }}"),
        [1],
        ["<|endoftext|>"],
    ),
    "none given": (QWEN_BASE, None, ["<|endoftext|>", "<|im_end|>"]),
    "all given, unsorted": (tokenizer_of("llama3_1"), [4, 1, 5], []),
}


@pytest.mark.parametrize(("tokenizer", "given", "added"), BASES.values(), ids=BASES)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_of_training_are_added_to_those_of_the_base(
    tokenizer: Any, given: Any, added: list[str], file: str, tmp_path: Path
) -> None:
    base, out, data = tmp_path / "base", tmp_path / "out", DataConfig()
    for folder in (base, out):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (base / file).write_text(json.dumps(SAMPLING | {"eos_token_id": given, "_from_model_config": True}))
    write_stops(out, base, trained_stops(tokenizer, data))
    before = [] if given is None else given if isinstance(given, list) else [given]
    expected = [*before, *tokenizer.convert_tokens_to_ids(added)]
    assert find_stop_ids(tokenizer, data, base, "model.path") == set(expected)
    notes = stop_notes(tokenizer, data, base)
    assert len(notes) == bool(added)
    assert (out / "generation_config.json").exists() is bool(added)
    if added:
        assert all(f"{token} (" in notes[0] for token in added)
        written = GenerationConfig.from_pretrained(out)
        assert written.eos_token_id == expected
        assert (written.temperature, written.do_sample, written.pad_token_id) == (0.6, True, 0)
        assert not stop_notes(tokenizer, data, out)
        assert "_from_model_config" not in (out / "generation_config.json").read_text()


def test_a_template_of_the_run_has_its_own_end(tmp_path: Path) -> None:
    own, tokenizer = tmp_path / "own.jinja", tiny.llama3()
    own.write_text(tiny.LLAMA3.replace("<|eot_id|>", "<|end_header_id|>"))
    for choice, end in ((None, "<|eot_id|>"), (str(own), "<|end_header_id|>")):
        expected = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", end])
        assert trained_stops(tokenizer, DataConfig(chat_template=choice)) == sorted(expected)


def padded(tokenizer: Any, token: str | None) -> Any:
    changed = tiny.with_template(tokenizer, tokenizer.chat_template)
    changed.pad_token = token
    return changed


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (tiny.qwen(), "<|endoftext|>"),
        (padded(tiny.qwen(), "<|im_end|>"), "<|endoftext|>"),
        (padded(tiny.qwen(), None), "<|endoftext|>"),
        (padded(tiny.llama3(), "<|end_of_text|>"), "<|begin_of_text|>"),
        (tokenizer_of("cohere2"), "<BOS_TOKEN>"),
    ],
)
def test_rows_of_a_reward_model_are_padded_with_a_token_that_ends_no_text(
    tokenizer: Any, expected: str
) -> None:
    assert padding_token(tokenizer, DataConfig()) == expected


def test_a_tokenizer_whose_special_tokens_all_end_texts_cannot_pad() -> None:
    only_end = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<|endoftext|>": 0, "a": 1}, "<|endoftext|>")),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
    )
    with pytest.raises(ConfigError, match="none can pad rows") as error:
        padding_token(only_end, DataConfig())
    assert "pad_token in tokenizer_config.json" in error.value.remedy
