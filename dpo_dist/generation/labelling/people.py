"""Pairs labelled by people: serve the page until it is interrupted, then write pairs and agreement."""

import json
import signal
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from types import FrameType
from typing import Any, TypeAlias

from dpo_dist.atomic import write_text
from dpo_dist.config.identity import plain
from dpo_dist.config.pairs_schema import PairsMethod
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.sources import pinned
from dpo_dist.errors import DataError
from dpo_dist.generation.count_words import describe_totals
from dpo_dist.generation.counted import good_records
from dpo_dist.generation.labelling.agreement import Undecided, agreement, agreement_table, outcome
from dpo_dist.generation.labelling.events import Judgement, Verdict
from dpo_dist.generation.labelling.items import Item, draw_items
from dpo_dist.generation.labelling.log import opened_log
from dpo_dist.generation.labelling.server import HOST, LabelServer
from dpo_dist.generation.labelling.session import Session
from dpo_dist.generation.labelling.state import Labelling, Plan
from dpo_dist.generation.pair_records import pair_fields
from dpo_dist.generation.startup import output_file
from dpo_dist.generation.summary import check_output, write_results
from dpo_dist.json_values import plain as finite
from dpo_dist.number_text import counted

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
