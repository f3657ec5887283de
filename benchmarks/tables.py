"""Numbers of the figures and tables of docs/performance.md, from docs/performance.json; Markdown tables."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

OURS, TRL = "dpo_dist", "trl_best_1"
ABLATIONS = {
    "dpo_dist": "nothing",
    "without_sharing": "prompt sharing",
    "without_packing_single": "packing: one pair at a time",
    "without_packing_padded": "packing: padded",
    "without_chunks": "chunked head",
    "without_store": "stored reference",
    "without_all": "all of these, padded",
}


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of these values."""
        return cls(statistics.median(values), min(values), max(values))


def spread(point: Json, value: Callable[[Json], float]) -> Spread:
    """Return the spread of `value` over the rounds of a point."""
    return Spread.of([value(result) for result in point["rounds"]])


def variant_points(part: Json, variant: str) -> list[Json]:
    """Return the points of one variant, in order."""
    return [point for point in part["points"] if point["variant"] == variant]


def pairs_per_second(point: Json, *, with_reference: bool) -> Spread:
    """Return pairs/s by the clock: of training, or of training and scoring by the reference."""
    pairs = point["setting"]["pairs"]
    return spread(point, lambda result: pairs / _spent(result, "seconds", with_reference))


def cpu_seconds_per_pair(point: Json, *, with_reference: bool) -> Spread:
    """Return CPU seconds of all threads for a pair."""
    pairs = point["setting"]["pairs"]
    return spread(point, lambda result: _spent(result, "cpu_seconds", with_reference) / pairs)


def peak_mib(point: Json) -> float:
    """Return the peak memory, the largest of the rounds."""
    return spread(point, lambda result: result["peak_bytes"] / 2**20).most


def times_faster(point: Json, other: Json, *, with_reference: bool) -> Spread:
    """Return the CPU seconds of `other` over those of `point`, round by round."""
    rounds = zip(point["rounds"], other["rounds"], strict=True)
    return Spread.of(
        [
            _spent(theirs, "cpu_seconds", with_reference) / _spent(ours, "cpu_seconds", with_reference)
            for ours, theirs in rounds
        ]
    )


def _spent(result: Json, unit: str, with_reference: bool) -> float:
    spent: float = result["training"][unit]
    return spent + result["reference"][unit] if with_reference else spent


def table(name: str, part: Json) -> str:
    """Return the numbers of a part as a table in Markdown."""
    match name:
        case "memory":
            rows = _memory_rows(part)
        case "ablation":
            rows = _ablation_rows(part)
        case "encode":
            rows = _encode_rows(part)
        case _:
            rows = _beside_trl_rows(name, part)
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _beside_trl_rows(name: str, part: Json) -> list[list[str]]:
    columns = (
        "dpo_dist, pairs/s; with its reference; TRL, pairs/s; with its reference; CPU s a pair; TRL's; "
        "times TRL; with references; peak MiB; TRL's"
    )
    rows = [[name.replace("_", " "), *columns.split("; ")]]
    for both in zip(variant_points(part, OURS), variant_points(part, TRL), strict=True):
        flags = (False, True)
        speeds = [pairs_per_second(point, with_reference=flag) for point in both for flag in flags]
        costs = [cpu_seconds_per_pair(point, with_reference=False) for point in both]
        times = [times_faster(*both, with_reference=flag) for flag in flags]
        numbers = [_number(value.median) for value in (*speeds, *costs)]
        peaks = [f"{peak_mib(point):.0f}" for point in both]
        rows.append([str(both[0]["x"]), *numbers, *map(_ranged, times), *peaks])
    return rows


def _memory_rows(part: Json) -> list[list[str]]:
    columns = "micro-batches a step; tokens of the largest; peak MiB; pairs/s; CPU s a pair"
    rows = [["`trainer.micro_batch_tokens`", *columns.split("; ")]]
    for point in part["points"]:
        steps = point["setting"]["pairs"] // point["setting"]["batch_pairs"]
        work = point["rounds"][0]["work"]
        speed = pairs_per_second(point, with_reference=False).median
        cost = cpu_seconds_per_pair(point, with_reference=False).median
        row = [str(point["x"]), _number(work["micro_batches"] / steps), str(work["most_tokens"])]
        rows.append([*row, f"{peak_mib(point):.0f}", _number(speed), _number(cost)])
    return rows


def _ablation_rows(part: Json) -> list[list[str]]:
    columns = (
        "without; tokens computed; rows of logits; micro-batches; CPU s a pair; times the whole; peak MiB"
    )
    rows = [columns.split("; ")]
    whole = part["points"][0]
    for point in part["points"]:
        work = point["rounds"][0]["work"]
        row = [
            ABLATIONS[point["variant"]],
            *(str(work[name]) for name in ("tokens", "logits", "micro_batches")),
        ]
        cost = _number(cpu_seconds_per_pair(point, with_reference=False).median)
        times = _ranged(times_faster(whole, point, with_reference=False))
        rows.append([*row, cost, times, f"{peak_mib(point):.0f}"])
    return rows


def _encode_rows(part: Json) -> list[list[str]]:
    rows = [["processes", "records/s", "tokens/s", "of all CPU time in the main process"]]
    for point in part["points"]:
        speeds = [_number(point[f"{unit}_per_second"]) for unit in ("records", "tokens")]
        rows.append([str(point["processes"]), *speeds, f"{point['main_share']:.0%}"])
    return rows


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ranged(values: Spread) -> str:
    """Return the median, with minimum and maximum where they differ visibly."""
    ends = f"{values.least:.2f}", f"{values.most:.2f}"
    return f"{values.median:.2f}" + (f" ({ends[0]}-{ends[1]})" if ends[0] != ends[1] else "")
