"""What rank 0 of many does in a step, by the project's own configuration of DeepSpeed."""

import json
from typing import Any

import pytest

from tests.simulated_cuda import runs
from tests.support.tiny_model import write_model

WIDTH = 128
KINDS = {
    "zero3": (18, 0, ["allgather_base", "reduce_scatter_base", "allreduce", "allgather_base"]),
    "zero2": (16, 2, ["allreduce", "allgather_base"]),
    "ddp": (12, 8, ["allreduce", "allgather_base"]),
}
"""Bytes of a weight that are sharded and that are not, as in docs/scaling.md; and the calls of a step."""
SIZES = (8, 1024)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    write_model(folder / "model", hidden_size=WIDTH, layers=4)
    out = folder / "steps.json"
    ended = runs.run_module("tests.simulated_cuda.many_ranks", [f"{folder}/model", str(out)])
    assert ended.code == 0, ended.output
    return json.loads(out.read_text())


def shown(step: Any) -> str:
    calls = "\n".join(f"{name:22} {count:12,} bytes" for name, count in step["calls"])
    return f"started {step['started']:,}, stepped {step['stepped']:,} bytes\n{calls}"


def states(kind: str, ranks: int, matrices: list[int], vectors: list[int]) -> int:
    """Bytes that the first steps leave to rank 0, in whole blocks of the allocator."""

    def blocks(count: int) -> int:
        return -(-count // 512) * 512

    def part(lengths: list[int]) -> int:  # of a group of weights; DeepSpeed pads each weight, or all together
        if kind == "zero3":
            return sum(-(-length // ranks) for length in lengths)
        return -(-sum(lengths) // (2 * ranks)) * 2

    moments = 2 * sum(blocks(4 * part(group)) for group in (matrices, vectors))
    small = [-(-length // ranks) * ranks for length in vectors] if kind == "zero3" else []  # stay gathered
    scalars = 3  # number of steps of each group; norm of the gradient
    return moments + sum(blocks(2 * length) for length in small) + 512 * scalars


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", SIZES)
def test_memory_and_communication_are_as_documented(kind: str, ranks: int, steps: Any) -> None:
    """To a few small parts; `weights` is the number of weights P, of `tensors` tensors."""
    step, (sharded, whole, names) = steps[f"{kind} {ranks}"], KINDS[kind]
    groups = [step["matrices"], step["vectors"]]
    weights, tensors = sum(map(sum, groups)), sum(map(len, groups))
    bucket = 2 * WIDTH**2 if kind == "zero3" else 0  # of gradients
    small = 1024 * tensors + 16 * ranks  # two blocks of the allocator for each; each rank's part is aligned
    expected = sharded * weights / ranks + whole * weights
    assert expected <= step["before_update"] <= expected + bucket + small, shown(step)
    assert step["stepped"] - step["started"] == states(kind, ranks, *groups), shown(step)
    calls = step["calls"]
    assert [name for n, (name, _) in enumerate(calls) if not n or name != calls[n - 1][0]] == names, shown(
        step
    )
    for gathers in (True, False):
        sent = sum(count for name, count in calls if (name == "allgather_base") is gathers)
        assert sent == pytest.approx(2 * weights, abs=small), shown(step)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_calls_does_not_depend_on_the_number_of_ranks(kind: str, steps: Any) -> None:
    few, many = (steps[f"{kind} {ranks}"] for ranks in SIZES)
    assert [name for name, _ in few["calls"]] == [name for name, _ in many["calls"]], shown(few) + shown(many)
