"""A teacher's distributions of the next token: sparse rows, which a store has, or whole, beside the policy.

A sparse row has the largest probabilities, and draws from the rest. The cross-entropy with a row, and its
gradient, are unbiased estimates of those with the whole distribution (arXiv 2503.16870). Those with the
largest probabilities alone are not, renormalised or not. Divergences that weigh tokens by the policy's
probability need whole distributions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_dist.config.losses import DistillOptions, LossConfig
from dpo_dist.config.schema import TeacherConfig

_UNITS = 2**40  # of a probability
_LEAST_LOGP = -1e4  # of an id whose logit is -inf, of which 0 times infinity would be nan
_ROUNDING = 1e-3  # of the sum of a vocabulary's probabilities in float32

_Floats = npt.NDArray[np.float32]


DRAWN = 16
"""Tokens drawn from those beyond the largest, which keep the gradient unbiased: their noise adds little."""


class SoftTargets(NamedTuple):
    """What a teacher wants at each position: probabilities of some tokens, at this temperature of softmax."""

    ids: Tensor  # int64 [positions, tokens], the most likely first; a token may stand there more than once
    shares: Tensor  # float32 [positions, tokens], with the sum 1, or 0 where nothing is wanted
    temperature: float


@dataclass(frozen=True)
class SparseRows:
    """How a teacher's distributions are kept: float32 [positions, width], of ids below 2^24 exactly.

    A row has the ids of the `k` largest probabilities and these, the ids of `drawn` tokens of the rest, what
    each of these stands for, and the entropy of the whole distribution, in nats. `temperature` is that of the
    softmax; `vocabulary`: the student's number of token ids, whose distribution has the teacher's first ones.
    """

    k: int
    drawn: int
    temperature: float
    vocabulary: int

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return 2 * self.k + self.drawn + 2

    def rows(self, probabilities: Tensor, uniforms: Tensor) -> Tensor:
        """Return the rows of distributions, float32 [positions, ids].

        `uniforms`, [positions, drawn], in [0, 1): each chooses a token in its own part of the rest. Draws
        from equal parts have less noise than as many independent ones, and are unbiased together.
        """
        if self.vocabulary < probabilities.shape[1]:  # padding of the teacher's output layer
            probabilities = probabilities[:, : self.vocabulary]
            probabilities = probabilities / probabilities.sum(1, keepdim=True)
        largest = probabilities.topk(self.k)
        rest = probabilities.scatter(1, largest.indices, 0.0)
        # In whole units: in float32 a sum over 150,000 tokens would lose the small ones, and GPUs have no
        # deterministic kernel for sums of floats.
        ends = rest.mul_(_UNITS).round_().long().cumsum_(1)
        units = ends[:, -1:]
        places = (torch.arange(self.drawn, device=units.device) + uniforms.double()) / self.drawn * units
        drawn = torch.searchsorted(ends, places.long(), right=True).clamp(max=ends.shape[1] - 1)
        mass = units / _UNITS
        entropy = torch.special.entr(probabilities).sum(1, keepdim=True)
        parts = (largest.indices, largest.values, drawn, mass / max(1, self.drawn), entropy)
        return torch.cat([part.float() for part in parts], dim=1)

    def fault(self, rows: _Floats) -> str:
        """Return, in words, why stored rows cannot be those of a teacher; "" if they can."""
        if rows.shape[1] != self.width:
            return f"{rows.shape[1]} numbers of a token in place of {self.width}"
        largest, shares, drawn, share, _ = np.split(rows, np.cumsum([self.k, self.k, self.drawn, 1]), axis=1)
        for ids in (largest, drawn):
            is_id = (ids >= 0) & (ids < self.vocabulary) & (ids == np.floor(ids))
            if not is_id.all():
                return f"token id {ids[~is_id][0]:g} of {self.vocabulary}"
        sums = shares.sum(1) + max(1, self.drawn) * share[:, 0]
        is_one = np.abs(sums - 1) <= _ROUNDING
        if not is_one.all():
            return f"probabilities with the sum {sums[~is_one][0]:g}"
        return ""

    def fault_of_others(self, rows: _Floats) -> str:
        """Return `fault`, and what else rows that others computed cannot have."""
        shares = rows[:, self.k : 2 * self.k]
        if not ((rows >= -_ROUNDING).all() and (np.diff(shares, axis=1) <= 0).all()):
            return "numbers below 0, or probabilities that are not the largest first"
        if not (rows[:, -1] <= np.log(self.vocabulary) + _ROUNDING).all():
            return f"more entropy than {self.vocabulary} ids have"
        return self.fault(rows)

    def distances(self, rows: _Floats, others: _Floats) -> _Floats:
        """Return how far apart two distributions are at each position, float32 [positions].

        That is the larger of two numbers: the total variation distance of the largest probabilities, and the
        difference of the entropies, in nats.
        """
        order = np.argsort(others[:, : self.k], axis=1)
        ids = np.take_along_axis(others[:, : self.k], order, axis=1)
        shares = np.take_along_axis(others[:, self.k : 2 * self.k], order, axis=1)
        apart: _Floats = np.abs(rows[:, -1] - others[:, -1])
        for place, row in enumerate(rows):
            at = np.searchsorted(ids[place], row[: self.k]).clip(max=self.k - 1)
            found = np.where(ids[place, at] == row[: self.k], shares[place, at], 0)
            apart[place] = max(apart[place], np.abs(row[self.k : 2 * self.k] - found).sum() / 2)
        return apart

    def soft_targets(self, rows: Tensor) -> SoftTargets:
        """Return what rows want of a student."""
        sizes = [self.k, self.k, self.drawn, 1, 1]
        largest, shares, drawn, share, _ = torch.split(rows, sizes, dim=1)
        ids = torch.cat((largest, drawn), dim=1).long()
        shares = torch.cat((shares, share.expand(-1, self.drawn)), dim=1)
        return SoftTargets(ids, shares, self.temperature)

    def divergences(self, rows: Tensor, expected_logps: Tensor) -> Tensor:
        """Return KL(teacher || student) at each position, in nats, float32 [positions].

        `expected_logps`: the teacher's mean of the student's log-probs, as `token_logps` returns it.
        """
        return -rows[:, -1] - expected_logps


@dataclass(frozen=True)
class WholeDistributions:
    """A teacher beside the policy gives its whole distributions, as states that its output layer reads.

    `mix`, above 0, is that of `generalized_jsd`, `temperature` that of both softmaxes. Distributions are over
    the first `vocabulary` ids, which both models have.
    """

    mix: float
    temperature: float
    vocabulary: int
    drawn: ClassVar[int] = 0

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return log-probs, [positions, vocabulary], from logits of at least as many ids."""
        logps = torch.log_softmax(logits[:, : self.vocabulary].float() / self.temperature, dim=-1)
        return logps.clamp(min=_LEAST_LOGP)


