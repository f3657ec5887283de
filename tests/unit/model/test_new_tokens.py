"""A model with tokens added to its vocabulary: an ordinary model folder, from the files of the base only."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist import api
from dpo_dist.config.schema import AdapterConfig, Dtype, ModelConfig
from dpo_dist.extend import main
from dpo_dist.model.adapter_files import check_start, tokenizer_folder
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import load_adapter
from tests.support.packing import pack_unkeyed, plain_logps, random_pairs
from tests.support.tiny_model import write_model

NEW = ["<|plan|>", "<|act|>"]
PAIRS = random_pairs([(3, 4, 2), (5, 1, 6)])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tied=request.param)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_new_rows_are_the_mean_and_all_others_stay(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(base), str(tmp_path / "out"), "--tokens", *NEW]) == 0
    old, new = loaded(base), loaded(tmp_path / "out")
    rows = old.config.vocab_size
    assert f"embeddings of {rows} rows before, {rows + 2} now" in capsys.readouterr().out
    assert new.config.vocab_size == rows + 2
    assert new.config.tie_word_embeddings is old.config.tie_word_embeddings
    former, found = old.state_dict(), new.state_dict()
    assert former.keys() == found.keys()
    for name, weight in former.items():
        assert torch.equal(found[name][: len(weight)], weight)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            torch.testing.assert_close(found[name][rows:], weight.mean(0).expand(2, -1))
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(new(ids).logits[..., :rows], old(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a<|plan|>b<|act|>", add_special_tokens=False)["input_ids"][1::2] == [rows, rows + 1]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    main([str(base), str(tmp_path / "again"), "--tokens", *NEW])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("of_tokenizer", [0, 1])
def test_new_tokens_in_unused_rows_of_a_padded_vocabulary_are_the_mean_too(
    of_tokenizer: int, tmp_path: Path
) -> None:
    """Also those of a named tokenizer."""
    base = write_model(tmp_path / "base", tied=False)
    with torch.no_grad():
        padded = loaded(base)
        rows = padded.config.vocab_size
        padded.resize_token_embeddings(rows + 3)
        for end in (padded.get_input_embeddings(), padded.get_output_embeddings()):
            end.weight[rows:] = 1.0
    padded.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW[:of_tokenizer], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = ["--tokenizer", str(tmp_path / "tokenizer"), "--tokens", *NEW[of_tokenizer:]]
    assert main([str(base), str(tmp_path / "out"), *named]) == 0
    former, found = padded.state_dict(), loaded(tmp_path / "out").state_dict()
    for name, weight in former.items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(found[name], weight)
            continue
        torch.testing.assert_close(found[name][rows : rows + 2], weight[:rows].mean(0).expand(2, -1))
        assert torch.equal(found[name][rows + 2 :], weight[rows + 2 :])
        assert torch.equal(found[name][:rows], weight[:rows])


def test_a_folder_without_a_tokenizer_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name, told in (("empty", "this folder has no tokenizer"), ("absent", "this folder does not exist")):
        assert main([str(base), str(tmp_path / "out"), "--tokenizer", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "--tokenizer" in error


def test_contents_contain_content_tokens_and_spell_special_ones_as_text(base: Path, tmp_path: Path) -> None:
    extended = tmp_path / "out"
    assert (
        main([str(base), str(extended), "--tokens", "<|user|>", "--content-tokens", "<plan>", "</plan>"]) == 0
    )
    assert not logging.getLogger("bitsandbytes.backends").isEnabledFor(logging.WARNING)
    rows = loaded(base).config.vocab_size
    tokenizer = api.load_tokenizer(str(extended))
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "<plan>", "</plan>"]) == [rows, rows + 1, rows + 2]
    turn = [{"role": "assistant", "content": "<plan>a</plan> <|user|>"}]
    chosen = {"chosen": turn, "rejected": [{"role": "assistant", "content": "b"}]}
    for record in (
        {"prompt": [{"role": "user", "content": "<plan> <|user|>"}], **chosen},
        {"prompt": "<plan> <|user|>", "chosen": "<plan>a</plan> <|user|>", "rejected": "b"},
    ):
        file = tmp_path / "pairs.jsonl"
        file.write_text(json.dumps(record))
        (pair,), _ = api.read_pairs(str(file), tokenizer, api.DataConfig(max_length=256))
        for ids, contained in ((pair.prompt_ids, [rows + 1]), (pair.responses[0], [rows + 1, rows + 2])):
            assert [int(id_) for id_ in ids if id_ >= rows] == contained
        assert "<plan>a</plan>" in tokenizer.decode(pair.responses[0], skip_special_tokens=True)


def sft_with_tokens(base: Path, folder: Path) -> Any:
    """As TRL and peft train new tokens: resized, both ends in full, the tokenizer beside the adapter."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), loaded(base)
    tokenizer.add_tokens(NEW, special_tokens=True)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    ends = ["embed_tokens", "lm_head"]
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=ends, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            weight.add_(0.05 * torch.randn_like(weight) * weight.requires_grad)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return adapted.eval()


def test_an_sft_adapter_with_new_tokens_is_one_of_the_extended_base(base: Path, tmp_path: Path) -> None:
    trained = sft_with_tokens(base, tmp_path / "sft")
    assert main([str(base), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "sft")]) == 0
    check_start(AdapterConfig(path=str(tmp_path / "sft")), tmp_path / "sft")
    assert tokenizer_folder(tmp_path / "out", tmp_path / "sft") == tmp_path / "sft"
    config = ModelConfig(str(tmp_path / "out"), dtype=Dtype.fp32)
    model = load_packed(tmp_path / "out", config, 64, torch.device("cpu"))
    load_adapter(model, tmp_path / "sft")
    with torch.no_grad():
        expected = plain_logps(trained, PAIRS)
    torch.testing.assert_close(model(pack_unkeyed(PAIRS)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tokens", "<|im_end|>"], "a new token is empty, one of the tokenizer"),
        (["--tokens", ""], "a new token is empty"),
        (["--tokens", "<|a|>", "<|a|>"], "named twice"),
        (["--tokens", "<|a|>", "--content-tokens", "<|a|>"], "named twice"),
        ([], "the model has embeddings of all tokens"),
    ],
)
def test_nothing_to_add_is_refused(
    arguments: list[str], told: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(base), str(tmp_path / "out"), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_incomplete_base_and_a_name_that_no_folder_has_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not as a disk without room."""
    assert main([str(base), str(tmp_path / ("x" * 300)), "--tokens", *NEW]) == 2
    assert "File name too long" in capsys.readouterr().err
    broken = shutil.copytree(base, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 1000)
    assert main([str(broken), str(tmp_path / "out"), "--tokens", *NEW]) == 2
    assert "a weight file of the model cannot be read" in capsys.readouterr().err


def test_another_tokenizer_and_an_existing_folder_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(base), str(tmp_path), "--tokens", "<|plan|>"]) == 2
    assert "the folder to write exists" in capsys.readouterr().err
    other = tmp_path / "other"
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    content = json.loads((other / "tokenizer.json").read_text())
    words = list(content["model"]["vocab"])
    numbers = content["model"]["vocab"]
    numbers[words[-1]], numbers[words[-2]] = numbers[words[-2]], numbers[words[-1]]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert main([str(base), str(tmp_path / "out"), "--tokens", "<|plan|>", "--tokenizer", str(other)]) == 2
    assert "has other ids for tokens of the model" in capsys.readouterr().err
