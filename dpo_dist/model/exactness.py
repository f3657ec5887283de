"""The check at start: training must compute the log-probs of the model's own plain forward."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_dist.batching.costs import Arrangement, ComputeCosts
from dpo_dist.batching.pack import PackedBatch, copy_to_device, pack
from dpo_dist.config.schema import AttentionBackend, Dtype
from dpo_dist.data import Example, ImageInput, TokenIds
from dpo_dist.foundation.errors import ConfigError, DeviceMemoryError, first_line
from dpo_dist.foundation.text import first_few
from dpo_dist.model.architectures import check_positions, recorded_arrangement
from dpo_dist.model.attention.kernels import choose_backend
from dpo_dist.model.attention.ulysses import sharing_error
from dpo_dist.model.flops import visited_experts
from dpo_dist.model.layers import layer_values, partly_used_blocks, shared_weights, weights_of
from dpo_dist.model.library_internals import attention_name, shards_loading
from dpo_dist.model.packed import PackedCausalLM, reset_rope

log = logging.getLogger(__name__)

Score = Callable[[PackedBatch], Tensor]
"""Map a batch to the log-probs of its targets, float32 [targets] on the device; may be collective."""
Agree = Callable[[str], str]
"""Map this rank's fault (empty: none) to the fault of the lowest rank that has one; collective."""

# Tokens of the first and of the last example. Chosen.
_USUAL_LENGTH = 64
_SHORT_LENGTH = 24
# The longest sequence that is tried: attention scores of longer ones would slow down the start. Chosen.
LONGEST = 1280
# Only token ids below this are drawn: higher ones may be untrained. Chosen.
_IDS = 10_000
# Largest accepted difference of a token's log-prob in float32: rounding of softmax, plus a share of the
# log-probs' standard deviation. Both are chosen.
_ROUNDING = 2e-5
_SHARE_OF_SPREAD = 5e-4
# Largest mean difference of tokens in 16 bits: a share of log-probs' standard deviation (chosen), or a
# multiple of the change by one more rounding of the embeddings: benchmarks/log.md, 2026-11-22, "The check at
# start and rounding in 16 bits": rounding is at most 1.25 times this change, a fault 2.2 times or more.
_SHARE_IN_16_BITS = 0.005
_NOISE_FACTOR = 2.0
# Rounding sends a few tokens to other experts, which changes them much: one draw can miss them. Chosen.
_DRAWS_OF_EXPERTS = 3
# Largest median change of the first tokens after a response when that response is replaced: a multiple of the
# change by rounding, or of the change between two forwards of one batch, as some kernels do not repeat
# results. All three are chosen.
_NEIGHBOUR_FACTOR = 0.1
_REPEAT_FACTOR = 5.0
_TOKENS_AFTER = 8
# Largest mean change of tokens in 16 bits when later tokens are replaced, as a share of log-probs' standard
# deviation: the shapes are equal, so that rounding hardly changes. Chosen.
_FUTURE = 0.02
# The same with int8 weights: an outlier in one token keeps its column of inputs unrounded for all tokens
# (arXiv:2208.07339), so that other tokens change the rounding. Chosen.
_FUTURE_IN_INT8 = 0.1
_PADDED = 3  # tokens of padding behind a row that a reward model's class scores


