"""Test this machine in about five minutes: `dpo-dist selftest`, on one GPU or all of a node.

Nothing is downloaded: random weights of real shapes, invented pairs. Says which kernels are exact, whether
every way of training gives the same steps, and how fast they are; writes selftest.json. The speeds need about
35 GB of disk beside it and 26 GB of memory. Exit code 1: a check failed, or nothing could be compared.
"""

from dpo_dist.foundation.signals import end_at_signals, raise_terminated, stop_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds

import argparse
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil
import yaml

from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import KINDS, Divergence, LossConfig, LossKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.foundation.errors import DpoDistError, ExitCode, first_line
from dpo_dist.foundation.exit import Arguments, exit_after
from dpo_dist.foundation.files import for_json
from dpo_dist.foundation.process import LAUNCHER_PREFIXES, WORLD_VARIABLES
from dpo_dist.foundation.streams import output_of_objects, print_line, reserve_output
from dpo_dist.foundation.text import size
from dpo_dist.training.reporting.metrics_log import read_latest_rows

_EQUAL, _ROUNDED = 1e-3, 0.05  # relative, of losses and gradient norms in float32 and in bf16
_GATHERED = (1, 33, 512)  # MB of a message; 33 is a matrix of a 7B model on 8 GPUs
_TINY = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
_STEPS, _COMPARED = 4, ("loss", "grad_norm")  # of runs that are compared
_WAYS = {  # of training in float32, without fused layers, and what each changes
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
_WITHOUT_OVERLAP = "without overlap"
_WAYS_ON_SEVERAL = {
    f"zero3 {_WITHOUT_OVERLAP}": "",
    f"zero2 {_WITHOUT_OVERLAP}": "parallelism=zero2",
    _ON_ONE: "",
    _ON_HALF: "",
}
_SHAPES = {  # of models of the shipped presets, also with fewer layers, which are alike
    "0.5B": ("Qwen/Qwen2.5-0.5B-Instruct", 24),
    "7B, 4 layers": ("Qwen/Qwen2.5-7B", 4),
}
_MEASURED = ["step_seconds", "mfu", "tokens_per_second", "memory/peak_allocated_bytes"]
_MEASURED += ["time/forward", "time/backward", "time/optimizer"]
_NOT_INSTALLED = ("not installed", "needs Triton")
_NO_ROOM = ("memory is exhausted", "has no room", "cannot be written", "No space left")
_HANGS_SECONDS, _RUN_SECONDS = 120, 900  # of a process that waits for another one, of a whole run
_Rows = list[dict[str, Any]]


class Check(NamedTuple):
    """A check: `passed`, `failed`, `skipped`, or `measured`, with what was seen, in words and in values."""

    name: str
    outcome: str
    seen: str
    values: Mapping[str, Any] = MappingProxyType({})


def _fault(name: str, error: str) -> Check:
    """Return the check of an error: `skipped` where the machine lacks a package, or room for a speed."""
    lacks = _NOT_INSTALLED + _NO_ROOM * name.startswith("speed")
    return Check(name, "skipped" if any(lack in error for lack in lacks) else "failed", error)


def _judged(name: str, faults: Sequence[str], seen: str) -> Check:
    return Check(name, "failed" if faults else "passed", "; ".join(faults) or seen, {"faults": len(faults)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist selftest", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("selftest.json"))
    parser.add_argument("--quick", action="store_true", help="no speeds; needs no room")
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)  # a process of `_exchanges`
    parser.add_argument("--waits", type=Path, help=argparse.SUPPRESS)  # a process of `_waits`
    parser.add_argument("--without-overlap", nargs="+", help=argparse.SUPPRESS)  # a process of `_train`
    given = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if given.exchange is not None:
        return _exchange(given.exchange)
    if given.waits is not None:
        return _count_waits(given.waits)
    if given.without_overlap is not None:
        return _train_without_overlap(given.without_overlap)
    output: Path = given.output.absolute()
    is_writable = all(os.access(path, os.W_OK) for path in (output.parent, output) if path.exists())
    if output.is_dir() or not output.parent.is_dir() or not is_writable:
        parser.error(f"argument --output: {output} is no file in a folder that can be written")
    reserve_output()  # what libraries print is not of the table
    for name in [
        name for name in os.environ if name in WORLD_VARIABLES or name.startswith(LAUNCHER_PREFIXES)
    ]:
        del os.environ[name]  # the processes that are started here are a world of their own
    for number in stop_signals():
        signal.signal(number, raise_terminated)
    began, checks = time.monotonic(), list[Check]()
    code, verdict = ExitCode.findings, "stopped before all checks were done"
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    content: dict[str, Any] = {"date": now, "host": socket.gethostname()}
    try:
        with tempfile.TemporaryDirectory(prefix="selftest-", dir=output.parent) as folder:
            for check in _checks(Path(folder), given.quick):
                print_line(f"{check.outcome:<8}  {check.name:<40}  {check.seen}", output_of_objects())
                checks.append(check)
        code, verdict = _verdict(checks)
    finally:
        seconds = time.monotonic() - began
        print_line(f"verdict: {verdict} ({seconds:.0f} s; {given.output})", output_of_objects())
        content |= {"seconds": seconds, "verdict": verdict, "checks": [check._asdict() for check in checks]}
        output.write_text(json.dumps(for_json(content), indent=1) + "\n", encoding="utf-8")
    return code


def _verdict(checks: Sequence[Check]) -> tuple[ExitCode, str]:
    import torch  # noqa: PLC0415  (slow)

    if failed := [check.name for check in checks if check.outcome == "failed"]:
        return ExitCode.findings, f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}"
    if not any(check.name.startswith("steps of ") and check.outcome == "passed" for check in checks):
        return ExitCode.findings, "no two ways of training could be compared"
    gpus, on = torch.cuda.device_count(), "these GPUs"
    if gpus < 2:
        on = "this GPU; sharding over several was not tried"
    if not gpus:
        on = "one CPU process: there was no GPU, so none of its kernels and no sharding was tried"
    return ExitCode.completed, f"every way of training that was tried gives the same steps on {on}"


def _checks(folder: Path, is_quick: bool) -> Iterator[Check]:
    """Yield the checks; those in processes of their own come before this process uses a GPU."""
    import torch  # noqa: PLC0415  (slow)

    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    groups = {"versions": _versions(gpus), "steps": _equal_runs(folder, gpus)}
    if gpus:
        groups["waits of the host"] = _waits(folder)
    if gpus > 1:
        groups["collective calls"] = _exchanges(folder, gpus)
    if gpus and not is_quick:
        groups |= {f"speed of {shape}": _speeds(folder, gpus, shape) for shape in _SHAPES}
    groups |= {"GPU": _devices(gpus, is_quick), "attention": _kernels(device)}
    if gpus:
        groups["losses"] = _losses(device)
    for name, checks in groups.items():
        try:
            yield from checks
        except Exception as error:  # of anything that is broken: it must not hide the other checks
            yield _fault(name, first_line(error))


def _versions(gpus: int) -> Iterator[Check]:
    import torch  # noqa: PLC0415  (slow)
    from torch.utils import collect_env  # noqa: PLC0415

    from dpo_dist.training.start.directory import PACKAGES, package_versions  # noqa: PLC0415

    versions: dict[str, str | None] = {"python": sys.version.split()[0], "CUDA": torch.version.cuda}
    if gpus:
        nccl: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        driver = collect_env.get_nvidia_driver_version(collect_env.run)  # type: ignore[no-untyped-call]
        versions |= {"NCCL": ".".join(map(str, nccl)), "driver": driver}
    versions |= dict.fromkeys(PACKAGES) | package_versions()
    installed = (f"{name} {found}" if found else f"no {name}" for name, found in versions.items())
    yield Check("versions", "measured", ", ".join(installed), versions)


def _devices(gpus: int, is_quick: bool) -> Iterator[Check]:
    """Describe each GPU, and multiply matrices on it alone: a slow one shows."""
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.model.flops import matmul_peak  # noqa: PLC0415

    if not gpus:
        yield Check("GPU", "measured", "there is none")
    for number in range(gpus):
        gpu = torch.cuda.get_device_properties(number)
        values = {"memory_bytes": gpu.total_memory, "capability": gpu.major + gpu.minor / 10}
        seen = f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        if not is_quick:
            values["matmul_flops"] = peak = matmul_peak(torch.device("cuda", number), torch.bfloat16)
            seen += f", {peak / 1e12:.0f} TFLOP/s of products in bf16"
        yield Check(f"GPU {number}", "measured", seen, {"name": gpu.name, **values})


def _write_pairs(file: Path) -> None:
    draw = random.Random(0)  # noqa: S311  (no secret)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(draw.randint(5, 60)))

    pairs = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(384)]
    file.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))


