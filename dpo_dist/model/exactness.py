"""The check at start: log-probs of a model as training computes them, against its own plain forward.

A few invented sequences are scored twice: by the model's own forward, one row at a time, and by the cheapest
arrangement that the model may have. If the log-probs differ by more than rounding, the next costlier
arrangement is tried. The model's own forward is also shown to be causal.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_dist.data.arrangement import Arrangement
from dpo_dist.data.packing import Ids, PackedBatch, Sequences, pack
from dpo_dist.errors import ConfigError, DeviceMemoryError, first_line
from dpo_dist.model.architectures import few_positions, recorded_arrangement
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.layer_options import layer_values

log = logging.getLogger(__name__)

Score = Callable[[PackedBatch], Tensor]
"""Log-probs of the targets of a batch on its device, float32 [targets]; may be collective."""

_USUAL_LENGTH = 40
# A longer sliding window is not tried: its scores would cost more than the start of a run.
_LONGEST_WINDOW = 1024
_SHORT_LENGTH = 12
# Beyond these, tokens of a trained vocabulary may never have been seen.
_IDS = 10_000
# Rows that tables of learned positions have beside the positions, as in OPT.
_SPARE_POSITIONS = 8
# Largest difference of a token in float32: rounding of the softmax, and a share of the spread of log-probs.
_ROUNDING = 2e-5
_SHARE_OF_SPREAD = 5e-4
# Differences in bf16, of the mean token and of the worst, as shares of the spread. A bf16 forward depends on
# the shape of its batch: a few times what the model's own forward shows between two shapes is rounding, too.
_BF16_MEAN, _BF16_LARGEST = 0.03, 0.25
_OWN_DRIFTS = 4.0
# Effect of other later tokens on the mean token in bf16: shapes are equal, so hardly any of it is rounding.
_BF16_FUTURE = 0.02
# The same with int8 weights: a column of inputs with an outlier in any token is not rounded in all of them
# (arXiv 2208.07339), so later tokens change rounding.
_INT8_FUTURE = 0.1


def settle(
    model: PackedCausalLM,
    score: Score,
    device: torch.device,
    max_length: int,
    agree: Callable[[bool], bool] = lambda flag: flag,
    key: str = "model.path",
) -> None:
    """Arrange `model` in the cheapest way that computes the log-probs of its own forward; collective.

    Args:
        model: in evaluation mode, in an engine or not.
        score: scores a batch on `device` by `model`.
        device: of the forward.
        max_length: the longest prompt plus response, in tokens.
        agree: returns whether a flag is true on any rank; collective.
        key: the configuration key to name in an error.

    Raises:
        ConfigError: the model is not causal, its own forward fails, or it has too few positions.
    """
    kind = model.causal_lm.config.model_type
    check_positions(model.causal_lm, max_length, key)
    trial = _tried(model, score, device, max_length, agree, key)
    failures: list[str] = []
    for arrangement, own_logits in _ladder(model):
        fault = trial.fault(arrangement, own_logits=own_logits)
        if not agree(bool(fault)):
            break
        failures.append(f"{_described(arrangement, own_logits)}: {fault or 'fails on another rank'}")
    else:
        raise ConfigError(
            "training would not compute the log-probs of this model's own forward",
            where=key,
            got=f"{kind}, {'; '.join(failures) or 'which cannot be packed, as sequence parallelism needs'}",
            expected=f"differences of up to {trial.tolerances[1]:.2g} nats",
            remedy="set parallelism.sequence_parallel=1" if model.sequence else "choose another model",
        )
    for failure in failures:
        log.info("%s, %s", kind, failure)
    if model.own_logits:
        text = "%s: log-probs are computed from all logits of the model, which takes memory for %s per token"
        log.warning(text, kind, f"{_vocabulary(model.causal_lm):,} values")


class _Trial:
    """Invented sequences, and their log-probs by the model's own forward of one row at a time.

    Attributes:
        is_float32: whether the model computes in float32.
        is_int8: whether products with its weights round their inputs to int8.
        plain: float32 [targets].
        drift: float32 [targets but the last of each response], their change in a shorter row; 0 in float32.
        future: float32 [targets of the first response], the effect of tokens after them in a longer row.
    """

    def __init__(self, model: PackedCausalLM, score: Score, device: torch.device, max_length: int):
        self._model, self._score, self._device = model, score, device
        sequences = trial_sequences(model.causal_lm, max_length)
        self._batch = _pack(sequences)
        self.is_int8 = any(weight.dtype == torch.int8 for weight in model.parameters())
        self.is_float32 = next(model.parameters()).dtype == torch.float32 and not self.is_int8
        self.plain = self._scores(self._batch, Arrangement.single, own_logits=True)
        prompt, (first, second) = sequences[0].prompt_ids, sequences[0].responses
        count, later = len(first), len(second) - len(first)
        longer = tuple(np.concatenate((first, end)) for end in (second[count:], prompt[:later]))
        scores = self._scores(_pack([Sequences(prompt, longer)]), Arrangement.single, own_logits=True)
        one, other = scores.view(2, -1)[:, :count]
        self.future = (one - other).abs()
        self.drift = torch.zeros_like(self.plain) if self.is_float32 else self._drift(sequences)

    def _drift(self, sequences: Sequence[Sequences]) -> Tensor:
        shorter = [replace(whole, responses=tuple(map(_without_end, whole.responses))) for whole in sequences]
        scores = self._scores(_pack(shorter), Arrangement.single, own_logits=True)
        kept = [len(response) for example in shorter for response in example.responses]
        plain = torch.split(
            self.plain, [len(response) for example in sequences for response in example.responses]
        )
        return (scores - torch.cat([of[:n] for of, n in zip(plain, kept, strict=True)])).abs()

    @torch.no_grad()
    def _scores(self, batch: PackedBatch, arrangement: Arrangement, *, own_logits: bool) -> Tensor:
        self._model.arrange(arrangement, own_logits=own_logits)
        return self._score(batch.to(self._device)).float().cpu()

    @property
    def spread(self) -> float:
        """Standard deviation of the plain log-probs over tokens."""
        return float(self.plain.std())

    @property
    def tolerances(self) -> tuple[float, float]:
        """Differences that rounding explains, in nats: of the mean token, and of a single one."""
        if self.is_float32:
            return (_ROUNDING + _SHARE_OF_SPREAD * self.spread,) * 2
        mean, largest = (_OWN_DRIFTS * float(drift) for drift in (self.drift.mean(), self.drift.max()))
        return max(_BF16_MEAN * self.spread, mean), max(_BF16_LARGEST * self.spread, largest)

    @property
    def is_causal(self) -> bool:
        """Whether later tokens leave the log-probs of a response as they are, but for rounding."""
        if self.is_float32:
            return float(self.future.max()) <= self.tolerances[1]
        share = _INT8_FUTURE if self.is_int8 else _BF16_FUTURE
        return float(self.future.mean()) <= share * self.spread

    def fault(self, arrangement: Arrangement, *, own_logits: bool) -> str:
        """Return why this arrangement of the model is not exact; empty: it is."""
        try:
            found = self._scores(self._batch, arrangement, own_logits=own_logits)
        except (DeviceMemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model can raise anything if it is called in an unusual way
            return first_line(error)
        differences = (found - self.plain).abs()
        mean, largest = float(differences.mean()), float(differences.max())
        if mean <= self.tolerances[0] and largest <= self.tolerances[1]:
            return ""
        return f"log-probs differ by up to {largest:.2g} nats, by {mean:.2g} in the mean"


def _tried(
    model: PackedCausalLM,
    score: Score,
    device: torch.device,
    max_length: int,
    agree: Callable[[bool], bool],
    key: str,
) -> _Trial:
    """Return the trial of a model whose own forward is causal; collective.

    Raises:
        ConfigError: the forward fails, is not causal, or gives log-probs that are not finite.
    """
    kind, fault, trial = model.causal_lm.config.model_type, "", None
    try:
        trial = _Trial(model, score, device, max_length)
    except (DeviceMemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's code can raise anything
        fault = first_line(error)
    if agree(trial is None) or trial is None:
        raise ConfigError(
            "the model's own forward cannot score a sequence of tokens",
            where=key,
            got=f"{kind}, {fault or 'an error on another rank'}",
            expected="causal_lm(input_ids=...).logits",
            remedy="choose a causal language model",
        )
    if agree(not bool(trial.plain.isfinite().all())):
        raise ConfigError(
            "the model computes log-probs that are not finite",
            where=key,
            got=f"{kind}, {int((~trial.plain.isfinite()).sum())} of {len(trial.plain)} of invented tokens",
            remedy="check the model's weights, or set model.dtype=fp32",
        )
    if agree(not trial.is_causal):
        raise ConfigError(
            "this model is not causal: its log-probs depend on later tokens",
            where=key,
            got=f"{kind}, of which a log-prob changes by {float(trial.future.max()):.2g} nats with the "
            "tokens after it",
            remedy="choose a causal language model",
        )
    return trial


def _ladder(model: PackedCausalLM) -> Iterator[tuple[Arrangement, bool]]:
    """Yield arrangements from the cheapest to the costliest: by the chunked head, then by all logits.

    Ranks that share the tokens of a batch can share those of a packed one only.
    """
    if model.sequence is not None:
        if model.has_chunked_head and model.can_pack(own_logits=False):
            yield Arrangement.packed, False
        return
    first = recorded_arrangement(model.causal_lm.config.get_text_config().model_type)
    arrangements = list(Arrangement)[list(Arrangement).index(first) :]
    for own_logits in (False, True):
        if own_logits or model.has_chunked_head:
            for arrangement in arrangements:
                if arrangement is not Arrangement.packed or model.can_pack(own_logits=own_logits):
                    yield arrangement, own_logits


def _described(arrangement: Arrangement, own_logits: bool) -> str:
    return f"{arrangement} with {'its own logits' if own_logits else 'the log-prob head'}"


def trial_sequences(causal_lm: Any, max_length: int) -> list[Sequences]:
    """Return two invented examples of two responses each, within `max_length` tokens.

    The first is longer than the model's sliding window, if that is short. The ids are those of text: none
    that the configuration names.
    """
    config = causal_lm.config.get_text_config()
    limits = [*layer_values(config, "sliding_window"), *layer_values(config, "attention_chunk_size")]
    windows = [limit for limit in limits if isinstance(limit, int) and limit <= _LONGEST_WINDOW]
    beyond = max(windows, default=0) * 5 // 4
    length = max(4, min(max_length, max(_USUAL_LENGTH, beyond)))
    short = min(length, _SHORT_LENGTH)
    named = _named_ids(causal_lm.config) | _named_ids(config)
    vocabulary = [id_ for id_ in range(min(_vocabulary(causal_lm), _IDS)) if id_ not in named]
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


def _without_end(response: Ids) -> Ids:
    return response[: max(1, len(response) * 3 // 4)]


def _vocabulary(causal_lm: Any) -> int:
    size: int = causal_lm.config.get_text_config().vocab_size
    return size


def _pack(sequences: Sequence[Sequences]) -> PackedBatch:
    responses = sum(len(example.responses) for example in sequences)
    return pack(sequences, np.zeros((responses, 2), dtype=np.uint64))


def check_positions(causal_lm: Any, max_length: int, key: str) -> None:
    """Check that a model with learned positions has one for each input token.

    Raises:
        ConfigError: it has fewer.
    """
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or max_length - 1 <= positions:
        return
    tokens = causal_lm.get_input_embeddings()
    tables = [m for m in causal_lm.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    if any(positions <= table.num_embeddings <= positions + _SPARE_POSITIONS for table in tables):
        raise few_positions(positions, max_length, key)