def generalized_jsd(logps: Tensor, teacher_logps: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """Return divergences of the policy from a teacher, and their derivatives with respect to its logits.

    With p the policy's distribution, q the teacher's and m = mix q + (1 - mix) p, a divergence is
    mix KL(q || m) + (1 - mix) KL(p || m), and with mix = 1 it is KL(p || q), in nats (GKD, arXiv 2306.13649,
    equation 1, and the limit that TRL takes there).

    Args:
        logps: [positions, ids], log-probs under p.
        teacher_logps: [positions, ids], log-probs under q.
        mix: above 0, at most 1.

    Returns:
        [positions], and [positions, ids].
    """
    probabilities = logps.exp()
    if mix == 1:
        apart = logps - teacher_logps
        of_policy = (probabilities * apart).sum(1, keepdim=True)
        return of_policy.squeeze(1), probabilities * (apart - of_policy)
    mixture = torch.logaddexp(logps + math.log1p(-mix), teacher_logps + math.log(mix))
    apart = logps - mixture
    of_policy = (probabilities * apart).sum(1, keepdim=True)
    of_teacher = (teacher_logps.exp() * (teacher_logps - mixture)).sum(1)
    values = mix * of_teacher + (1 - mix) * of_policy.squeeze(1)
    # m depends on p, too; what that adds to the derivative is 0 in all.
    return values, (1 - mix) * probabilities * (apart - of_policy)


def kept_distributions(
    teacher: TeacherConfig, loss: LossConfig, vocabulary: int
) -> SparseRows | WholeDistributions:
    """Return how a run keeps a teacher's distributions over so many token ids."""
    options = loss.options_of(DistillOptions)
    if options.mix:
        return WholeDistributions(options.mix, options.temperature, vocabulary)
    return sparse_rows(teacher, loss, vocabulary)


def sparse_rows(teacher: TeacherConfig, loss: LossConfig, vocabulary: int) -> SparseRows:
    """Return how a teacher's distributions over so many token ids are kept."""
    k = min(teacher.k, vocabulary)
    drawn = DRAWN if k < vocabulary else 0
    return SparseRows(k, drawn, loss.options_of(DistillOptions).temperature, vocabulary)


class WholeTargets(NamedTuple):
    """A teacher's whole distributions at each position, of which a chunk is computed at a time."""

    kept: WholeDistributions
    states: Tensor  # [positions, width]: hidden states, or logits
    logits: Callable[[Tensor], Tensor]  # of states [n, width], float32 [n, ids]

    @torch.no_grad()
    def log_softmax(self) -> Tensor:
        """Return the teacher's log-probs, float32 [positions, kept.vocabulary]."""
        return self.kept.log_softmax(self.logits(self.states))


class TeacherInputs(NamedTuple):
    """What a batch has of a teacher: what it wants of the policy, or what it is asked by."""

    kept: SparseRows | WholeDistributions
    rows: Tensor | None = None  # float32 [targets, kept.width], or states of `WholeTargets`
    uniforms: Tensor | None = None  # float32 [targets, kept.drawn], in [0, 1): the teacher draws rows by them
    logits: Callable[[Tensor], Tensor] | None = None  # of `WholeTargets`

    def map(self, change: Callable[[Tensor], Tensor]) -> "TeacherInputs":
        """Return these inputs with their tensors of targets changed."""
        rows, uniforms = (None if each is None else change(each) for each in self[1:3])
        return self._replace(rows=rows, uniforms=uniforms)

    def wanted(self) -> SoftTargets | WholeTargets:
        """Return what the teacher wants of the policy."""
        assert self.rows is not None
        if isinstance(self.kept, SparseRows):
            return self.kept.soft_targets(self.rows)
        assert self.logits is not None
        return WholeTargets(self.kept, self.rows, self.logits)

    def divergences(self, values: Tensor) -> Tensor:
        """Return the divergence at each position, in nats, float32 [targets].

        `values`: what `token_logps` returns of the teacher.
        """
        if not isinstance(self.kept, SparseRows):
            return values
        assert self.rows is not None
        return self.kept.divergences(self.rows, values)