def _write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Write random weights of this shape in bf16, with a tokenizer of bytes; return the folder."""
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


def _quoted(path: Path) -> str:
    """Return a path as a value of Hydra's command line, which may have its brackets, commas and quotes."""
    return '"' + str(path).replace('"', '\\"') + '"'


def _train(
    folder: Path, name: str, words: Sequence[str], gpus: int, steps: range, code: int = 0
) -> tuple[_Rows, str]:
    """Return the rows of a training run and its error, if any; one to resume is kept without its rows."""
    run, program = RunFolder(folder / "run"), ["-m", "dpo_dist.train"]
    if name.endswith(_WITHOUT_OVERLAP):
        program = ["-m", "dpo_dist", "selftest", "--without-overlap"]
    error = _started(name, [*program, *_usual(folder, run), *words], gpus, code)
    rows: _Rows = [] if error else read_latest_rows(run)
    rows = [row for row in rows if all(math.isfinite(row.get(key) or math.nan) for key in _COMPARED)]
    shutil.rmtree(run.metrics if code and not error else run.path, ignore_errors=True)
    if not error and (done := [row["step"] for row in rows]) != [*steps]:
        error = f"it has rows of steps {done}, not of {[*steps]}: one is not finite, or it was not resumed"
    return rows, error


def _train_without_overlap(words: Sequence[str]) -> int:
    from dpo_dist.distributed import deepspeed_config  # noqa: PLC0415  (slow)
    from dpo_dist.train import main as train  # noqa: PLC0415

    deepspeed_config.OVERLAPS = False
    return train(load_run_config(words, verb="train"))


