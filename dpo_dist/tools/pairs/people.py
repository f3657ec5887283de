"""Let people label pairs: serve a page until Ctrl-C, then write the pairs and the annotators' agreement."""

import itertools
import json
import os
import secrets
import signal
import socket
import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from dpo_dist.data import DataConfig, DataSource, Dialogue, PreferenceRecord, turns_of
from dpo_dist.data.counts import count_lines
from dpo_dist.data.read.plain import parse_json
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import DataError, first_line
from dpo_dist.foundation.fields import plain
from dpo_dist.foundation.files import locked, text_digest, write_json
from dpo_dist.foundation.text import pluralize
from dpo_dist.tools.pages.blocks import Answers, Choices, PageBlock, Piece, Text
from dpo_dist.tools.pages.render import page
from dpo_dist.tools.pages.thumbnails import thumbnails, with_marks
from dpo_dist.tools.pairs.files import (
    check_output,
    image_fields,
    pair_fields,
    training_records,
    write_results,
)
from dpo_dist.tools.pairs.folder import PairsFolder
from dpo_dist.tools.sampling.keys import PairsMethod
from dpo_dist.tools.written_records import as_fields

HOST = "127.0.0.1"
_MOST_ITEMS = 1000
_IMAGE_SIDE = 800  # pixels
_OVERLAP = 0.2
"""Share of the comparisons that every annotator judges, to measure their agreement."""

_MOST_BYTES = 2**16  # of a judgement

TIE, SKIP = "tie", "skip"
CHOICES = ("left", "right", TIE, SKIP)
"""What an annotator says of the responses as they are shown."""
_SIDES = ("first", "second")
"""The verdict that the response of this index is better."""


_BUTTONS = (
    ("left", "Response 1 [1]", "1 ArrowLeft"),
    (TIE, "Tie [0]", "0 t"),
    ("right", "Response 2 [2]", "2 ArrowRight"),
    (SKIP, "Skip [s]", "s"),
)
_INSTRUCTIONS = """\
Each shows a prompt and two responses. Choose the response that you would rather get to this prompt: more \
correct, more helpful, and nothing harmful. Length and style alone make none better.
Keys: 1 or \u2190 response 1 is better, 2 or \u2192 response 2 is better, 0 or t they are equally good, \
s skip.
The browser's back button returns to a comparison: the last choice counts. Every choice is saved at once, so \
that you can stop at any time."""
_END = "All comparisons are judged. Thank you! Ctrl-C ends the command and writes the pairs."


class Annotation(NamedTuple):
    """A line of the log: a verdict on an item; a later one by the same annotator on the item replaces it."""

    item: str
    annotator: str
    verdict: str  # the better response: first or second, in the item's order; or tie, or skip
    left: int  # index of the response that was shown on the left
    time: str


def draw_items(
    records: Iterable[PreferenceRecord], most: int, seed: int, counts: Counter[str]
) -> dict[str, PreferenceRecord]:
    """Return at most `most` records with two responses each, by key; seed and contents decide the draw.

    A key is a digest of prompt and responses, in any order. `counts` gets the records without an item, by
    reason.
    """
    items: dict[str, PreferenceRecord] = {}
    for record in records:
        if len(record.responses) < 2:
            counts["one_response"] += 1
            continue
        texts = [json.dumps(part, sort_keys=True) for part in as_fields(record.prompt, record.responses)]
        prompt, *keys = map(text_digest, texts)
        if record.images:
            prompt = text_digest(" ".join([prompt, *(image.digest.hex() for image in record.images)]))
        indices = sorted(range(len(keys)), key=lambda index: _fraction(seed, prompt, keys[index]))
        first, second = sorted(indices[:2], key=lambda index: keys[index])  # an order unrelated to quality
        key = text_digest(f"{prompt} {keys[first]} {keys[second]}")[:20]
        counts["duplicate"] += key in items
        responses = record.responses[first], record.responses[second]
        items.setdefault(key, replace(record, responses=responses, scores=None))
    sample = sorted(items, key=lambda key: _fraction(seed, "draw", key))[:most]
    counts["not_drawn"] = len(items) - len(sample)
    return {key: items[key] for key in sample}


