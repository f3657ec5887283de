"""Measure what speed and memory depend on: `python -m benchmarks curves`, then `draw_performance`.

Every part is measured in rounds whose runs take turns, each run in a process of its own, and then written to
docs/performance.json beside the parts that stand there:

    shared_prefix     pairs/s over the prompt's share of a sequence; TRL 1.16 at its best beside ours
    response_tokens   the same over the length of a response after a prompt of fixed length
    model_size        the same over model size
    memory            peak memory and pairs/s over `trainer.micro_batch_tokens`
    ablation          CPU seconds and memory without prompt sharing, packing, chunked head, stored reference
    encode            records/s over processes, from `--encode FILE`: output of `benchmarks encode`

Times are of training steps and of scoring by the reference, as in `vs_trl`. Ends with an error if
the trainers, or the whole program and what is left of it, compute different losses. A round of all parts is
meant to take about ten minutes on two quiet cores.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.assets import ORDER, REAL_DATA, ROOT, Setting, prepare, shared_data
from benchmarks.child import Result, in_fork, run_variant

MEASUREMENTS = ROOT / "docs" / "performance.json"
PARTS = ("shared_prefix", "response_tokens", "model_size", "memory", "ablation")
WHOLE = "dpo_dist"
ABLATIONS = (
    "without_sharing",
    "without_packing_single",
    "without_packing_padded",
    "without_chunks",
    "without_store",
    "without_all",
)
TRL = "trl_best_1"
TOLERANCE = 1e-4

BASE = Setting(
    model="40m",
    data="synthetic",
    pairs=16,
    batch_pairs=8,
    max_length=1024,
    dtype="fp32",
    micro_batch_tokens=4096,
    trl_micro_pairs=8,
    shared_prefix=0.7,
    mean_tokens=250,
    length_spread=0.3,
    seed=0,
)


@dataclass(frozen=True)
class Job:
    """One run. `is_warm`: with a store that holds the reference's values."""

    setting: Setting
    variant: str
    is_warm: bool = False


@dataclass(frozen=True)
class Point:
    """A job's place in a part."""

    x: float | str
    job: Job


def main() -> int:
    arguments = _arguments()
    parts = _smoke_parts() if arguments.smoke else _parts()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), arguments.threads)
        for part in arguments.parts:
            bench.measure(parts[part], arguments.rounds)
            _check(part, parts[part], bench.results)
            points = [_told(point, bench) for point in parts[part]]
            _write(arguments.out, part, {**_circumstances(bench, arguments), "points": points})
            print(f"{part}: {len(points)} points, {arguments.rounds} rounds", flush=True)
        if arguments.encode:
            _write(
                arguments.out, "encode", {**_circumstances(bench, arguments), **_encoding(arguments.encode)}
            )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--encode", type=Path, metavar="FILE", help="measurements of encoding, made before")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=MEASUREMENTS, help="the file of measurements")
    parser.add_argument("--smoke", action="store_true", help="tiny runs, to see that everything works")
    return parser.parse_args()


def _parts() -> dict[str, list[Point]]:
    """What is measured. The parts share the run of `BASE`."""
    prompt_tokens = round(BASE.mean_tokens * BASE.shared_prefix)

    def with_response(tokens: int) -> Setting:
        total = prompt_tokens + tokens
        return dataclasses.replace(BASE, mean_tokens=total, shared_prefix=prompt_tokens / total)

    # 24 pairs of equal length fill a micro-batch of 8192 tokens, and half of them half of it.
    filling = dataclasses.replace(BASE, pairs=48, batch_pairs=24, length_spread=0.0)
    data = "hh" if (shared_data() / REAL_DATA["hh"]).is_file() else "synthetic"
    real = dataclasses.replace(BASE, data=data, pairs=32, batch_pairs=16, length_spread=0.7)
    return {
        "shared_prefix": _beside_trl(
            {share: dataclasses.replace(BASE, shared_prefix=share) for share in (0.1, 0.4, 0.7, 0.9)}
        ),
        "response_tokens": _beside_trl({tokens: with_response(tokens) for tokens in (25, 75, 300)}),
        "model_size": _beside_trl(
            {model: dataclasses.replace(BASE, model=model) for model in ("5m", "40m", "160m")}
        ),
        "memory": _over_budgets(filling, (1024, 2048, 4096, 8192)),
        "ablation": _ablations(real, ABLATIONS),
    }


def _smoke_parts() -> dict[str, list[Point]]:
    tiny = dataclasses.replace(BASE, model="tiny", pairs=4, batch_pairs=2, mean_tokens=24, trl_micro_pairs=2)
    return {
        "shared_prefix": _beside_trl({tiny.shared_prefix: tiny}),
        "response_tokens": _beside_trl({tiny.mean_tokens * (1 - tiny.shared_prefix): tiny}),
        "model_size": _beside_trl({tiny.model: tiny}),
        "memory": _over_budgets(tiny, (tiny.micro_batch_tokens,)),
        "ablation": _ablations(tiny, ABLATIONS[-1:]),
    }


def _beside_trl(settings: dict[Any, Setting]) -> list[Point]:
    return [Point(x, Job(setting, variant)) for x, setting in settings.items() for variant in (WHOLE, TRL)]


def _over_budgets(setting: Setting, budgets: tuple[int, ...]) -> list[Point]:
    settings = {budget: dataclasses.replace(setting, micro_batch_tokens=budget) for budget in budgets}
    return [Point(budget, Job(settings[budget], WHOLE, is_warm=True)) for budget in budgets]


