"""Measure speed and memory over what they depend on; `draw` then makes figures and tables.

Every part is measured in rounds whose runs take turns, each run in a process of its own, and written to
docs/performance.json, where it replaces the part of that name:

    shared_prefix     pairs/s over the prompt's share of a sequence; TRL 1.16 at its best for comparison
    response_tokens   the same over the length of a response after a prompt of fixed length
    model_size        the same over model size
    memory            peak memory and pairs/s over `trainer.micro_batch_tokens`
    ablation          CPU seconds and memory without prompt sharing, packing, chunked head, stored reference
    encode            records/s over processes, from `--encode FILE`: a file that `encode --out FILE` wrote

Times are of training steps and of scoring by the reference, as in `vs_trl`. Ends with an error if the
trainers, or the whole program and an ablation of it, compute different losses. A round of all parts takes
about ten minutes on two quiet cores.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import shlex
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import Benchmark, Json
from benchmarks.runs import Result, Run, in_fork, start
from benchmarks.setting import ORDER, ROOT, Setting, default_data, prepare
from benchmarks.tables import ABLATIONS, OURS, TRL

MEASUREMENTS = ROOT / "docs" / "performance.json"
PARTS = ("shared_prefix", "response_tokens", "model_size", "memory", "ablation")
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
    """One run. `is_warm`: its store already has the reference log-probs."""

    setting: Setting
    variant: str
    is_warm: bool = False


@dataclass(frozen=True)
class Point:
    """A job and its x value in a part."""

    x: float | str
    job: Job


def run(options: Namespace) -> Json:
    """Measure the parts, one after the other."""
    parts = _smoke_parts() if options.smoke else _parts()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        bench = Bench(Path(name), options.threads)
        for part in options.parts:
            bench.measure(parts[part], options.rounds)
            _check(part, parts[part], bench.results)
            points = [_as_json(point, bench) for point in parts[part]]
            _write(options.measurements, part, {**_circumstances(bench, options), "points": points})
            print(f"{part}: {len(points)} points, {options.rounds} rounds", flush=True)
        if options.encode:
            encoding = _encoding(options.encode)
            _write(options.measurements, "encode", {**_circumstances(bench, options), **encoding})
    return {"parts": [*options.parts, *["encode"] * bool(options.encode)]}


def _own_options(parser: ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--encode", type=Path, metavar="FILE", help="figures that `encode --out FILE` wrote")
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="file of all parts")


def _parts() -> dict[str, list[Point]]:
    """Return the points of each part. The parts share the run of `BASE`."""
    prompt_tokens = round(BASE.mean_tokens * BASE.shared_prefix)

    def with_response(tokens: int) -> Setting:
        total = prompt_tokens + tokens
        return dataclasses.replace(BASE, mean_tokens=total, shared_prefix=prompt_tokens / total)

    # 24 pairs of equal length fill a micro-batch of 8192 tokens, and half of them half of it.
    filling = dataclasses.replace(BASE, pairs=48, batch_pairs=24, length_spread=0.0)
    real = dataclasses.replace(BASE, data=default_data(), pairs=32, batch_pairs=16, length_spread=0.7)
    return {
        "shared_prefix": _beside_trl(
            {share: dataclasses.replace(BASE, shared_prefix=share) for share in (0.1, 0.4, 0.7, 0.9)}
        ),
        "response_tokens": _beside_trl({tokens: with_response(tokens) for tokens in (25, 75, 300)}),
        "model_size": _beside_trl(
            {model: dataclasses.replace(BASE, model=model) for model in ("5m", "40m", "160m")}
        ),
        "memory": _over_budgets(filling, (1024, 2048, 4096, 8192)),
        "ablation": _ablations(real, tuple(ABLATIONS)),
    }


def _smoke_parts() -> dict[str, list[Point]]:
    tiny = dataclasses.replace(BASE, model="tiny", pairs=4, batch_pairs=2, mean_tokens=24, trl_micro_pairs=2)
    return {
        "shared_prefix": _beside_trl({tiny.shared_prefix: tiny}),
        "response_tokens": _beside_trl({tiny.mean_tokens * (1 - tiny.shared_prefix): tiny}),
        "model_size": _beside_trl({tiny.model: tiny}),
        "memory": _over_budgets(tiny, (tiny.micro_batch_tokens,)),
        "ablation": _ablations(tiny, (OURS, "without_all")),
    }


def _beside_trl(settings: dict[Any, Setting]) -> list[Point]:
    return [Point(x, Job(setting, variant)) for x, setting in settings.items() for variant in (OURS, TRL)]


def _over_budgets(setting: Setting, budgets: tuple[int, ...]) -> list[Point]:
    settings = {budget: dataclasses.replace(setting, micro_batch_tokens=budget) for budget in budgets}
    return [Point(budget, Job(settings[budget], OURS, is_warm=True)) for budget in budgets]


def _ablations(setting: Setting, names: tuple[str, ...]) -> list[Point]:
    return [Point(name, Job(setting, name, is_warm=True)) for name in names]


class Bench:
    """Runs jobs, each once a round, also where several parts use it.

    Attributes:
        results: of each job, one result a round.
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
        """Return the tokens of all pairs of a run, every prompt counted once."""
        return int(json.loads((self._folders[setting] / ORDER).read_text())["unique_tokens"])

    def environment(self) -> dict[str, Any]:
        """Return versions and hardware, read in a fork because this loads libraries."""
        file = self._work / "environment.json"

        def describe() -> None:
            from dpo_dist.insight.metrics.log import describe_environment

            file.write_text(json.dumps(describe_environment(1)))

        in_fork(describe)
        environment: dict[str, Any] = json.loads(file.read_text())
        return environment

    @property
    def _warm_store(self) -> Path:
        return self._work / "store"  # of all settings: entries are addressed by content

    def _prepare(self, settings: list[Setting]) -> None:
        new = [setting for setting in dict.fromkeys(settings) if setting not in self._folders]
        for setting in new:
            self._folders[setting] = Path(tempfile.mkdtemp(dir=self._work))

        def prepare_all() -> None:
            for setting in new:
                prepare(setting, self._folders[setting])

        in_fork(prepare_all)

    def _fill(self, settings: list[Setting]) -> None:
        """Fill the store for warm runs; a token budget changes no log-prob."""
        one_budget = {dataclasses.replace(setting, micro_batch_tokens=0): setting for setting in settings}
        for setting in one_budget.values():
            self._run(Job(setting, OURS), self._warm_store)

    def _run(self, job: Job, store: Path) -> Result:
        return start(Run(str(self._folders[job.setting]), job.variant, str(store)), 1, self.threads)


