"""The check at start: log-probs of a model as training computes them, against its own plain forward.

A few invented sequences are scored twice: by the model's own forward, one row at a time, and by the cheapest
arrangement that the model may have. If the log-probs differ by more than rounding, the next costlier
arrangement is tried. The model's own forward is also shown to be causal.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dpo_dist.data.arrangement import Arrangement
from dpo_dist.errors import ConfigError
from dpo_dist.model.architectures import few_positions, recorded_arrangement
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.sequence_parallel import cannot_be_shared
from dpo_dist.model.trial import Score, Trial, attempted, changes_in_training

log = logging.getLogger(__name__)

# Rows that tables of learned positions have beside the positions, as in OPT.
_SPARE_POSITIONS = 8


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
        ConfigError: the model is not causal or is random, its own forward fails, or it has too few positions.
    """
    kind = model.causal_lm.config.model_type
    check_positions(model.causal_lm, max_length, key)
    trial = _tried(model, score, device, max_length, agree, key)
    failures: list[str] = []
    for arrangement, own_logits in _ladder(model, max_length):
        after = max_length if model.mixes_lengths(max_length) else 0
        fault = trial.fault(arrangement, own_logits=own_logits, after=after)
        if not fault:
            model.arrange(arrangement, own_logits=own_logits)  # the trial may have changed it
            break
        failures.append(f"{_described(arrangement, own_logits)}: {fault}")
    else:
        _check_not_random(trial, kind, key)
        if model.sequence is not None:
            raise cannot_be_shared(kind, model.sequence.ranks, "; ".join(failures))
        raise ConfigError(
            "training would not compute the log-probs of this model's own forward",
            where=key,
            got=f"{kind}, {'; '.join(failures)}",
            expected="differences that rounding explains",
            remedy="choose another model",
        )
    for failure in failures:
        log.info("%s, %s", kind, failure)
    if model.own_logits:
        text = "%s: log-probs are computed from all logits of the model, which takes memory for %s per token"
        log.warning(text, kind, f"{model.causal_lm.config.get_text_config().vocab_size:,} values")


def check_training(
    model: PackedCausalLM,
    score: Score,
    device: torch.device,
    max_length: int,
    agree: Callable[[bool], bool] = lambda flag: flag,
    key: str = "model.path",
) -> None:
    """Check that a settled `model` computes the same log-probs in training mode; collective.

    Args: as of `settle`. The model is in training mode afterwards.

    Raises:
        ConfigError: it does not, as with dropout in code of its own that no option switches off, or it fails.
    """
    change, fault = attempted(lambda: changes_in_training(model, score, device, max_length))
    if agree(change is None) or change is None:
        raise ConfigError(
            "the model cannot score a sequence of tokens in training mode",
            where=key,
            got=f"{model.causal_lm.config.model_type}, {fault or 'an error on another rank'}",
            expected="the forward of evaluation mode",
            remedy="remove what the model's own code does in training mode only, or choose another model",
        )
    if agree(bool(change)):
        raise ConfigError(
            "log-probs of this model are others in training mode",
            where=key,
            got=f"{model.causal_lm.config.model_type}, {change or 'on another rank'}",
            expected="a forward without dropout or noise, as policy and reference compute the same function",
            remedy="remove dropout and noise from the model's own code, or choose another model",
        )


def _tried(
    model: PackedCausalLM,
    score: Score,
    device: torch.device,
    max_length: int,
    agree: Callable[[bool], bool],
    key: str,
) -> Trial:
    """Return the trial of a model whose own forward is causal; collective.

    Raises:
        ConfigError: the forward fails, is not causal, or gives log-probs that are not finite.
    """
    kind = model.causal_lm.config.model_type
    trial, fault = attempted(lambda: Trial(model, score, device, max_length, agree))
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
        _check_not_random(trial, kind, key)
        raise ConfigError(
            "this model is not causal: its log-probs depend on later tokens",
            where=key,
            got=f"{kind}, of which a log-prob changes by {float(trial.future.max()):.2g} nats with the "
            "tokens after it",
            remedy="choose a causal language model",
        )
    return trial


def _check_not_random(trial: Trial, kind: str, key: str) -> None:
    """Check that the model's own forward repeats its log-probs; collective.

    Raises:
        ConfigError: it does not, which also looks like the dependence on other tokens.
    """
    if trial.random_change:
        raise ConfigError(
            "log-probs of this model are random: the same tokens have others in each forward",
            where=key,
            got=f"{kind}, of which they change by {trial.random_change:.2g} nats in the mean",
            expected="a forward without dropout or noise in evaluation mode",
            remedy="remove dropout and noise from the model's own code, or choose another model",
        )


def _ladder(model: PackedCausalLM, max_length: int) -> Iterator[tuple[Arrangement, bool]]:
    """Yield arrangements from the cheapest to the costliest: by the chunked head, then by all logits.

    Ranks that share the tokens of a batch can share those of a packed one only.
    """
    is_alone = model.mixes_lengths(max_length)
    if model.sequence is not None:
        if model.has_chunked_head and model.can_pack(own_logits=False) and not is_alone:
            yield Arrangement.packed, False
        return
    recorded = recorded_arrangement(model.causal_lm.config.get_text_config().model_type)
    first = Arrangement.single if is_alone else recorded
    arrangements = list(Arrangement)[list(Arrangement).index(first) :]
    for own_logits in (False, True):
        if own_logits or model.has_chunked_head:
            for arrangement in arrangements:
                if arrangement is not Arrangement.packed or model.can_pack(own_logits=own_logits):
                    yield arrangement, own_logits


def _described(arrangement: Arrangement, own_logits: bool) -> str:
    return f"{arrangement} with {'its own logits' if own_logits else 'the log-prob head'}"


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
