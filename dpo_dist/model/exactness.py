"""The check at start: log-probs of a model as training computes them, against its own plain forward."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_dist.batching.pack import Ids, PackedBatch, Sequences, pack
from dpo_dist.batching.plan import Arrangement
from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.foundation.errors import ConfigError, DeviceMemoryError, first_line
from dpo_dist.foundation.text import first_few
from dpo_dist.model.architectures import few_positions, recorded_arrangement
from dpo_dist.model.attention import choose_backend
from dpo_dist.model.layers import expert_blocks, layer_values
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.rotary import forget_lengths
from dpo_dist.model.supported import check_supported, check_text
from dpo_dist.model.ulysses import cannot_be_shared

log = logging.getLogger(__name__)

# How long a rank on which a forward has failed waits for the others. They compute the same forward, so they
# fail at the same time, or come from its end; or they wait for this rank in the forward, and never come.
# Ranks may compile a kernel before they fail, and then a costlier arrangement may succeed.
LAST_SECONDS, LADDER_SECONDS = 5.0, 60.0

T = TypeVar("T")
Score = Callable[[PackedBatch], Tensor]
"""Log-probs of the targets of a batch on its device, float32 [targets]; may be collective."""


class Agree(Protocol):
    """Collective agreement on a fault."""

    def __call__(self, fault: str, seconds: float | None = None, /) -> str:
        """Return the fault of the lowest rank that has one; empty: none has. Collective.

        Args:
            fault: of this rank; empty: none.
            seconds: how long a rank with a fault waits for the others, which may be in a forward that it
                has left; None: without a limit.

        Raises:
            ConfigError: they have not come.
        """
        ...


def _alone(fault: str, _seconds: float | None = None) -> str:
    return fault


@dataclass(frozen=True)
class CheckedModel:
    """A model under the check at start.

    Attributes:
        model: in evaluation mode, in an engine or not.
        score: scores a batch on `device` by `model`.
        device: of the forward.
        max_length: the longest prompt plus response, in tokens.
        key: the configuration key to name in an error.
        agree: on a fault, by all ranks that check.
    """

    model: PackedCausalLM
    score: Score
    device: torch.device
    max_length: int
    key: str = "model.path"
    agree: Agree = _alone

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

    def attempt(self, work: Callable[[], T], seconds: float) -> tuple[T | None, str]:
        """Return the result of `work`, and no text; or None and the first line of an error. Collective.

        A model can raise anything if it is called in an unusual way. Exhausted memory is raised.

        Args:
            work: makes the same collective calls on all ranks, unless it fails.
            seconds: how long a rank with an error waits for the others.
        """
        result, fault = None, ""
        try:
            result = work()
        except (DeviceMemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            fault = first_line(error)
            log.info("%s, in the check at start:", self.kind, exc_info=True)
        fault = self.agree(fault, seconds)
        return (None if fault else result), fault


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


# Prompt and response of the short sequence: an input of two tokens.
_SHORT = (2, 1)


def sometimes_used(checked: CheckedModel) -> str:
    """Return in words the trained weights that some sequences use and others do not; empty: there are none.

    Without those of lists of experts, whose gradients are ready at once. Collective.
    """
    causal_lm = checked.model.causal_lm
    long = trial_sequences(causal_lm, checked.max_length)[0]
    prompt, response = _SHORT
    short = Sequences(long.prompt_ids[:prompt], (long.responses[0][:response],))
    one, other = (_reached(checked, sequences) for sequences in (long, short))
    experts = {weight for block in expert_blocks(causal_lm) for weight in block.parameters()}
    names = [name for name, weight in causal_lm.named_parameters() if weight in (one ^ other) - experts]
    return first_few(names)


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


@contextlib.contextmanager
def packed_for_a_while(model: PackedCausalLM | PreTrainedModel, longest: int) -> Iterator[PackedCausalLM]:
    """Yield `model` as a packed model; a model of transformers gets its own attention and head back.

    Args:
        model: in evaluation mode.
        longest: tokens of the longest prompt plus response.

    Raises:
        ConfigError: it is no such model, is in training mode, or its log-probs are not exact.
    """
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
    check_text(model.config, "model")
    check_supported(model.config, longest)
    if model.training:
        raise ConfigError(
            "the model is in training mode, in which dropout makes log-probs random",
            where="model",
            got=type(model).__name__,
            remedy="call model.eval(); gradients are recorded in evaluation mode too",
        )
    packed: PackedCausalLM | None = None
    head, attention = model.get_output_embeddings(), model.config._attn_implementation
    dtype = Dtype.fp32 if next(model.parameters()).dtype == torch.float32 else Dtype.bf16
    try:
        backend = choose_backend(AttentionBackend.auto, dtype, model.device)
        packed = PackedCausalLM(model, backend, arrangement=Arrangement.padded).eval()
        settle(CheckedModel(packed, packed, model.device, longest, "model"))
        yield packed
    finally:
        if packed is not None:
            forget_lengths(model)
        if head is not None:
            model.set_output_embeddings(head)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
