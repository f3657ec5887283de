"""The check at start: log-probs of a model as training computes them, against its own plain forward."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_dist.batching.pack import Ids, PackedBatch, Sequences, pack
from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.foundation.errors import ConfigError, DeviceMemoryError, first_line
from dpo_dist.foundation.text import first_few
from dpo_dist.model.architectures import check_supported, few_positions, recorded_arrangement
from dpo_dist.model.attention import choose_backend
from dpo_dist.model.layers import expert_blocks, layer_values
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.rotary import forget_lengths
from dpo_dist.model.ulysses import cannot_be_shared

log = logging.getLogger(__name__)

Score = Callable[[PackedBatch], Tensor]
"""Log-probs of the targets of a batch on its device, float32 [targets]; may be collective."""
Agree = Callable[[str], str]
"""Fault of this rank (empty: none) to that of the lowest rank that has one; collective."""


@dataclass(frozen=True)
class CheckedModel:
    """A model in evaluation mode, how it is scored, and the longest prompt plus response in tokens."""

    model: PackedCausalLM
    score: Score
    device: torch.device
    max_length: int
    key: str = "model.path"
    agree: Agree = str

    @property
    def kind(self) -> str:
        """Return the `model_type`."""
        return str(self.model.causal_lm.config.model_type)

    @property
    def is_int8(self) -> bool:
        """Return whether products with the model's weights may round their inputs to int8."""
        return any(weight.dtype == torch.int8 for weight in self.model.parameters())

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> Tensor:
        """Return the log-probs of a batch, float32 [targets] on the host."""
        return self.score(batch.to(self.device)).float().cpu()

    def fault(self, work: Callable[[], str]) -> str:
        """Return the fault that `work` returns, or the first line of an error, on some rank. Collective.

        A model can raise anything if it is called in an unusual way. Exhausted memory is raised.
        """
        try:
            fault = work()
        except (DeviceMemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            fault = first_line(error)
            log.info("%s, in the check at start:", self.kind, exc_info=True)
        return self.agree(fault)

    def refuse(self, work: Callable[[], str], message: str, remedy: str) -> None:
        """Raise a `ConfigError` if `work` returns a fault or fails on some rank; collective."""
        if fault := self.fault(work):
            raise ConfigError(message, where=self.key, got=f"{self.kind}, {fault}", remedy=remedy)


_USUAL_LENGTH = 64
# Sequences of this length are tried at most: their scores would cost more than the start of a run.
LONGEST = 1280
_SHORT_LENGTH = 24
# Beyond these, tokens of a trained vocabulary may never have been seen.
_IDS = 10_000
# Largest difference of a token in float32: rounding of the softmax, and a share of the spread of log-probs.
_ROUNDING = 2e-5
_SHARE_OF_SPREAD = 5e-4
# Difference of the mean token in 16 bits that needs no explanation, as a share of the spread, and what
# rounding explains, as a multiple of the change that it makes.
_TYPICAL, _NOISES = 0.005, 2.0
# Effect of another response on the median of the tokens that follow it first, as a multiple of the change by
# rounding, and of the change in a second forward of the same batch: some kernels round otherwise each time.
_NEIGHBOUR_NOISES, _REPEATS = 0.1, 5.0
_NEAR = 8
# Effect of other later tokens on the mean token in 16 bits: shapes are equal, so hardly any is rounding.
_FUTURE = 0.02
# The same with int8 weights: a column of inputs with an outlier in any token is not rounded in all of them
# (arXiv 2208.07339), so other tokens change rounding.
_INT8_OTHERS = 0.1


class Trial:
    """Invented sequences, and their log-probs `plain` by the model's own forward of one row at a time."""

    plain: Tensor
    found: Tensor
    spread: float

    def __init__(self, checked: CheckedModel):
        self.checked = checked
        self.sequences = trial_sequences(checked.model.causal_lm, checked.max_length)
        self.batch = pack_trial(self.sequences)
        self.is_float32 = next(checked.model.parameters()).dtype == torch.float32 and not checked.is_int8
        self.noise = 0.0

    def score_plainly(self) -> str:
        """Compute `plain`, and what rounding explains; return no fault. Collective."""
        self.plain = self.found = self._plain_again()
        self.spread = float(self.plain.std())
        if not self.is_float32:
            with _rounded_once_more(self.checked.model.causal_lm):
                self.noise = float((self._plain_again() - self.plain).abs().mean())
        return ""

    def _scores(self, batch: PackedBatch, arrangement: Arrangement, own_logits: bool) -> Tensor:
        self.checked.model.arrange(arrangement, own_logits=own_logits)
        return self.checked.scores(batch)

    def _plain_again(self) -> Tensor:
        return self._scores(self.batch, Arrangement.single, own_logits=True)

    @property
    def rounding(self) -> float:
        """Return the difference of the mean token that rounding explains, in nats."""
        return _ROUNDING + max(_TYPICAL * self.spread, _NOISES * self.noise)

    @property
    def _exact(self) -> float:
        return _ROUNDING + _SHARE_OF_SPREAD * self.spread

    def not_finite(self) -> str:
        """Return in words how many log-probs are not finite; empty: none."""
        lost = int((~self.plain.isfinite()).sum())
        return f"{lost} of {len(self.plain)} of invented tokens" if lost else ""

    def effect_of_later_tokens(self) -> str:
        """Return in words the largest effect of later tokens on a token; empty: none but rounding.

        The last two responses have one length, and begin with the same tokens.
        """
        tokens = len(self.sequences[-1].responses[0])
        first, second = self.plain[-2 * tokens :].view(2, -1)[:, : max(1, tokens // 2)]
        effect = (first - second).abs()
        mean, largest = float(effect.mean()), float(effect.max())
        if self.is_float32:
            is_rounding = largest <= self._exact
        else:
            share = _INT8_OTHERS if self.checked.is_int8 else _FUTURE
            is_rounding = mean <= share * self.spread
        return "" if is_rounding else f"a log-prob changes by {largest:.2g} nats with the tokens after it"

    def fault(self, arrangement: Arrangement, own_logits: bool) -> str:
        """Return why this arrangement of the model is not exact; empty: it is. Collective."""
        self.found = self._scores(self.batch, arrangement, own_logits)
        neighbours = ""
        if not self.is_float32 and arrangement is not Arrangement.single:
            neighbours = self._effect_of_neighbours()
        return self._difference() or neighbours

    def _difference(self) -> str:
        """Return in words what rounding does not explain of the difference from `plain`; empty: nothing."""
        differences = (self.found - self.plain).abs()
        largest, mean = float(differences.max()), float(differences.mean())
        is_rounding = largest <= self._exact if self.is_float32 else mean <= self.rounding
        text = f"log-probs differ by up to {largest:.2g} nats, by {mean:.2g} in the mean"
        return "" if is_rounding else text

    def _effect_of_neighbours(self) -> str:
        """Return in words the effect of the first response on the tokens that follow it; empty: none."""
        example = self.sequences[0]
        first, second = example.responses
        other = replace(example, responses=(first[::-1].copy(), second))
        # The prompt predicts the first one.
        near = slice(len(first) + min(1, len(second) - 1), len(first) + min(1 + _NEAR, len(second)))
        effect, repeated = (
            float((self.checked.scores(batch) - self.found)[near].abs().median())
            for batch in (pack_trial([other, *self.sequences[1:]]), self.batch)
        )
        allowed = max(_REPEATS * repeated, _NEIGHBOUR_NOISES * self.noise)
        if self.checked.is_int8:
            allowed = max(allowed, _INT8_OTHERS * self.spread)
        is_rounding = effect <= allowed
        return "" if is_rounding else f"log-probs change by {effect:.2g} nats with other responses"


@contextlib.contextmanager
def _rounded_once_more(causal_lm: nn.Module) -> Iterator[None]:
    """Change each value of embeddings by up to a rounding error of its dtype, at random."""
    generator = torch.Generator().manual_seed(0)

    def change(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        error = torch.finfo(embedded.dtype).eps / 2
        factors = 1 + error * (2 * torch.rand(embedded.shape, generator=generator) - 1)
        return (embedded.float() * factors.to(embedded.device)).to(embedded.dtype)

    tables = [module for module in causal_lm.modules() if isinstance(module, nn.Embedding)]
    hooks = [table.register_forward_hook(change) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trial_sequences(causal_lm: Any, max_length: int) -> list[Sequences]:
    """Return two invented examples of two responses each, within `max_length` tokens.

    The first is longer than the model's sliding window, if that is short. The responses of the second have
    one length, and begin alike. The ids are those of text: none that the configuration names.
    """
    config = causal_lm.config.get_text_config()
    limits = [*layer_values(config, "sliding_window"), *layer_values(config, "attention_chunk_size")]
    limits += (getattr(config, "compress_rates", None) or {}).values()  # keys that stand for so many tokens
    tried = [limit * 5 // 4 for limit in limits if isinstance(limit, int) and limit * 5 // 4 <= LONGEST]
    length = max(4, min(max_length, max([_USUAL_LENGTH, *tried])))
    short = min(length, _SHORT_LENGTH)
    named = _named_ids(causal_lm.config) | _named_ids(config)
    vocabulary = [id_ for id_ in range(min(config.vocab_size, _IDS)) if id_ not in named]
    generator = np.random.default_rng(0)

    def ids(count: int) -> Ids:
        return generator.choice(vocabulary, count).astype(np.int32)

    long = Sequences(ids(length - length // 2), (ids(length // 4), ids(length // 2)))
    same = ids(max(1, short // 4))
    ends = (np.concatenate((same, ids(short // 2 - len(same)))) for _ in range(2))
    return [long, Sequences(ids(short - short // 2), tuple(ends))]


def _named_ids(config: Any) -> set[int]:
    """Return the token ids that a configuration names, of which an option may have several in a list."""
    values = [value for name, value in vars(config).items() if name.endswith(("_id", "_index"))]
    ids = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    return {one for one in ids if isinstance(one, int)}


def pack_trial(sequences: Sequence[Sequences]) -> PackedBatch:
    """Return a batch of invented sequences, whose keys are not read."""
    responses = sum(len(example.responses) for example in sequences)
    return pack(sequences, np.zeros((responses, 2), dtype=np.uint64))


# Rows that tables of learned positions have beside the positions, as in OPT.
_SPARE_POSITIONS = 8


def settle(checked: CheckedModel) -> Trial:
    """Arrange a model in the cheapest way that computes the log-probs of its own forward; collective."""
    model, max_length = checked.model, checked.max_length
    check_positions(model.causal_lm, max_length, checked.key)
    trial = Trial(checked)
    checked.refuse(
        trial.score_plainly,
        "the model's own forward cannot score a sequence of tokens",
        "choose a causal language model",
    )
    checked.refuse(
        trial.not_finite,
        "the model computes log-probs that are not finite",
        "check the model's weights, or set model.dtype=fp32",
    )
    checked.refuse(
        trial.effect_of_later_tokens,
        "this model is not causal, or its forward is random",
        "choose a causal language model, or remove dropout and noise from the model's own code",
    )
    failures: list[str] = []
    for arrangement, own_logits in _ladder(model, max_length):
        fault = checked.fault(partial(trial.fault, arrangement, own_logits))
        if not fault:
            break
        head = "its own logits" if own_logits else "the log-prob head"
        failures.append(f"{arrangement} with {head}: {fault}")
    else:
        if model.sequence is not None:
            raise cannot_be_shared(checked.kind, model.sequence.ranks, "; ".join(failures))
        raise ConfigError(
            "training would not compute the log-probs of this model's own forward",
            where=checked.key,
            got=f"{checked.kind}, {'; '.join(failures)}",
            remedy="choose another model, or remove dropout and noise from its own code",
        )
    for failure in failures:
        log.info("%s, %s", checked.kind, failure)
    if model.own_logits:
        text = "%s: log-probs are computed from all logits of the model, which takes memory for %s per token"
        vocabulary = model.causal_lm.config.get_text_config().vocab_size
        log.warning(text, checked.kind, f"{vocabulary:,} values")
    return trial


def check_training(trial: Trial) -> None:
    """Check that a settled model computes the same log-probs in training mode, where it stays; collective.

    Its own code may have dropout that no option switches off.
    """
    checked = trial.checked
    checked.model.train()

    def change() -> str:
        mean, limit = float((checked.scores(trial.batch) - trial.found).abs().mean()), trial.rounding
        if checked.is_int8 and checked.device.type != "cuda":
            # There, bitsandbytes rounds the inputs of int8 weights in evaluation mode only.
            limit = max(limit, _INT8_OTHERS * trial.spread)
        return "" if mean <= limit else f"by {mean:.2g} nats in the mean"

    checked.refuse(
        change,
        "the forward of this model is another in training mode",
        "remove dropout, noise and what else is only for training from the model's own code",
    )


def check_use(checked: CheckedModel) -> None:
    """Check that each sequence uses the same trained weights of a model in training mode; collective.

    Ranks add up gradients weight by weight. A rank whose sequences do not use one has no gradient to add,
    and the others would wait for it.
    """
    causal_lm = checked.model.causal_lm
    long = trial_sequences(causal_lm, checked.max_length)[0]
    short = Sequences(long.prompt_ids[:2], (long.responses[0][:1],))

    def sometimes_used() -> str:
        differing = _reached(checked, long) ^ _reached(checked, short)
        differing -= {weight for block in expert_blocks(causal_lm) for weight in block.parameters()}
        return first_few([name for name, weight in causal_lm.named_parameters() if weight in differing])

    checked.refuse(
        sometimes_used,
        "some sequences do not use all weights of this model, so several processes cannot train it",
        "train on one process, or add 0 times these weights to the output of their module",
    )


def _reached(checked: CheckedModel, sequences: Sequences) -> set[nn.Parameter]:
    """Return the weights with a gradient from the log-probs of these sequences."""
    with torch.enable_grad():
        logps: Tensor = checked.score(pack_trial([sequences]).to(checked.device))
    seen, found, waiting = set(), set(), [logps.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):  # where a gradient ends
                found.add(node.variable)
            waiting += [following for following, _ in node.next_functions]
    return found


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
    arrangements = list(Arrangement)
    arrangements = arrangements[arrangements.index(Arrangement.single if is_alone else recorded) :]
    for own_logits in (False, True) if model.has_chunked_head else (True,):
        for arrangement in arrangements:
            if arrangement is not Arrangement.packed or model.can_pack(own_logits=own_logits):
                yield arrangement, own_logits


def check_positions(causal_lm: Any, max_length: int, key: str) -> None:
    """Check that a model with learned positions has one for each input token."""
    positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or max_length - 1 <= positions:
        return
    tokens = set(causal_lm.get_input_embeddings().modules())  # original and copy, if an adapter has one
    tables = [m for m in causal_lm.modules() if isinstance(m, nn.Embedding) and m not in tokens]
    if any(positions <= table.num_embeddings <= positions + _SPARE_POSITIONS for table in tables):
        raise few_positions(positions, max_length, key)


@contextlib.contextmanager
def packed_for_a_while(model: PackedCausalLM | PreTrainedModel, longest: int) -> Iterator[PackedCausalLM]:
    """Yield `model` as a packed model of up to `longest` tokens; it gets its own attention and head back."""
    if isinstance(model, PackedCausalLM):
        yield model
        return
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            "this is not a causal language model of transformers",
            where="model",
            got=type(model).__name__,
            remedy="pass the result of load_model, or a PreTrainedModel: of a PeftModel, get_base_model()",
        )
    check_supported(model.config, longest)
    if model.training:
        raise ConfigError(
            "the model is in training mode, in which dropout makes log-probs random",
            where="model",
            got=type(model).__name__,
            remedy="call model.eval(); gradients are recorded in evaluation mode too",
        )
    head, attention = model.get_output_embeddings(), model.config._attn_implementation
    dtype = Dtype.fp32 if next(model.parameters()).dtype == torch.float32 else Dtype.bf16
    backend = choose_backend(AttentionBackend.auto, dtype, model.device)
    try:
        packed = PackedCausalLM(model, backend, arrangement=Arrangement.padded).eval()
        settle(CheckedModel(packed, packed, model.device, longest, "model"))
        yield packed
    finally:
        forget_lengths(model)
        if head is not None:
            model.set_output_embeddings(head)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