@dataclass(frozen=True)
class Rounding:
    """How far rounding alone moves a model's log-probs, in nats.

    `spread`: their standard deviation; `noise`: their mean change by one more rounding of the embeddings.
    """

    is_float32: bool
    spread: float
    noise: float = 0.0

    @classmethod
    def measured(cls, causal_lm: Any, score: Callable[[], Tensor]) -> "tuple[Tensor, Rounding]":
        """Return the log-probs that `score` computes with the model, and how far rounding moves them."""
        logps = score()
        noise = 0.0
        # Products with int8 weights may round their inputs to int8.
        is_float32 = next(causal_lm.parameters()).dtype == torch.float32 and not _is_int8(causal_lm)
        if not is_float32:
            draws = _DRAWS_OF_EXPERTS if visited_experts(causal_lm.config.get_text_config()) else 1
            with rounded_once_more(causal_lm):
                again = [score() for _ in range(draws)]
            noise = float(torch.stack([changes(each, logps).mean() for each in again]).mean())
        finite = logps[logps.isfinite()]
        spread = float(finite.std()) if len(finite) > 1 else 0.0
        return logps, cls(is_float32, spread, noise)

    @property
    def largest(self) -> float:
        """Return the largest difference in float32."""
        return _ROUNDING + _SHARE_OF_SPREAD * self.spread

    @property
    def mean(self) -> float:
        """Return the largest mean difference in 16 bits."""
        return _ROUNDING + max(_SHARE_IN_16_BITS * self.spread, _NOISE_FACTOR * self.noise)

    def unexplained(self, differences: Tensor) -> str:
        """Return how large these differences are; empty if rounding explains them."""
        # In 16 bits, single tokens of an exact model move by a tenth of a nat with the shape of the batch, so
        # that only their mean tells rounding from a fault.
        largest, mean = float(differences.max()), float(differences.mean())
        is_rounding = largest <= self.largest if self.is_float32 else mean <= self.mean
        if is_rounding:
            return ""
        return f"log-probs differ by up to {largest:.2g} nats, by {mean:.2g} in the mean"


def changes(logps: Tensor, others: Tensor) -> Tensor:
    """Return absolute differences; a token that the model excludes, whose log-prob is -inf twice, has 0."""
    return torch.where(logps == others, 0.0, (logps - others).abs())


def _is_int8(model: nn.Module) -> bool:
    return any(weight.dtype == torch.int8 for weight in model.parameters())


# With these, every prefix that is not very short is shared.
_SHARING = ComputeCosts(key=0.0, target=0.0, beyond_prompts=True)


