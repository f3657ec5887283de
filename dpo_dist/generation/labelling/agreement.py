"""Outcome of an item's judgements; agreement of annotators with themselves and with each other."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dpo_dist.generation.labelling.events import Judgement, Slot, Verdict
from dpo_dist.generation.text_table import table_text
from dpo_dist.number_text import percent

_LABELS = [Verdict.first, Verdict.second, Verdict.tie]


Undecided = StrEnum("Undecided", ["tie", "disagreement", "skipped", "not_judged"])
"""Reasons why judgements give no pair."""


def outcome(judgements: Sequence[Judgement]) -> int | Undecided:
    """Return the index of the better of an item's responses, or why there is none.

    Every annotator has one vote, for the response that more of their judgements prefer; the majority decides.
    """
    sums: dict[str, int] = defaultdict(int)
    for one in judgements:
        sums[one.annotator] += (one.verdict is Verdict.first) - (one.verdict is Verdict.second)
    votes = sum((total > 0) - (total < 0) for total in sums.values())
    if votes:
        return 0 if votes > 0 else 1
    verdicts = {one.verdict for one in judgements} - {Verdict.skip}
    if not verdicts:
        return Undecided.skipped if judgements else Undecided.not_judged
    return Undecided.tie if verdicts == {Verdict.tie} else Undecided.disagreement


def agreement(judgements: Iterable[Judgement]) -> dict[str, Any]:
    """Return counts and agreement of the judgements, skips aside, as a JSON object.

    Returns:
        `annotators`: for each their counts, median seconds, the share of decided judgements for the left
        side (position bias if far from 0.5), and `self`: first against repeated judgement of an item.
        `between`: every two annotators on the items that both judged. Each comparison has `items`, `agreed`
        (share of equal verdicts) and `kappa` (Cohen 1960, chance-corrected; null if undefined).
    """
    by_annotator: dict[str, dict[Slot, Judgement]] = defaultdict(dict)
    skipped: dict[str, int] = defaultdict(int)
    for one in judgements:
        if one.verdict is Verdict.skip:
            skipped[one.annotator] += 1
        else:
            by_annotator[one.annotator][one.slot] = one
    names = sorted(by_annotator.keys() | skipped.keys())
    return {
        "annotators": {name: _of_annotator(by_annotator[name], skipped[name]) for name in names},
        "between": [
            {"annotators": [one, other], **_between(by_annotator[one], by_annotator[other])}
            for one, other in itertools.combinations(names, 2)
        ],
    }


def _of_annotator(given: dict[Slot, Judgement], skipped: int) -> dict[str, Any]:
    verdicts = [one.verdict for one in given.values()]
    lefts = [
        (one.left == 0) == (one.verdict is Verdict.first)
        for one in given.values()
        if one.verdict is not Verdict.tie
    ]
    seconds = [one.seconds for one in given.values()]
    repeats = [slot for slot in given if slot.is_repeat and Slot(slot.item) in given]
    return {
        "judged": len(given),
        "ties": verdicts.count(Verdict.tie),
        "skipped": skipped,
        "median_seconds": statistics.median(seconds) if seconds else None,
        "left_share": sum(lefts) / len(lefts) if lefts else None,
        "self": compared(
            [given[Slot(slot.item)].verdict for slot in repeats], [given[slot].verdict for slot in repeats]
        ),
    }


def _between(one: dict[Slot, Judgement], other: dict[Slot, Judgement]) -> dict[str, Any]:
    both = [slot for slot in one if slot in other and not slot.is_repeat]
    return compared([one[slot].verdict for slot in both], [other[slot].verdict for slot in both])


def compared(first: Sequence[Verdict], second: Sequence[Verdict]) -> dict[str, Any]:
    """Return the agreement of two lists of verdicts on the same items."""
    items = len(first)
    if not items:
        return {"items": 0, "agreed": None, "kappa": None}
    agreed = sum(one == other for one, other in zip(first, second, strict=True)) / items
    return {"items": items, "agreed": agreed, "kappa": _kappa(first, second)}


def agreement_table(found: dict[str, Any]) -> str:
    """Return the result of `agreement` as a table for the terminal."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in (
        "annotator",
        "judged",
        "ties",
        "skipped",
        "seconds",
        "left",
        "compared",
        "agreed",
        "kappa",
    ):
        table.add_column(heading, justify="left" if heading == "annotator" else "right")
    for name, one in found["annotators"].items():
        counts = (str(one[key]) for key in ("judged", "ties", "skipped"))
        table.add_row(
            Text(name),
            *counts,
            _number(one["median_seconds"], ".1f"),
            _share(one["left_share"]),
            *_cells(one["self"]),
        )
    for one in found["between"]:
        if one["items"]:
            table.add_row(Text(" and ".join(one["annotators"])), *[""] * 5, *_cells(one))
    return table_text(table)


def _cells(compared: dict[str, Any]) -> tuple[str, ...]:
    return str(compared["items"]), _share(compared["agreed"]), _number(compared["kappa"], ".2f")


def _number(value: float | None, format_: str) -> str:
    return "-" if value is None else format(value, format_)


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _kappa(first: Sequence[Verdict], second: Sequence[Verdict]) -> float | None:
    if len({*first, *second}) == 1:
        return None  # only one verdict was ever given: chance agreement is 1
    from sklearn.metrics import cohen_kappa_score  # noqa: PLC0415  (slow)

    kappa = float(cohen_kappa_score(list(map(str, first)), list(map(str, second)), labels=_LABELS))
    return kappa if math.isfinite(kappa) else None
