"""The checks: devices, kernels, and ways of training in processes of their own on an invented model."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import psutil

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.foundation.errors import DpoDistError, ExitCode, Lack, first_line
from dpo_dist.foundation.streams import print_line
from dpo_dist.foundation.text import size
from dpo_dist.kit import Dtype, RunFolder, RunHistory

HANGS_SECONDS = 120  # for a process that waits for another one
_RUN_SECONDS = 900  # for a whole run
STEPS = 4  # of the experiment smoke
COMPARED_METRICS = ("loss", "grad_norm")  # for runs that are compared
RunRows = list[dict[str, Any]]


class Check(NamedTuple):
    """A check that `passed`, `failed`, was `skipped` or only `measured`; the result in words and values."""

    name: str
    outcome: str
    seen: str  # what selftest.json calls it
    values: Mapping[str, Any] = MappingProxyType({})


class Fault(NamedTuple):
    """Why a process failed, and what the machine lacks for it, if that is the reason."""

    cause: str
    lacks: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Return the fault of a check that raised an error."""
        return cls(first_line(error), getattr(error, "lacks", None))

    def check(self, name: str) -> Check:
        """Return its check, `skipped` for want of a package."""
        return Check(name, "skipped" if self.lacks == Lack.package else "failed", self.cause)


def write_pairs(file: Path) -> None:
    """Write pairs of invented words."""
    draw = random.Random(0)  # noqa: S311  (no secret)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(draw.randint(5, 60)))

    pairs = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(64)]
    file.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))


def write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Write random weights of this shape in bf16, with a byte tokenizer; return the folder."""
    import torch  # noqa: PLC0415  (slow)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    end = "<end>"
    tokens = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, eos_token_id=0, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def quoted(path: Path) -> str:
    """Return a path in quotes for Hydra's command line; it may contain brackets, commas and quotes."""
    return '"' + str(path).replace('"', '\\"') + '"'


def train_rows(
    folder: Path, name: str, words: Sequence[str], gpus: int, steps: range, code: int = 0
) -> tuple[RunRows, Fault | None]:
    """Train, and return metrics rows and the fault, if any; `code`: the exit code that is expected.

    The run directory is deleted; a preempted run keeps it without the metrics, for the run that resumes it.
    """
    run = RunFolder(folder / "run")
    usual = [
        "+experiment=smoke",
        f"run.dir={quoted(run.path)}",
        f"data.train=[{quoted(folder / 'pairs.jsonl')}]",
        f"data.cache={quoted(folder / 'encoded')}",
        f"reference.store={quoted(folder / 'store')}",
        "tracking=off",
        f"parallelism.timeout_seconds={HANGS_SECONDS}",
        "trainer.log_every=1",
        "optim.lr=1e-4",
        "optim.warmup_ratio=0",
        "console.style=json",  # so that errors can be read
    ]
    fault = run_python(name, ["-m", "dpo_dist.train", *usual, *words], gpus, code)
    rows: RunRows = [] if fault else RunHistory(run).latest_rows()
    rows = [row for row in rows if all(math.isfinite(row.get(key) or math.nan) for key in COMPARED_METRICS)]
    shutil.rmtree(run.metrics if code and not fault else run.path, ignore_errors=True)
    numbers = [row["step"] for row in rows]
    if not fault and numbers != [*steps]:
        fault = Fault(
            f"rows of steps {numbers}, not {[*steps]}: a metric is not finite, or the run was not resumed"
        )
    return rows, fault


