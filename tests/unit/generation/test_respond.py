"""Responses of models: training reads the tokens that were generated, of dialogues and thoughts too."""

import copy
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpo_dist.config.load import load_run_config
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Dialogue, Message, Origin, PreferenceRecord, Response
from dpo_dist.generation.pairs.files import pair_fields, write_results
from dpo_dist.generation.sampling.generate import Request, Sample, Sampling
from dpo_dist.generation.sampling.respond import Answer, Responder, find_model, open_generator, respond
from tests.support import tiny
from tests.support.chat_tokenizers import tokenizer_of
from tests.support.pairs import WIDE
from tests.support.tiny_model import write_model

DIALOGUE = PreferenceRecord(Dialogue("\n\nHuman: hi\n\nAssistant:"), (), Origin("here", 1))
CHAT = PreferenceRecord((Message("user", "What is 2+2?"),), (), Origin("here", 1))
PLAIN = copy.deepcopy(tiny.qwen())
PLAIN.chat_template = None


def answered(
    record: PreferenceRecord, tokenizer: PreTrainedTokenizerFast, *texts: str, finished: bool = True
) -> tuple[list[Answer], list[list[int]]]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    source: Any = SimpleNamespace(name="my_model")
    responder = Responder(source, tokenizer, WIDE, frozenset(), None)
    samples = [Sample(each, finished) for each in ids]
    (row,) = respond([record], responder, lambda *_: samples, Sampling(50), range(len(texts)))
    return row.answers, ids


def trained(folder: Path, record: PreferenceRecord, tokenizer: Any, *sides: Response) -> list[list[int]]:
    pair = pair_fields(record, (sides[0], sides[1]), None, {})
    write_results(folder / "pairs.jsonl", [pair], {}, Counter(), lambda _: None)
    (read,) = read_records(str(folder / "pairs.jsonl"))
    assert isinstance(read, PreferenceRecord)
    example = encode_pair(read, tokenizer, WIDE)
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


@pytest.mark.parametrize("turn", ["Human: and you?", "Assistant: more"])
def test_a_response_ends_before_a_further_turn(turn: str) -> None:
    [sample], _ = answered(DIALOGUE, PLAIN, f" yes\n\n{turn}", finished=False)
    tokens = len(PLAIN(" yes")["input_ids"])
    assert (sample.content, sample.tokens, sample.finished, sample.same_ids) == (" yes", tokens, True, True)
    assert answered(DIALOGUE, PLAIN, f"\n\n{turn}")[0][0].content == ""


REQUEST = Request(np.arange(40, 50, dtype=np.int32), "key", 3)


def sampled(folder: Path, base: Path) -> tuple[list[Sample], str]:
    config = load_run_config(
        [f"model.path={base}", "model.dtype=fp32", "data.train=[a.jsonl]", f"run.root={base.parent}"]
    )
    source = find_model(str(folder), config)
    _, generator = open_generator(source, config, torch.device("cpu"))
    return generator([REQUEST], Sampling(12)), source.digest


def test_adapters_shards_and_other_ends_of_a_response(tmp_path: Path) -> None:
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
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 5]}))
    assert sampled(base, base)[1] != digest, "responses of before would be used again"