def _ablations(setting: Setting, names: tuple[str, ...]) -> list[Point]:
    return [Point(name, Job(setting, name, is_warm=True)) for name in (WHOLE, *names)]


class Bench:
    """Runs jobs, each as often as asked and not again for another part.

    Attributes:
        results: of each job, a round each.
    """

    def __init__(self, work: Path, threads: int):
        self.results: dict[Job, list[Result]] = {}
        self.threads = threads
        self._work = work
        self._folders: dict[Setting, Path] = {}

    def measure(self, points: list[Point], rounds: int) -> None:
        """Run the jobs of `points` that have not run yet; their order alternates from round to round."""
        jobs = [job for job in dict.fromkeys(point.job for point in points) if job not in self.results]
        self._prepare([job.setting for job in jobs])
        self._fill([job.setting for job in jobs if job.is_warm])
        for number in range(rounds):
            for job in jobs[:: -1 if number % 2 else 1]:
                store = self._warm_store if job.is_warm else Path(tempfile.mkdtemp(dir=self._work))
                self.results.setdefault(job, []).append(self._run(job, store))

    def unique_tokens(self, setting: Setting) -> int:
        """Of all pairs of a run, every prompt counted once."""
        return int(json.loads((self._folders[setting] / ORDER).read_text())["unique_tokens"])

    def environment(self) -> dict[str, Any]:
        """Versions and hardware; found out elsewhere, as it needs the libraries in memory."""
        file = self._work / "environment.json"

        def describe() -> None:
            from dpo_dist.report.environment import describe_environment

            file.write_text(json.dumps(describe_environment(1)))

        in_fork(describe)
        environment: dict[str, Any] = json.loads(file.read_text())
        return environment

    @property
    def _warm_store(self) -> Path:
        return self._work / "store"  # of all settings: rows are addressed by content

    def _prepare(self, settings: list[Setting]) -> None:
        new = [setting for setting in dict.fromkeys(settings) if setting not in self._folders]
        for setting in new:
            self._folders[setting] = Path(tempfile.mkdtemp(dir=self._work))

        def prepare_all() -> None:
            for setting in new:
                prepare(setting, self._folders[setting])

        in_fork(prepare_all)

    def _fill(self, settings: list[Setting]) -> None:
        """Store what warm runs need; a budget of tokens changes no value."""
        one_budget = {dataclasses.replace(setting, micro_batch_tokens=0): setting for setting in settings}
        for setting in one_budget.values():
            self._run(Job(setting, WHOLE), self._warm_store)

    def _run(self, job: Job, store: Path) -> Result:
        return run_variant(self._folders[job.setting], job.variant, store, 1, self.threads)


def _check(part: str, points: list[Point], results: dict[Job, list[Result]]) -> None:
    """End the benchmark if runs that train the same pairs differ; what takes its time may not be wrong."""
    for point in points:
        wanted = next(other.job for other in points if _same_training(other.job, point.job))
        expected = results[wanted][0]["curves"]
        for result in results[point.job]:
            for name in ("loss", "logps/chosen", "logps/rejected"):
                pairs = zip(result["curves"][name], expected[name], strict=True)
                difference = max(abs(got - want) / max(1.0, abs(want)) for got, want in pairs)
                if not difference <= TOLERANCE:
                    raise SystemExit(
                        f"{part}, {point.x}: {name} of {point.job.variant} is {difference:.1e} off "
                        f"that of {wanted.variant}"
                    )


def _same_training(job: Job, other: Job) -> bool:
    budget = other.setting.micro_batch_tokens
    return dataclasses.replace(job.setting, micro_batch_tokens=budget) == other.setting


def _told(point: Point, bench: Bench) -> dict[str, Any]:
    """A point as it stands in the file."""
    setting = point.job.setting
    return {
        "x": point.x,
        "variant": point.job.variant,
        "setting": dataclasses.asdict(setting),
        "unique_tokens": bench.unique_tokens(setting),
        "rounds": [
            {name: result[name] for name in ("training", "reference", "work", "peak_bytes")}
            for result in bench.results[point.job]
        ],
    }


def _encoding(printed: Path) -> dict[str, Any]:
    """What `benchmarks/encode.py` printed, as a part of the file."""
    told = json.loads(printed.read_text().splitlines()[-1])
    command = ["python", "-m", "benchmarks", "encode", "--records", str(told["records"])] + ["--chat"] * told[
        "chat"
    ]
    return {"command": shlex.join(command), "file": told["file"], "points": told["figures"]}


def _circumstances(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    environment = bench.environment()
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", "curves", *sys.argv[1:]]),
        "machine": _machine(environment),
        "threads": arguments.threads,
        "python": environment["python"],
        "packages": {**environment["packages"], "trl": importlib.metadata.version("trl")},
        "git_commit": environment["git_commit"],
    }


def _machine(environment: dict[str, Any]) -> str:
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text().splitlines() if processors.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = f"{environment['memory_bytes'] / 2**30:.0f} GiB of memory"
    cores = f"{environment['cpus']} cores" + (f" ({names[0]})" if names else "")
    return ", ".join([cores, memory, *(environment["gpus"] or ["no GPU"])])


def _write(file: Path, part: str, content: dict[str, Any]) -> None:
    parts = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**parts, part: content}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
