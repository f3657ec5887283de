"""Invented preference pairs without faults, into which tests plant faults; examination of such pairs."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.insight.doctor.examine import Diagnosis, examine
from dpo_dist.insight.doctor.findings import Finding, Level, with_thresholds
from tests.support.records import assistant, user

Pair = dict[str, Any]

_TEXT = (
    "the of and to in is you that it he was for on are with as his they be at one have this from or had by "
    "hot but some what there we can out other were all your when up use word how said an each she which do "
    "their time if will way about many then them would write like so these her long make thing see him two "
    "has look more day could go come did my sound no most number who over know water than call first people "
    "may down side been now find any new work part take get place made live where after back little only "
    "round man year came show every good me give our under name very through just form much great think say "
    "help low line before turn cause same mean differ move right boy old too does tell sentence set three "
    "want air well also play small end put home read hand port large spell add even land here must big high "
    "such follow act why ask men change went light kind off need house picture try us again animal point"
)
_WORDS = _TEXT.split()


def _text(rng: random.Random, least: int, most: int) -> str:
    words = rng.choices(_WORDS, k=rng.randint(least, most))
    return " ".join(words).capitalize() + rng.choice(".!?")


def clean_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Return pairs of random words whose sides have the same distribution."""
    rng = random.Random(seed)
    return [
        {"prompt": _text(rng, 8, 40), "chosen": _text(rng, 5, 80), "rejected": _text(rng, 5, 80)}
        for _ in range(count)
    ]


def as_messages(pair: Pair) -> Pair:
    """Return a pair of texts as one of messages."""
    sides = {name: [assistant(pair[name])] for name in ("chosen", "rejected")}
    return {"prompt": [user(pair["prompt"])], **sides}


def write(file: Path, records: Sequence[Mapping[str, Any]]) -> str:
    """Write records as lines of JSON; return the path."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def examined(
    folder: Path,
    train: Sequence[Mapping[str, Any]],
    evaluation: Sequence[Mapping[str, Any]] = (),
    tokenizer: Any = None,
    config: Mapping[str, Any] | None = None,
    thresholds: Mapping[str, float] | None = None,
    **options: Any,
) -> Diagnosis:
    """Return the report on one training source and, if given, one evaluation source."""
    sources = [SourceConfig(path=write(folder / "train.jsonl", train))]
    eval_sources = [SourceConfig(path=write(folder / "eval.jsonl", evaluation))] if evaluation else []
    data = DataConfig(train=sources, eval=eval_sources, processes=1, **(config or {}))
    return examine(data, tokenizer, with_thresholds(thresholds), **options)


def of_rule(report: Diagnosis, rule: str) -> list[Finding]:
    """Return the findings of a rule."""
    return [finding for finding in report.findings if finding.rule == rule]


def alarms(report: Diagnosis) -> list[str]:
    """Return the findings above a note."""
    return [f"{one.rule}: {one.text}" for one in report.findings if one.level is not Level.note]


def lines(finding: Finding) -> list[int]:
    """Return the first line number of each example."""
    return [int(example.split(", ")[0].rpartition(":")[2]) for example in finding.examples]
