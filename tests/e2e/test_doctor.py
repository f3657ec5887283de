"""The doctor on the command line: faults, exit codes, its files beside a run's, the page in a browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Overrides
from tests.support.browser import Watched, chromium
from tests.support.doctor_data import as_messages, clean_pairs, write
from tests.support.launch import constants, run_verb, train
from tests.support.records import assistant, user

HOSTILE = (
    "</script><script>alert(1)</script><img src='http://example.com/x.png' onerror=alert(2)></style></div>"
    "<a href='javascript:alert(3)'>x</a> \u202egnp.exe\u202c \u200b\x07 <|im_end|>"
)
SHOWN = "dpo_dist.insight.doctor.examine.SHOWN_PAIRS"


def clean_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return list(map(as_messages, clean_pairs(count, seed)))


def faulty_records() -> list[dict[str, Any]]:
    """100 pairs of which some are identical, repeated, contradictory, cut; every rejected one has a space."""
    records = clean_records(100)
    for record in records:
        record["rejected"][0]["content"] = " " + record["rejected"][0]["content"]
    records[3]["rejected"] = records[3]["chosen"]
    records[7] = records[8]
    records[11] = {**records[12], "chosen": records[12]["rejected"], "rejected": records[12]["chosen"]}
    records[20]["prompt"] = [user(HOSTILE)]
    records[21]["chosen"] = [assistant(HOSTILE)]
    records[30]["chosen"] = [assistant("a long story " * 1000)]
    return records


def report(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tmp_path / "run" / "doctor" / "doctor.json").read_text())
    return content


def rules(tmp_path: Path) -> set[str]:
    return {finding["rule"] for finding in report(tmp_path)["findings"]}


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    return write(tmp_path / "faulty.jsonl", faulty_records())


def test_planted_faults_are_found(overrides: Overrides, faulty: str, tmp_path: Path) -> None:
    held_out = write(tmp_path / "eval.jsonl", [*clean_records(20, seed=5), clean_records(100)[50]])
    data = (f"data.train=[{faulty}]", f"data.eval=[{held_out}]")
    ended = run_verb("doctor", overrides(*data), cold=True)
    assert ended.code == 1, ended.output
    assert {"dropped", "duplicates", "contradictions", "response_truncated", "train_eval_leak"} <= rules(
        tmp_path
    )
    assert {"label_leak", "broken_text", "markup_in_text"} <= rules(tmp_path)
    [leak] = [found for found in report(tmp_path)["findings"] if found["rule"] == "train_eval_leak"]
    assert f"{held_out}:21" in leak["examples"][0]
    source = report(tmp_path)["sources"][0]
    assert source["dropped"]["identical_responses"]["examples"] == [f"{faulty}:4"]
    assert report(tmp_path)["exit_code"] == 1
    assert "identical_responses" in ended.output
    assert ended.output.splitlines()[-1] == f"page: {tmp_path}/run/doctor/doctor.html"
    assert "\x1b" not in ended.output
    again = run_verb("doctor", overrides(*data, "doctor.fail_on=never"))
    assert again.code == 0
    # Nothing is left to encode for training, and the doctor's files are not a result of the run.
    trained = train(overrides(*data, "run.resume=never", "trainer.max_steps=2"))
    assert "encoding" not in trained.output
    assert run_verb("doctor", overrides(*data, "trainer.max_steps=2")).code == 1
    assert train(overrides(*data, "run.resume=auto", "trainer.max_steps=2")).code == 0


def test_data_that_training_refuses_are_examined(overrides: Overrides, tmp_path: Path) -> None:
    half = write(tmp_path / "half.jsonl", [*clean_records(20), *[{"messages": [], "label": True}] * 20])
    ended = run_verb("doctor", overrides(f"data.train=[{half}]"))
    assert ended.code == 1, ended.output
    assert "too_many_dropped" in rules(tmp_path)
    assert report(tmp_path)["sources"][0]["kept"] == 20
    labelled = write(tmp_path / "kto.jsonl", [{"prompt": "q", "completion": "a", "label": True}] * 5)
    ended = run_verb("doctor", overrides(f"data.train=[{labelled}]"))
    assert "no_records" in rules(tmp_path), ended.output
    assert report(tmp_path)["sources"][0]["dropped"]["unpaired"]["count"] == 5
    one_sided = write(tmp_path / "sft.jsonl", [{"prompt": "q", "completion": "a"}] * 5)
    ended = run_verb("doctor", overrides(f"data.train=[{one_sided}]"))
    assert "training_refuses" in rules(tmp_path), ended.output


def test_without_a_model_texts_are_examined(overrides: Overrides, faulty: str, tmp_path: Path) -> None:
    given = [each for each in overrides(f"data.train=[{faulty}]") if not each.startswith("model.")]
    ended = run_verb("doctor", given)
    assert ended.code == 1, ended.output
    assert "without a model" in ended.output
    assert report(tmp_path)["model"] is None
    assert "duplicates" in rules(tmp_path)


def test_a_filled_store_gives_margins(overrides: Overrides, tmp_path: Path) -> None:
    clean = write(tmp_path / "clean.jsonl", clean_records(30))
    data = f"data.train=[{clean}]"
    ended = run_verb("doctor", overrides(data))
    assert ended.code == 0, ended.output
    assert "no log-probs of these pairs" in ended.output
    assert not (tmp_path / "store").exists()
    assert run_verb("precompute", overrides(data)).code == 0
    ended = run_verb("doctor", overrides(data))
    assert "reference: 30 of 30 pairs in the store (fp32, sdpa, cpu)" in ended.output
    assert report(tmp_path)["store"]["stored"] == 30
    assert report(tmp_path)["sources"][0]["margins"]["pairs"] == 30
    more = write(tmp_path / "more.jsonl", clean_records(40))
    assert "30 of 40 pairs" in run_verb("doctor", overrides(f"data.train=[{more}]")).output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def test_the_page_is_inert_in_a_browser(
    overrides: Overrides, faulty: str, tmp_path: Path, browser: Any
) -> None:
    ended = run_verb("doctor", overrides(f"data.train=[{faulty}]"), prepare=constants(**{SHOWN: 100}))
    address = f"file://{tmp_path}/run/doctor/doctor.html"
    watched = Watched(browser, viewport={"width": 390, "height": 800}, color_scheme="dark")
    page = watched.page
    page.goto(address)
    hidden = page.locator(".texts", has_text="javascript:alert(3)")
    assert hidden.count() >= 2, ended.output
    assert not hidden.first.is_visible()
    page.locator("label[for=all-texts]").click()
    assert hidden.first.is_visible()
    assert page.locator(".mark", has_text="U+202E").first.is_visible()
    assert page.locator("main a:not([href^='#']), img, script, iframe").count() == 0
    assert page.locator(".trained").count() > 0
    assert page.locator(".cut:not(.legend .cut)").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("svg.histogram").count() >= 3
    # Opened one by one, by the keyboard.
    page.locator("label[for=all-texts]").click()
    page.locator("#text-0").focus()
    page.keyboard.press("Space")
    assert page.locator("article .texts").first.is_visible()
    assert watched.errors == []
    assert watched.requests == [address]
    assert run_verb("doctor", overrides(f"data.train=[{faulty}]", "doctor.texts=false")).code == 1
    assert "javascript:alert" not in (tmp_path / "run" / "doctor" / "doctor.html").read_text()