def _usual(folder: Path, run: RunFolder) -> list[str]:
    """Return the words of every training run."""
    words = [f"run.dir={_quoted(run.path)}", f"data.train=[{_quoted(folder / 'pairs.jsonl')}]"]
    words += [f"data.cache={_quoted(folder / 'encoded')}", f"reference.store={_quoted(folder / 'store')}"]
    words += ["data.max_length=1024", "tracking=off", f"parallelism.timeout_seconds={_HANGS_SECONDS}"]
    words += ["trainer.log_every=1", "trainer.save_every=0", "optim.lr=1e-4", "optim.warmup_ratio=0"]
    return [*words, "trainer.global_batch_pairs=16"]


def _started(name: str, words: Sequence[str], gpus: int, code: int = 0) -> str:
    """Run Python with these arguments, on several GPUs by the launcher; return its error, if any."""
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
                return f"it did not end in {_RUN_SECONDS} s"
            raise
    if process.returncode < 0:  # of one process, which has no launcher that says so
        screen += f"\nit was ended by {signal.Signals(-process.returncode).name}"
    return "" if process.returncode == code else f"exit code {process.returncode}: {_cause(screen)}"


def _cause(screen: str) -> str:
    """Return the line that says why a process failed: a signal, or an error, or its last."""
    lines = [line.strip() for line in screen.splitlines() if line.strip()] or ["it said nothing"]
    titles = ("error: ", *(f"{kind.title}: " for kind in DpoDistError.__subclasses__()))
    by_signal = [line for line in lines if " was ended by SIG" in line]
    return (by_signal or [line for line in lines if line.startswith(titles)] or lines[-1:])[0]