class StartCheck:
    """Check a model in evaluation mode on invented sequences.

    `max_length` is the longest prompt plus response, in tokens, `images` are invented images of different
    sizes, for a model that reads images. `texts` are examples of the data, without images, at whose ends a
    reward model's class has to read the score. Public methods are collective.
    """

    _plain: Tensor  # log-probs by the model's own forward of one row at a time
    _tried: Tensor  # log-probs by the last arrangement
    _rounding: Rounding  # of the plain log-probs

    def __init__(
        self,
        model: PackedCausalLM,
        score: Score,
        device: torch.device,
        max_length: int,
        key: str = "model.path",
        agree: Agree = str,
        images: Sequence[ImageInput] = (),
        texts: Sequence[Example] = (),
    ):
        self._model = model
        self._score = score
        self._device = device
        self._max_length = max_length
        self._key = key
        self._agree = agree
        self._kind = str(model.causal_lm.config.model_type)
        self._is_int8 = _is_int8(model)
        self._examples = trial_examples(model.causal_lm, max_length, images)
        self._batch = _packed(self._examples)
        branches = _branches(self._examples)
        self._tree = _packed([*self._examples, *branches], costs=_SHARING)
        self._texts = texts

    def choose_arrangement(self) -> None:
        """Set the cheapest arrangement that computes the log-probs of the model's own forward."""
        check_positions(self._model.causal_lm, self._max_length, self._key)
        self._refuse_fault(
            self._score_plainly,
            "the model's own forward cannot score a sequence of tokens",
            "choose a causal language model; if it is one, check the weights, or set model.dtype=fp32",
        )
        self._refuse_fault(
            self._effect_of_later_tokens,
            "this model is not causal, or its forward is random",
            "choose a causal language model, or remove dropout and noise from the model's own code",
        )
        model = self._model
        failures = []
        for arrangement, own_logits in _candidates(model, self._max_length):
            fault = self._agreed_fault(partial(self._why_inexact, arrangement, own_logits))
            if not fault:
                break
            head = "its own logits" if own_logits else "the log-prob head"
            failures.append(f"{arrangement} with {head}: {fault}")
        else:
            if model.sequence is not None:
                raise sharing_error(self._kind, model.sequence.ranks, "; ".join(failures))
            raise ConfigError(
                "training would not compute the log-probs of this model's own forward",
                where=self._key,
                got=f"{self._kind}, {'; '.join(failures)}",
                remedy="choose another model, or remove dropout and noise from its own code",
            )
        for failure in failures:
            log.info("%s, %s", self._kind, failure)
        if model.gives_scores:
            self._refuse_fault(
                self._unlike_class,
                "this model's own class in transformers gives other scores than training would",
                "choose another model, or a pad_token in tokenizer_config.json that ends no text: the class "
                "reads a score at the last token that is not padding",
            )
        if model.own_logits:
            log.warning("%s: log-probs are computed from all logits of the model at once", self._kind)

    def check_training(self) -> None:
        """Check that the model computes the same log-probs in training mode; leave it in that mode.

        The model's own code may have dropout that no option switches off.
        """
        self._model.train()
        self._refuse_fault(
            self._change_by_training,
            "this model computes other log-probs in training mode",
            "remove from the model's own code what differs in training, such as dropout and noise",
        )

    def check_use(self) -> None:
        """Check that every sequence uses the same trained weights; the model is in training mode.

        Ranks reduce gradients weight by weight: if one rank's sequences do not use a weight, the other ranks
        would wait for its gradient.
        """
        self._refuse_fault(
            self._sometimes_used,
            "some sequences do not use all weights of this model, so several processes cannot train it",
            "train on one process, or add 0 times these weights to the output of their module",
        )

    def _refuse_fault(self, work: Callable[[], str], message: str, remedy: str) -> None:
        """Raise a `ConfigError` if `work` returns a fault or fails on some rank; collective."""
        fault = self._agreed_fault(work)
        if fault:
            raise ConfigError(message, where=self._key, got=f"{self._kind}, {fault}", remedy=remedy)

    def _agreed_fault(self, work: Callable[[], str]) -> str:
        """Return the fault of `work`, or the first line of its error, agreed by all ranks. Collective.

        A model can raise anything if it is called in an unusual way. Out-of-memory errors are raised.
        """
        try:
            fault = work()
        except (DeviceMemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            fault = first_line(error)
            log.info("%s, in the check at start:", self._kind, exc_info=True)
        return self._agree(fault)

    @torch.no_grad()
    def _scores(self, batch: PackedBatch) -> Tensor:
        """Return the log-probs of a batch, float32 [targets] on the host."""
        return self._score(batch.to(self._device)).float().cpu()

    def _scores_as(self, arrangement: Arrangement, own_logits: bool) -> Tensor:
        self._model.arrange(arrangement, own_logits=own_logits)
        return self._scores(self._batch)

    def _plain_scores(self) -> Tensor:
        """Return the log-probs by the model's own forward of one row at a time, which reads pixels itself."""
        # A reward model's own logits are those of the end of a row only.
        own_logits = not self._model.gives_scores
        if self._model.images is None:
            return self._scores_as(Arrangement.single, own_logits)
        self._model.arrange(Arrangement.single, own_logits=own_logits)
        logps = []
        with self._model.images.by_own_forward():
            for example in self._examples:
                for ids in example.responses:
                    logps.append(self._scores(_packed([replace(example, responses=(ids,))])))
        return torch.cat(logps)

    def _score_plainly(self) -> str:
        """Compute the plain log-probs and their change by rounding; return a fault if one is not finite."""
        self._plain, self._rounding = Rounding.measured(self._model.causal_lm, self._plain_scores)
        self._tried = self._plain
        lost = int((~self._plain.isfinite()).sum())
        return f"{lost} of {len(self._plain)} log-probs are not finite" if lost else ""

    def _effect_of_later_tokens(self) -> str:
        """Return how much later tokens change a log-prob; empty if rounding explains the change.

        The last two responses have the same length, and begin with the same tokens.
        """
        tokens = len(self._examples[-1].responses[0])
        first, second = self._plain[-2 * tokens :].view(2, -1)[:, : max(1, tokens // 2)]
        effect = (first - second).abs()
        mean, largest = float(effect.mean()), float(effect.max())
        share = _FUTURE_IN_INT8 if self._is_int8 else _FUTURE
        if self._rounding.is_float32:
            is_rounding = largest <= self._rounding.largest
        else:
            is_rounding = mean <= share * self._rounding.spread
        return "" if is_rounding else f"a log-prob changes by {largest:.2g} nats with the tokens after it"

    def _why_inexact(self, arrangement: Arrangement, own_logits: bool) -> str:
        """Return why this arrangement is not exact; empty if it is exact. Collective."""
        self._tried = self._scores_as(arrangement, own_logits)
        neighbours = ""
        if not self._rounding.is_float32 and arrangement is not Arrangement.single:
            neighbours = self._effect_of_neighbours()
        fault = self._difference(self._tried) or neighbours
        if arrangement is Arrangement.packed:
            # Also after a fault: a forward is collective, and ranks may round to both sides of a limit.
            shared = self._difference(self._scores(self._tree)[: len(self._plain)])
            fault = fault or (shared and f"with shared prefixes {shared}")
        return fault

    def _difference(self, tried: Tensor) -> str:
        """Return how much log-probs differ from the plain ones; empty if rounding explains it."""
        return self._rounding.unexplained((tried - self._plain).abs())

    def _effect_of_neighbours(self) -> str:
        """Return how much the first response changes the tokens after it; empty if rounding explains it."""
        example = self._examples[0]
        first, second = example.responses
        other = replace(example, responses=(first[::-1].copy(), second))
        # The prompt predicts the second response's first token, so that token is left out.
        near = slice(len(first) + min(1, len(second) - 1), len(first) + min(1 + _TOKENS_AFTER, len(second)))

        # The median: rounding may send one token to another expert, which would decide the mean.
        def median_change(batch: PackedBatch) -> float:
            return float((self._scores(batch) - self._tried)[near].abs().median())

        effect = median_change(_packed([other, *self._examples[1:]]))
        repeated = median_change(self._batch)
        allowed = max(_REPEAT_FACTOR * repeated, _NEIGHBOUR_FACTOR * self._rounding.noise)
        if self._is_int8:
            allowed = max(allowed, _FUTURE_IN_INT8 * self._rounding.spread)
        return "" if effect <= allowed else f"log-probs change by {effect:.2g} nats with other responses"

    def _unlike_class(self) -> str:
        """Return how much scores differ from those of the class for the same rows with padding; "" if not."""
        invented = [example for example in self._examples if not example.images]
        batch = _packed([*invented, *(replace(text, trained=()) for text in self._texts)])
        scores = self._scores(batch)[batch.response_tokens.cumsum(0) - 1]
        ids_of_batch = batch.input_ids.to(self._device)
        padding = self._model.causal_lm.config.get_text_config().pad_token_id
        own = []
        with torch.no_grad(), self._model.unpacked() as reward_model:
            for row in batch.rows:
                ids = ids_of_batch[copy_to_device(self._device, row)][None]
                mask = torch.ones_like(ids)
                if padding is not None:  # without it, the class takes rows of one length
                    ids = nn.functional.pad(ids, (0, _PADDED), value=padding)
                    mask = nn.functional.pad(mask, (0, _PADDED))
                own.append(reward_model(input_ids=ids, attention_mask=mask).logits[0, 0].float().cpu())
        # The class rounds its scores to the model's precision.
        rounding = 2 * torch.finfo(next(self._model.parameters()).dtype).eps * scores.abs()
        differences = (torch.stack(own) - scores).abs()
        is_rounding = not self._rounding.unexplained((differences - rounding).clamp(min=0))
        return "" if is_rounding else f"scores differ by up to {float(differences.max()):.2g}"

    def _change_by_training(self) -> str:
        mean = float((self._scores(self._batch) - self._tried).abs().mean())
        limit = self._rounding.mean
        if self._is_int8 and self._device.type != "cuda":
            # On CPUs, bitsandbytes rounds the inputs of int8 weights in evaluation mode only.
            limit = max(limit, _FUTURE_IN_INT8 * self._rounding.spread)
        return "" if mean <= limit else f"log-probs change by {mean:.2g} nats in the mean"

    def _sometimes_used(self) -> str:
        """Return the names of weights that only a long or only a short sequence uses; empty if none."""
        causal_lm = self._model.causal_lm
        long = self._examples[0]
        short = Example(long.prompt_ids[:2], (long.responses[0][:1],))
        differing = self._used(_packed([long])) ^ self._used(_packed([short]))
        for example in self._examples:  # a rank without an image encodes a dummy
            if example.images:
                dummy = _packed([short], example.images[0])
                differing |= self._used(_packed([example])) ^ self._used(dummy)
        joined = weights_of(partly_used_blocks(causal_lm))
        if shards_loading():  # ZeRO-3 cannot gather and reduce a block at once if others share its weights
            joined -= shared_weights(causal_lm)
        differing -= joined
        return first_few([name for name, weight in causal_lm.named_parameters() if weight in differing])

    def _used(self, batch: PackedBatch) -> set[nn.Parameter]:
        """Return the weights that get a gradient from a batch's log-probs."""
        # Read off the graph: a backward would need memory for all gradients.
        with torch.enable_grad():
            logps = self._score(batch.to(self._device))
        seen = set()
        used = set()
        waiting = [logps.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if hasattr(node, "variable"):  # a leaf of the graph
                    used.add(node.variable)
                waiting += [following for following, _ in node.next_functions]
        return used


@contextlib.contextmanager
def rounded_once_more(causal_lm: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside the block, change embeddings at random by up to one rounding error of `dtype` or theirs."""
    # How much a model amplifies rounding is its own: another order of sums can change log-probs by what one
    # more rounding of its first values changes, so the limits are multiples of this.
    generator = torch.Generator().manual_seed(0)

    def change(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        error = torch.finfo(dtype or embedded.dtype).eps / 2
        factors = 1 + error * (2 * torch.rand(embedded.shape, generator=generator) - 1)
        return (embedded.float() * factors.to(embedded.device)).to(embedded.dtype)

    tables = [module for module in causal_lm.modules() if isinstance(module, nn.Embedding)]
    hooks = [table.register_forward_hook(change) for table in tables]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trial_examples(causal_lm: Any, max_length: int, images: Sequence[ImageInput] = ()) -> list[Example]:
    """Return two invented examples with two responses each, of at most `max_length` tokens.

    The first example is longer than the model's sliding window or chunk, if that is short. The last
    example's responses have the same length and begin with the same tokens. No id is one that the
    configuration names. With `images`, two more examples are between them: one with the first and the last
    image, and one with the first image again.
    """
    config = causal_lm.config.get_text_config()
    limits = [*layer_values(config, "sliding_window"), *layer_values(config, "attention_chunk_size")]
    limits += (getattr(config, "compress_rates", None) or {}).values()  # tokens in one compressed key
    beyond = [limit * 5 // 4 for limit in limits if isinstance(limit, int)]
    longest = max(length for length in (_USUAL_LENGTH, *beyond) if length <= LONGEST)
    length = max(4, min(max_length, longest))
    short = min(length, _SHORT_LENGTH)
    special_ids = _named_ids(causal_lm.config) | _named_ids(config)
    vocabulary = [id_ for id_ in range(min(config.vocab_size, _IDS)) if id_ not in special_ids]
    generator = np.random.default_rng(0)

    def ids(count: int) -> TokenIds:
        return generator.choice(vocabulary, count).astype(np.int32)

    long = Example(ids(length - length // 2), (ids(length // 4), ids(length // 2)))
    same = ids(max(1, short // 4))
    ends = (np.concatenate((same, ids(short // 2 - len(same)))) for _ in range(2))
    text = Example(ids(short - short // 2), tuple(ends))

    def with_images(shown_images: Sequence[ImageInput], *responses: int) -> Example:
        token = causal_lm.config.image_token_id
        prompt_parts = []
        for image in shown_images:
            prompt_parts += [np.full(image.tokens, token, np.int32), ids(4)]
        return Example(
            np.concatenate((ids(3), *prompt_parts)), tuple(map(ids, responses)), images=tuple(shown_images)
        )

    if not images:
        return [long, text]
    return [long, with_images((images[0], images[-1]), 6, 4), with_images(images[:1], 3, 5), text]


def _named_ids(config: Any) -> set[int]:
    """Return the token ids in a configuration's options, alone or in lists."""
    ids: set[int] = set()
    for name, value in vars(config).items():
        if name.endswith(("_id", "_ids", "_index")):
            entries = value if isinstance(value, list | tuple) else [value]
            ids |= {entry for entry in entries if isinstance(entry, int)}
    return ids


def _branches(examples: Sequence[Example]) -> Iterator[Example]:
    """Yield examples that begin like the first one, and like the first with two images up to its second."""
    long = examples[0]
    yield Example(long.prompt_ids[: 1 + len(long.prompt_ids) * 2 // 3], (long.responses[0][::-1],))
    for example in examples:
        if len(example.images) > 1:
            image = example.images[0]
            prompt = example.prompt_ids
            after = np.flatnonzero(prompt == image.placeholder_id)[image.tokens - 1] + 1
            yield Example(prompt[: after + 2], example.responses[:1], images=(image,))


def _packed(
    examples: Sequence[Example], dummy_image: ImageInput | None = None, costs: ComputeCosts | None = None
) -> PackedBatch:
    """Return a batch of invented examples, without real keys; with `costs` as a prefix tree."""
    responses = sum(len(example.responses) for example in examples)
    return pack(examples, np.zeros((responses, 2), dtype=np.uint64), dummy_image=dummy_image, costs=costs)


def _candidates(model: PackedCausalLM, max_length: int) -> Iterator[tuple[Arrangement, bool]]:
    """Yield arrangements with the chunked output layer, then with all logits at once; the cheapest first.

    Under sequence parallelism only the packed arrangement is possible.
    """
    is_alone = model.exceeds_rope_limit(max_length)
    if model.sequence is not None:
        can_share = model.has_chunked_head and not model.forks_states
        if can_share and model.can_pack(own_logits=False) and not is_alone:
            yield Arrangement.packed, False
        return
    first = recorded_arrangement(model.causal_lm.config.get_text_config().model_type)
    if is_alone:
        first = Arrangement.single
    arrangements = list(Arrangement)
    arrangements = arrangements[arrangements.index(first) :]
    has_own_logits = not model.gives_scores  # a reward model's own are those of the end of a row
    heads = [own for own, is_there in ((False, model.has_chunked_head), (True, has_own_logits)) if is_there]
    for own_logits in heads:
        for arrangement in arrangements:
            if arrangement is not Arrangement.packed or model.can_pack(own_logits=own_logits):
                yield arrangement, own_logits


@dataclass(frozen=True)
class _CheckResult:
    """The arrangement that the check found for a model with these facts, up to `longest` tokens."""

    facts: tuple[torch.dtype, torch.device, str]
    longest: int
    arrangement: Arrangement
    own_logits: bool


_CHECK_RESULTS: WeakKeyDictionary[PreTrainedModel, _CheckResult] = WeakKeyDictionary()


@contextlib.contextmanager
def temporarily_packed(model: PackedCausalLM | PreTrainedModel, longest: int) -> Iterator[PackedCausalLM]:
    """Yield `model` as a packed model for up to `longest` tokens; restore its attention and head at the end.

    A model is checked once, and again for longer sequences or another precision, device or attention.
    """
    if isinstance(model, PackedCausalLM):
        yield model
        return
    if not isinstance(model, PreTrainedModel) or model.training:
        raise ConfigError(
            "this is not a causal language model of transformers in evaluation mode",
            where="model",
            got=type(model).__name__,
            remedy="call model.eval(): dropout makes log-probs random; for a PeftModel pass get_base_model()",
        )
    head = model.get_output_embeddings()
    attention = attention_name(model)
    facts = next(model.parameters()).dtype, model.device, attention
    dtype = Dtype.fp32 if facts[0] == torch.float32 else Dtype.bf16
    backend = choose_backend(AttentionBackend.auto, dtype, model.device)
    result = _CHECK_RESULTS.get(model)
    try:
        packed = PackedCausalLM(model, backend, arrangement=Arrangement.padded).eval()
        if result is not None and result.facts == facts and longest <= result.longest:
            packed.arrange(result.arrangement, own_logits=result.own_logits)
        else:
            StartCheck(packed, packed, model.device, longest, "model").choose_arrangement()
            _CHECK_RESULTS[model] = _CheckResult(facts, longest, packed.arrangement, packed.own_logits)
        yield packed
    finally:
        reset_rope(model)
        if head is not None:
            model.set_output_embeddings(head)
        if attention_name(model) != attention:
            model.set_attn_implementation(attention)
