"""The keys of `doctor`: the examination of the data; see `schema`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dpo_dist.config.fields import key

FailOn = StrEnum("FailOn", ["warning", "error", "never"])


@dataclass(frozen=True)
class DoctorConfig:
    """The examination of the data by `python -m dpo_dist.doctor`."""

    thresholds: Any = key(
        None,
        "Other thresholds of rules, by name: `{duplicates: 0.05}`; docs/doctor.md lists the rules.",
        accepts="null or a mapping of rules to numbers",
    )
    fail_on: FailOn = key(FailOn.warning, "Lowest level of a finding that makes the exit code 1.")
    benchmarks: list[str] = key(
        [], "Files of benchmark prompts, .jsonl or .txt, that training data should not contain."
    )
    shown_pairs: int = key(
        4, "Pairs of each source to show decoded, besides examples of findings; 0: none.", at_least=0
    )
    texts: bool = key(True, "Whether the page has texts of records; they are hidden until clicked.")
