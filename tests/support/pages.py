"""Code blocks of the documentation, and a process that runs them."""

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(?:# (\S+\.py)\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, the file that its first line names, and the rest."""

    language: str
    file: str
    text: str


def blocks_of(page: str, section: str = "") -> list[Block]:
    """The blocks of a page of the project, or of the section with this heading, that have a language."""
    text = (ROOT / page).read_text()
    if section:
        text = re.split(rf"^#+ {section}$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^##+ ", text, flags=re.MULTILINE)[0]
    return [Block(*found) for found in _BLOCK.findall(text)]


def in_process(work: Callable[..., Any], *arguments: Any, seconds: float = 400) -> None:
    """Run `work` in a process forked from the warm parent; its traceback fails the test."""
    from tests.support.warm import context, start_parent

    start_parent()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_reported, args=(sender, work, arguments))
    process.start()
    assert receiver.poll(seconds), "the process takes too long"
    error = receiver.recv()
    process.join(240)
    assert error is None, error


def _reported(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments)
        sender.send(None)
    except BaseException:
        sender.send(traceback.format_exc())
