"""A name or text of data cannot write records of its own into a log, or control a terminal."""

import io
import logging

from dpo_dist.insight.console import _logging_to

ATTACKS = (
    "a\n2026-01-01 00:00:00 dpo_dist INFO forged\x1b[2J\x1b]52;c;eA==\x07\x1b]8;;http://x\x07\u202e\x9b.jsonl"
)


def test_a_record_of_the_log_is_one_record() -> None:
    stream = io.StringIO()
    with _logging_to(stream):
        logging.getLogger("dpo_dist.test").warning("the file %s is damaged", ATTACKS)
        try:
            raise ValueError(ATTACKS)
        except ValueError:
            logging.getLogger("dpo_dist.test").exception("a bug")
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if not line.startswith("  ") and "dpo_dist.test" not in line] == []
    assert sum("forged" in line and line.startswith("  ") for line in lines) == 2
    assert all(character.isprintable() or character == "\n" for character in stream.getvalue())
