"""Measure what the prefix tree saves: tokens and CPU seconds of training and scoring with and without it.

A small model with random weights trains on each data set, with `trainer.prefix_tree=true` and `false` in
turns, each in its own process with a store of its own. Data sets are files of any format that training reads,
or else `agents`, which is generated: conversations with one of three sets of tools, where a record may be a
later turn of another record's conversation. Tokens of a pair are those of rows (a prompt once for each
response), with shared prompts, and with the tree. CPU seconds, of all steps and of scoring by the reference,
are medians over rounds, their ratios and that of peak memory are with the tree to without. If losses differ,
the exit code is 1.
"""

import dataclasses
import json
import random
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
_TOKENS = "tokens.json"
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
        files = options.files or [folder / "agents.jsonl"]
        in_fork(lambda: _prepare(setting, files, options.base, folder))
        tokens: dict[str, Json] = json.loads((folder / _TOKENS).read_text())
        for file in files:
            rounds = []
            for number in range(options.rounds):
                order = (True, False) if number % 2 else (False, True)
                rounds.append({tree: _train(folder, file, f"{number}-{tree}", tree) for tree in order})
            figures[file.stem] = {**tokens[str(file)], **_figures(rounds)}
    print(f"{setting}\n{options.rounds} rounds\n")
    table = [["", *next(iter(figures.values()))]]
    table += [[name, *(f"{value:,.4g}" for value in row.values())] for name, row in figures.items()]
    print(markdown(table))
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


def _prepare(setting: Setting, files: list[Path], base: Path | None, folder: Path) -> None:
    """Write the generated data, the model and, by file, the tokens of a pair of the run."""
    from dpo_dist.batching.sampler import make_sampler
    from dpo_dist.batching.step_batch import shard_batch
    from dpo_dist.config.load import load_run_config
    from dpo_dist.encoded.build import Preparation
    from dpo_dist.encoded.dataset import open_dataset
    from dpo_dist.model.files.load import load_config, load_tokenizer, tokenizer_digest, without_weights
    from dpo_dist.model.flops import compute_costs, step_flops

    setting.write(folder)
    with (folder / "agents.jsonl").open("w") as out:
        records = agent_records(setting.pairs, setting.seed)
        out.writelines(f"{json.dumps(record)}\n" for record in records)
    _save_model(setting, files, base, folder)
    model, tokens = folder / "model", {}
    for file in files:
        chosen = [*overrides(setting, folder, folder / "unused", folder / "unused"), f"data.train=[{file}]"]
        config = load_run_config(chosen)
        tokenizer = load_tokenizer(model, config.model)
        encoded = Preparation(config.data.train, config.data, tokenizer, tokenizer_digest(model)).whole()
        dataset = open_dataset(encoded, config.data)
        sampler = make_sampler(dataset.spans([1.0]), config.trainer)
        flops = step_flops(without_weights(load_config(model, config.model), config.model))
        costs = dataclasses.replace(compute_costs(flops, prefixes=True), is_masked=True)
        steps = [
            shard_batch(dataset, sampler.indices(step), 0, 1, setting.micro_batch_tokens, costs)
            for step in range(sampler.steps)
        ]
        names = {"rows": "unshared_tokens", "shared prompts": "tokens", "tree": "computed_tokens"}
        tokens[str(file)] = {
            shown: sum(getattr(step, name) for step in steps) / setting.pairs for shown, name in names.items()
        }
    (folder / _TOKENS).write_text(json.dumps(tokens))


def _save_model(setting: Setting, files: list[Path], base: Path | None, folder: Path) -> None:
    """Write a model with random weights, and its tokenizer: that of `base`, or one trained on the files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = folder / "model"
    if base is not None:
        config: Any = AutoConfig.from_pretrained(base)
        config.num_hidden_layers = setting.layers or config.num_hidden_layers
        torch.manual_seed(setting.seed)
        causal_lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        causal_lm.save_pretrained(model)
        AutoTokenizer.from_pretrained(base).save_pretrained(model)
        return
    texts = folder / "texts.jsonl"
    with texts.open("w") as out:
        out.writelines(f"{json.dumps({'text': line})}\n" for file in files for line in file.open())
    shape = SHAPES[setting.model]
    tokenizer = train_tokenizer(texts, min(shape.vocabulary, TOKENIZER_VOCABULARY))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    shape = dataclasses.replace(
        shape, vocabulary=max(shape.vocabulary, len(tokenizer)), layers=setting.layers or shape.layers
    )
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    save_random_model(shape, model, setting.seed, **tokens)


def _train(folder: Path, file: Path, name: str, tree: bool) -> Result:
    chosen = f"data.train=[{file}]", f"trainer.prefix_tree={str(tree).lower()}", "parallelism=ddp"
    store = folder / f"store-{file.stem}-{name}"
    return start(Run(str(folder), "dpo_dist", str(store), chosen, saves=False), threads=1)


def _figures(rounds: list[dict[bool, Result]]) -> Json:
    """Return CPU seconds without the tree and with it, ratios and losses."""

    def median_ratio(value: Callable[[Result], float]) -> float:
        return statistics.median(value(each[True]) / value(each[False]) for each in rounds)

    found: Json = {}
    for phase in ("training", "reference"):
        for tree, name in ((False, f"{phase} s"), (True, f"{phase} s, tree")):
            found[name] = statistics.median(each[tree][phase]["cpu_seconds"] for each in rounds)
    found["training ratio"] = median_ratio(lambda result: result["training"]["cpu_seconds"])
    found["reference ratio"] = median_ratio(lambda result: result["reference"]["cpu_seconds"])
    found["peak ratio"] = median_ratio(lambda result: result["peak_bytes"])
    found["loss difference"] = max(
        abs(ours["loss"] - theirs["loss"])
        for each in rounds
        for ours, theirs in zip(each[True]["rows"], each[False]["rows"], strict=True)
    )
    return found


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--files", type=Path, nargs="+", help="data sets; without this option, agents")
    parser.add_argument("--base", type=Path, help="model folder that gives shape and tokenizer")
    parser.add_argument("--layers", type=int, help="layers of the model; without this option, the shape's")
    parser.add_argument("--seed", type=int, default=0)


def _fault(options: Namespace) -> str:
    return "" if options.pairs % options.batch_pairs == 0 else "pairs must be a multiple of batch-pairs"


BENCHMARK = Benchmark(
    run,
    shared={
        "model": "5m",
        "pairs": 64,
        "batch_pairs": 32,
        "max_length": 4096,
        "rounds": 2,
        "micro_batch_tokens": 8192,
    },
    own=_own_options,
    smoke={"model": "tiny", "pairs": 8, "batch_pairs": 4, "rounds": 1},
    fault=_fault,
)