def _equal_runs(folder: Path, gpus: int) -> Iterator[Check]:
    """Compare the steps of every way of training with those of the first that ran."""
    _write_pairs(folder / "pairs.jsonl")
    usual = [f"model.path={_quoted(_write_model(folder / 'tiny', _TINY))}", f"trainer.max_steps={_STEPS}"]
    ways = _WAYS | (_WAYS_ON_GPUS if gpus else {}) | (_WAYS_ON_SEVERAL if gpus > 1 else {})
    first = None
    for way, changed in ways.items():
        keys = {"model.dtype": "fp32", "model.fused": "none"}
        keys |= dict(key.split("=") for key in changed.split())
        words, name = [*usual, *map("=".join, keys.items())], f"steps of {way}"
        number = {_ON_ONE: 1, _ON_HALF: gpus // 2}.get(way, gpus)
        rows, error = _Rows(), ""
        if way == _ON_HALF:
            stopped = [*words, "trainer.stop_after_steps=2"]
            rows, error = _train(folder, name, stopped, gpus, range(1, 3), ExitCode.preempted)
        if not error:
            others, error = _train(folder, name, words, number, range(len(rows) + 1, _STEPS + 1))
            rows += others
        if error:
            yield _fault(name, error)
            continue
        first, is_first = first or (way, rows), first is None
        allowed = _ROUNDED if "bf16" in (way, first[0]) else _EQUAL
        pairs = [(row[key], of[key]) for row, of in zip(rows, first[1], strict=True) for key in _COMPARED]
        difference = max(abs(number / other - 1) for number, other in pairs)
        outcome, seen = "passed", f"within {difference:.1e} of {first[0]}"
        if difference > allowed:
            outcome, seen = "failed", f"{seen}, where {allowed:g} is allowed"
        values = {"difference": difference, "allowed": allowed}
        if is_first:
            outcome, seen, values = "measured", "the others are compared with it", {}
        yield Check(name, outcome, seen, values)


def _speeds(folder: Path, gpus: int, shape: str) -> Iterator[Check]:
    """Measure steps in bf16 of a shape by each kind of fused layers."""
    shapes = yaml.safe_load(files("dpo_dist.tools.plan").joinpath("shapes.yaml").read_text(encoding="utf-8"))
    model_name, layers = _SHAPES[shape]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model = _write_model(Path(temporary), {**shapes[model_name], "num_hidden_layers": layers})
        words = [f"model.path={_quoted(model)}", "parallelism=zero2", "trainer.max_steps=6"]
        words += [f"trainer.global_batch_pairs={64 * gpus}", "trainer.micro_batch_tokens=8192"]
        ways = {f"fused layers: {fused}": [f"model.fused={fused}"] for fused in ("none", "liger", "compile")}
        if gpus > 1:
            ways[_WITHOUT_OVERLAP] = ["model.fused=none"]
        for name, changed in ways.items():
            check, way = f"speed of {shape}, {name}", [*words, *changed]
            rows, error = _train(folder, check, way, gpus, range(1, 7))
            if error:
                yield _fault(check, error)
                continue
            # After kernels are chosen and compiled.
            values = {key: float(statistics.median(row[key] for row in rows[2:])) for key in _MEASURED}
            values["planned_bytes"] = planned = _planned_bytes([*way, f"plan.gpus={gpus}"])
            seconds, mfu, tokens, used, *phases = values.values()
            seen = f"{1000 * seconds:.0f} ms a step (forward, backward, optimizer: "
            seen += f"{', '.join(f'{1000 * phase:.0f}' for phase in phases[:3])}), MFU {mfu:.1%}, "
            seen += f"{tokens:,.0f} tokens/s, {size(used)} (planned {size(planned)})"
            yield Check(check, "measured", seen, values)


def _planned_bytes(words: Sequence[str]) -> float:
    """Return the bytes of a GPU that `dpo-dist plan` computes, without those of CUDA; it measures nothing."""
    from dpo_dist.tools.plan.plans import make_plan  # noqa: PLC0415  (slow)

    given = ["data.train=[-]", "plan.gpu=h100-80g", "plan.pairs=1000", "plan.tokens_per_pair=200"]
    plan = make_plan(load_run_config([*words, *given]), lambda *_: nullcontext(lambda *_: None))
    return float(sum(part for name, part in plan.content["bytes"].items() if name != "CUDA and NCCL"))


def _exchanges(folder: Path, gpus: int) -> Iterator[Check]:
    """Measure collective calls of all GPUs, and their sums against float64."""
    out = folder / "exchanged.json"
    if error := _started("collective calls", ["-m", "dpo_dist", "selftest", "--exchange", str(out)], gpus):
        yield _fault("collective calls", error)
        return
    gathered, error_of_sum = json.loads(out.read_text())
    speeds = ", ".join(f"{size} MB: {speed:.3g} GB/s" for size, speed in gathered.items())
    yield Check("all-gather of bf16", "measured", speeds, gathered)
    seen, values = f"within {error_of_sum:.1e} of float64", {"difference": error_of_sum}
    yield Check("sums over GPUs in float32", "passed" if error_of_sum < 1e-6 else "failed", seen, values)


def _exchange(out: Path) -> int:
    import torch  # noqa: PLC0415  (slow)
    import torch.distributed as dist  # noqa: PLC0415

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=_HANGS_SECONDS))
    rank, ranks, gathered = dist.get_rank(), dist.get_world_size(), {}
    for megabytes in _GATHERED:
        part = torch.ones(megabytes * 10**6 // 2 // ranks, dtype=torch.bfloat16, device=device)
        whole, began = part.new_empty(len(part) * ranks), 0.0
        for repetition in range(-2, 10):  # the first ones connect
            if repetition == 0:
                torch.cuda.synchronize()
                began = time.monotonic()
            dist.all_gather_into_tensor(whole, part)
        torch.cuda.synchronize()
        gathered[megabytes] = 10 * (whole.nbytes - part.nbytes) / (time.monotonic() - began) / 1e9
    parts = [torch.randn(10**6, generator=torch.Generator().manual_seed(seed)) for seed in range(ranks)]
    total, exact = parts[rank].to(device), torch.stack(parts).double().sum(0)
    dist.all_reduce(total)
    if rank == 0:
        out.write_text(json.dumps([gathered, float((total.cpu() - exact).norm() / exact.norm())]))
    dist.destroy_process_group()
    return ExitCode.completed


def _waits(folder: Path) -> Iterator[Check]:
    """Count how often the host waits for the GPU in a step, as far as PyTorch's debug mode sees it."""
    name, out = "waits of the host", folder / "waits.json"
    if error := _started(name, ["-m", "dpo_dist", "selftest", "--waits", str(out)], 1):
        yield _fault(name, error)
        return
    found = json.loads(out.read_text())
    yield Check(name, "measured", f"{found} in a step of ddp on one GPU", {"waits": found})


def _count_waits(out: Path) -> int:
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.api import train  # noqa: PLC0415

    waits, by_row, folder = 0, list[int](), out.parent

    def count(record: logging.LogRecord) -> bool:
        nonlocal waits
        waits += "called a synchronizing CUDA operation" in record.getMessage()
        return True

    words = [*_usual(folder, RunFolder(folder / "waits")), f"model.path={_quoted(folder / 'tiny')}"]
    words += ["parallelism=ddp", "model.fused=none", f"trainer.max_steps={_STEPS}"]
    logging.getLogger("py.warnings").addFilter(count)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(action="always"):
        train(words, on_row=lambda _row: by_row.append(waits))
    out.write_text(json.dumps(by_row[-1] - by_row[-2]))  # kernels have been chosen
    return ExitCode.completed


def _kernels(device: Any) -> Iterator[Check]:
    """Check the outputs and gradients of each attention kernel against float32."""
    import torch  # noqa: PLC0415  (slow)
    from transformers import Gemma2Config, MistralConfig  # noqa: PLC0415

    from dpo_dist.model.attention.kernels import check_kernel, choose_backend  # noqa: PLC0415

    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    texts = [MistralConfig(**heads, head_dim=dim, sliding_window=4096) for dim in (64, 128, 256)]
    texts += [Gemma2Config(**heads, head_dim=256, attn_logit_softcapping=50.0)]
    chosen = choose_backend(AttentionBackend.auto, Dtype.bf16, device)
    yield Check("attention chosen by auto", "measured", chosen)
    for backend in list(AttentionBackend)[1:-1]:  # SDPA in float32 is what they are compared with
        name, faults = f"attention by {backend}", list[str]()
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
        seen = "outputs and gradients are those of float32, of heads of 64, 128 and 256"
        yield _judged(name, faults, seen)


def _losses(device: Any) -> Iterator[Check]:
    """Compare each loss and its gradient with those of the CPU; none may make the host wait for a GPU."""
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.objective.logps import PairLogps  # noqa: PLC0415
    from dpo_dist.objective.losses import BatchFacts, RunningMeans, preference_loss  # noqa: PLC0415

    values = -30 * torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    configs = [LossConfig(kind) for kind in LossKind if kind is not LossKind.custom]
    diverging = [config.kind for config in configs if "divergence" in KINDS[config.kind].uses]
    configs += [LossConfig(kind, divergence=other) for kind in diverging for other in list(Divergence)[1:]]

    def computed(config: LossConfig, place: Any) -> list[Any]:
        on_place = values.to(place, copy=True).requires_grad_()
        tokens, gaps, known = torch.full((8,), 7, device=place), on_place[4].detach(), on_place[2:4].detach()
        facts = BatchFacts(7.0, gaps.abs(), mismatch=-gaps.mean(), running=RunningMeans(0.1, 0.2, 2))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            policy, reference = (PairLogps(sums[0], sums[1], tokens, tokens) for sums in (on_place, known))
            loss = preference_loss(policy, reference, config, facts)
            loss.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert on_place.grad is not None
        return [loss.detach().cpu(), on_place.grad.cpu()]

    faults = []
    for config in configs:
        try:
            here, plain = computed(config, device), computed(config, torch.device("cpu"))
            torch.testing.assert_close(here, plain, rtol=1e-6, atol=1e-9)
        except Exception as error:  # a loss can raise anything
            faults.append(f"{config.kind}: {first_line(error)}")
    seen = f"{len(configs)} losses equal those of the CPU, and none makes the host wait"
    yield _judged("losses", faults, seen)


if __name__ == "__main__":
    exit_after(main)
