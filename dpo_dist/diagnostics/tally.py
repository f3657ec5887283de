"""Facts about one source, summed over its chunks; the source's report."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from scipy.stats import spearmanr

from dpo_dist.diagnostics.findings import (
    SIDES,
    LeakTest,
    Occurrences,
    PrefixSharing,
    SideReport,
    SourceReport,
)
from dpo_dist.diagnostics.label_leaks import MIN_PAIRS, SideSample, leak_tests, single_test
from dpo_dist.diagnostics.measures.lengths import LengthSketch
from dpo_dist.diagnostics.measures.observe import Named, Observed, PairFacts
from dpo_dist.diagnostics.measures.sample import Reservoir
from dpo_dist.diagnostics.rules import RULES
from dpo_dist.generation.languages import language_of, shares

SAMPLED_PAIRS = 20_000
SAMPLED_LANGUAGES = 2_000
_PAIR_NAMES = {
    "chosen_longer",
    "model_name_chosen",
    "model_name_rejected",
    "refusal_chosen",
    "refusal_rejected",
    "trailing_space_chosen",
    "trailing_space_rejected",
}


class SourceTally:
    """Sums of one source.

    Attributes:
        names: readable records by their faults and properties.
        dropped: dropped records by reason.
        details: for each reason, details of the first such record, without texts.
        read: records read.
        readable: records that have a prompt and responses.
    """

    def __init__(self, label: str, path: str, is_eval: bool, seed: int):
        self.label, self.path, self.is_eval = label, path, is_eval
        self.names, self.dropped = Named(), Named()
        self.details: dict[str, str] = {}
        self.read = self.readable = 0
        self.sample: Reservoir[PairFacts] = Reservoir(SAMPLED_PAIRS, seed)
        self._held_out: int | None = None
        self._kept = self._pairs = self._tokens = self._unique_tokens = 0
        self._response_tokens = self._trained_tokens = 0
        self._changed: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()
        self._cut_tokens: Counter[str] = Counter()
        self._has_tokens = False
        self._lengths = {(side, unit): LengthSketch() for side in SIDES for unit in ("characters", "tokens")}

    @property
    def pair_records(self) -> int:
        """Readable records with at least two responses."""
        return self.names.counts["pair_or_ranking"]

    def add(self, observed: Observed) -> None:
        """Add the facts about the next records."""
        self.read += observed.read
        self.readable += len(observed.origins)
        if observed.kept_held_out is not None:
            self._held_out = (self._held_out or 0) + observed.kept_held_out
        self.names.update(observed.names)
        self.dropped.update(observed.dropped)
        self.details = observed.details | self.details
        self.sample.add(observed.pairs)
        self._add_lengths("characters", observed.characters)
        tokens = observed.tokens
        if tokens is None:
            return
        self._has_tokens = True
        self._add_lengths("tokens", tokens.lengths)
        self._kept += tokens.kept
        self._pairs += tokens.pairs
        self._tokens += tokens.tokens
        self._unique_tokens += tokens.unique_tokens
        self._response_tokens += tokens.response_tokens
        self._trained_tokens += tokens.trained_tokens
        self._changed.update(tokens.changed)
        self._cut.update(tokens.cut)
        self._cut_tokens.update(tokens.cut_tokens)

    def report(self) -> SourceReport:
        """Return the report of the source; its tests for label leaks run here."""
        languages = self._languages()
        return SourceReport(
            label=self.label,
            path=self.path,
            is_eval=self.is_eval,
            read=self.read,
            kept=self._kept if self._has_tokens else self.readable,
            pairs=self._pairs if self._has_tokens else self.readable,
            held_out=self._held_out,
            dropped=_occurrences(self.dropped),
            changed=dict(sorted(self._changed.items())),
            sides=self._sides(),
            prefix=PrefixSharing(self._tokens, self._unique_tokens) if self._has_tokens else None,
            shares=self._shares(),
            languages=shares([prompt for prompt, *_ in languages]),
            scores=self._scores(),
            leaks=self._leaks(languages),
            notes=tuple(self._notes()),
        )

    def language_differences(self) -> tuple[int, int]:
        """Return the number of sampled pairs in two languages, and of those whose languages are known."""
        known = [pair[1:] for pair in self._languages() if None not in pair[1:]]
        return sum(chosen != rejected for chosen, rejected in known), len(known)

    def _add_lengths(self, unit: str, lengths: Iterable[tuple[int, int, int]]) -> None:
        values = np.array(list(lengths), dtype=np.int64).reshape(-1, len(SIDES))
        for column, side in zip(values.T, SIDES, strict=True):
            self._lengths[side, unit].add(column[column >= 0])

    def _sides(self) -> dict[str, SideReport]:
        reports = {}
        for side in SIDES:
            characters = self._lengths[side, "characters"].distribution()
            if characters is not None:
                tokens = self._lengths[side, "tokens"].distribution()
                reports[side] = SideReport(characters, tokens, self._cut[side], self._cut_tokens[side])
        return reports

    def _shares(self) -> dict[str, float]:
        """Return the shares of records that are facts, not faults; and the share of trained tokens."""
        trained = self._trained_tokens / self._response_tokens if self._response_tokens else 0.0
        tokens = {"trained_tokens": trained} if self._response_tokens else {}
        return tokens | {
            name: count / (self.pair_records if name in _PAIR_NAMES else self.readable)
            for name, count in sorted(self.names.counts.items())
            if name not in RULES
        }

    def _languages(self) -> list[tuple[str | None, ...]]:
        if not hasattr(self, "_found_languages"):
            heads = (pair.heads for pair in self.sample.items[:SAMPLED_LANGUAGES])
            self._found_languages = [tuple(map(language_of, texts)) for texts in heads]
        return self._found_languages

    def _leaks(self, languages: list[tuple[str | None, ...]]) -> tuple[LeakTest, ...]:
        pairs = self.sample.items
        if len(pairs) < MIN_PAIRS:
            return ()
        prompts = np.array([pair.prompt for pair in pairs], dtype=np.uint64)
        tests = leak_tests(
            SideSample(np.stack([pair.features for pair in pairs]), [pair.words for pair in pairs], prompts)
        )
        is_prompt_language = np.array(
            [0 if None in found else (found[1] == found[0]) - (found[2] == found[0]) for found in languages],
            dtype=np.float64,
        )
        language = single_test(is_prompt_language, prompts[: len(languages)], "language of the prompt")
        return tuple(sorted((*tests, language), key=lambda test: -test.accuracy)) if tests else ()

    def _scores(self) -> Mapping[str, float]:
        """Return statistics of the sampled scores."""
        scores = np.array([pair.scores for pair in self.sample.items]).reshape(-1, 2)
        longer = np.array([pair.longer_by for pair in self.sample.items])
        scored = ~np.isnan(scores).any(axis=1)
        if not scored.any():
            return {}
        scores, longer = scores[scored], longer[scored]
        gaps = scores[:, 0] - scores[:, 1]
        spread = float(np.subtract(*np.percentile(scores, [95, 5])))
        small = (gaps > 0) & (gaps < spread / 10)
        varied = len(gaps) > 2 and gaps.std() > 0 and longer.std() > 0
        return {
            "sampled": len(gaps),
            "mean_chosen": float(scores[:, 0].mean()),
            "mean_rejected": float(scores[:, 1].mean()),
            "median_gap": float(np.median(gaps)),
            "small_gap_share": float(small.mean()),
            "small_gap_below": spread / 10,
            "length_correlation": float(spearmanr(gaps, longer).statistic) if varied else 0.0,
        }

    def _notes(self) -> Iterable[str]:
        yield "lengths above 1024 are within 1 %"
        if self.sample.seen > SAMPLED_PAIRS:
            yield f"label leaks and scores: a sample of {SAMPLED_PAIRS} of {self.sample.seen} pairs"
        if self.sample.seen > SAMPLED_LANGUAGES:
            yield f"languages: a sample of {SAMPLED_LANGUAGES} pairs"


def _occurrences(named: Named) -> dict[str, Occurrences]:
    return {
        name: Occurrences(count, tuple(named.examples[name])) for name, count in named.counts.most_common()
    }
