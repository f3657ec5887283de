"""Distributions, near copies, margins and benchmark files of the doctor."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.foundation.errors import DataError
from dpo_dist.insight.doctor.findings import RULES
from dpo_dist.insight.doctor.margins import margin_findings
from dpo_dist.insight.doctor.texts import read_benchmarks


def test_pairs_that_the_reference_orders_against_the_labels_by_far() -> None:
    per_token = np.random.default_rng(0).normal(-1, 0.1, (2, 100))
    per_token[:, 7], per_token[:, 8], per_token[:, 9] = (-3.5, -1), (-2.9, -1), (-0.2, -2.9)
    table = np.concatenate([40 * per_token, np.full((2, 100), 40.0)])
    origins = [f"a:{index}" for index in range(100)]
    margins, facts, [finding] = margin_findings(table, origins, "a", RULES)
    assert margins == pytest.approx(per_token[0] - per_token[1])
    assert (finding.rule, finding.examples) == ("reference_disagrees", ("a:7", "a:8"))
    assert (facts["reference_disagrees"], facts["reference_solved"]) == (0.02, 0.01)
    # The margin of a single token is within noise.
    assert margin_findings(np.array([[-5.0], [-0.1], [1], [1]]), ["a:1"], "a", RULES)[2] == []


def test_benchmark_files_of_several_kinds(tmp_path: Path) -> None:
    question = "one two three four five six seven eight nine"
    files = {
        "a.jsonl": json.dumps({"turns": [question, "and then"]}),
        "b.jsonl": json.dumps(question),
        "c.txt": f"\n{question}\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        benchmark = read_benchmarks([str(tmp_path / name)])
        line = 2 if name == "c.txt" else 1
        found = benchmark.item_in("nothing", f"{question.upper()}! and then more")
        assert found == f"{tmp_path / name}:{line}"
        assert benchmark.item_in(question.replace("five", "six")) is None


@pytest.mark.parametrize("content", ["", "{", '{"answer": "42"}', "\xff"])
def test_a_bad_benchmark_file_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError):
        read_benchmarks([str(tmp_path / "a.jsonl")])
