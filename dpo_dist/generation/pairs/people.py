"""Pairs labelled by people: serve the page until it is interrupted, then write pairs and agreement."""

import itertools
import json
import math
import signal
import socket
import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from types import FrameType
from typing import Any, TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

from dpo_dist.config.identity import plain
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verb_options import PairsMethod
from dpo_dist.data.formats import read_records
from dpo_dist.data.sources import pinned
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import plain as finite
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.text import counted, percent
from dpo_dist.generation.pairs.files import (
    check_output,
    describe_totals,
    good_records,
    pair_fields,
    table_text,
    write_results,
)
from dpo_dist.generation.pairs.label_server import HOST, LabelServer, Session
from dpo_dist.generation.pairs.labelling import (
    Item,
    Judgement,
    Labelling,
    Plan,
    Slot,
    Verdict,
    draw_items,
    opened_log,
)
from dpo_dist.generation.pairs.start import output_file

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


Say: TypeAlias = Callable[[str], None]

_MOST_ITEMS = 1000
_LINE_EVERY = 25
_COMPARISONS = {
    "pairs": "comparisons_decided",
    Undecided.tie: "comparisons_tied",
    Undecided.disagreement: "comparisons_without_majority",
    Undecided.skipped: "comparisons_skipped",
    Undecided.not_judged: "comparisons_not_judged",
}
"""Names of the counts beside the pairs, by outcome."""


def label_pairs(config: RunConfig, say: Say, show: Say) -> None:
    """Serve the page until Ctrl-C or SIGTERM; then write the pairs of all judgements, and their agreement.

    Args:
        config: of the run.
        say: prints and logs a line.
        show: prints a line without logging it.

    Raises:
        DataError: a source cannot be read, or has no two responses to a prompt.
        ConfigError: the port is in use, another process serves this session, or the file of pairs exists and
            was made with other settings.
    """
    folder, people = RunFolder.of(config), config.pairs.people
    settings = {
        "method": str(PairsMethod.people),
        "sources": plain(config.data.train),
        "limit": config.pairs.limit,
        "seed": config.pairs.seed,
    }
    check_output(output_file(config), settings)
    items = {item.key: item for item in _draw(config, say)}
    plan = Plan(config.pairs.seed, people.overlap, people.repeats)
    with opened_log(folder.pairs_judgements) as log:
        state = Labelling(items, plan, log.events)
        if state.foreign:
            say(
                f"{state.foreign:,} earlier judgements are of comparisons that these data and "
                "pairs.seed do not give: they stay in the log and are not used"
            )
        session = Session(items, state, log, people.blurred, _reporter(say))
        with LabelServer(session, people.port) as server:
            _serve(server, show)
    _write(config, items, state, settings, say)


def _draw(config: RunConfig, say: Say) -> list[Item]:
    counts: Counter[str] = Counter()
    records = chain.from_iterable(
        good_records(read_records(pinned(source, None)), source, config.data, say)
        for source in config.data.train
    )
    items = draw_items(records, config.pairs.limit or _MOST_ITEMS, config.pairs.seed, counts)
    rest = _listed((reason, number) for reason, number in counts.most_common() if reason != "read")
    say(
        f"{counted(len(items), 'comparison')} of {counted(counts['read'], 'record')}"
        + (f" ({rest})" if rest else "")
    )
    if not items:
        raise DataError(
            "there is nothing to compare",
            where="data.train",
            got=rest or "no record",
            expected="records with two responses or more",
            remedy="name other data, or make responses first: pairs.method=samples",
        )
    return items


def _reporter(say: Say) -> Callable[[Labelling], None]:
    """Return a function that prints the annotators' counts after every few judgements."""

    def report(state: Labelling) -> None:
        number = state.number
        if number % _LINE_EVERY == 0 and number:
            say(_counts(state))

    return report


def _counts(state: Labelling) -> str:
    progress = {name: state.progress(name) for name in state.annotators}
    each = ", ".join(f"{name} {one.done} ({one.remaining} to go)" for name, one in progress.items())
    return f"{sum(one.done for one in progress.values()):,} judgements" + (f": {each}" if each else "")


def _serve(server: LabelServer, show: Say) -> None:
    """Print the address and serve until SIGINT or SIGTERM."""
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    handlers = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    worker = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    worker.start()
    try:
        # The address gives access to the data, so it is in no log file.
        show(f"open {server.url}")
        show(
            f"from another machine first: ssh -N -L {server.server_port}:{HOST}:{server.server_port} "
            f"{socket.gethostname()}"
        )
        show("Ctrl-C ends and writes the pairs; the same command continues")
        while not stop.wait(1.0):  # a wait without end would keep signals from the main thread
            pass
    finally:
        server.shutdown()
        worker.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _write(
    config: RunConfig, items: Mapping[str, Item], state: Labelling, settings: Mapping[str, Any], say: Say
) -> None:
    folder, counts = RunFolder.of(config), Counter[str]()
    judgements = state.judgements
    found = agreement(judgements)
    records = list(_pairs(items, judgements, counts))
    say(_counts(state))
    if judgements:
        say(agreement_table(found))
        write_text(folder.pairs_agreement, json.dumps(finite(found | {"items": counts}), indent=2) + "\n")
    named = Counter({_COMPARISONS[name]: number for name, number in counts.items()})
    if records:
        write_results(output_file(config), records, settings, named, say)
    else:
        say(f"no pair is decided yet: {describe_totals(named)}")


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts)


def _pairs(
    items: Mapping[str, Item], judgements: list[Judgement], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    by_item: dict[str, list[Judgement]] = defaultdict(list)
    for one in judgements:
        by_item[one.slot.item].append(one)
    for key, item in items.items():
        given = by_item[key]
        result = outcome(given)
        counts["pairs" if isinstance(result, int) else result] += 1
        if isinstance(result, int):
            responses = item.record.responses
            yield pair_fields(
                item.record,
                (responses[result], responses[1 - result]),
                None,
                {
                    "source": str(item.record.origin),
                    "method": str(PairsMethod.people),
                    "judgements": [_provenance(one, result) for one in given],
                },
            )


def _provenance(judgement: Judgement, chosen: int) -> dict[str, Any]:
    """Return a judgement with sides in place of indices."""
    sides = ("chosen", "rejected") if chosen == 0 else ("rejected", "chosen")
    verdicts = {Verdict.first: sides[0], Verdict.second: sides[1]}
    return {
        "annotator": judgement.annotator,
        "verdict": verdicts.get(judgement.verdict, str(judgement.verdict)),
        "left": sides[judgement.left],
        "seconds": judgement.seconds,
        "time": judgement.time,
        "is_repeat": judgement.slot.is_repeat,
    }
