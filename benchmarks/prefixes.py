"""Measure what the prefix tree saves: tokens and CPU seconds of training and scoring with and without it.

Each data set is trained on for a few steps by a small model with random weights, `trainer.prefix_tree=true`
and `false` in turns, each in its own process and with a store of its own. Data sets are files of any format
that training reads, and `agents`, which is generated: conversations with one of three sets of tools, where a
record may be a later turn of an earlier record's conversation. Tokens are those of a pair as rows (each
prompt once for each response), with shared prompts, and with the tree; seconds are medians over rounds.
If losses of the two differ, the exit code is 1.
"""

import dataclasses
import json
import random
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encode import CHATML
from benchmarks.options import Benchmark, Json, markdown
from benchmarks.runs import Result, Run, in_fork, start
from benchmarks.setting import (
    SHAPES,
    TOKENIZER_VOCABULARY,
    Setting,
    overrides,
    save_random_model,
    train_tokenizer,
)

_TOLERANCE = 1e-5
_AGENTS = "agents"
_TOOL_SETS, _TURNS = 3, 4
_WORDS = "account amount city code count customer date email file filter id invoice item key language limit "
_WORDS += "list message name number order page path price product query range region report result room "
_WORDS += "search sort start status stock table text ticket time title total type unit update user value week"


def run(options: Namespace) -> Json:
    """Measure each data set with the tree and without it."""
    setting = Setting.from_options(options)
    figures: dict[str, Json] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        agents = folder / f"{_AGENTS}.jsonl"
        with agents.open("w") as file:
            file.writelines(f"{json.dumps(record)}\n" for record in agent_records(options.pairs, setting.seed))
        files = options.files or [agents]
        setting.write(folder)
        in_fork(lambda: _save_model(setting, files, options.base, folder))
        for file in files:
            rounds: list[dict[bool, Result]] = []
            for number in range(options.rounds):
                order = (True, False) if number % 2 else (False, True)
                rounds.append({tree: _train(folder, file, f"{number}-{tree}", tree) for tree in order})
            figures[file.stem] = _figures(rounds) | _tokens(setting, folder, file)
    print(f"{setting}\n{options.rounds} rounds\n")
    rows = [["", *next(iter(figures.values()))]]
    rows += [[name, *(f"{value:,.4g}" for value in row.values())] for name, row in figures.items()]
    print(markdown(rows))
    largest = max(row["loss difference"] for row in figures.values())
    return {"trainers_agree": largest <= _TOLERANCE, **figures}


def agent_records(pairs: int, seed: int) -> Iterator[Json]:
    """Yield invented pairs of tool calls, in random order.

    A prompt has a system message with one set of tools, of about 1,500 tokens, and up to `_TURNS` calls with
    their results, as in earlier records of its conversation.
    """
    draw = random.Random(seed)
    words = _WORDS.split()

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    def tool() -> Json:
        described = {
            name: {"type": draw.choice(["string", "integer", "boolean"]), "description": text(9)}
            for name in draw.sample(words, 4)
        }
        function = {"name": "_".join(draw.sample(words, 2)), "description": text(20)}
        return {"type": "function", "function": {**function, "parameters": {"properties": described}}}

    def call(tools: list[Json]) -> Json:
        function = draw.choice(tools)["function"]
        arguments = {name: text(2) for name in function["parameters"]["properties"]}
        content = json.dumps({"name": function["name"], "arguments": arguments})
        return {"role": "assistant", "content": content}

    sets = [[tool() for _ in range(10)] for _ in range(_TOOL_SETS)]
    records: list[Json] = []
    while len(records) < pairs:
        tools = draw.choice(sets)
        prompt = [{"role": "system", "content": f"You can call these tools:\n{json.dumps(tools)}"}]
        prompt.append({"role": "user", "content": text(15)})
        for _ in range(draw.randint(1, _TURNS)):
            chosen, rejected = call(tools), call(tools)
            records.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
            prompt = [*prompt, chosen, {"role": "tool", "content": json.dumps({"result": text(40)})}]
    draw.shuffle(records)
    yield from records[:pairs]


def _save_model(setting: Setting, files: list[Path], base: Path | None, folder: Path) -> None:
    """Write a model with random weights, and its tokenizer: that of `base`, or one trained on the files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if base is not None:
        config: Any = AutoConfig.from_pretrained(base)
        config.num_hidden_layers = setting.layers or config.num_hidden_layers
        torch.manual_seed(setting.seed)
        causal_lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        causal_lm.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / "model")
        return
    texts = folder / "texts.jsonl"
    with texts.open("w") as out:
        out.writelines(f"{json.dumps({'text': line})}\n" for file in files for line in file.open())
    shape = SHAPES[setting.model]
    tokenizer = train_tokenizer(texts, min(shape.vocabulary, TOKENIZER_VOCABULARY))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "model")
    size = max(shape.vocabulary, len(tokenizer))
    shape = dataclasses.replace(shape, vocabulary=size, layers=setting.layers or shape.layers)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_random_model(shape, folder / "model", setting.seed, **tokens)


def _train(folder: Path, file: Path, name: str, tree: bool) -> Result:
    chosen = f"data.train=[{file}]", f"trainer.prefix_tree={str(tree).lower()}", "parallelism=ddp"
    return start(Run(str(folder), "dpo_dist", f"{folder}/store-{file.stem}-{name}", chosen, saves=False))


def _figures(rounds: list[dict[bool, Result]]) -> Json:
    """Return CPU seconds of training and scoring without the tree and with it, their ratios, and memory."""

    def losses(result: Result) -> Any:
        return np.array([row["loss"] for row in result["rows"]])

    found: Json = {}
    for phase in ("training", "reference"):
        seconds = {tree: [each[tree][phase]["cpu_seconds"] for each in rounds] for tree in (False, True)}
        found |= {f"{phase} s": statistics.median(seconds[False])}
        found |= {f"{phase} s, tree": statistics.median(seconds[True])}
        ratios = [with_tree / without for without, with_tree in zip(*seconds.values(), strict=True)]
        found |= {f"{phase} ratio": statistics.median(ratios)}
    found["peak ratio"] = statistics.median(each[True]["peak_bytes"] / each[False]["peak_bytes"] for each in rounds)
    found["loss difference"] = max(float(abs(losses(each[True]) - losses(each[False])).max()) for each in rounds)
    return found
