"""Groups of equal and nearly equal records among all sources, from keys and MinHash signatures."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from dpo_dist.insight.doctor.findings import Across, Finding, Level
from dpo_dist.insight.doctor.observe import Observed, RecordKeys
from dpo_dist.insight.doctor.rules import Judge
from dpo_dist.insight.doctor.texts import EMPTY_SKETCH, SIGNATURE_NUMBERS, Signature

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

SIMILARITY = 0.7
# 16 bands of 4 numbers: two texts of similarity 0.7 share a band with a probability of 0.99.
_BANDS, _BAND_NUMBERS = 16, 4
_SHOWN_CLUSTERS, _SHOWN_MEMBERS, _SHOWN = 5, 4, 20


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

    def sizes(self, count: int) -> tuple[int, ...]:
        """Return the sizes of the largest groups of several records."""
        sizes = np.sort(np.unique(self.first, return_counts=True)[1])[::-1]
        return tuple(int(size) for size in sizes[:count] if size > 1)


def equal_groups(keys: Keys) -> Groups:
    """Return groups of records with equal keys, uint64 [records]."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return Groups(first[inverse])


def near_groups(signatures: Iterable[Signature], similarity: float = SIMILARITY) -> Groups:
    """Return groups of records whose prompts and whose responses are both nearly equal to the first one's.

    Args:
        signatures: uint32 [2, 64] of each record, of prompt and responses.
        similarity: least estimated Jaccard similarity.
    """
    table = MinHashLSH(num_perm=SIGNATURE_NUMBERS, params=(_BANDS, _BAND_NUMBERS))
    firsts: dict[int, Signature] = {}
    first: list[int] = []
    for index, own in enumerate(signatures):
        # A band has two numbers of each side: a bucket holds records that are alike in both.
        both = np.stack([side.reshape(-1, 2) for side in own], axis=1).ravel()[:SIGNATURE_NUMBERS]
        sketch = _sketch(both)
        near = (one for one in table.query(sketch) if ((firsts[one] == own).mean(axis=1) >= similarity).all())
        first.append(min(near, default=index))
        if first[-1] == index:
            table.insert(index, sketch)
            firsts[index] = own
    return Groups(np.array(first, dtype=np.int64))


def near_prompts(records: list[RecordKeys], is_eval: npt.NDArray[np.bool_]) -> Indices:
    """Return the evaluation records whose prompt is nearly equal to that of a training record.

    Returns:
        int64 [found, 2]: the index of the evaluation record, and of the first such training record.
    """
    table = MinHashLSH(num_perm=SIGNATURE_NUMBERS, params=(_BANDS, _BAND_NUMBERS))
    prompts = [record.signatures[0] for record in records]
    for index in np.flatnonzero(is_eval):
        table.insert(int(index), _sketch(prompts[index]))
    found: dict[int, int] = {}
    for index in np.flatnonzero(~is_eval) if is_eval.any() else ():
        for other in table.query(_sketch(prompts[index])):
            if (prompts[other] == prompts[index]).mean() >= SIMILARITY:
                found[other] = int(index)
                table.remove(other)
    return np.array(sorted(found.items()), dtype=np.int64).reshape(-1, 2)


def _sketch(numbers: npt.NDArray[np.uint32]) -> MinHash:
    sketch = EMPTY_SKETCH.copy()
    sketch.hashvalues = numbers
    return sketch


def contradicted(records: list[RecordKeys]) -> Indices:
    """Return int64 [found, 2]: each record of which another states the opposite, and the first such one."""
    stated: dict[int, int] = {}
    for index, record in enumerate(records):
        for preference, _opposite in record.preferences:
            stated.setdefault(preference, index)
    found = {
        index: stated[opposite]
        for index, record in enumerate(records)
        for _preference, opposite in record.preferences
        if opposite in stated
    }
    return np.array(sorted(found.items()), dtype=np.int64).reshape(-1, 2)


