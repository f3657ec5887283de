"""A trial of a model on a few invented sequences: are its log-probs those of its own forward?

In float32 two exact forwards differ by little more than the rounding of a softmax. In 16 bits, and most of
all where rounding sends tokens to other experts, they differ by much, so the trial measures what rounding
makes: the change of the model's own log-probs if each value of the embeddings is rounded once more. Another
attention kernel in all layers changes them as much (docs/log.md). Log-probs that depend on other responses
show without such noise: two forwards of one shape, of which only other responses differ, round alike.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_dist.data.arrangement import Arrangement
from dpo_dist.data.packing import Ids, PackedBatch, Sequences, pack
from dpo_dist.model.checked import LADDER_SECONDS, CheckedModel
from dpo_dist.model.layer_options import layer_values

_USUAL_LENGTH = 96
# Sequences of this length are tried at most: their scores would cost more than the start of a run.
LONGEST = 1280
_SHORT_LENGTH = 24
# Beyond these, tokens of a trained vocabulary may never have been seen.
_IDS = 10_000
# Largest difference of a token in float32: rounding of the softmax, and a share of the spread of log-probs.
_ROUNDING = 2e-5
_SHARE_OF_SPREAD = 5e-4
# In 16 bits: differences of the mean and median token and of the worst that need no explanation, as shares
# of the spread, and those that rounding explains, as multiples of the noise that it makes.
_TYPICAL, _LARGEST = 0.005, 0.25
_NOISES, _LARGEST_NOISES = 2.0, 4.0
_DRAWS = 2
# Effect of other responses on the median of the tokens that follow them first, as a multiple of the noise,
# and of the change in a second forward of the same batch: some kernels round otherwise each time.
_NEIGHBOUR_NOISES, _REPEATS = 0.25, 3.0
_NEAR = 8
# Effect of other later tokens on the mean token in 16 bits: shapes are equal, so hardly any is rounding.
_FUTURE = 0.02
# The same with int8 weights: a column of inputs with an outlier in any token is not rounded in all of them
# (arXiv 2208.07339), so other tokens change rounding.
_INT8_OTHERS = 0.1


class Trial:
    """Invented sequences, and their log-probs by the model's own forward of one row at a time.

    Args:
        checked: in evaluation mode.

    Attributes:
        is_float32: whether the model computes in float32.
        is_int8: whether products with its weights round their inputs to int8.
        plain: float32 [targets].
        future: float32 [targets of the first response], the effect of tokens after them in a longer row.
    """

    def __init__(self, checked: CheckedModel):
        model = checked.model
        self._checked, self._model, self._agree = checked, model, checked.agree
        self._sequences = trial_sequences(model.causal_lm, checked.max_length)
        self._batch = pack_trial(self._sequences)
        self.is_int8 = checked.is_int8
        self.is_float32 = next(model.parameters()).dtype == torch.float32 and not self.is_int8
        self.plain = self._scores(self._batch, Arrangement.single, own_logits=True)
        prompt, (first, second) = self._sequences[0].prompt_ids, self._sequences[0].responses
        count, later = len(first), len(second) - len(first)
        longer = tuple(np.concatenate((first, end)) for end in (second[count:], prompt[:later]))
        scores = self._scores(pack_trial([Sequences(prompt, longer)]), Arrangement.single, own_logits=True)
        one, other = scores.view(2, -1)[:, :count]
        self.future = (one - other).abs()

    def _scores(self, batch: PackedBatch, arrangement: Arrangement, *, own_logits: bool) -> Tensor:
        self._model.arrange(arrangement, own_logits=own_logits)
        return self._checked.scores(batch)

    @property
    def spread(self) -> float:
        """Standard deviation of the plain log-probs over tokens."""
        return float(self.plain.std())

    @property
    def is_causal(self) -> bool:
        """Whether later tokens leave the log-probs of a response as they are, but for rounding."""
        if self.is_float32:
            return float(self.future.max()) <= self._float32_limit
        share = _INT8_OTHERS if self.is_int8 else _FUTURE
        return float(self.future.mean()) <= share * self.spread

    @property
    def random_change(self) -> str:
        """Mean change of the plain log-probs from one forward to the next, in words; collective.

        Empty if rounding explains it, as by kernels that round otherwise each time.
        """
        one, other = (self._scores(self._batch, Arrangement.single, own_logits=True) for _ in range(2))
        change = float((one - other).abs().mean())
        is_rounding = change <= _ROUNDING + _TYPICAL * self.spread
        return self._agree("" if is_rounding else f"by {change:.2g} nats in the mean")

    def fault(self, arrangement: Arrangement, *, own_logits: bool, after: int = 0) -> str:
        """Return why this arrangement of the model is not exact on some rank; empty: it is. Collective.

        Args:
            arrangement: of the responses.
            own_logits: whether log-probs are computed from the model's own logits.
            after: a sequence of so many tokens is scored before, as code of the model's own may keep what it
                computed for the longest sequence so far; 0: none.
        """

        def scored() -> tuple[Tensor, tuple[float, float]]:
            if after:
                self._scores(pack_trial([self._long(after)]), arrangement, own_logits=own_logits)
            found = self._scores(self._batch, arrangement, own_logits=own_logits)
            if self.is_float32 or arrangement is Arrangement.single:
                return found, (0.0, 0.0)
            return found, self._effect_of_neighbours(found, arrangement, own_logits=own_logits)

        result, raised = self._checked.attempt(scored, LADDER_SECONDS)
        if result is None:
            return raised
        found, neighbours = result
        return self._agree(self._difference((found - self.plain).abs(), neighbours))

    def _long(self, tokens: int) -> Sequences:
        """Return one response of one token, `tokens` with its prompt."""
        ids = np.resize(self._sequences[0].prompt_ids, tokens)
        return Sequences(ids[:-1], (ids[-1:],))

    def _effect_of_neighbours(
        self, found: Tensor, arrangement: Arrangement, *, own_logits: bool
    ) -> tuple[float, float]:
        """Return the effect of the first response on the tokens that follow it; that of a second forward."""
        first, second = self._sequences[0].responses
        other = replace(self._sequences[0], responses=(first[::-1].copy(), second))
        # The prompt predicts the first one.
        near = slice(len(first) + min(1, len(second) - 1), len(first) + min(1 + _NEAR, len(second)))
        batches = pack_trial([other, *self._sequences[1:]]), self._batch
        again = (self._scores(batch, arrangement, own_logits=own_logits) for batch in batches)
        effect, repeated = (float((scores - found)[near].abs().median()) for scores in again)
        return effect, repeated

    def _difference(self, differences: Tensor, neighbours: tuple[float, float]) -> str:
        """Return in words what rounding does not explain; empty: nothing. Collective.

        Args:
            differences: from the plain log-probs, float32 [targets].
            neighbours: from `_effect_of_neighbours`.
        """
        mean, median, largest = _summary(differences)
        text = f"log-probs differ by up to {largest:.2g} nats, by {mean:.2g} in the mean"
        if self.is_float32:
            return text if not largest <= self._float32_limit else ""
        typical, most = _TYPICAL * self.spread, _LARGEST * self.spread
        effect, repeated = neighbours
        allowed = max(_REPEATS * repeated, _INT8_OTHERS * self.spread if self.is_int8 else 0.0)
        is_explained = mean <= typical and median <= typical and largest <= most and effect <= allowed
        if not self._agree("" if is_explained else text):
            return ""
        changes, raised = self._checked.attempt(lambda: self._noise, LADDER_SECONDS)
        if changes is None:
            return f"{text}; what rounding explains cannot be measured: {raised}"
        noise = _summary(changes)
        if not effect <= max(allowed, _NEIGHBOUR_NOISES * noise[1]):
            return f"log-probs change by {effect:.2g} nats with the tokens of other responses"
        limits = [max(typical, _NOISES * value) for value in noise[:2]]
        limits.append(max(most, _LARGEST_NOISES * noise[2]))
        values = (mean, median, largest)
        is_rounding = all(value <= limit for value, limit in zip(values, limits, strict=True))
        return "" if is_rounding else f"{text}; rounding explains {limits[0]:.2g}"

    @property
    def _float32_limit(self) -> float:
        return _ROUNDING + _SHARE_OF_SPREAD * self.spread

    @cached_property
    def _noise(self) -> Tensor:
        """Changes of `plain` if embeddings are rounded once more, float32 [draws * targets]; collective."""
        draws = []
        for draw in range(_DRAWS):
            with _rounded_once_more(self._model.causal_lm, draw):
                draws.append(self._scores(self._batch, Arrangement.single, own_logits=True) - self.plain)
        return torch.cat(draws).abs()


def changes_in_training(checked: CheckedModel) -> str:
    """Return in words how log-probs change when the model goes to training mode, where it stays; empty: not.

    Forwards of one shape round alike, but for kernels that round otherwise each time.
    """
    batch = pack_trial(trial_sequences(checked.model.causal_lm, checked.max_length))
    before, again = (checked.scores(batch) for _ in range(2))
    checked.model.train()
    changed = (checked.scores(batch) - before).abs()
    # Off CUDA, bitsandbytes rounds the inputs of int8 weights in evaluation mode only.
    share = _INT8_OTHERS if checked.is_int8 and checked.device.type != "cuda" else _TYPICAL
    typical = _ROUNDING + share * float(before.std()) + _REPEATS * float((again - before).abs().mean())
    mean = float(changed.mean())
    return "" if mean <= typical else f"by {mean:.2g} nats in the mean"


def _summary(differences: Tensor) -> tuple[float, float, float]:
    """Return mean, median and maximum."""
    return float(differences.mean()), float(differences.median()), float(differences.max())


@contextlib.contextmanager
def _rounded_once_more(causal_lm: Any, seed: int) -> Iterator[None]:
    """Change each value of the input embeddings by up to a rounding error of its dtype, at random."""
    generator = torch.Generator().manual_seed(seed)

    def change(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        error = torch.finfo(embedded.dtype).eps / 2
        factors = 1 + error * (2 * torch.rand(embedded.shape, generator=generator) - 1)
        return (embedded.float() * factors.to(embedded.device)).to(embedded.dtype)

    hook = causal_lm.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


def trial_sequences(causal_lm: Any, max_length: int) -> list[Sequences]:
    """Return two invented examples of two responses each, within `max_length` tokens.

    The first is longer than the model's sliding window, if that is short. The ids are those of text: none
    that the configuration names.
    """
    config = causal_lm.config.get_text_config()
    limits = [*layer_values(config, "sliding_window"), *layer_values(config, "attention_chunk_size")]
    limits += (getattr(config, "compress_rates", None) or {}).values()  # keys that stand for so many tokens
    tried = [limit * 5 // 4 for limit in limits if isinstance(limit, int) and limit * 5 // 4 <= LONGEST]
    beyond = max(tried, default=0)
    length = max(4, min(max_length, max(_USUAL_LENGTH, beyond)))
    short = min(length, _SHORT_LENGTH)
    named = _named_ids(causal_lm.config) | _named_ids(config)
    vocabulary = [id_ for id_ in range(min(config.vocab_size, _IDS)) if id_ not in named]
    generator = np.random.default_rng(0)

    def ids(count: int) -> Ids:
        return generator.choice(vocabulary, count).astype(np.int32)

    shapes = (
        (length - length // 2, length // 4, length // 2),
        (short - short // 2, short // 2, short // 3),
    )
    return [Sequences(ids(prompt), (ids(one), ids(other))) for prompt, one, other in shapes]


def _named_ids(config: Any) -> set[int]:
    """Return the token ids that a configuration names, of which an option may have several in a list."""
    values = [value for name, value in vars(config).items() if name.endswith(("_id", "_index"))]
    ids = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    return {one for one in ids if isinstance(one, int)}


def pack_trial(sequences: Sequence[Sequences]) -> PackedBatch:
    """Return a batch of invented sequences, whose keys are not read."""
    responses = sum(len(example.responses) for example in sequences)
    return pack(sequences, np.zeros((responses, 2), dtype=np.uint64))