def run_python(name: str, words: Sequence[str], gpus: int, code: int = 0) -> Fault | None:
    """Run Python with these arguments, on several GPUs by the launcher; return its fault, if any."""
    print_line(f"running: {name}", sys.stderr)
    launcher = ["-m", "dpo_dist", "launch", "--num_processes", str(gpus)] if gpus > 1 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not visible[0]:
        visible = [str(number) for number in range(gpus)]
    with (
        subprocess.Popen(  # noqa: S603  (this package)
            [sys.executable, *launcher, *words],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible[:gpus])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process
    ):
        try:
            screen, _ = process.communicate(timeout=_RUN_SECONDS)
        except BaseException as ended:  # it takes too long, or a signal ends this process
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            if isinstance(ended, subprocess.TimeoutExpired):
                return Fault(f"it did not end in {_RUN_SECONDS} s")
            raise
    if process.returncode == code:
        return None
    lines = [line.strip() for line in screen.splitlines() if line.strip()]
    lacks = None
    # Why it ended: a signal, which the launcher gives as 128 + its number; an error; or else the last line.
    numbers = (-process.returncode, process.returncode - 128)
    signals = [each.name for each in signal.Signals if each in numbers]
    error = next(filter(None, map(_error_in, lines)), None)
    if signals:
        cause = next((line for line in lines if signals[0] in line), f"ended by {signals[0]}")
    elif error:
        cause = ": ".join(filter(None, (error.get("title"), error["message"], error.get("got"))))
        lacks = error.get("lacks")
    else:
        cause = lines[-1] if lines else "no output"
    return Fault(f"exit code {process.returncode}: {cause}", lacks)