class AllRecords:
    """Keys of the readable records of all sources, in order; about 8 kB each while they are compared.

    Args:
        judge: applies rules.
        is_split: whether `data.eval_share` splits the sources, so that both parts share no prompt.
        drops_eval_prompts: whether training drops records with a prompt of the evaluation data.
    """

    def __init__(self, judge: Judge, is_split: bool = False, drops_eval_prompts: bool = False) -> None:
        self._judge, self._is_split, self._drops_eval_prompts = judge, is_split, drops_eval_prompts
        self._labels: list[str] = []
        self._records: list[RecordKeys] = []
        self._of_source: list[int] = []
        self._of_eval: list[bool] = []

    def add(self, observed: Observed, label: str, is_eval: bool) -> None:
        """Add the next records of the source with this label, which is evaluation data or not."""
        if label not in self._labels[-1:]:
            self._labels.append(label)
        self._records += observed.records
        self._of_source += [len(self._labels) - 1] * len(observed.records)
        self._of_eval += [record.is_held_out if self._is_split else is_eval for record in observed.records]

    def findings(self) -> tuple[Across, list[Finding]]:
        """Return the facts about all sources, and the findings that compare records."""
        records = self._records
        self._source = np.array(self._of_source, dtype=np.int64)
        self._is_eval = np.array(self._of_eval, dtype=np.bool_)
        equal, prompts = equal_groups(self._keys("record")), equal_groups(self._keys("prompt"))
        near = near_groups(record.signatures for record in records)
        opposed = contradicted(records)
        repeated = np.setdiff1d(prompts.later, near.later)
        left, removed, only_near = self._leaks()
        of_benchmark = [index for index, record in enumerate(records) if record.benchmark is not None]
        hits = np.array([of_benchmark, of_benchmark], dtype=np.int64).T
        benchmark_items = [f"{records[index].origin}, {records[index].benchmark}" for index in of_benchmark]
        findings = [
            *self._reported("duplicates", _with_first(equal, equal.later)),
            *self._near(np.setdiff1d(near.later, np.union1d(equal.later, opposed[:, 0])), near),
            *self._reported("contradictions", opposed),
            *self._reported("repeated_prompts", _with_first(prompts, repeated)),
            *self._leak_findings(left, removed, only_near),
            *self._reported("benchmark_overlap", hits, benchmark_items),
        ]
        leaked = len(left) + len(removed)
        return (
            Across(
                duplicates=len(equal.later),
                near_duplicates=len(near.later),
                clusters=near.sizes(_SHOWN),
                contradictions=len(opposed),
                repeated_prompts=len(prompts.later),
                leaked_prompts=leaked,
                near_leaked_prompts=len(only_near) + leaked,
                benchmark_hits=len(of_benchmark),
            ),
            findings,
        )

    def _keys(self, name: str) -> Keys:
        return np.array([getattr(record, name) for record in self._records], dtype=np.uint64)

    def _leaks(self) -> tuple[Indices, Indices, Indices]:
        """Return the evaluation records with a prompt of the training data, each with a training record.

        Those whose prompt training keeps, those whose prompt it drops, and those of a nearly equal prompt.
        In two parts of a split equal prompts differ in case at least: they are nearly equal.
        """
        hashes = self._keys("hash")
        # Training compares case too.
        is_dropped = self._drops_eval_prompts & ~self._is_eval & np.isin(hashes, hashes[self._is_eval])
        left = self._with_prompt_of(np.flatnonzero(~self._is_eval & ~is_dropped))
        removed = self._with_prompt_of(np.flatnonzero(is_dropped))
        removed = removed[~np.isin(removed[:, 0], left[:, 0])]
        near = near_prompts(self._records, self._is_eval)
        leaked = np.concatenate([left[:, 0], removed[:, 0]])
        return left, removed, near[~np.isin(near[:, 0], leaked)]

    def _with_prompt_of(self, trained: Indices) -> Indices:
        """Return int64 [found, 2]: each evaluation record with a prompt of these, and the first of them."""
        if self._is_split:
            return np.empty((0, 2), dtype=np.int64)
        first: dict[tuple[str, int], int] = {}
        for index in map(int, trained):
            first.setdefault(("prompt", self._records[index].prompt), index)
            first.setdefault(("hash", self._records[index].hash), index)
        found = {}
        for index in map(int, np.flatnonzero(self._is_eval)):
            record = self._records[index]
            other = first.get(("prompt", record.prompt), first.get(("hash", record.hash)))
            if other is not None:
                found[index] = other
        return np.array(sorted(found.items()), dtype=np.int64).reshape(-1, 2)

    def _leak_findings(self, left: Indices, removed: Indices, only_near: Indices) -> Iterator[Finding]:
        of = int(self._is_eval.sum())
        for rule, found in (("train_eval_leak", left), ("near_train_eval_leak", only_near)):
            detail = self._other_numbers(*found.T)
            yield from self._judge.count(rule, len(found), of, None, self._shown(found), detail=detail)
        detail = "data.drop_eval_prompts removes it from the training data"
        for finding in self._judge.count(
            "train_eval_leak", len(removed), of, None, self._shown(removed), detail=detail
        ):
            yield replace(finding, level=Level.note, remedy="none is needed")

    def _reported(
        self, rule: str, pairs: Indices, examples: list[str] | None = None, detail: str = ""
    ) -> list[Finding]:
        """Return the finding of records with a partner: of their source, or with the count of each source."""
        # A record of training and evaluation data is a leak, which has a rule of its own.
        pairs = pairs[self._is_eval[pairs[:, 0]] == self._is_eval[pairs[:, 1]]]
        sources, counts = np.unique(self._source[pairs[:, 0]], return_counts=True)
        examples = self._shown(pairs) if examples is None else examples
        if len(sources) == 1:
            of, label = int((self._source == sources[0]).sum()), self._labels[sources[0]]
            return self._judge.count(rule, len(pairs), of, label, examples, detail=detail)
        labels = [self._labels[source] for source in sources]
        by_source = ", ".join(f"{count} in {label}" for label, count in zip(labels, counts, strict=True))
        detail = "; ".join(filter(None, (by_source, detail)))
        return self._judge.count(rule, len(pairs), len(self._records), None, examples, detail=detail)

    def _near(self, records: Indices, groups: Groups) -> list[Finding]:
        """Return the finding of nearly equal records with the largest groups of them."""
        pairs = _with_first(groups, records)
        found = pairs[self._is_eval[pairs[:, 0]] == self._is_eval[pairs[:, 1]]]
        firsts, sizes = np.unique(found[:, 1], return_counts=True)
        order = np.argsort(-sizes, kind="stable")[:_SHOWN_CLUSTERS]
        members = [
            np.array([firsts[at], *found[found[:, 1] == firsts[at], 0][: _SHOWN_MEMBERS - 1]]) for at in order
        ]
        shown, numbers = ", ".join(str(sizes[at] + 1) for at in order), self._other_numbers(*found.T)
        detail = f"groups: {len(firsts)}, the largest of {shown} records" + (numbers and f"; {numbers}")
        return self._reported("near_duplicates", found, self._shown(members), detail)

    def _other_numbers(self, records: Indices, partners: Indices) -> str:
        """Return how many of the records have other numbers in the prompt than their partner."""
        numbers = self._keys("numbers")
        count = int((numbers[records] != numbers[partners]).sum())
        return f"{count} of them with other numbers in the prompt" if count else ""

    def _shown(self, groups: Iterable[Indices]) -> list[str]:
        return [", ".join(str(self._records[index].origin) for index in group) for group in groups][:_SHOWN]


def _with_first(groups: Groups, records: Indices) -> Indices:
    """Return int64 [records, 2]: each record and the first one of its group."""
    return np.stack([records, groups.first[records]], axis=1)
