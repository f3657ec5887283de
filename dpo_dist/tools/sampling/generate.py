"""Generate responses in batches padded on the left; a sample's random numbers do not depend on its batch."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpo_dist.data import ImageInput, TokenIds
from dpo_dist.kit import (
    Engine,
    NotFiniteError,
    Stops,
    WrongGenerationError,
    can_mix_lengths,
    extend,
    fault_agreement,
    rope_limit,
)
from dpo_dist.tools.sampling.settings import Sampling


@dataclass(frozen=True, eq=False)
class Request:
    """One response to generate: sample `number` of the prompt that `key` identifies."""

    prompt_ids: TokenIds
    key: str
    number: int
    images: tuple[ImageInput, ...] = ()  # in the order of their placeholders in the prompt
    room: int | None = None  # most tokens of the response; None: `max_new_tokens`

    def new_tokens(self, sampling: Sampling) -> int:
        """Return the most tokens of the response with these settings."""
        most = sampling.max_new_tokens
        return most if self.room is None else min(most, self.room)


@dataclass(frozen=True)
class Sample:
    """A generated response: its tokens, and the token that ended it (None if the response did not end)."""

    ids: list[int]
    end: int | None = None

    @classmethod
    def from_tokens(cls, ids: list[int], stop_ids: Collection[int]) -> "Sample":
        """Return the sample at the start of generated tokens, up to the first of `stop_ids`."""
        for length, token in enumerate(ids):
            if token in stop_ids:
                return cls(ids[:length], token)
        return cls(ids)

    @property
    def is_finished(self) -> bool:
        """Whether the response ended by itself."""
        return self.end is not None


def random_numbers(sampling: Sampling, request: Request) -> Tensor:
    """Return float64 [max_new_tokens] in [0, 1), which seed, prompt and sample number alone decide."""
    text = f"{sampling.seed} {request.number} {request.key}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(sampling.max_new_tokens))


def batches(
    requests: Sequence[Request],
    sampling: Sampling,
    budget: int,
    rank: int = 0,
    size: int = 1,
    *,
    mixes_lengths: bool = True,
) -> list[list[int]]:
    """Return a rank's batches as indices of requests, longest prompts first; ranks take turns in this order.

    Rows of a batch times tokens of its longest prompt with its response are at most `budget`; a single row
    may exceed it. All rows have the same room: else a row that has ended would pass the end of the model's
    context while it waits for the others. Without `mixes_lengths` their prompts have one length, too.
    """
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))[rank::size]

    def alike(index: int) -> tuple[int, int]:
        length = 0 if mixes_lengths else len(requests[index].prompt_ids)
        return requests[index].new_tokens(sampling), length

    indices_of_batches = []
    while order:
        (room, _), same = next(itertools.groupby(order, alike))
        rows = max(1, budget // (len(requests[order[0]].prompt_ids) + room))
        batch = list(itertools.islice(same, rows))
        indices_of_batches.append(batch)
        del order[: len(batch)]
    return indices_of_batches


def may_mix_lengths(
    causal_lm: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    stop_ids: Collection[int],
    device: torch.device,
    agree: Callable[[str], str] = str,
    *,
    is_synchronised: bool = False,
) -> bool:
    """Return whether the prompts of a batch may have different lengths (see `can_mix_lengths`)."""
    images = [image for request in requests for image in request.images]
    can_mix = can_mix_lengths(
        causal_lm, device, min(stop_ids), images, agree, is_synchronised=is_synchronised
    )
    if images and is_synchronised and not can_mix:
        # A rank whose prompts have no images encodes one beside them, in a row of another length.
        kind = causal_lm.config.model_type
        raise WrongGenerationError(
            f"{kind} generates rightly without padding only; on several ranks images need it"
        )
    # A sequence above the limit changes the frequencies of all rows beside it.
    limit = rope_limit(causal_lm.config.get_text_config())
    longest = max(len(request.prompt_ids) + request.new_tokens(sampling) for request in requests)
    return can_mix and (limit is None or longest <= limit)


@torch.inference_mode()
def generate(
    causal_lm: Any, requests: Sequence[Request], sampling: Sampling, stop_ids: Collection[int], budget: int
) -> list[Sample]:
    """Return a sample for each request, in order.

    How requests are batched changes logits by rounding only: a response stays the same unless rounding
    decides between two tokens, which is rare in float32 and usual in bf16. Raises NotFiniteError if logits
    are not finite, and WrongGenerationError. `budget`: most tokens of a batch.
    """
    if not requests:
        return []
    samples: dict[int, Sample] = {}
    mixes_lengths = may_mix_lengths(causal_lm, requests, sampling, stop_ids, causal_lm.device)
    for indices in batches(requests, sampling, budget, mixes_lengths=mixes_lengths):
        batch = [requests[index] for index in indices]
        samples_of_batch = generate_batch(causal_lm, batch, sampling, stop_ids, causal_lm.device)
        samples |= zip(indices, samples_of_batch, strict=True)
    return [samples[index] for index in range(len(requests))]


def generate_batch(
    causal_lm: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    stop_ids: Collection[int],
    device: torch.device,
    *,
    is_synchronised: bool = False,
    must_end: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Return a sample for each request, generated as one batch; arguments as for `generate`.

    `is_synchronised`: all ranks call this together and make as many forwards as the longest response needs.
    `must_end` is called before each token; if it returns true, all responses of this rank end there.
    """
    longest = max(len(request.prompt_ids) for request in requests)
    next_token = _NextToken(requests, longest, sampling, stop_ids, device)
    rows = extend(
        causal_lm,
        [request.prompt_ids for request in requests],
        list(itertools.chain.from_iterable(request.images for request in requests)),
        next_token,
        max(request.new_tokens(sampling) for request in requests),
        device,
        min(stop_ids),
        stop_ids=stop_ids,
        is_synchronised=is_synchronised,
        must_end=must_end,
    )
    if next_token.is_broken:
        raise NotFiniteError
    return [Sample.from_tokens(tokens, stop_ids) for tokens in rows]


