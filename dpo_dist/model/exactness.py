"""The check at start: log-probs of a model as training computes them, against its own plain forward.

A few invented sequences are scored twice: by the model's own forward, one row at a time, and by the cheapest
arrangement that the model may have. If the log-probs differ by more than rounding, the next costlier
arrangement is tried. The model's own forward is also shown to be causal.
"""

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from dpo_dist.data.arrangement import Arrangement
from dpo_dist.errors import ConfigError
from dpo_dist.model.architectures import few_positions, recorded_arrangement
from dpo_dist.model.checked import LAST_SECONDS, CheckedModel
from dpo_dist.model.gradient_reach import sometimes_used
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.sequence_parallel import cannot_be_shared
from dpo_dist.model.trial import Trial, changes_in_training

log = logging.getLogger(__name__)

# Rows that tables of learned positions have beside the positions, as in OPT.
_SPARE_POSITIONS = 8


def settle(checked: CheckedModel) -> None:
    """Arrange a model in the cheapest way that computes the log-probs of its own forward; collective.

    Raises:
        ConfigError: the model is not causal or is random, its own forward fails, or it has too few positions.
    """
    model, kind, max_length = checked.model, checked.kind, checked.max_length
    check_positions(model.causal_lm, max_length, checked.key)
    trial = _tried(checked)
    failures: list[str] = []
    for arrangement, own_logits in _ladder(model, max_length):
        after = max_length if model.mixes_lengths(max_length) else 0
        fault = trial.fault(arrangement, own_logits=own_logits, after=after)
        if not fault:
            model.arrange(arrangement, own_logits=own_logits)  # the trial may have changed it
            break
        failures.append(f"{_described(arrangement, own_logits)}: {fault}")
    else:
        _check_not_random(trial, checked)
        if model.sequence is not None:
            raise cannot_be_shared(kind, model.sequence.ranks, "; ".join(failures))
        raise ConfigError(
            "training would not compute the log-probs of this model's own forward",
            where=checked.key,
            got=f"{kind}, {'; '.join(failures)}",
            expected="differences that rounding explains",
            remedy="choose another model",
        )
    for failure in failures:
        log.info("%s, %s", kind, failure)
    if model.own_logits:
        text = "%s: log-probs are computed from all logits of the model, which takes memory for %s per token"
        log.warning(text, kind, f"{model.causal_lm.config.get_text_config().vocab_size:,} values")


def check_training(checked: CheckedModel) -> None:
    """Check that a settled model computes the same log-probs in training mode; collective.

    The model is in training mode afterwards.

    Raises:
        ConfigError: it does not, as with dropout in code of its own that no option switches off, or it fails.
    """
    change, fault = checked.attempt(lambda: changes_in_training(checked), LAST_SECONDS)
    if change is None:
        raise ConfigError(
            "the model cannot score a sequence of tokens in training mode",
            where=checked.key,
            got=f"{checked.kind}, {fault}",
            expected="the forward of evaluation mode",
            remedy="remove what the model's own code does in training mode only, or choose another model",
        )
    if change := checked.agree(change):
        raise ConfigError(
            "log-probs of this model are others in training mode",
            where=checked.key,
            got=f"{checked.kind}, {change}",
            expected="a forward without dropout or noise, as policy and reference compute the same function",
            remedy="remove dropout and noise from the model's own code, or choose another model",
        )


def check_use(checked: CheckedModel) -> None:
    """Check that each sequence uses the same trained weights of a model in training mode; collective.

    Ranks add up gradients weight by weight. A rank whose sequences do not use one has no gradient to add,
    and the others would wait for it.

    Raises:
        ConfigError: a short sequence uses others than a long one, or the forward fails.
    """
    names, fault = checked.attempt(lambda: sometimes_used(checked), LAST_SECONDS)
    if fault or checked.agree(names or ""):
        raise ConfigError(
            "some sequences do not use all weights of this model, so several processes cannot train it",
            where=checked.key,
            got=f"{checked.kind}, {fault or names}",
            expected="a gradient of each trained weight from each sequence",
            remedy="train on one process, or add 0 times these weights to the output of their module",
        )


def _tried(checked: CheckedModel) -> Trial:
    """Return the trial of a model whose own forward is causal; collective.

    Raises:
        ConfigError: the forward fails, is not causal, or gives log-probs that are not finite.
    """
    trial, fault = checked.attempt(lambda: Trial(checked), LAST_SECONDS)
    if trial is None:
        raise ConfigError(
            "the model's own forward cannot score a sequence of tokens",
            where=checked.key,
            got=f"{checked.kind}, {fault}",
            expected="causal_lm(input_ids=...).logits",
            remedy="choose a causal language model",
        )
    lost = int((~trial.plain.isfinite()).sum())
    if fault := checked.agree(f"{lost} of {len(trial.plain)} of invented tokens" if lost else ""):
        raise ConfigError(
            "the model computes log-probs that are not finite",
            where=checked.key,
            got=f"{checked.kind}, {fault}",
            remedy="check the model's weights, or set model.dtype=fp32",
        )
    if change := checked.agree("" if trial.is_causal else f"{float(trial.future.max()):.2g} nats"):
        _check_not_random(trial, checked)
        raise ConfigError(
            "this model is not causal: its log-probs depend on later tokens",
            where=checked.key,
            got=f"{checked.kind}, of which a log-prob changes by {change} with the tokens after it",
            remedy="choose a causal language model",
        )
    return trial


def _check_not_random(trial: Trial, checked: CheckedModel) -> None:
    """Check that the model's own forward repeats its log-probs; collective.

    Raises:
        ConfigError: it does not, which also looks like the dependence on other tokens.
    """
    if change := trial.random_change:
        raise ConfigError(
            "log-probs of this model are random: the same tokens have others in each forward",
            where=checked.key,
            got=f"{checked.kind}, of which they change {change}",
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
    tokens = set(causal_lm.get_input_embeddings().modules())  # original and copy, if an adapter has one
    tables = [m for m in causal_lm.modules() if isinstance(m, nn.Embedding) and m not in tokens]
    if any(positions <= table.num_embeddings <= positions + _SPARE_POSITIONS for table in tables):
        raise few_positions(positions, max_length, key)
