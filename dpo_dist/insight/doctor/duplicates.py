"""Groups of equal and nearly equal records among all sources, from keys and MinHash signatures.

Only numbers are kept of each record: about 600 bytes, most of them in a temporary file.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from dpo_dist.insight.doctor.findings import Across, Finding, Level
from dpo_dist.insight.doctor.observe import Observed
from dpo_dist.insight.doctor.rules import Judge
from dpo_dist.insight.doctor.words import SIGNATURE_NUMBERS, Benchmark

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]

# 16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99.
_BANDS, _BAND_NUMBERS = 16, 4
_BLOCK = 1 << 14
_PROMPT, _RESPONSES = 0, 1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class SignatureFile:
    """Signatures of all records, uint32 [records, 2, 64], in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self.records = 0

    def add(self, signatures: Signatures) -> None:
        """Append signatures, uint32 [n, 2, 64]."""
        self._file.write(np.ascontiguousarray(signatures, dtype=np.uint32).tobytes())
        self.records += len(signatures)

    def read(self) -> Signatures:
        """Return all signatures, memory-mapped."""
        shape = (self.records, 2, SIGNATURE_NUMBERS)
        if not self.records:
            return np.empty(shape, dtype=np.uint32)
        self._file.flush()
        return np.memmap(self._file, dtype=np.uint32, mode="r", shape=shape)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of records.

    Attributes:
        first: int64 [records], index of the first record in the group of each record.
    """

    first: Indices

    @property
    def later(self) -> Indices:
        """Indices of the records that are not the first of their group, ascending."""
        return np.flatnonzero(self.first != np.arange(len(self.first)))

    def largest(self, count: int) -> list[Indices]:
        """Return the largest groups of several records, the largest first."""
        members, sizes = np.unique(self.first, return_counts=True)
        order = np.argsort(-sizes, kind="stable")[:count]
        return [np.flatnonzero(self.first == members[at]) for at in order if sizes[at] > 1]

    def sizes(self, count: int) -> tuple[int, ...]:
        """Return the sizes of the largest groups of several records."""
        sizes = np.sort(np.unique(self.first, return_counts=True)[1])[::-1]
        return tuple(int(size) for size in sizes[:count] if size > 1)


def equal_groups(keys: Keys) -> Groups:
    """Return groups of records with equal keys, uint64 [records]."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return Groups(first[inverse])


def near_groups(signatures: Signatures, similarity: float) -> Groups:
    """Return groups of records whose prompts and whose responses both have at least that similarity.

    A record is compared with its neighbour and with the first one in each bucket of a locality-sensitive hash
    table of 16 bands (Leskovec, Rajaraman and Ullman: Mining of Massive Datasets, chapter 3), so that a
    record with few similar ones can be missed in a bucket of many others.
    """
    links = [np.empty((0, 2), np.int64)]
    for order, starts in _buckets(signatures, (_PROMPT, _RESPONSES)):
        later = np.flatnonzero(starts != np.arange(len(starts)))
        for other in (later - 1, starts[later]):
            links.append(_similar(signatures, order[later], order[other], similarity, (_PROMPT, _RESPONSES)))
    return _connected(np.concatenate(links), len(signatures))


def near_prompts(signatures: Signatures, is_eval: npt.NDArray[np.bool_], similarity: float) -> Indices:
    """Return the evaluation records whose prompt is nearly equal to that of a training record.

    Args:
        signatures: of all records.
        is_eval: bool [records].
        similarity: least Jaccard similarity of the prompts.

    Returns:
        int64 [found, 2]: the index of the evaluation record, and of one such training record.
    """
    found = [np.empty((0, 2), np.int64)]
    for order, starts in _buckets(signatures, (_PROMPT,)):
        positions = np.arange(len(order))
        trained = np.where(is_eval[order], -1, positions)
        before = np.maximum.accumulate(trained)
        after = np.minimum.accumulate(np.where(is_eval[order], len(order), positions)[::-1])[::-1]
        after = np.minimum(after, len(order) - 1)
        for other in (before, after):
            near = is_eval[order] & (other >= 0) & (starts[other] == starts) & ~is_eval[order[other]]
            ones, others = order[near], order[other[near]]
            found.append(_similar(signatures, ones, others, similarity, (_PROMPT,)))
    pairs = np.concatenate(found)
    return _first_of_each(pairs)