def _fraction(seed: int, *names: str) -> float:
    """Return a pseudo-random number in [0, 1) for the seed and the names."""
    return int(text_digest("\0".join([str(seed), *names]))[:12], 16) / 16**12


class Labelling:
    """The items of a session, and each annotator's latest judgements, which are also in the open log."""

    def __init__(self, items: Mapping[str, PreferenceRecord], log: int, seed: int):
        self.items = items
        self._log = log
        self._seed = seed
        self.judgements: dict[tuple[str, str], Annotation] = {}
        self._shared = {key for key in items if _fraction(seed, "shared", key) < _OVERLAP}

    def read(self, file: Path) -> int:
        """Read judgements of earlier starts, cut off an incomplete last line; count those without an item."""
        content = file.read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        os.ftruncate(self._log, len(content))
        lines = []
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                lines.append(Annotation(**parse_json(line)))
            except (ValueError, TypeError) as error:
                raise DataError(
                    "this line is not a judgement",
                    where=f"{file}:{number}",
                    got=first_line(error),
                    expected=f"a JSON object with {', '.join(Annotation._fields)}",
                    remedy="correct the line or delete it; the other judgements stay",
                ) from error
        self.judgements = {(each.annotator, each.item): each for each in lines if each.item in self.items}
        return sum(each.item not in self.items for each in lines)

    def judge(self, annotator: str, item: str, choice: str) -> None:
        """Write a judgement to disk, then to `judgements`; `choice` is one of `CHOICES`."""
        left = self.left(annotator, item)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        verdicts = {"left": _SIDES[left], "right": _SIDES[1 - left]}
        judgement = Annotation(item, annotator, verdicts.get(choice, choice), left, now)
        line = (json.dumps(judgement._asdict(), ensure_ascii=False) + "\n").encode()
        size = os.fstat(self._log).st_size
        try:
            while line:  # on a full disk only a part of the line may be written
                line = line[os.write(self._log, line) :]
            os.fsync(self._log)
        except OSError:
            os.ftruncate(self._log, size)
            raise
        self.judgements[annotator, item] = judgement

    def left(self, annotator: str, item: str) -> int:
        """Return the index of the response that this annotator sees on the left."""
        return int(_fraction(self._seed, "left", item, annotator) < 0.5)

    def remaining(self, annotator: str) -> list[str]:
        """Return the items that the annotator still has to judge, shuffled by the annotator's name."""
        closed = {item for (_, item), each in self.judgements.items() if each.verdict != SKIP} - self._shared
        closed |= {item for name, item in self.judgements if name == annotator}
        items = [key for key in self.items if key not in closed]
        return sorted(items, key=lambda key: _fraction(self._seed, "order", key, annotator))

    def shown(self, annotator: str, item: str) -> tuple[str, list[PageBlock]]:
        """Return the title and the blocks of the page of an annotator: the instructions, or an item."""
        if not annotator:
            start = Choices([("start", "Start", "")], {}, "annotator")
            return pluralize(len(self.items), "comparison"), [Text(_INSTRUCTIONS), start]
        judged = sum(name == annotator for name, _ in self.judgements)
        title = f"{annotator}: {judged} judged, {len(self.remaining(annotator))} to go"
        record = self.items.get(item)
        if record is None:
            return title, [Text(_END)]
        prompt = tuple(record.prompt) if isinstance(record.prompt, Dialogue) else record.prompt
        if record.images:
            prompt = tuple(replace(turn, content=with_marks(turn.content)) for turn in turns_of(prompt))
        turns, *responses = as_fields(prompt, record.responses)
        left = self.left(annotator, item)
        tools = [{"tools": record.tools}] if record.tools else []
        answers = Answers(
            "",
            "",
            [*_pieces(tools), *_pieces(turns)],
            [("Response 1", "", _pieces(responses[left])), ("Response 2", "", _pieces(responses[1 - left]))],
            thumbnails(record.images, _IMAGE_SIDE),
            is_open=True,
        )
        return title, [answers, Choices(_BUTTONS, {"annotator": annotator, "item": item})]


