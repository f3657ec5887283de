"""The checks: devices, ways of training and their speeds, in processes of their own on an invented model."""

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import psutil

from dpo_dist.config.schema import AttentionBackend
from dpo_dist.foundation.errors import DpoDistError, ExitCode, Lack, first_line, lack_behind
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.signals import StopRequest
from dpo_dist.foundation.streams import print_line
from dpo_dist.foundation.text import size
from dpo_dist.kit import Dtype, RunFolder, RunHistory, checked_console, load_run_config

HANGS_SECONDS = 120  # for a process that waits for another one
_RUN_SECONDS = 900  # for a whole run
WITHOUT_OVERLAP = "without overlap"
STEPS = 4
COMPARED_METRICS = ("loss", "grad_norm")  # for runs that are compared
RunRows = list[dict[str, Any]]


class Check(NamedTuple):
    """A check that `passed`, `failed`, was `skipped` or only `measured`; the result in words and values."""

    name: str
    outcome: str
    seen: str  # what selftest.json calls it
    values: Mapping[str, Any] = MappingProxyType({})


def shared_facts(date: str, checks: Sequence[Check]) -> dict[str, Any]:
    """Return what one machine tells others: devices, versions, speeds, outcomes; no name, path or error."""
    values = {check.name: check.values for check in checks}
    gpus = Counter(facts["name"] for facts in values.values() if "name" in facts)
    return {
        "date": date,
        "device": ", ".join(f"{number} x {name}" for name, number in gpus.items()) or "CPU",
        "versions": values.get("versions", {}),
        "speeds": {name: facts for name, facts in values.items() if "pairs_per_second" in facts},
        "checks": {check.name: check.outcome for check in checks},
    }


