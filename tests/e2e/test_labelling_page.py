"""The labelling page in a real browser: keyboard, a step back, reload, a killed server, hostile texts."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.data.formats import read_records
from dpo_dist.data.records import PreferenceRecord
from tests.support.browser import Watched, chromium
from tests.support.launch import ROOT, environment

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><style>*{display:none}</style>"
    "</div></body><iframe src='http://example.com'></iframe> \u202egnirts javascript:alert(3) " + "long" * 500
)
ITEMS = 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {n} {HOSTILE if n % 2 else ''}"}],
            "chosen": [{"role": "assistant", "content": f"good {n} {HOSTILE}"}],
            "rejected": [{"role": "assistant", "content": f"bad {n}"}],
        }
        for n in range(ITEMS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Command:
    """The running command; `url` is the address that it printed."""

    def __init__(self, data: Path, *overrides: str):
        self.folder = data.parent / "run"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dpo_dist.pairs", "pairs.method=people"),
                *(f"data.train=[{data}]", f"run.dir={self.folder}"),
                *overrides,
            ],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.screen = ""
        assert self.process.stdout is not None
        deadline = time.monotonic() + 240
        while "http" not in self.screen:
            assert self.process.poll() is None, self.screen + self.process.stdout.read()
            assert time.monotonic() < deadline
            self.screen += self.process.stdout.readline()
        self.url = re.search(r"http://\S+", self.screen)[0]

    def end(self, how: signal.Signals = signal.SIGINT) -> str:
        self.process.send_signal(how)
        rest, _ = self.process.communicate(timeout=240)
        return rest

    @property
    def events(self) -> list[dict]:
        return [
            json.loads(line) for line in (self.folder / "pairs/judgements.jsonl").read_text().splitlines()
        ]


@contextlib.contextmanager
def running(data: Path, *overrides: str) -> Iterator[Command]:
    command = Command(data, *overrides)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


def start(watched: Watched, url: str, name: str = "Ada") -> None:
    watched.page.goto(url)
    watched.page.fill("[name=annotator]", name)
    watched.page.keyboard.press("Enter")
    watched.page.wait_for_selector("#left")


def press(watched: Watched, key: str) -> None:
    """Press a key and wait until the next comparison is on the screen."""
    watched.page.wait_for_timeout(300)  # a second press is ignored for so long
    with watched.page.expect_navigation():
        watched.page.keyboard.press(key)


def good_side(watched: Watched) -> str:
    return "1" if "good" in watched.page.inner_text("#left") else "2"


def test_a_person_labels_by_keyboard_through_reload_and_kill(browser, data) -> None:
    watched = Watched(browser)
    page = watched.page
    with running(data) as command:
        start(watched, command.url)
        sides = []
        for number in range(6):
            sides.append(good_side(watched))
            press(watched, {"1": ("1", "ArrowLeft"), "2": ("2", "ArrowRight")}[sides[-1]][number % 2])
        assert set(sides) == {"1", "2"}
        assert "6 judged, 6 to go" in page.inner_text("header")
        judged = page.inner_text("#left")
        press(watched, "0")
        page.go_back()
        assert page.inner_text("#left") == judged
        press(watched, good_side(watched))
        page.reload()
        assert "7 judged, 5 to go" in page.inner_text("header")
        open_item = page.inner_text("#left")
        command.end(signal.SIGKILL)
    with running(data) as command:
        start(watched, command.url)
        assert page.inner_text("#left") == open_item
        for _ in range(3):
            press(watched, good_side(watched))
        press(watched, "s")
        press(watched, "t")
        page.wait_for_selector("#end")
        assert "12 judged, 0 to go" in page.inner_text("header")
        screen = command.end()
        assert command.process.returncode == 0, screen
        assert "12 judgements" in screen
        assert len(command.events) == ITEMS + 1
    assert watched.errors == []
    assert {url.split("/")[2].split(":")[0] for url in watched.requests} == {"127.0.0.1"}
    file = command.folder / "pairs/pairs.jsonl"
    pairs = list(read_records(str(file)))
    assert len(pairs) == 10
    for pair in pairs:
        assert isinstance(pair, PreferenceRecord)
        assert [str(response)[:3] for response in pair.responses] == ["goo", "bad"]
    provenance = json.loads(file.read_text().splitlines()[0])["provenance"]
    assert provenance["method"] == "people"
    assert provenance["judgements"][0]["annotator"] == "Ada"
    assert provenance["judgements"][0]["seconds"] > 0
    agreement = json.loads((command.folder / "pairs/agreement.json").read_text())
    assert agreement["items"] == {
        **{"comparisons_decided": 10, "comparisons_skipped": 1, "comparisons_tied": 1},
    }
    summary = json.loads((command.folder / "pairs/pairs.jsonl.summary.json").read_text())
    assert (summary["pairs"], summary["settings"]["method"]) == (10, "people")
    log = (command.folder / "logs/rank-0.log").read_text()
    assert command.url.rstrip("/").rpartition("/")[2] not in log


def test_two_annotators_on_a_screen_and_a_phone(browser, data) -> None:
    with running(data) as command:
        ada = Watched(browser, color_scheme="dark")
        start(ada, command.url)
        press(ada, "1")
        phone = Watched(browser, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
        start(phone, command.url, "Ben")
        left, right = (phone.page.locator(name).bounding_box() for name in ("#left", "#right"))
        assert right["y"] >= left["y"] + left["height"]
        assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
        for _ in range(3):
            with phone.page.expect_navigation():
                phone.page.tap("[value=left]")
        assert ada.errors == phone.errors == []
        screen = command.end()
    assert "Ben: 3 judged" in screen
    assert Counter(event["annotator"] for event in command.events) == {"Ada": 1, "Ben": 3}