def contradicted(preferences: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the preferences of which another record states the opposite.

    Args:
        preferences: uint64 [preferences, 3]: index of the record, key, key of the opposite.

    Returns:
        int64 [found, 2]: the index of the record, and of one record that states the opposite.
    """
    if not len(preferences):
        return np.empty((0, 2), dtype=np.int64)
    order = np.argsort(preferences[:, 1], kind="stable")
    keys = preferences[order, 1]
    at = np.minimum(np.searchsorted(keys, preferences[:, 2]), len(keys) - 1)
    is_opposed = keys[at] == preferences[:, 2]
    pairs = np.stack([preferences[:, 0], preferences[order[at], 0]], axis=1)[is_opposed].astype(np.int64)
    return _first_of_each(pairs)


def _first_of_each(pairs: Indices) -> Indices:
    """Return one pair for each first index, ascending."""
    kept: Indices = pairs[np.unique(pairs[:, 0], return_index=True)[1]]
    return kept


def _buckets(signatures: Signatures, sides: tuple[int, ...]) -> Iterator[tuple[Indices, Indices]]:
    """Yield for each band the records sorted by bucket, and for each the position of its bucket's first."""
    numbers = _BAND_NUMBERS // len(sides)
    for band in range(_BANDS):
        keys = np.zeros(len(signatures), dtype=np.uint64)
        for side in sides:
            for number in range(band * numbers, (band + 1) * numbers):
                keys = (keys ^ signatures[:, side, number]) * _MULTIPLIER
                keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        is_first = np.ones(len(keys), dtype=np.bool_)
        is_first[1:] = keys[order[1:]] != keys[order[:-1]]
        yield order, np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))


def _similar(
    signatures: Signatures, ones: Indices, others: Indices, similarity: float, sides: tuple[int, ...]
) -> Indices:
    """Return those of the pairs whose estimated similarity is enough on all sides, int64 [similar, 2]."""
    kept = [np.empty((0, 2), np.int64)]
    for start in range(0, len(ones), _BLOCK):
        pairs = np.stack([ones[start : start + _BLOCK], others[start : start + _BLOCK]], axis=1)
        enough = np.ones(len(pairs), dtype=np.bool_)
        for side in sides:
            equal = signatures[pairs[:, 0], side] == signatures[pairs[:, 1], side]
            enough &= equal.mean(axis=1) >= similarity
        kept.append(pairs[enough])
    return np.concatenate(kept)


def _connected(links: Indices, records: int) -> Groups:
    """Return the groups of records that links connect, directly or through others."""
    ones = np.ones(len(links), dtype=np.bool_)
    graph = sparse.coo_matrix((ones, (links[:, 0], links[:, 1])), shape=(records, records))
    _, labels = connected_components(graph, directed=False)
    return equal_groups(labels)


SIMILARITY = 0.7
_SHOWN_CLUSTERS = 5
_SHOWN_MEMBERS = 4
_SHOWN = 20

Columns: TypeAlias = Mapping[str, npt.NDArray[np.uint64]]


