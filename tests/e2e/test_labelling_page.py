"""The labelling page in a real browser: keyboard, a step back, reload, a killed server, hostile texts."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from tests.support.browser import Watched, chromium
from tests.support.launch import running, wait_until
from tests.support.records import assistant, jsonl, user

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><style>*{display:none}</style>"
    "</div></body><iframe src='http://example.com'></iframe> \u202egnirts javascript:alert(3) " + "long" * 500
)
ITEMS = 8
LEFT = ".response >> nth=0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@contextlib.contextmanager
def labelling(folder: Path) -> Iterator[Any]:
    """The running command, with the address that it printed as `url`."""
    rows = [
        {
            "prompt": [user(f"question {n} {HOSTILE if n % 2 else ''}")],
            "chosen": [assistant(f"good {n} {HOSTILE}")],
            "rejected": [assistant(f"bad {n}")],
        }
        for n in range(ITEMS)
    ]
    overrides = ["pairs.method=people", f"data.train=[{jsonl(folder, *rows)}]", f"run.dir={folder}/run"]
    with running("pairs", overrides, folder / "screen.txt") as command:
        command.screen.write_text("")  # of a command before
        wait_until(lambda: "Ctrl-C" in command.screen.read_text(), command)
        command.url = re.findall(r"http://\S+", command.screen.read_text())[0]
        yield command


def start(watched: Watched, url: str) -> None:
    watched.page.goto(url)
    first = watched.page.inner_text("body")
    assert f"{ITEMS} comparisons" in first
    assert all(key in first for key in ("1 or", "2 or", "0 or", "s skip"))
    watched.page.fill("[name=annotator]", "Ada")
    watched.page.keyboard.press("Enter")
    watched.page.wait_for_selector(LEFT)


def press(watched: Watched, key: str) -> None:
    """Press a key and wait until the next comparison is on the screen."""
    watched.page.wait_for_timeout(300)  # a second press is ignored for so long
    with watched.page.expect_navigation():
        watched.page.keyboard.press(key)


def good_side(watched: Watched) -> str:
    return "1" if "good" in watched.page.inner_text(LEFT) else "2"


def test_a_person_labels_by_keyboard_through_reload_and_kill(browser: Any, tmp_path: Path) -> None:
    watched = Watched(browser)
    page = watched.page
    with labelling(tmp_path) as command:
        start(watched, command.url)
        sides = []
        for number in range(4):
            sides.append(good_side(watched))
            press(watched, {"1": ("1", "ArrowLeft"), "2": ("2", "ArrowRight")}[sides[-1]][number % 2])
        assert set(sides) == {"1", "2"}
        judged = page.inner_text(LEFT)
        press(watched, "0")
        page.go_back()
        assert page.inner_text(LEFT) == judged
        press(watched, good_side(watched))
        page.reload()
        assert "5 judged, 3 to go" in page.inner_text("header")
        open_item, address = page.inner_text(LEFT), command.url
    with labelling(tmp_path) as command:
        start(watched, command.url)
        assert page.inner_text(LEFT) == open_item
        for key in (good_side(watched), "s", "t"):
            press(watched, key)
        assert page.get_by_text("All comparisons are judged").is_visible()
        assert "8 judged, 0 to go" in page.inner_text("header")
        os.kill(command.pid, signal.SIGINT)
        command.join(240)
        assert command.exitcode == 0, command.screen.read_text()
        assert "8 judgements" in command.screen.read_text()
    assert watched.errors == []
    assert {url.split("/")[2].split(":")[0] for url in watched.requests} == {"127.0.0.1"}
    folder = tmp_path / "run/pairs"
    assert len((folder / "judgements.jsonl").read_text().splitlines()) == ITEMS + 1
    pairs = [pair for pair in read_records(str(folder / "pairs.jsonl")) if isinstance(pair, PreferenceRecord)]
    assert [[str(response)[:3] for response in pair.responses] for pair in pairs] == [["goo", "bad"]] * 6
    provenance = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])["provenance"]
    assert provenance["judgements"][0]["annotator"] == "Ada"
    assert json.loads((folder / "agreement.json").read_text())["items"] == {
        **{"comparisons_decided": 6, "comparisons_not_judged": 1, "comparisons_without_majority": 1},
    }
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert address.rstrip("/").rpartition("/")[2] not in log