class Fault(NamedTuple):
    """Why a process failed, and what the machine lacks for it, if that is the reason."""

    cause: str
    lacks: Lack | None = None

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Return the fault of a check that raised an error."""
        return cls(first_line(error), lack_behind(error))

    def check(self, name: str, *, is_large: bool = False) -> Check:
        """Return its check, `skipped` for want of a package, or of room for one that `is_large`."""
        is_excused = self.lacks is Lack.package or (is_large and self.lacks is Lack.room)
        return Check(name, "skipped" if is_excused else "failed", self.cause)


def write_pairs(file: Path) -> None:
    """Write pairs of invented words."""
    draw = random.Random(0)  # noqa: S311  (no secret)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(draw.randint(5, 60)))

    pairs = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(384)]
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
    program = ["-m", "dpo_dist.train"]
    if name.endswith(WITHOUT_OVERLAP):
        program = ["-m", "dpo_dist.tools.selftest", "--without-overlap"]
    usual = [
        f"run.dir={quoted(run.path)}",
        f"data.train=[{quoted(folder / 'pairs.jsonl')}]",
        f"data.cache={quoted(folder / 'encoded')}",
        f"reference.store={quoted(folder / 'store')}",
        "data.max_length=1024",
        "tracking=off",
        f"parallelism.timeout_seconds={HANGS_SECONDS}",
        "trainer.log_every=1",
        "trainer.save_every=0",
        "optim.lr=1e-4",
        "optim.warmup_ratio=0",
        "trainer.global_batch_pairs=16",
        "console.style=json",  # so that errors can be read
    ]
    fault = run_python(name, [*program, *usual, *words], gpus, code)
    rows: RunRows = [] if fault else RunHistory(run).latest_rows()
    rows = [row for row in rows if all(math.isfinite(row.get(key) or math.nan) for key in COMPARED_METRICS)]
    shutil.rmtree(run.metrics if code and not fault else run.path, ignore_errors=True)
    numbers = [row["step"] for row in rows]
    if not fault and numbers != [*steps]:
        fault = Fault(
            f"rows of steps {numbers}, not {[*steps]}: a metric is not finite, or the run was not resumed"
        )
    return rows, fault


def train_without_overlap(words: Sequence[str]) -> int:
    """Train in this process without overlapping communication with computing; return the exit code."""
    from dpo_dist.distributed import deepspeed_config  # noqa: PLC0415  (slow)

    deepspeed_config.OVERLAPS = False
    config = load_run_config(words, verb="train")
    stop = StopRequest()
    with stop.listening(), checked_console(config, trains=True) as console:
        from dpo_dist.kit import train  # noqa: PLC0415  (slow)
        from dpo_dist.tools.report.recorder import reporting  # noqa: PLC0415  (slow)

        return train(config, console, stop, reporting())


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
        lacks = Lack(error["lacks"]) if "lacks" in error else None
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


_MESSAGES = (1, 33, 512)  # MB of a message; 33 is a 4096 x 4096 matrix of a 7B model


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


def describe_gpus(gpus: int, is_quick: bool) -> Iterator[Check]:
    """Describe each GPU, and time matrix products on each alone, which shows a slow one."""
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.kit import matmul_peak  # noqa: PLC0415

    if not gpus:
        yield Check("GPU", "measured", "there is none")
    for number in range(gpus):
        gpu = torch.cuda.get_device_properties(number)
        values = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "capability": gpu.major + gpu.minor / 10,
        }
        text = f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        if not is_quick:
            peak = matmul_peak(torch.device("cuda", number), torch.bfloat16)
            values["matmul_flops"] = peak
            text += f", {peak / 1e12:.0f} TFLOP/s in bf16 matrix products"
        yield Check(f"GPU {number}", "measured", text, values)


def check_collective_calls(folder: Path, gpus: int) -> Iterator[Check]:
    """Measure all-gathers over all GPUs, and the error of an all-reduce against float64."""
    out = folder / "exchanged.json"
    program = ["-m", "dpo_dist.tools.selftest", "--exchange", str(out)]
    fault = run_python("collective calls", program, gpus)
    if fault:
        yield fault.check("collective calls")
        return
    speeds, error_of_sum = json.loads(out.read_text())
    text = ", ".join(f"{size} MB: {speed:.3g} GB/s" for size, speed in speeds.items())
    yield Check("all-gather of bf16", "measured", text, speeds)
    outcome = "passed" if error_of_sum < 1e-6 else "failed"
    text = f"within {error_of_sum:.1e} of float64"
    yield Check("sums over GPUs in float32", outcome, text, {"difference": error_of_sum})


def exchange(out: Path) -> int:
    """Run as one of the processes of `check_collective_calls`; rank 0 writes the results."""
    import torch  # noqa: PLC0415  (slow)
    import torch.distributed as dist  # noqa: PLC0415

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=HANGS_SECONDS))
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    speeds = {}
    for megabytes in _MESSAGES:
        part = torch.ones(megabytes * 10**6 // 2 // ranks, dtype=torch.bfloat16, device=device)
        parts_of_all = part.new_empty(len(part) * ranks)
        start = 0.0
        for repetition in range(-2, 10):  # the first ones connect the processes, and are not timed
            if repetition == 0:
                torch.cuda.synchronize()
                start = time.monotonic()
            dist.all_gather_into_tensor(parts_of_all, part)
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
        speeds[megabytes] = 10 * (parts_of_all.nbytes - part.nbytes) / seconds / 1e9
    parts = [torch.randn(10**6, generator=torch.Generator().manual_seed(seed)) for seed in range(ranks)]
    total = parts[rank].to(device)
    exact = torch.stack(parts).double().sum(0)
    dist.all_reduce(total)
    if rank == 0:
        out.write_text(json.dumps([speeds, float((total.cpu() - exact).norm() / exact.norm())]))
    dist.destroy_process_group()
    return ExitCode.completed


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
    f"zero3 {WITHOUT_OVERLAP}": "",
    f"zero2 {WITHOUT_OVERLAP}": "parallelism=zero2",
    _ON_ONE: "",
    _ON_HALF: "",
}
SHAPES = {  # models of shipped presets; fewer layers suffice, as layers are alike
    "0.5B": ("Qwen/Qwen2.5-0.5B-Instruct", 24),
    "7B, 4 layers": ("Qwen/Qwen2.5-7B", 4),
}
_PHASES = ("time/forward", "time/backward", "time/optimizer")
_SPEEDS = (
    "step_seconds",
    "mfu",
    "tokens_per_second",
    "memory/peak_allocated_bytes",
    *_PHASES,
    "pairs_per_second",
)


def compare_ways(folder: Path, gpus: int) -> Iterator[Check]:
    """Compare the steps of every way of training with the steps of the first one that ran."""
    write_pairs(folder / "pairs.jsonl")
    model = write_model(folder / "tiny", _TINY)
    usual = [f"model.path={quoted(model)}", f"trainer.max_steps={STEPS}"]
    ways = dict(_WAYS)
    if gpus:
        ways |= _WAYS_ON_GPUS
    if gpus > 1:
        ways |= _WAYS_ON_SEVERAL
    first_way = ""
    first_rows = RunRows()
    for way, overrides in ways.items():
        keys = {"model.dtype": "fp32", "model.fused": "none"}
        keys |= dict(key.split("=") for key in overrides.split())
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


def measure_speeds(folder: Path, gpus: int, shape: str) -> Iterator[Check]:
    """Measure steps of a model of this shape in bf16, with each kind of fused layers."""
    shapes = own_table(Path(__file__).parents[1] / "plan" / "shapes.yaml")
    model_name, layers = SHAPES[shape]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model = write_model(Path(temporary), {**shapes[model_name], "num_hidden_layers": layers})
        words = [
            f"model.path={quoted(model)}",
            "parallelism=zero2",
            "trainer.max_steps=6",
            f"trainer.global_batch_pairs={64 * gpus}",
            "trainer.micro_batch_tokens=8192",
        ]
        ways = {f"fused layers: {fused}": [f"model.fused={fused}"] for fused in ("none", "liger", "compile")}
        if gpus > 1:
            ways[WITHOUT_OVERLAP] = ["model.fused=none"]
        for name, overrides in ways.items():
            check = f"speed of {shape}, {name}"
            way = [*words, *overrides]
            rows, fault = train_rows(folder, check, way, gpus, range(1, 7))
            if fault:
                yield fault.check(check, is_large=True)
                continue
            # The first steps, in which kernels are chosen and compiled, do not count.
            values = {key: float(statistics.median(row[key] for row in rows[2:])) for key in _SPEEDS}
            values["planned_bytes"] = _planned_bytes([*way, f"plan.gpus={gpus}"])
            phases = ", ".join(f"{1000 * values[phase]:.0f}" for phase in _PHASES)
            memory = size(values["memory/peak_allocated_bytes"])
            text = (
                f"{1000 * values['step_seconds']:.0f} ms a step (forward, backward, optimizer: {phases}), "
                f"MFU {values['mfu']:.1%}, {values['tokens_per_second']:,.0f} tokens/s, {memory} "
                f"(planned {size(values['planned_bytes'])})"
            )
            yield Check(check, "measured", text, values)


def _planned_bytes(words: Sequence[str]) -> float:
    """Return how many bytes a GPU needs by `dpo-dist plan`, not counting CUDA and NCCL."""
    from dpo_dist.tools.plan.make_plan import make_plan  # noqa: PLC0415  (slow)

    of_plan = ["data.train=[-]", "plan.gpu=h100-80g", "plan.pairs=1000", "plan.tokens_per_pair=200"]
    plan = make_plan(load_run_config([*words, *of_plan]), lambda *_: nullcontext(lambda *_: None))
    return float(sum(part for name, part in plan.content["bytes"].items() if name != "CUDA and NCCL"))