class AllRecords:
    """Keys, signatures and origins of the readable records of all sources, in order.

    Args:
        is_split: whether `data.eval_share` splits the sources, so that both parts share no prompt.
        drops_eval_prompts: whether training drops records with a prompt of the evaluation data.
    """

    def __init__(self, is_split: bool = False, drops_eval_prompts: bool = False) -> None:
        self.signatures = SignatureFile()
        self._is_split, self._drops_eval_prompts = is_split, drops_eval_prompts
        self._files: dict[str, int] = {}
        self._labels: list[str] = []
        self._is_eval = False
        self._blocks: dict[str, list[npt.NDArray[np.uint64]]] = {
            name: [] for name in ("source", "is_eval", "file", "line", "prompt", "hash", "numbers", "record")
        }
        self._preferences: list[npt.NDArray[np.uint64]] = []
        self._hits: list[tuple[int, int]] = []

    def start_source(self, label: str, is_eval: bool) -> None:
        """Say that the records added from now on are of this source."""
        self._labels.append(label)
        self._is_eval = is_eval

    def add(self, observed: Observed) -> None:
        """Add the next records of the source."""
        first, count = self.signatures.records, len(observed.origins)
        if not count:
            return
        self._hits += [(first + index, item) for index, item in observed.benchmark]
        self.signatures.add(np.stack(observed.signatures))
        files = [self._files.setdefault(origin.source, len(self._files)) for origin in observed.origins]
        columns = {
            "source": [len(self._labels) - 1] * count,
            "is_eval": observed.held_out if self._is_split else [self._is_eval] * count,
            "file": files,
            "line": [origin.line for origin in observed.origins],
            "prompt": observed.prompts,
            "hash": observed.hashes,
            "numbers": observed.numbers,
            "record": observed.records,
        }
        for name, values in columns.items():
            self._blocks[name].append(np.array(values, dtype=np.uint64))
        preferences = np.array(observed.preferences, dtype=np.uint64).reshape(-1, 3)
        preferences[:, 0] += np.uint64(first)
        self._preferences.append(preferences)

    def close(self) -> None:
        """Delete the temporary file."""
        self.signatures.close()

    def findings(self, judge: Judge, benchmark: Benchmark | None) -> tuple[Across, list[Finding]]:
        """Return the facts about all sources, and the findings that compare records."""
        columns = {
            name: np.concatenate([np.empty(0, np.uint64), *blocks]) for name, blocks in self._blocks.items()
        }
        comparison = _Comparison(columns, self._labels, list(self._files), judge)
        signatures = self.signatures.read()
        preferences = np.concatenate([np.empty((0, 3), np.uint64), *self._preferences])
        comparison.compare_records(signatures, contradicted(preferences))
        comparison.compare_with_evaluation(signatures, self._is_split, self._drops_eval_prompts)
        comparison.compare_with_benchmark(self._hits, benchmark)
        return Across(**comparison.facts), comparison.findings


