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

HANGS_SECONDS, _RUN_SECONDS = 120, 900  # for a process that waits for another one, for a whole run
WITHOUT_OVERLAP = "without overlap"
STEPS = 4
COMPARED_METRICS = ("loss", "grad_norm")  # for runs that are compared
RunRows = list[dict[str, Any]]


class Check(NamedTuple):
    """A check that `passed`, `failed`, was `skipped` or only `measured`; the result in words and values."""

    name: str
    outcome: str
    seen: str
    values: Mapping[str, Any] = MappingProxyType({})


def shared_facts(date: str, checks: Sequence[Check]) -> dict[str, Any]:
    """Return what one machine tells others: devices, versions, speeds, outcomes; no name, path or error."""
    values = {check.name: check.values for check in checks}
    gpus = Counter(facts["name"] for facts in values.values() if "name" in facts)
    device = ", ".join(f"{number} x {name}" for name, number in gpus.items()) or "CPU"
    speeds = {name: facts for name, facts in values.items() if "pairs_per_second" in facts}
    facts = {"date": date, "device": device, "versions": values.get("versions", {}), "speeds": speeds}
    return {**facts, "checks": {check.name: check.outcome for check in checks}}


class Fault(NamedTuple):
    """Why a process failed, and what the machine lacks for it, if that is the reason."""

    seen: str
    lacks: Lack | None = None

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Return the fault of a check that raised an error."""
        return cls(first_line(error), lack_behind(error))

    def check(self, name: str, *, is_large: bool = False) -> Check:
        """Return its check, `skipped` for want of a package, or of room for one that `is_large`."""
        is_excused = self.lacks is Lack.package or (is_large and self.lacks is Lack.room)
        return Check(name, "skipped" if is_excused else "failed", self.seen)


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
    end, *letters = "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({word: number for number, word in enumerate((end, *letters))}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(folder)
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
    usual = [f"run.dir={quoted(run.path)}", f"data.train=[{quoted(folder / 'pairs.jsonl')}]"]
    usual += [f"data.cache={quoted(folder / 'encoded')}", f"reference.store={quoted(folder / 'store')}"]
    usual += ["data.max_length=1024", "tracking=off", f"parallelism.timeout_seconds={HANGS_SECONDS}"]
    usual += ["trainer.log_every=1", "trainer.save_every=0", "optim.lr=1e-4", "optim.warmup_ratio=0"]
    usual += ["trainer.global_batch_pairs=16", "console.style=json"]  # so that errors can be read
    fault = run_python(name, [*program, *usual, *words], gpus, code)
    rows: RunRows = [] if fault else RunHistory(run).latest_rows()
    rows = [row for row in rows if all(math.isfinite(row.get(key) or math.nan) for key in COMPARED_METRICS)]
    shutil.rmtree(run.metrics if code and not fault else run.path, ignore_errors=True)
    if not fault and (done := [row["step"] for row in rows]) != [*steps]:
        fault = Fault(
            f"rows of steps {done}, not {[*steps]}: a metric is not finite, or the run was not resumed"
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
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = given if given[0] else [str(number) for number in range(gpus)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible[:gpus])}
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipe |= {"text": True, "errors": "replace"}
    with subprocess.Popen([sys.executable, *launcher, *words], env=environment, **pipe) as process:  # noqa: S603  (this package)
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
    if ended_by := [each.name for each in signal.Signals if each in numbers]:
        cause = next((line for line in lines if ended_by[0] in line), f"ended by {ended_by[0]}")
    elif error := next(filter(None, map(_error_in, lines)), None):
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


_GATHERED = (1, 33, 512)  # MB of a message; 33 is a 4096 x 4096 matrix of a 7B model


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
    installed = (f"{name} {found}" if found else f"no {name}" for name, found in versions.items())
    yield Check("versions", "measured", ", ".join(installed), versions)


def describe_gpus(gpus: int, is_quick: bool) -> Iterator[Check]:
    """Describe each GPU, and time matrix products on each alone, which shows a slow one."""
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.kit import matmul_peak  # noqa: PLC0415

    if not gpus:
        yield Check("GPU", "measured", "there is none")
    for number in range(gpus):
        gpu = torch.cuda.get_device_properties(number)
        values = {"memory_bytes": gpu.total_memory, "capability": gpu.major + gpu.minor / 10}
        seen = f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        if not is_quick:
            values["matmul_flops"] = peak = matmul_peak(torch.device("cuda", number), torch.bfloat16)
            seen += f", {peak / 1e12:.0f} TFLOP/s in bf16 matrix products"
        yield Check(f"GPU {number}", "measured", seen, {"name": gpu.name, **values})


def check_collective_calls(folder: Path, gpus: int) -> Iterator[Check]:
    """Measure all-gathers over all GPUs, and the error of an all-reduce against float64."""
    out = folder / "exchanged.json"
    program = ["-m", "dpo_dist.tools.selftest", "--exchange", str(out)]
    if fault := run_python("collective calls", program, gpus):
        yield fault.check("collective calls")
        return
    gathered, error_of_sum = json.loads(out.read_text())
    speeds = ", ".join(f"{size} MB: {speed:.3g} GB/s" for size, speed in gathered.items())
    yield Check("all-gather of bf16", "measured", speeds, gathered)
    seen = f"within {error_of_sum:.1e} of float64"
    values = {"difference": error_of_sum}
    yield Check("sums over GPUs in float32", "passed" if error_of_sum < 1e-6 else "failed", seen, values)


def exchange(out: Path) -> int:
    """Run as one of the processes of `check_collective_calls`; rank 0 writes the results."""
    import torch  # noqa: PLC0415  (slow)
    import torch.distributed as dist  # noqa: PLC0415

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=HANGS_SECONDS))
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    gathered = {}
    for megabytes in _GATHERED:
        part = torch.ones(megabytes * 10**6 // 2 // ranks, dtype=torch.bfloat16, device=device)
        whole = part.new_empty(len(part) * ranks)
        began = 0.0
        for repetition in range(-2, 10):  # the first ones connect the processes, and are not timed
            if repetition == 0:
                torch.cuda.synchronize()
                began = time.monotonic()
            dist.all_gather_into_tensor(whole, part)
        torch.cuda.synchronize()
        gathered[megabytes] = 10 * (whole.nbytes - part.nbytes) / (time.monotonic() - began) / 1e9
    parts = [torch.randn(10**6, generator=torch.Generator().manual_seed(seed)) for seed in range(ranks)]
    total = parts[rank].to(device)
    exact = torch.stack(parts).double().sum(0)
    dist.all_reduce(total)
    if rank == 0:
        out.write_text(json.dumps([gathered, float((total.cpu() - exact).norm() / exact.norm())]))
    dist.destroy_process_group()
    return ExitCode.completed


def check_attention(device: Any) -> Iterator[Check]:
    """Check the outputs and gradients of each attention kernel against float32."""
    import torch  # noqa: PLC0415  (slow)
    from transformers import Gemma2Config, MistralConfig  # noqa: PLC0415

    from dpo_dist.model.attention.kernels import check_kernel, choose_backend  # noqa: PLC0415

    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    texts = [MistralConfig(**heads, head_dim=dim, sliding_window=4096) for dim in (64, 128, 256)]
    texts += [Gemma2Config(**heads, head_dim=256, attn_logit_softcapping=50.0)]
    chosen = choose_backend(AttentionBackend.auto, Dtype.bf16, device)
    yield Check("attention chosen by auto", "measured", chosen)
    for backend in list(AttentionBackend)[1:-1]:  # not SDPA, with which the others are compared
        name = f"attention by {backend}"
        faults = list[str]()
        try:
            choose_backend(backend, Dtype.bf16, device)
        except DpoDistError as error:
            yield Check(name, "skipped", error.message)
            continue
        for text in texts:
            try:
                check_kernel(backend, device, text, torch.bfloat16)
            except Exception as error:  # a kernel can raise anything
                faults.append(error.got if isinstance(error, DpoDistError) else first_line(error))
        seen = "outputs and gradients equal those in float32, for heads of 64, 128 and 256"
        outcome = "failed" if faults else "passed"
        yield Check(name, outcome, "; ".join(faults) or seen, {"faults": len(faults)})


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
        words = [*usual, *map("=".join, keys.items())]
        name = f"steps of {way}"
        number = {_ON_ONE: 1, _ON_HALF: gpus // 2}.get(way, gpus)
        rows = RunRows()
        fault = None
        if way == _ON_HALF:
            stopped = [*words, "trainer.stop_after_steps=2"]
            rows, fault = train_rows(folder, name, stopped, gpus, range(1, 3), ExitCode.preempted)
        if not fault:
            others, fault = train_rows(folder, name, words, number, range(len(rows) + 1, STEPS + 1))
            rows += others
        if fault:
            yield fault.check(name)
            continue
        first, is_first = first or (way, rows), first is None
        allowed = _ROUNDED if "bf16" in (way, first[0]) else _EQUAL
        pairs = [
            (row[key], other[key])
            for row, other in zip(rows, first[1], strict=True)
            for key in COMPARED_METRICS
        ]
        difference = max(abs(number / other - 1) for number, other in pairs)
        outcome = "passed"
        seen = f"within {difference:.1e} of {first[0]}"
        if difference > allowed:
            outcome = "failed"
            seen = f"{seen}, where {allowed:g} is allowed"
        values = {"difference": difference, "allowed": allowed}
        if is_first:
            outcome = "measured"
            seen = "the others are compared with it"
            values = {}
        yield Check(name, outcome, seen, values)


def measure_speeds(folder: Path, gpus: int, shape: str) -> Iterator[Check]:
    """Measure steps of a model of this shape in bf16, with each kind of fused layers."""
    shapes = own_table(Path(__file__).parents[1] / "plan" / "shapes.yaml")
    model_name, layers = SHAPES[shape]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model = write_model(Path(temporary), {**shapes[model_name], "num_hidden_layers": layers})
        words = [f"model.path={quoted(model)}", "parallelism=zero2", "trainer.max_steps=6"]
        words += [f"trainer.global_batch_pairs={64 * gpus}", "trainer.micro_batch_tokens=8192"]
        ways = {f"fused layers: {fused}": [f"model.fused={fused}"] for fused in ("none", "liger", "compile")}
        if gpus > 1:
            ways[WITHOUT_OVERLAP] = ["model.fused=none"]
        for name, changed in ways.items():
            check = f"speed of {shape}, {name}"
            way = [*words, *changed]
            rows, fault = train_rows(folder, check, way, gpus, range(1, 7))
            if fault:
                yield fault.check(check, is_large=True)
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
