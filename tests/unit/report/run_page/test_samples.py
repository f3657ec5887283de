"""The samples section of a run's page: its choice of prompts, limits, damaged and hostile files."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.insight.pages.samples import choose, judged, samples_section
from tests.support.sample_files import GOOD, sample, write_samples

FRENCH = "La capitale de la France est Paris, une ville sur la Seine avec environ deux millions d'habitants."
BABBLE = "the same again and " * 60


def section(run: Path, metrics: Sequence[Mapping[str, float]] = ()) -> str:
    return samples_section(RunFolder(run), metrics)


def shown_prompts(html: str) -> list[str]:
    return re.findall(r"<summary[^>]*>(.*?) <small>", html)


def reasons(html: str) -> list[str]:
    return re.findall(r"<summary.*?<small>(.*?)</small></summary>", html)


@pytest.mark.parametrize(
    ("row", "faults"),
    [
        (sample(1), set()),
        (sample(1, ""), {"empty"}),
        (sample(1, " \n"), {"empty"}),
        (sample(1, policy_finished=False), {"unfinished"}),
        (sample(1, BABBLE), {"repeats", "longer"}),
        (sample(1, "I'm sorry, but I cannot help with that question of yours, at all."), {"refuses"}),
        (sample(1, "I'm sorry, I cannot help.", reference="Sorry, I can't.", policy_tokens=16), set()),
        (sample(1, FRENCH), {"language"}),
        (sample(1, "In Paris."), {"shorter"}),
        (sample(1, policy_tokens=None, policy_finished="no", reference=7, chosen=None), set()),
        (sample(1, policy_tokens=10**400), set()),
    ],
)
def test_faults_of_a_response(row: dict[str, object], faults: set[str]) -> None:
    assert set(judged(row).faults) == faults


def test_the_worst_of_each_fault_and_the_extremes_of_change_are_shown_first() -> None:
    rows = [judged(sample(number)) for number in range(30)]
    rows[4] = judged(sample(4, policy_finished=False, policy_tokens=20))
    rows[5] = judged(sample(5, policy_finished=False, policy_tokens=30))
    rows[6] = judged(
        sample(6, "Berlin lies elsewhere, and so do Rome, Oslo, Bern, Kyiv, Riga, Vienna, Minsk.")
    )
    rows[7] = judged(sample(7, GOOD.replace("two", "three")))
    chosen = choose(rows, 10)
    ids = [int(name, 16) for name in chosen]
    assert ids[0] == 5
    assert set(ids) == {5, 6, 7, 4, ids[2]}
    assert ids[-1] == 4
    assert chosen[f"{6:016x}"] == ["differs most from the reference's"]
    assert chosen[f"{7:016x}"] == ["differs least from the reference's"]
    assert choose(rows[::-1], 10) == chosen
    assert len(choose([judged(sample(number, "", policy_finished=False)) for number in range(99)], 10)) == 10


def test_responses_of_the_last_the_previous_and_the_first_step(tmp_path: Path) -> None:
    for step, word in ((0, "three"), (100, "one"), (200, "four"), (300, "five"), (1000300, "six")):
        write_samples(tmp_path, step, [sample(1, GOOD.replace("two", word))])
    (tmp_path / "samples" / "step-later.jsonl").write_text("{}")
    html = section(tmp_path)
    labels = re.findall(r"<h4>([^<]+)", html)
    assert [label.strip() for label in labels] == [
        "prompt", "reference", "step 1000300", "step 300", "step 100", "chosen",
    ]  # fmt: skip
    assert re.findall("<mark>(.*?)</mark>", html)[:3] == ["six", "five", "one"]
    assert "% changed since step 300" in html
    assert shown_prompts(html) == ["Question 1?"]
    assert "qa: the response after step 1,000,300 differs most" in reasons(html)[0]
    assert "1 held-out prompt: none is empty" in html


def test_step_0_is_shown_if_the_policy_did_not_start_as_the_reference(tmp_path: Path) -> None:
    for step, word in ((0, "one"), (100, "four"), (200, "five"), (300, "six")):
        write_samples(tmp_path, step, [sample(1, GOOD.replace("two", word))])
    labels = re.findall(r"<h4>(step [^<]+)", section(tmp_path))
    assert [label.strip() for label in labels] == ["step 300", "step 200", "step 0"]


def test_faults_of_all_prompts_are_counted(tmp_path: Path) -> None:
    rows = [sample(number) for number in range(6)]
    rows += [sample(7, ""), sample(8, policy_finished=False), sample(9, policy_finished=False)]
    rows += [sample(10, GOOD.replace("two", "three"))]
    long = " ".join(f"The city of number {number} has a river." for number in range(99))
    rows += [sample(11, f"{long} One end.", reference=f"{long} Another end.", policy_finished=False)]
    write_samples(tmp_path, 5, rows)
    html = section(tmp_path)
    assert "11 held-out prompts: 1 is empty; 3 do not end; " in html
    assert "; 1 has the same words as the reference's." in html
    assert html.count("<details") == html.count("</details>")
    assert html.count(" open>") == 2


def test_without_the_reference_nothing_is_compared(tmp_path: Path) -> None:
    unknown = {"reference": None, "reference_tokens": None, "reference_finished": None}
    write_samples(tmp_path, 0, [sample(1, **unknown)])
    write_samples(tmp_path, 10, [sample(1, "", **unknown)])
    html = section(tmp_path)
    assert "not known" in html
    assert "step 0" in html
    assert "<mark>" not in html


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    assert section(tmp_path) == ""
    write_samples(tmp_path, 100, [sample(1), sample(2)])
    write_samples(tmp_path, 200, [sample(1), sample(2)])
    file = RunFolder(tmp_path).samples_file(200)
    file.write_bytes(
        b'[1]\n\xff\xfe\n{"policy": 3}\n' + b"[" * 100_000 + b"\n" + file.read_bytes() + b'{"cut'
    )
    html = section(tmp_path)
    assert "5 lines of the file cannot be read" in html
    assert len(shown_prompts(html)) == 2
    RunFolder(tmp_path).samples_file(300).write_bytes(b"\0\0\n")
    RunFolder(tmp_path).samples_file(100).unlink()
    RunFolder(tmp_path).samples_file(100).mkdir()
    assert len(shown_prompts(section(tmp_path))) == 2


def test_its_size_is_bounded(tmp_path: Path) -> None:
    huge = "\u202e" * 30_000
    rows = [sample(number, huge, prompt=huge, chosen=huge, source=huge) for number in range(12)]
    for step in (100, 200, 300):
        write_samples(tmp_path, step, rows)
    html = section(tmp_path)
    assert len(html.encode()) < 1_000_000
    assert 0 < len(shown_prompts(html)) < 10
    assert "would make this page too large" in html
    assert "characters not shown" in html


def test_only_the_first_rows_of_a_long_file_are_considered(tmp_path: Path) -> None:
    write_samples(tmp_path, 100, [sample(number, "yes", reference="no") for number in range(300)])
    html = section(tmp_path)
    assert "Only the first 200 rows of the file are considered." in html
    assert "to 200 held-out prompts" in html


def test_texts_are_inert(tmp_path: Path) -> None:
    hostile = "</details><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x07"
    write_samples(
        tmp_path, 1, [sample(1, hostile, prompt=hostile, source=hostile, reference=hostile, chosen=hostile)]
    )
    html = section(tmp_path)
    assert "<script" not in html
    assert "<img" not in html
    assert "\u202e" not in html


def test_metrics_over_steps(tmp_path: Path) -> None:
    write_samples(tmp_path, 100, [sample(1)])
    rows: list[dict[str, float]] = [{"step": step, "eval_loss": 1.0} for step in range(5)]
    rows += [
        {"step": step, "eval_samples/length": 100.0 + step, "eval_samples/finished": 0.5}
        for step in range(0, 1001, 10)
    ]
    rows.append({"step": 1010, "eval_samples/length": math.nan, "eval_samples/reference_length": 30})
    html = section(tmp_path, rows)
    table = re.search("<table.*?</table>", html)
    assert table is not None
    cells = re.findall("<td>(.*?)</td>", table[0])
    assert len(cells) == 8 * 3
    assert cells[:6] == ["reference", "30", "", "0", "100", "50 %"]
    assert cells[-3:] == ["870", "970", "50 %"]
    assert "<table" not in section(tmp_path)
