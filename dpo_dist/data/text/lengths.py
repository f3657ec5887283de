"""Truncation of a prompt and its responses; limits that would keep the records that do not fit."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os.path import commonprefix
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dpo_dist.data.config import DataConfig, Truncation

Tokens: TypeAlias = npt.NDArray[np.int64]
_STEP = 64  # suggested limits are its multiples


def kept_tokens(prompt: Any, longest: Any, prefix: Any, limits: DataConfig) -> tuple[Tokens, Tokens]:
    """Return the tokens that truncation leaves of a prompt and, at most, of each response; docs/data.md.

    `prompt` and `longest` (response) are token counts, integers or int64 arrays; `prefix` counts the tokens
    of BOS, which stay. Nothing is left of the responses if the record may not be cut, or has no room for
    both sides.
    """
    most = limits.max_length
    if limits.max_prompt_length is not None:
        prompt = np.minimum(prompt, limits.max_prompt_length)
    match limits.truncation:
        case Truncation.drop:
            room = 0 * longest
        case Truncation.keep_start:
            room = np.maximum(most - prompt, 0)
        case Truncation.keep_end:
            room = np.where(most - longest > prefix, longest, 0)
        case Truncation.both:
            room = np.where(2 * prompt < most, most - prompt, most * longest // (prompt + longest))
            room = np.where(2 * longest < most, longest, room)
            room = np.clip(room, 1, np.maximum(most - prefix - 1, 0))
    room = np.where(prompt + longest <= most, longest, room)
    return np.minimum(prompt, most - room), np.minimum(room, longest)


def needed_tokens(responses: Sequence[list[int]], trained: Sequence[npt.NDArray[np.bool_]]) -> int:
    """Return how many tokens of each response keep all distinct, with one that the loss counts in each."""
    shared = [len(commonprefix(pair)) for pair in pairwise(sorted(responses))]  # noqa: RUF071 (of token ids)
    return 1 + max([0, *shared, *(int(mask.argmax()) for mask in trained)])


@dataclass(frozen=True)
class SourceLengths:
    """The lengths of a source's records before they were cut, and the numbers of records."""

    lengths: Tokens  # of `RecordLengths`, [records that fit or would with other limits, 5]
    unusable: int  # records that stay unusable with any limits
    max_dropped: float  # most records that may be dropped

    def kept(self, limits: DataConfig) -> int:
        """Return how many records these limits keep."""
        prompt, longest, bos, needed, least_prompt = self.lengths.T
        prompt_room, room = kept_tokens(prompt, longest, bos, limits)
        has_images_whole = (prompt_room >= least_prompt) | (least_prompt == bos)
        return int(((room >= needed) & has_images_whole).sum())

    def accepts(self, limits: DataConfig) -> bool:
        """Return whether these limits drop no more records than allowed, and not all."""
        records = len(self.lengths)
        usable = self.kept(limits)
        return usable == records or (usable > 0 and records - usable + self.unusable <= self.max_dropped)


def fitting_limits(sources: Sequence[SourceLengths], limits: DataConfig) -> str | None:
    """Return the remedy to set limits that make the data of all sources usable; None if there are none."""
    totals = np.concatenate([source.lengths[:, :2].sum(axis=1) for source in sources])
    longest = int(totals.max(initial=1))
    steps = range(_STEP * (limits.max_length // _STEP + 1), longest + _STEP, _STEP)

    def accepted(changed: DataConfig) -> bool:
        return all(source.accepts(changed) for source in sources)

    at = bisect_left(steps, 1, key=lambda step: accepted(replace(limits, max_length=step)))
    tried = {"data.truncation=both": replace(limits, truncation=Truncation.both)}
    for step in steps[at : at + 1]:
        tried[f"data.max_length={step}"] = replace(limits, max_length=step)
    fitting = [word for word, changed in tried.items() if accepted(changed)]
    return f"set {' or '.join(fitting)}" if fitting else None