def _pieces(value: Any) -> list[Piece]:
    """Return a text, or turns with the names of their roles and other fields, for a page."""
    if isinstance(value, str):
        return [(value, "")]
    pieces = []
    for turn in value:
        for name, content in turn.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            if name == "role":
                pieces.append((text, "role"))
            else:
                pieces += [] if name == "content" else [(name, "role")]
                pieces.append((text, ""))
    return pieces


class _Request(WSGIRequestHandler):
    timeout = 2.0  # at the end the server waits for connections that browsers opened in advance

    def log_message(self, *_: Any) -> None:
        """Print nothing: the address gives access to the data."""


class LabelServer(ThreadingMixIn, WSGIServer):
    """Serves the page to this machine only, at a random address that nobody can guess."""

    daemon_threads = True  # else a client that is still sending would hold the end

    def __init__(self, labelling: Labelling):
        self._labelling = labelling
        self._lock = threading.Lock()
        self.path = f"/{secrets.token_urlsafe(24)}/"
        super().__init__((HOST, 0), _Request)  # a free port
        self.set_app(self._reply)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a browser may close a connection at any time."""

    def _reply(self, environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        """Store a verdict; send a comparison, the form for the name, or a redirect to the next comparison."""
        if environ["PATH_INFO"] != self.path:
            start("404 Not Found", [])
            return []
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
            content = environ["wsgi.input"].read(min(length, _MOST_BYTES))
            form = content.decode()
        except (OSError, ValueError):
            form = ""
            is_complete = False
        else:
            is_complete = len(content) == length
        fields = dict(parse_qsl(form or environ["QUERY_STRING"], keep_blank_values=True))
        annotator = fields.get("annotator", "").strip()
        item = fields.get("item", "")
        is_verdict = annotator and item in self._labelling.items and fields.get("choice") in CHOICES
        if not is_complete or (form and not is_verdict):
            start("400 Bad Request", [("Content-Type", "text/plain; charset=utf-8")])
            expected = f"a name, a comparison of this session and one of {', '.join(CHOICES)}"
            return [f"Not saved: this is no judgement. Expected: {expected}.".encode()]
        with self._lock:
            try:
                if form:
                    self._labelling.judge(annotator, item, fields["choice"])
            except OSError as error:
                start("507 Insufficient Storage", [("Content-Type", "text/plain; charset=utf-8")])
                return [f"Not saved: {error.strerror}. Free disk space, go back and judge again.".encode()]
            if form or (annotator and "item" not in fields):
                # The comparison's key is in the address, so that the browser can go back to it.
                item = next(iter(self._labelling.remaining(annotator)), "")
                query = urlencode({"annotator": annotator, "item": item})
                start("303 See Other", [("Location", f"{self.path}?{query}")])
                return []
            body = page(*self._labelling.shown(annotator, item))
        start("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")])
        return [body.encode()]


def outcome(judgements: Sequence[Annotation]) -> tuple[int | None, str]:
    """Return the index of the better response by majority, or None, and the count to which the item adds."""
    verdicts = [each.verdict for each in judgements if each.verdict != SKIP]
    votes = verdicts.count("first") - verdicts.count("second")
    if votes:
        return int(votes < 0), "comparisons_decided"
    return None, "comparisons_without_majority" if verdicts else "comparisons_not_judged"


def agreement(judgements: Iterable[Annotation]) -> dict[str, Any]:
    """Return the agreement of the judgements, without skips, as a JSON object.

    `between`: for every two annotators `items` that both judged, `agreed` (share of equal verdicts).
    """
    by_annotator: dict[str, dict[str, Annotation]] = defaultdict(dict)
    for each in judgements:
        if each.verdict != SKIP:
            by_annotator[each.annotator][each.item] = each
    between = []
    for names in itertools.combinations(sorted(by_annotator), 2):
        first, second = (by_annotator[name] for name in names)
        pairs = [(first[key].verdict, second[key].verdict) for key in first if key in second]
        row = {"annotators": list(names), "items": len(pairs), "agreed": None}
        if pairs:
            row["agreed"] = statistics.fmean(verdict == other for verdict, other in pairs)
        between.append(row)
    return {"between": between}


def label_pairs(
    folder: PairsFolder, data: DataConfig, limit: int | None, seed: int, console: Console
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; then write the pairs of all judgements, and their agreement."""
    say = console.say
    settings = {
        "method": str(PairsMethod.people),
        "sources": plain(data.train),
        "limit": limit,
        "seed": seed,
    }
    check_output(folder.pairs_file, settings)
    counts_of_draw: Counter[str] = Counter()
    items = draw_items(
        training_records(data, DataSource.records, say), limit or _MOST_ITEMS, seed, counts_of_draw
    )
    rest = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in (+counts_of_draw).items())
    line = pluralize(len(items), "comparison")
    if rest:
        line += f"; records: {rest}"
    say(line)
    if not items:
        raise DataError(
            "there is nothing to compare",
            where="data.train",
            got=rest or "no record",
            expected="records with two responses or more",
            remedy="name other data, or make responses first: pairs.method=samples",
        )
    remedy = "open the address that the other process printed (annotators share it), or set another run.dir"
    with locked(folder.pairs_judgements, "serves this labelling session", remedy) as descriptor:
        labelling = Labelling(items, descriptor, seed)
        foreign = labelling.read(folder.pairs_judgements)
        if foreign:
            say(f"{foreign:,} earlier judgements are not used: their comparisons are not drawn now")
        with LabelServer(labelling) as server:
            _serve(server, console)
    judgements = list(labelling.judgements.values())
    counts = Counter[str]()
    pairs = list(_pairs(items, judgements, counts, folder.pairs))
    say(f"{len(judgements):,} judgements: {folder.pairs_agreement}")
    write_json(folder.pairs_agreement, {**agreement(judgements), "items": counts})
    if pairs:
        write_results(folder.pairs_file, pairs, settings, counts, say)
    else:
        say("no pair is decided yet:")
        for line in count_lines(counts):
            say(line)