class _NextToken(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token by a random number of the row, through the cumulative distribution.

    `is_broken`: logits were not finite before the end of a response. Such a row ends: an error at this place
    would leave other ranks waiting.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        prompt_length: int,
        sampling: Sampling,
        stop_ids: Collection[int],
        device: torch.device,
    ):
        self._prompt_length = prompt_length
        self._stop_ids = torch.tensor(sorted(stop_ids), device=device)
        self.is_broken = False
        self._numbers: Tensor | None = None  # greedy
        self._warpers = LogitsProcessorList()
        if sampling.temperature > 0:
            numbers = [random_numbers(sampling, request) for request in requests]
            self._numbers = torch.stack(numbers).to(device)
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits [rows, vocabulary] that are finite for the drawn token only; greedy: unchanged."""
        generated = input_ids[:, self._prompt_length :]
        broken = ~scores.amax(-1).isfinite()
        if broken.any():
            has_ended = torch.isin(generated, self._stop_ids).any(-1)  # then the rest is padding
            self.is_broken |= bool((broken & ~has_ended).any())
            ended = torch.full_like(scores, -torch.inf).index_fill(-1, self._stop_ids[:1], 0.0)
            scores = torch.where(broken[:, None], ended, scores)
        if self._numbers is None:
            return scores
        number = self._numbers[:, generated.shape[1], None]
        scores = scores.float()
        scores = self._warpers(input_ids, scores - scores.amax(-1, keepdim=True))
        chances = scores.softmax(-1).double().cumsum(-1)
        total = chances[:, -1:]
        target = torch.minimum(number * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(chances, target, right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def dummy_request(
    batch: Sequence[Request], beside: Sequence[Request], stop_ids: Collection[int]
) -> list[Request]:
    """Return a request whose sample is not used, if a rank needs one to make the forwards of the others.

    `beside` are the requests of all ranks' batches: if some have images, each rank encodes one, in the same
    place among its forwards.
    """
    with_images = [request for request in beside if request.images]
    if with_images and not any(request.images for request in batch):
        shortest = min(with_images, key=lambda request: len(request.prompt_ids))
        # As much room as the rows: with more, they would pass the end of the model's context.
        return [replace(shortest, room=batch[0].room) if batch else shortest]
    return [] if batch else [Request(np.array([min(stop_ids)], dtype=np.int32), "", 0)]


def generate_together(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    stop_ids: Collection[int],
    budget: int,
    stops: Stops,
    *,
    without_adapter: bool = False,
) -> list[Sample]:
    """Return a sample of the engine's model for each request, in order, on all ranks; collective.

    Every rank generates a share. Under ZeRO-3 each forward gathers weights from all ranks, so that all ranks
    generate the same number of batches with the same number of forwards, and encode images in the same
    batches. A rank that is asked to stop ends its responses at once, and all ranks raise Interrupted after
    the batch. If logits are not finite, all ranks raise NotFiniteError, and if the model does not generate
    what its forward predicts, WrongGenerationError.
    """
    if not requests:
        return []
    world = stops.world
    is_synchronised = engine.is_synchronised
    samples = dict[int, Sample]()
    is_broken = False
    with engine.ready_to_generate(without_adapter=without_adapter) as causal_lm:
        mixes_lengths = may_mix_lengths(
            causal_lm,
            requests,
            sampling,
            stop_ids,
            world.device,
            fault_agreement(world, are_forwards_collective=is_synchronised),
            is_synchronised=is_synchronised,
        )
        shares = [
            batches(requests, sampling, budget, rank, world.size, mixes_lengths=mixes_lengths)
            for rank in range(world.size)
        ]
        share = shares[world.rank]
        for number in range(max(map(len, shares))):
            stops.raise_if_stopping()
            if number >= len(share) and not is_synchronised:
                continue
            indices = share[number] if number < len(share) else []
            batch = [requests[index] for index in indices]
            settings = sampling
            if not batch:  # a rank without work takes part in the forwards of the others
                settings = Sampling(max_new_tokens=1, temperature=0)
            if is_synchronised:
                of_all_ranks = itertools.chain(*(each[number] for each in shares if number < len(each)))
                beside = [requests[index] for index in of_all_ranks]
                batch += dummy_request(batch, beside, stop_ids)
            try:
                samples_of_batch = generate_batch(
                    causal_lm,
                    batch,
                    settings,
                    stop_ids,
                    world.device,
                    is_synchronised=is_synchronised,
                    must_end=lambda: stops.request.is_urgent,
                )
            except NotFiniteError:  # raised after the loop: the other ranks wait in the next batch
                is_broken = True
            else:
                samples |= zip(indices, samples_of_batch, strict=False)
    stops.raise_if_stopping()  # the last responses may be cut
    gathered = world.gather((samples, is_broken))
    if any(fault for _, fault in gathered):
        raise NotFiniteError
    for part, _ in gathered:
        samples |= part
    return [samples[index] for index in range(len(requests))]
