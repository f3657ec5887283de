"""Checks that train: does every way of training give the same steps, and how fast is it?"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path

import yaml

from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.foundation.text import size
from dpo_dist.tools.selftest.runs import (
    COMPARED_METRICS,
    STEPS,
    WITHOUT_OVERLAP,
    Check,
    RunRows,
    failed_check,
    quoted,
    train_rows,
    write_model,
    write_pairs,
)

_EQUAL, _ROUNDED = 1e-3, 0.05  # relative, of losses and gradient norms in float32 and in bf16
_TINY = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
_WAYS = {  # ways of training in float32 without fused layers, with the overrides of each
    "zero3": "",
    "zero2": "parallelism=zero2",
    "ddp": "parallelism=ddp",
    "gradient checkpointing": "model.gradient_checkpointing=full",
    "small micro-batches": "trainer.micro_batch_tokens=600",
}
_WAYS_ON_GPUS = {
    "bf16": "parallelism=zero2 model.dtype=bf16",
    "fused layers: liger": "model.fused=liger",
    "fused layers: compile": "model.fused=compile",
}
_ON_ONE, _ON_HALF = "one GPU", "a run resumed on half of the GPUs"
_WAYS_ON_SEVERAL = {
    f"zero3 {WITHOUT_OVERLAP}": "",
    f"zero2 {WITHOUT_OVERLAP}": "parallelism=zero2",
    _ON_ONE: "",
    _ON_HALF: "",
}
SHAPES = {  # models of shipped presets; fewer layers suffice, as layers are alike
    "0.5B": ("Qwen/Qwen2.5-0.5B-Instruct", 24),
    "7B, 4 layers": ("Qwen/Qwen2.5-7B", 4),
}
_MEASURED = ["step_seconds", "mfu", "tokens_per_second", "memory/peak_allocated_bytes"]
_MEASURED += ["time/forward", "time/backward", "time/optimizer", "pairs_per_second"]


def compare_ways(folder: Path, gpus: int) -> Iterator[Check]:
    """Compare the steps of every way of training with the steps of the first one that ran."""
    write_pairs(folder / "pairs.jsonl")
    usual = [f"model.path={quoted(write_model(folder / 'tiny', _TINY))}", f"trainer.max_steps={STEPS}"]
    ways = _WAYS | (_WAYS_ON_GPUS if gpus else {}) | (_WAYS_ON_SEVERAL if gpus > 1 else {})
    first = None
    for way, changed in ways.items():
        keys = {"model.dtype": "fp32", "model.fused": "none"}
        keys |= dict(key.split("=") for key in changed.split())
        words, name = [*usual, *map("=".join, keys.items())], f"steps of {way}"
        number = {_ON_ONE: 1, _ON_HALF: gpus // 2}.get(way, gpus)
        rows, error = RunRows(), ""
        if way == _ON_HALF:
            stopped = [*words, "trainer.stop_after_steps=2"]
            rows, error = train_rows(folder, name, stopped, gpus, range(1, 3), ExitCode.preempted)
        if not error:
            others, error = train_rows(folder, name, words, number, range(len(rows) + 1, STEPS + 1))
            rows += others
        if error:
            yield failed_check(name, error)
            continue
        first, is_first = first or (way, rows), first is None
        allowed = _ROUNDED if "bf16" in (way, first[0]) else _EQUAL
        pairs = [
            (row[key], other[key])
            for row, other in zip(rows, first[1], strict=True)
            for key in COMPARED_METRICS
        ]
        difference = max(abs(number / other - 1) for number, other in pairs)
        outcome, seen = "passed", f"within {difference:.1e} of {first[0]}"
        if difference > allowed:
            outcome, seen = "failed", f"{seen}, where {allowed:g} is allowed"
        values = {"difference": difference, "allowed": allowed}
        if is_first:
            outcome, seen, values = "measured", "the others are compared with it", {}
        yield Check(name, outcome, seen, values)


def measure_speeds(folder: Path, gpus: int, shape: str) -> Iterator[Check]:
    """Measure steps of a model of this shape in bf16, with each kind of fused layers."""
    shapes = yaml.safe_load(files("dpo_dist.tools.plan").joinpath("shapes.yaml").read_text(encoding="utf-8"))
    model_name, layers = SHAPES[shape]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model = write_model(Path(temporary), {**shapes[model_name], "num_hidden_layers": layers})
        words = [f"model.path={quoted(model)}", "parallelism=zero2", "trainer.max_steps=6"]
        words += [f"trainer.global_batch_pairs={64 * gpus}", "trainer.micro_batch_tokens=8192"]
        ways = {f"fused layers: {fused}": [f"model.fused={fused}"] for fused in ("none", "liger", "compile")}
        if gpus > 1:
            ways[WITHOUT_OVERLAP] = ["model.fused=none"]
        for name, changed in ways.items():
            check, way = f"speed of {shape}, {name}", [*words, *changed]
            rows, error = train_rows(folder, check, way, gpus, range(1, 7))
            if error:
                yield failed_check(check, error, is_large=True)
                continue
            # The first steps, in which kernels are chosen and compiled, do not count.
            values = {key: float(statistics.median(row[key] for row in rows[2:])) for key in _MEASURED}
            values["planned_bytes"] = planned = _planned_bytes([*way, f"plan.gpus={gpus}"])
            seconds, mfu, tokens, used, *phases = values.values()
            seen = f"{1000 * seconds:.0f} ms a step (forward, backward, optimizer: "
            seen += f"{', '.join(f'{1000 * phase:.0f}' for phase in phases[:3])}), MFU {mfu:.1%}, "
            seen += f"{tokens:,.0f} tokens/s, {size(used)} (planned {size(planned)})"
            yield Check(check, "measured", seen, values)


def _planned_bytes(words: Sequence[str]) -> float:
    """Return how many bytes a GPU needs by `dpo-dist plan`, not counting CUDA and NCCL."""
    from dpo_dist.tools.plan.make_plan import make_plan  # noqa: PLC0415  (slow)

    given = ["data.train=[-]", "plan.gpu=h100-80g", "plan.pairs=1000", "plan.tokens_per_pair=200"]
    plan = make_plan(load_run_config([*words, *given]), lambda *_: nullcontext(lambda *_: None))
    return float(sum(part for name, part in plan.content["bytes"].items() if name != "CUDA and NCCL"))