def _serve(server: LabelServer, console: Console) -> None:
    """Print the address and serve until SIGINT or SIGTERM."""
    port = server.server_port
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # The address gives access to the data, so it must not get into a log file.
        console.show(f"open http://{HOST}:{port}{server.path}")
        console.show(f"from another machine first: ssh -N -L {port}:{HOST}:{port} {socket.gethostname()}")
        console.show("Ctrl-C ends the labelling and writes the pairs; the same command continues")
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _pairs(
    items: Mapping[str, PreferenceRecord],
    judgements: Sequence[Annotation],
    counts: Counter[str],
    folder: Path,
) -> Iterator[dict[str, Any]]:
    by_item: dict[str, list[Annotation]] = defaultdict(list)
    for each in judgements:
        by_item[each.item].append(each)
    for key, record in items.items():
        better, name = outcome(by_item[key])
        counts[name] += 1
        if better is None:
            continue
        sides = ("chosen", "rejected") if better == 0 else ("rejected", "chosen")  # by index
        names = dict(zip(_SIDES, sides, strict=True))
        judgements_of_item = []
        for each in by_item[key]:
            verdict = names.get(each.verdict, each.verdict)
            judgements_of_item.append({**each._asdict(), "verdict": verdict, "left": sides[each.left]})
        facts = {
            "source": str(record.origin),
            "method": str(PairsMethod.people),
            "judgements": judgements_of_item,
        }
        responses = record.responses[better], record.responses[1 - better]
        yield {**pair_fields(record, responses, None, facts), **image_fields(record, folder)}