def _check(part: str, points: list[Point], results: dict[Job, list[Result]]) -> None:
    """End the benchmark if runs that train the same pairs differ."""
    for point in points:
        wanted = next(other.job for other in points if _same_training(other.job, point.job))
        expected = results[wanted][0]["rows"]
        for result in results[point.job]:
            for name in ("loss", "logps/chosen", "logps/rejected"):
                steps = zip(result["rows"], expected, strict=True)
                difference = max(
                    abs(got[name] - want[name]) / max(1.0, abs(want[name])) for got, want in steps
                )
                if not difference <= TOLERANCE:
                    raise SystemExit(
                        f"{part}, {point.x}: {name} of {point.job.variant} is {difference:.1e} off "
                        f"that of {wanted.variant}"
                    )


def _same_training(job: Job, other: Job) -> bool:
    budget = other.setting.micro_batch_tokens
    return dataclasses.replace(job.setting, micro_batch_tokens=budget) == other.setting


def _as_json(point: Point, bench: Bench) -> dict[str, Any]:
    """Return a point as it is written."""
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


def _encoding(figures: Path) -> dict[str, Any]:
    """Return figures of `encode` as a part of the file."""
    measured = json.loads(figures.read_text().splitlines()[-1])
    command = ["python", "-m", "benchmarks", "encode", "--records", str(measured["records"])] + [
        "--chat"
    ] * measured["chat"]
    return {"command": shlex.join(command), "file": measured["file"], "points": measured["figures"]}


def _circumstances(bench: Bench, options: Namespace) -> dict[str, Any]:
    environment = bench.environment()
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", "curves", *sys.argv[1:]]),
        "machine": _machine(environment),
        "threads": options.threads,
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


BENCHMARK = Benchmark(run, shared={"rounds": 1, "threads": os.cpu_count()}, own=_own_options)
