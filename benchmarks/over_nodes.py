"""Measure ways to train over nodes: two network namespaces of two processes each, with a slow link between.

A small mixture of experts with random weights trains by ZeRO-3 over all processes, with a copy of the weights
on each node (`parallelism.shard_size=2`), with experts that the processes of a node share
(`parallelism.experts=2`), and with both. Bytes are those of the collective calls of a step and process that
leave a node, by their tensors, beside those that the plan counts; seconds are medians of steps. Needs root,
and ip and tc (iproute2).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.options import Benchmark, Json, markdown
from benchmarks.runs import in_fork
from benchmarks.setting import Setting, train_tokenizer, write_synthetic

WAYS = {
    "zero3": [],
    "shard_size": ["parallelism.shard_size=2"],
    "experts": ["parallelism.experts=2"],
    "both": ["parallelism.experts=2", "parallelism.shard_size=2"],
}
_NODES = ("10.78.0.1", "10.78.0.2")
_STEPS = (2, 6)  # of a short and of a long run: the difference is of whole steps
_SHAPE = {
    **{"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 16},
    **{"num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1},
}


def run(options: Namespace) -> Json:
    """Measure each way, and compute what the plan says of it."""
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        in_fork(lambda: _prepare(folder))
        figures = {}
        with _nodes(options.mbit) as nodes:
            for way, words in WAYS.items():
                short, long = (_train(folder, nodes, f"{way}-{steps}", words, steps) for steps in _STEPS)
                apart = _STEPS[1] - _STEPS[0]
                figures[way] = {
                    "bytes": (long["bytes"] - short["bytes"]) / apart,
                    "planned_bytes": _planned_bytes(folder, words),
                    "seconds": long["seconds"],
                }
    print(markdown([["", *next(iter(figures.values()))]] + [_row(way, row) for way, row in figures.items()]))
    return figures


def _row(way: str, row: Json) -> list[str]:
    return [way, *(f"{value:,.4g}" for value in row.values())]


def _prepare(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_synthetic(folder / "pairs.jsonl", Setting("tiny", pairs=64, batch_pairs=8, mean_tokens=60))
    tokenizer = train_tokenizer(folder / "pairs.jsonl", 512)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), **_SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")


def _words(folder: Path, words: list[str]) -> list[str]:
    return [
        *(f"model.path={folder}/model", "model.dtype=fp32", f"data.train=[{folder}/pairs.jsonl]"),
        *("reference=none", "loss=simpo", "tracking=off", "trainer.global_batch_pairs=8"),
        *("data.truncation=both", "data.max_length=256", "model.gradient_checkpointing=none"),
        *words,
    ]


def _planned_bytes(folder: Path, words: list[str]) -> float:
    """Return the bytes that a process sends to another node in a step by the plan."""
    from dpo_dist.config.load import load_run_config
    from dpo_dist.kit import policy_without_weights
    from dpo_dist.tools.plan import estimate as plan

    config = load_run_config(_words(folder, words))
    data = plan.Data(8, 100.0, "")  # one step of one micro-batch
    machine = plan.Machine(4, "", 1e12, 1e12, 1e12, network=1.0)
    causal_lm = policy_without_weights(config.model)
    with mock.patch.multiple(plan, GPUS_PER_NODE=2, _NVLINK=float("inf")):
        return plan.estimate(config, data, machine, causal_lm).sending


@contextmanager
def _nodes(mbit: float) -> Iterator[list[str]]:
    """Yield the names of two network namespaces, connected by a link of this speed."""
    names = [f"nodes{os.getpid()}{node}" for node in range(2)]

    def call(*words: str) -> None:
        subprocess.run(words, check=True)

    try:
        for name in names:
            call("ip", "netns", "add", name)
        call(
            "ip",
            "link",
            "add",
            "link0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "link1",
            "netns",
            names[1],
        )
        for number, (name, address) in enumerate(zip(names, _NODES, strict=True)):
            link = f"link{number}"
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
            for interface in ("lo", link):
                call("ip", "-n", name, "link", "set", interface, "up")
            shaping = ("tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", "400ms")
            call("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root", *shaping)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _train(folder: Path, nodes: list[str], name: str, words: list[str], steps: int) -> Json:
    """Train in four processes; return the bytes that left a node, and the median seconds of a step."""
    run_dir = folder / name
    command = [sys.executable, "-m", "benchmarks.over_nodes", *_words(folder, words)]
    command += [f"trainer.max_steps={steps}", f"run.dir={run_dir}"]
    processes = []
    for rank in range(4):
        node = rank // 2
        place = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        environment |= {"MASTER_ADDR": _NODES[0], "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": f"link{node}", "SENT": str(folder / f"{name}-{rank}.json")}
        log = (folder / f"{name}-{rank}.log").open("w")
        inside = ["ip", "netns", "exec", nodes[node], *command]
        processes.append(subprocess.Popen(inside, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit((folder / f"{name}-0.log").read_text()[-3000:])
    rows = json.loads((run_dir / "dpo_metrics/log_history.json").read_text())
    seconds = [row["step_seconds"] for row in rows if row.get("step_seconds")]
    return {
        "bytes": json.loads((folder / f"{name}-0.json").read_text()),
        "seconds": statistics.median(seconds[1:]),
    }


def _be_rank() -> None:
    """Train as the command line does, and write down the bytes of calls that leave this node."""
    import torch
    import torch.distributed as dist
    from deepspeed.comm.torch import TorchBackend

    from dpo_dist import train
    from dpo_dist.config.command_line import run_verb

    file = Path(os.environ["SENT"])
    sent = 0

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal sent
            ranks = dist.get_process_group_ranks(options.get("group") or dist.group.WORLD)
            values = [*arguments, *options.values()]
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            if len({rank // 2 for rank in ranks}) > 1 and tensors:
                # To sum and return takes twice the bytes of a sum that is shared out.
                times = 2 if owner is dist else 1
                sent += times * max(tensor.nbytes for tensor in tensors)
                file.write_text(json.dumps(sent))  # a run ends its process without a further line of Python
            return original(*arguments, **options)

        setattr(owner, name, counted)

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        count(TorchBackend, name)
    count(dist, "all_reduce")
    run_verb(train.main, train.check, verb="train")


def _own(parser: ArgumentParser) -> None:
    parser.add_argument("--mbit", type=float, default=100.0, help="speed of the link, in Mbit/s")


BENCHMARK = Benchmark(run=run, own=_own)

if __name__ == "__main__":
    _be_rank()
