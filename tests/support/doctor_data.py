"""Invented preference pairs without faults, into which tests plant faults; their examination; a diagnosis."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.tools.doctor.examine import Diagnosis, examine
from dpo_dist.tools.findings import Finding, Level
from dpo_dist.tools.pages.blocks import Answers
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
    sides = {name: [assistant(pair[name])] for name in ("chosen", "rejected")}
    return {"prompt": [user(pair["prompt"])], **sides}


def agent_records(count: int, kinds: int = 1) -> list[Pair]:
    """Return conversations with one of so many long system messages, in turn."""
    systems = [
        {"role": "system", "content": _text(random.Random(-1 - kind), 150, 150)} for kind in range(kinds)
    ]
    records = list(map(as_messages, clean_pairs(count)))
    return [
        {**record, "prompt": [systems[at % kinds], *record["prompt"]]} for at, record in enumerate(records)
    ]


def write(file: Path, records: Iterable[Mapping[str, Any]]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def examined(
    folder: Path,
    train: Sequence[Mapping[str, Any]],
    evaluation: Sequence[Mapping[str, Any]] = (),
    tokenizer: Any = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Diagnosis:
    """Return the report on one training source and, if given, one evaluation source."""
    sources = [SourceConfig(path=write(folder / "train.jsonl", train))]
    eval_sources = [SourceConfig(path=write(folder / "eval.jsonl", evaluation))] if evaluation else []
    data = DataConfig(train=sources, eval=eval_sources, **(config or {}))
    return examine(data, tokenizer, **options)


def of_rule(report: Diagnosis, rule: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.rule == rule]


def alarms(report: Diagnosis) -> list[str]:
    """Return the findings above a note."""
    return [f"{one.rule}: {one.text}" for one in report.findings if one.level is not Level.note]


def lines(finding: Finding) -> list[int]:
    """Return the first line number of each example."""
    return [int(example.split(", ")[0].rpartition(":")[2]) for example in finding.examples]


LENGTHS = {
    **{"count": 4, "mean": 7.0, "smallest": 0, "largest": 30, "percentiles": {25: 1.0, 50: 3.0, 95: 30.0}},
}
SIDE = {"characters": LENGTHS, "tokens": LENGTHS, "cut": 1, "cut_tokens": 20}
EMPTY: dict[str, Any] = {
    **{"label": "a", "path": "a", "is_eval": False, "read": 0, "kept": 0, "pairs": 0, "held_out": None},
    **{
        "dropped": {},
        "changed": {},
        "sides": {},
        "images": None,
    },
    "leaks": [],
}
ACROSS = {"duplicates": 5, "contradictions": 0, "repeated_prompts": 0, "leaked_prompts": 0}


def diagnosis(text: str) -> Diagnosis:
    """A diagnosis with `text` wherever data, paths and labels of a user can occur."""
    test = {"feature": "first_word", "accuracy": 0.9, "low": 0.8, "high": 0.95, "pairs": 8, "detail": text}
    source = EMPTY | {
        **{"label": text, "path": text, "read": 10, "kept": 8, "pairs": 8},
        "dropped": {"empty_response": {"count": 2, "examples": [f"{text}:1", f"{text}:2"]}},
        "changed": {"prompt_truncated": 3},
        "sides": dict.fromkeys(("prompt", "chosen", "rejected"), SIDE),
        "leaks": [test],
    }
    findings = tuple(
        Finding(f"rule_{level}", level, text, text, 3, 0.3, (f"{text}:4",), text)
        for level in (Level.error, Level.warning, Level.note)
    )
    chosen = ("chosen", text, [(text, "trained"), (text, "special "), (text, "cut")])
    pair = Answers(f"{text}:1", f"rule; dropped: {text}", [("9 not shown", "omitted")], [chosen])
    return Diagnosis([source], ACROSS, findings, Path(text), (pair,))