class _Comparison:
    """Findings that compare records, and the facts of `Across`.

    Args:
        columns: uint64 [records] each: see `AllRecords`.
        labels: of the sources.
        files: the path of each file.
        judge: applies rules.
    """

    def __init__(self, columns: Columns, labels: list[str], files: list[str], judge: Judge):
        self.facts: dict[str, Any] = {}
        self.findings: list[Finding] = []
        self._columns, self._labels, self._files, self._judge = columns, labels, files, judge
        self._source = columns["source"].astype(np.int64)
        self._is_eval = columns["is_eval"].astype(np.bool_)

    def compare_records(self, signatures: Signatures, contradictions: Indices) -> None:
        """Find equal, nearly equal and contradictory records, and repeated prompts."""
        equal = equal_groups(self._columns["record"])
        near = near_groups(signatures, SIMILARITY)
        prompts = equal_groups(self._columns["prompt"])
        others = np.union1d(equal.later, contradictions[:, 0])
        later_near = np.setdiff1d(near.later, others)
        repeated = np.setdiff1d(prompts.later, near.later)
        self._report("duplicates", equal.later, equal.first[equal.later])
        self._report_near(later_near, near)
        self._report("contradictions", contradictions[:, 0], contradictions[:, 1])
        self._report("repeated_prompts", repeated, prompts.first[repeated])
        self.facts |= {
            "duplicates": len(equal.later),
            "near_duplicates": len(near.later),
            "clusters": near.sizes(_SHOWN),
            "contradictions": len(contradictions),
            "repeated_prompts": len(prompts.later),
        }

    def compare_with_evaluation(
        self, signatures: Signatures, is_split: bool, drops_eval_prompts: bool
    ) -> None:
        """Find prompts of the training data in the evaluation data.

        In two parts of a split equal prompts differ in case at least: they are nearly equal.
        """
        hashes = self._columns["hash"]
        # Training compares case too.
        is_dropped = drops_eval_prompts & ~self._is_eval & np.isin(hashes, hashes[self._is_eval])
        left = self._leaked_from(np.flatnonzero(~self._is_eval & ~is_dropped), is_split)
        removed = self._leaked_from(np.flatnonzero(is_dropped), is_split)
        near = near_prompts(signatures, self._is_eval, SIMILARITY)
        leaked = np.union1d(left[:, 0], removed[:, 0])
        only_near = near[~np.isin(near[:, 0], leaked)]
        of = int(self._is_eval.sum())
        for rule, found in (("train_eval_leak", left), ("near_train_eval_leak", only_near)):
            detail = self._other_numbers(*found.T)
            examples = self._shown(found[:_SHOWN])
            self.findings += self._judge.count(rule, len(found), of, None, examples, detail=detail)
        self.findings += [
            replace(finding, level=Level.note, remedy="none is needed")
            for finding in self._judge.count(
                "train_eval_leak",
                len(removed),
                of,
                None,
                self._shown(removed[:_SHOWN]),
                detail="data.drop_eval_prompts removes it from the training data",
            )
        ]
        self.facts |= {"leaked_prompts": len(leaked), "near_leaked_prompts": len(only_near) + len(leaked)}

    def _leaked_from(self, trained: Indices, is_split: bool) -> Indices:
        """Return int64 [found, 2]: each evaluation record with a prompt of these records, and one of them."""
        evaluated = np.flatnonzero(self._is_eval & (not is_split))
        found = [np.empty((0, 2), np.int64)]
        if len(trained):
            for keys in (self._columns["prompt"], self._columns["hash"]):
                order = trained[np.argsort(keys[trained], kind="stable")]
                at = np.minimum(np.searchsorted(keys[order], keys[evaluated]), len(order) - 1)
                pairs = np.stack([evaluated, order[at]], axis=1)
                found.append(pairs[keys[pairs[:, 0]] == keys[pairs[:, 1]]])
        pairs = np.concatenate(found)
        return pairs[np.unique(pairs[:, 0], return_index=True)[1]]

    def compare_with_benchmark(self, hits: list[tuple[int, int]], benchmark: Benchmark | None) -> None:
        """Report the records that overlap with benchmark items, pairs of record and item."""
        items = dict(reversed(hits))
        self.facts["benchmark_hits"] = len(items)
        for number, label in enumerate(self._labels):
            found = [
                (record, item) for record, item in sorted(items.items()) if self._source[record] == number
            ]
            if found and benchmark is not None:
                examples = [f"{self._origin(record)}, {benchmark.items[item]}" for record, item in found]
                of = int((self._source == number).sum())
                self.findings += self._judge.count("benchmark_overlap", len(found), of, label, examples)

    def _report(self, rule: str, records: Indices, partners: Indices) -> None:
        """Report records with a partner: by source, and those with a partner in another one."""
        within = self._source[records] == self._source[partners]
        pairs = np.stack([records, partners], axis=1)
        for number, label in enumerate(self._labels):
            found = pairs[within & (self._source[records] == number)]
            of = int((self._source == number).sum())
            self.findings += self._judge.count(rule, len(found), of, label, self._shown(found[:_SHOWN]))
        # A record of training and evaluation data is a leak, which has a rule of its own.
        across = pairs[~within & (self._is_eval[records] == self._is_eval[partners])]
        self.findings += self._judge.count(
            rule,
            len(across),
            len(self._source),
            None,
            self._shown(across[:_SHOWN]),
            detail="in another source",
        )

    def _report_near(self, records: Indices, groups: Groups) -> None:
        """Report nearly equal records with the largest groups of them."""
        for number, label in [*enumerate(self._labels), (None, None)]:
            same = self._source[groups.first[records]] == self._source[records]
            is_eval = self._is_eval[groups.first[records]] != self._is_eval[records]
            chosen = same & (self._source[records] == number) if label is not None else ~same & ~is_eval
            found = records[chosen]
            if not len(found):
                continue
            firsts, sizes = np.unique(groups.first[found], return_counts=True)
            order = np.argsort(-sizes, kind="stable")[:_SHOWN_CLUSTERS]
            members = [
                np.array([firsts[at], *found[groups.first[found] == firsts[at]][: _SHOWN_MEMBERS - 1]])
                for at in order
            ]
            shown = ", ".join(str(sizes[at] + 1) for at in order)
            of = len(self._source) if label is None else int((self._source == number).sum())
            numbers = self._other_numbers(found, groups.first[found])
            detail = f"groups: {len(firsts)}, the largest of {shown} records" + (numbers and f"; {numbers}")
            self.findings += self._judge.count(
                "near_duplicates", len(found), of, label, self._shown(members), detail=detail
            )

    def _other_numbers(self, records: Indices, partners: Indices) -> str:
        """Return how many of the records have other numbers in the prompt than their partner."""
        numbers = self._columns["numbers"]
        count = int((numbers[records] != numbers[partners]).sum())
        return f"{count} of them with other numbers in the prompt" if count else ""

    def _shown(self, groups: Iterable[Indices]) -> list[str]:
        return [", ".join(self._origin(record) for record in group) for group in groups]

    def _origin(self, record: int) -> str:
        return f"{self._files[int(self._columns['file'][record])]}:{int(self._columns['line'][record])}"