def _error_in(line: str) -> dict[str, Any] | None:
    """Return the error that a line of a run's screen describes for programs."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("kind") == "error" else None


def list_versions(gpus: int) -> Iterator[Check]:
    """Yield the versions of all packages, of Python, CUDA, NCCL and the driver."""
    import torch  # noqa: PLC0415  (slow)
    from torch.utils import collect_env  # noqa: PLC0415

    from dpo_dist.training.start.environment import PACKAGES, package_versions  # noqa: PLC0415

    versions: dict[str, str | None] = {"python": sys.version.split()[0], "CUDA": torch.version.cuda}
    if gpus:
        nccl: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        driver = collect_env.get_nvidia_driver_version(collect_env.run)  # type: ignore[no-untyped-call]
        versions |= {"NCCL": ".".join(map(str, nccl)), "driver": driver}
    versions |= dict.fromkeys(PACKAGES) | package_versions()
    packages = (f"{name} {version}" if version else f"no {name}" for name, version in versions.items())
    yield Check("versions", "measured", ", ".join(packages), versions)


def describe_gpus(gpus: int) -> Iterator[Check]:
    """Describe each GPU, and time matrix products on each alone, which shows a slow one."""
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.kit import matmul_peak  # noqa: PLC0415

    if not gpus:
        yield Check("GPU", "measured", "there is none")
    for number in range(gpus):
        gpu = torch.cuda.get_device_properties(number)
        peak = matmul_peak(torch.device("cuda", number), torch.bfloat16)
        values = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "capability": gpu.major + gpu.minor / 10,
            "matmul_flops": peak,
        }
        text = f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        text += f", {peak / 1e12:.0f} TFLOP/s in bf16 matrix products"
        yield Check(f"GPU {number}", "measured", text, values)


def check_attention(device: Any) -> Iterator[Check]:
    """Check the outputs and gradients of each attention kernel against float32."""
    import torch  # noqa: PLC0415  (slow)
    from transformers import Gemma2Config, MistralConfig  # noqa: PLC0415

    from dpo_dist.model.attention.kernels import check_kernel, choose_backend  # noqa: PLC0415

    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    text_configs = [MistralConfig(**heads, head_dim=dim, sliding_window=4096) for dim in (64, 128, 256)]
    text_configs.append(Gemma2Config(**heads, head_dim=256, attn_logit_softcapping=50.0))
    yield Check(
        "attention chosen by auto", "measured", choose_backend(AttentionBackend.auto, Dtype.bf16, device)
    )
    for backend in list(AttentionBackend)[1:-1]:  # not SDPA, with which the others are compared
        name = f"attention by {backend}"
        faults = list[str]()
        try:
            choose_backend(backend, Dtype.bf16, device)
        except DpoDistError as error:
            yield Check(name, "skipped", error.message)
            continue
        for config in text_configs:
            try:
                check_kernel(backend, device, config, torch.bfloat16)
            except Exception as error:  # a kernel can raise anything
                faults.append(error.got if isinstance(error, DpoDistError) else first_line(error))
        values = {"faults": len(faults)}
        if faults:
            yield Check(name, "failed", "; ".join(faults), values)
            continue
        text = "outputs and gradients equal those in float32, for heads of 64, 128 and 256"
        yield Check(name, "passed", text, values)


# Most relative differences of losses and gradient norms; those of the selftest in benchmarks/log.md
# (2026-11-27) were at most 4e-7 and 0.009.
_EQUAL = 1e-3  # in float32
_ROUNDED = 0.05  # in bf16
_TINY = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
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
    "a copy of the weights on each half": "parallelism.shard_size={half}",
    _ON_ONE: "",
    _ON_HALF: "",
}
_EXPERTS_OF_A_GPU = 2
_WAYS_OF_A_MIXTURE = {
    "a mixture by zero3": "",
    "a mixture whose GPUs share experts": "parallelism.experts={gpus}",
}


def compare_ways(folder: Path, gpus: int) -> Iterator[Check]:
    """Compare the steps of every way of training with those of the first one that ran, and of a mixture."""
    write_pairs(folder / "pairs.jsonl")
    ways = dict(_WAYS)
    if gpus:
        ways |= _WAYS_ON_GPUS
    if gpus > 1:
        ways |= _WAYS_ON_SEVERAL
    yield from _compare(folder, write_model(folder / "tiny", _TINY), ways, gpus)
    if gpus > 1:
        experts = {"num_experts": _EXPERTS_OF_A_GPU * gpus, "num_experts_per_tok": 2}
        shape = _TINY | {"model_type": "qwen3_moe", "moe_intermediate_size": 32, **experts}
        yield from _compare(folder, write_model(folder / "mixture", shape), _WAYS_OF_A_MIXTURE, gpus)


def _compare(folder: Path, model: Path, ways: Mapping[str, str], gpus: int) -> Iterator[Check]:
    """Compare the steps of `ways` to train a model."""
    usual = [f"model.path={quoted(model)}"]
    first_way = ""
    first_rows = RunRows()
    for way, overrides in ways.items():
        keys = {"model.dtype": "fp32", "model.fused": "none"}
        keys |= dict(key.split("=") for key in overrides.format(gpus=gpus, half=gpus // 2).split())
        words = [*usual, *map("=".join, keys.items())]
        name = f"steps of {way}"
        number = {_ON_ONE: 1, _ON_HALF: gpus // 2}.get(way, gpus)
        rows = RunRows()
        fault = None
        if way == _ON_HALF:
            half = [*words, "trainer.stop_after_steps=2"]
            rows, fault = train_rows(folder, name, half, gpus, range(1, 3), ExitCode.preempted)
        if not fault:
            others, fault = train_rows(folder, name, words, number, range(len(rows) + 1, STEPS + 1))
            rows += others
        if fault:
            yield fault.check(name)
            continue
        if not first_way:
            first_way = way
            first_rows = rows
            yield Check(name, "measured", "the others are compared with it")
            continue
        allowed = _ROUNDED if "bf16" in (way, first_way) else _EQUAL
        difference = 0.0
        for row, other in zip(rows, first_rows, strict=True):
            for key in COMPARED_METRICS:
                difference = max(difference, abs(row[key] / other[key] - 1))
        values = {"difference": difference, "allowed": allowed}
        text = f"within {difference:.1e} of {first_way}"
        if difference > allowed:
            yield Check(name, "failed", f"{text}, where {allowed:g} is allowed", values)
        else:
            yield Check(name, "passed", text, values)
