"""Test this machine in about five minutes: `python -m dpo_dist.selftest`, on one GPU or all of a node.

Nothing is downloaded: random weights of real shapes, invented pairs. Says which kernels are exact, whether
every way of training gives the same steps, and how fast they are; writes selftest.json. Exit code 1: a check
failed.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import KINDS, Divergence, LossConfig, LossKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.foundation.errors import DpoDistError, ExitCode, first_line
from dpo_dist.foundation.streams import open_closed_streams, print_line
from dpo_dist.training.metrics_log import read_latest_rows

_PACKAGES = ("torch", "transformers", "deepspeed", "flash-attn", "flash-attn-3", "liger-kernel")
_EQUAL, _ROUNDED = 1e-3, 0.05  # relative, of losses and gradient norms in float32 and in bf16
_GATHERED = (1, 33, 512)  # MB of a message; 33 is a matrix of a 7B model on 8 GPUs
_TINY = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
_SHAPES = {  # of models of the shipped presets, also with fewer layers, which are alike
    "0.5B": ("Qwen/Qwen2.5-0.5B-Instruct", 24),
    "7B, 4 layers": ("Qwen/Qwen2.5-7B", 4),
}
_LACKS = ("not installed", "memory is exhausted", "needs Triton")  # errors of what a machine does not have


class Check(NamedTuple):
    """A check: `passed`, `failed`, `skipped`, or `measured`, with what was seen."""

    name: str
    outcome: str
    seen: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    open_closed_streams()
    parser = argparse.ArgumentParser(prog="python -m dpo_dist.selftest", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("selftest.json"))
    parser.add_argument("--quick", action="store_true", help="no speeds")
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)  # a process of `_exchanges`
    given = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if given.exchange is not None:
        return _exchange(given.exchange)
    if not os.access(beside := given.output.absolute().parent, os.W_OK):
        parser.error(f"argument --output: {beside} is no folder that can be written")
    began, checks = time.monotonic(), list[Check]()
    with tempfile.TemporaryDirectory(prefix="selftest-", dir=beside) as folder:
        for check in _checks(Path(folder), given.quick):
            print_line(f"{check.outcome:<8}  {check.name:<40}  {check.seen}")
            checks.append(check)
    failed = [check.name for check in checks if check.outcome == "failed"]
    verdict = "every way of training that was tried gives the same steps on this machine"
    if failed:
        verdict = f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}"
    content = {"verdict": verdict, "checks": [check._asdict() for check in checks]}
    given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print_line(f"verdict: {verdict} ({time.monotonic() - began:.0f} s; {given.output})")
    return ExitCode.findings if failed else ExitCode.completed


def _checks(folder: Path, is_quick: bool) -> Iterator[Check]:
    """Yield the checks; those in processes of their own come before this process uses a GPU."""
    import torch  # noqa: PLC0415  (slow)

    yield Check("versions", "measured", _versions())
    gpus = torch.cuda.device_count()
    _write_pairs(folder / "pairs.jsonl")
    yield from _equal_runs(folder, gpus)
    if gpus > 1:
        yield from _exchanges(folder, gpus)
    if gpus and not is_quick:
        yield from _speeds(folder, gpus)
    device = torch.device("cuda" if gpus else "cpu")
    yield Check("device", "measured", f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "no GPU")
    yield from _kernels(device)
    yield _losses(device)


def _versions() -> str:
    installed = []
    for package in _PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            installed.append(f"no {package}")
    return ", ".join(installed)


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

    end, *letters = "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({word: number for number, word in enumerate((end, *letters))}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape, eos_token_id=0, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


class _Run(NamedTuple):
    """A training run: the rows of its steps, or its error."""

    rows: list[dict[str, Any]]
    error: str


def _train(folder: Path, name: str, words: Sequence[str], gpus: int, visible: str | None = None) -> _Run:
    """Train on `gpus` processes, or on one without a GPU; `visible`: CUDA_VISIBLE_DEVICES."""
    usual = [f"run.dir={folder / name}", f"data.train=[{folder / 'pairs.jsonl'}]", "data.max_length=1024"]
    usual += [f"data.cache={folder / 'encoded'}", f"reference.store={folder / 'store'}", "tracking=off"]
    usual += ["trainer.log_every=1", "trainer.save_every=0", "optim.lr=1e-4", "optim.warmup_ratio=0"]
    if error := _started(["-m", "dpo_dist.train", *usual, *words], gpus, visible):
        return _Run([], error)
    rows = read_latest_rows(RunFolder(folder / name))
    return _Run([row for row in rows if "grad_norm" in row], "")


def _started(words: Sequence[str], gpus: int, visible: str | None = None) -> str:
    """Run Python with these arguments, on several GPUs by the launcher; return its error."""
    launcher = ["-m", "dpo_dist.launch", "--num_processes", str(gpus)] if gpus > 1 else []
    environment = os.environ | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    ended = subprocess.run(  # noqa: S603  (this package)
        [sys.executable, *launcher, *words], env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode == 0:
        return ""
    lines = f"{ended.stderr or ''}{ended.stdout}".strip().splitlines() or [""]
    errors = [line.strip() for line in lines if "error" in line.lower()]
    return f"exit code {ended.returncode}: {(errors or lines)[0]}"


def _equal_runs(folder: Path, gpus: int) -> Iterator[Check]:
    """Compare the steps of every way of training with those of the first."""
    usual = [f"model.path={_write_model(folder / 'tiny', _TINY)}", "model.fused=none", "trainer.max_steps=4"]
    usual += ["trainer.global_batch_pairs=16"]
    exact, half = [*usual, "model.dtype=fp32"], gpus // 2
    ways: dict[str, tuple[list[str], int, float]] = {
        "zero3": (exact, gpus, _EQUAL),
        "zero2": ([*exact, "parallelism=zero2"], gpus, _EQUAL),
        "ddp": ([*exact, "parallelism=ddp"], gpus, _EQUAL),
        "gradient checkpointing": ([*exact, "model.gradient_checkpointing=full"], gpus, _EQUAL),
        "small micro-batches": ([*exact, "trainer.micro_batch_tokens=600"], gpus, _EQUAL),
    }
    if gpus:
        ways["bf16"] = [*usual, "parallelism=zero2"], gpus, _ROUNDED
    if half:
        ways["one GPU"] = exact, 1, _EQUAL
        ways["a run resumed on half of the GPUs"] = exact, half, _EQUAL
        _train(folder, "half", [*exact, "trainer.stop_after_steps=2"], gpus)
    first = None
    for name, (words, number, tolerance) in ways.items():
        visible = None if number == gpus else ",".join(map(str, range(number)))
        run = _train(folder, "half" if "half" in name else name.replace(" ", "-"), words, number, visible)
        first = first or run
        seen = ("failed", run.error or "there is nothing to compare it with")
        if run.rows and first.rows:
            steps = list(zip(run.rows, first.rows, strict=True))
            worst = max(abs(row[key] / of[key] - 1) for row, of in steps for key in ("loss", "grad_norm"))
            seen = "passed" if worst <= tolerance else "failed", f"within {worst:.1e} of those of zero3"
        yield Check(f"steps of {name}", *seen)


def _speeds(folder: Path, gpus: int) -> Iterator[Check]:
    """Measure steps in bf16 by each kind of fused layers."""
    shapes = yaml.safe_load(files("dpo_dist.insight").joinpath("shapes.yaml").read_text(encoding="utf-8"))
    for shape, (name, layers) in _SHAPES.items():
        model = _write_model(folder / "model", {**shapes[name], "num_hidden_layers": layers})
        for fused in ("none", "liger", "compile"):
            words = [f"model.path={model}", f"model.fused={fused}", "parallelism=zero2"]
            words += [
                "trainer.max_steps=6",
                "trainer.global_batch_pairs=64",
                "trainer.micro_batch_tokens=8192",
            ]
            run = _train(folder, f"{layers}-{fused}", words, gpus)
            outcome = "skipped" if any(word in run.error for word in _LACKS) else "failed"
            seen = (outcome, run.error) if run.error else ("measured", _speed(run.rows, words))
            yield Check(f"speed of {shape}, fused layers: {fused}", *seen)
        shutil.rmtree(model)


def _speed(rows: Sequence[dict[str, Any]], words: Sequence[str]) -> str:
    def median(key: str) -> float:
        return float(statistics.median(row[key] for row in rows[2:]))  # after kernels are chosen, compiled

    steps = {name: 1000 * median(f"time/{name}") for name in ("forward", "backward", "optimizer")}
    phases = ", ".join(f"{name} {milliseconds:.0f}" for name, milliseconds in steps.items())
    used, planned = median("memory/peak_allocated_bytes"), _planned_bytes(words)
    speed = f"MFU {median('mfu'):.1%}, {median('tokens_per_second'):,.0f} tokens/s"
    memory = f"{used / 2**30:.1f} GiB (planned {planned / 2**30:.1f})"
    return f"{1000 * median('step_seconds'):.0f} ms a step ({phases}), {speed}, {memory}"


def _planned_bytes(words: Sequence[str]) -> float:
    """Return the bytes of a GPU that `dpo-dist plan` computes, without those of CUDA."""
    from dpo_dist.insight.plan import make_plan  # noqa: PLC0415  (slow)

    config = load_run_config([*words, "data.train=[-]", "plan.pairs=1000", "plan.tokens_per_pair=200"])
    parts = make_plan(config, lambda *_: nullcontext(lambda *_: None)).content["bytes"]
    return float(sum(size for name, size in parts.items() if name != "CUDA and NCCL"))


def _exchanges(folder: Path, gpus: int) -> Iterator[Check]:
    """Measure collective calls of all GPUs, and their sums against float64."""
    out = folder / "exchanged.json"
    if error := _started(["-m", "dpo_dist.selftest", "--exchange", str(out)], gpus):
        yield Check("collective calls", "failed", error)
        return
    gathered, error_of_sum = json.loads(out.read_text())
    speeds = ", ".join(f"{size} MB: {speed:.0f} GB/s" for size, speed in gathered.items())
    yield Check("all-gather of bf16", "measured", speeds)
    outcome = "passed" if error_of_sum < 1e-6 else "failed"
    yield Check("sums over GPUs in float32", outcome, f"within {error_of_sum:.1e} of float64")


def _exchange(out: Path) -> int:
    import torch  # noqa: PLC0415  (slow)
    import torch.distributed as dist  # noqa: PLC0415

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    rank, ranks, gathered = dist.get_rank(), dist.get_world_size(), {}
    for size in _GATHERED:
        part = torch.ones(size * 10**6 // 2 // ranks, dtype=torch.bfloat16, device=device)
        whole, began = part.new_empty(len(part) * ranks), 0.0
        for repetition in range(-2, 10):  # the first ones connect
            if repetition == 0:
                torch.cuda.synchronize()
                began = time.monotonic()
            dist.all_gather_into_tensor(whole, part)
        torch.cuda.synchronize()
        gathered[size] = 10 * (whole.nbytes - part.nbytes) / (time.monotonic() - began) / 1e9
    parts = [torch.randn(10**6, generator=torch.Generator().manual_seed(seed)) for seed in range(ranks)]
    total, exact = parts[rank].to(device), torch.stack(parts).double().sum(0)
    dist.all_reduce(total)
    if rank == 0:
        out.write_text(json.dumps([gathered, float((total.cpu() - exact).norm() / exact.norm())]))
    dist.destroy_process_group()
    return ExitCode.completed


def _kernels(device: Any) -> Iterator[Check]:
    """Check the outputs and gradients of each attention kernel against float32."""
    import torch  # noqa: PLC0415  (slow)
    from transformers import Gemma2Config, MistralConfig, Qwen2Config  # noqa: PLC0415

    from dpo_dist.model.attention import check_kernel, choose_backend  # noqa: PLC0415

    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896, "head_dim": 64}
    texts = [Qwen2Config(**heads), MistralConfig(**heads, sliding_window=4096)]
    texts += [Gemma2Config(**heads, attn_logit_softcapping=50.0)]
    chosen = choose_backend(AttentionBackend.auto, Dtype.bf16, device)
    for backend in list(AttentionBackend)[1:-1]:  # SDPA in float32 is what they are compared with
        name, faults = f"attention by {backend}{', chosen by auto' * (backend is chosen)}", list[str]()
        try:
            choose_backend(backend, Dtype.bf16, device)
        except DpoDistError as error:
            yield Check(name, "skipped", error.message)
            continue
        for text in texts:
            try:
                check_kernel(backend, device, text, torch.bfloat16)
            except DpoDistError as error:
                faults.append(str(error.got))
        seen = "outputs and gradients are those of float32"
        yield Check(name, "failed" if faults else "passed", "; ".join(faults) or seen)


def _losses(device: Any) -> Check:
    """Compare each loss and its gradient with those of the CPU; none may make the host wait for a GPU."""
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.objective.logps import PairLogps  # noqa: PLC0415
    from dpo_dist.objective.losses import BatchFacts, RunningMeans, preference_loss  # noqa: PLC0415

    values = -30 * torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    configs = [LossConfig(kind) for kind in LossKind if kind is not LossKind.custom]
    diverging = [config.kind for config in configs if "divergence" in KINDS[config.kind].options]
    configs += [LossConfig(kind, divergence=other) for kind in diverging for other in list(Divergence)[1:]]

    def computed(config: LossConfig, place: Any) -> list[Any]:
        on_place = values.to(place, copy=True).requires_grad_()
        tokens, gaps, known = torch.full((8,), 7, device=place), on_place[4].detach(), on_place[2:4].detach()
        facts = BatchFacts(7.0, gaps.abs(), mismatch=-gaps.mean(), running=RunningMeans(0.1, 0.2, 2))
        if place.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            policy, reference = (PairLogps(sums[0], sums[1], tokens, tokens) for sums in (on_place, known))
            loss = preference_loss(policy, reference, config, facts)
            loss.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            if place.type == "cuda":
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
    return Check("losses", "failed" if faults else "passed", "; ".join(faults) or seen)


if __name__ == "__main__":
    sys.exit(main())
