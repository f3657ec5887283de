"""Generate responses in batches padded on the left; a sample's random numbers do not depend on its batch."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpo_dist.batching.example import ImageInput, TokenIds
from dpo_dist.batching.pack import joined_inputs
from dpo_dist.distributed.processes.world import Stops
from dpo_dist.distributed.zero import Engine
from dpo_dist.model.images import ImageReader
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
        length = next((at for at, token in enumerate(ids) if token in stop_ids), None)
        return cls(ids[:length], None if length is None else ids[length])

    @property
    def is_finished(self) -> bool:
        """Whether the response ended by itself."""
        return self.end is not None


class NotFiniteError(Exception):
    """A model's logits for the next token are not finite."""


def random_numbers(sampling: Sampling, request: Request) -> Tensor:
    """Return float64 [max_new_tokens] in [0, 1), which seed, prompt and sample number alone decide."""
    text = f"{sampling.seed} {request.number} {request.key}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.random(sampling.max_new_tokens))


def batches(
    requests: Sequence[Request], sampling: Sampling, budget: int, rank: int = 0, size: int = 1
) -> list[list[int]]:
    """Return a rank's batches as indices of requests, longest prompts first; ranks take turns in this order.

    Rows of a batch times tokens of its longest prompt with its response are at most `budget`; a single row
    may exceed it. All rows have the same room: else a row that has ended would pass the end of the model's
    context while it waits for the others.
    """
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))[rank::size]
    batched = []
    while order:
        rooms = itertools.groupby(order, lambda index: requests[index].new_tokens(sampling))
        room, alike = next(rooms)
        rows = max(1, budget // (len(requests[order[0]].prompt_ids) + room))
        batched.append(list(itertools.islice(alike, rows)))
        del order[: len(batched[-1])]
    return batched


def image_inputs(causal_lm: Any, ids: Tensor, images: Sequence[ImageInput]) -> dict[str, Tensor]:
    """Return what the model's forward needs for the images in `ids` [rows, tokens], in their order."""
    return ImageReader(causal_lm).own_inputs(joined_inputs(images), ids) if images else {}


@torch.inference_mode()
def generate(
    causal_lm: Any, requests: Sequence[Request], sampling: Sampling, stop_ids: Collection[int], budget: int
) -> list[Sample]:
    """Return a sample for each request, in order.

    How requests are batched changes logits by rounding only: a response stays the same unless rounding
    decides between two tokens, which is rare in float32 and usual in bf16. Raises NotFiniteError if logits
    are not finite. `budget`: most tokens of a batch.
    """
    samples: dict[int, Sample] = {}
    for indices in batches(requests, sampling, budget):
        chosen = [requests[index] for index in indices]
        generated = generate_batch(causal_lm, chosen, sampling, stop_ids, causal_lm.device)
        samples |= zip(indices, generated, strict=True)
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
    filler = min(stop_ids)
    prompts = [torch.from_numpy(request.prompt_ids.astype(np.int64)) for request in requests]
    ids = pad_sequence(prompts, True, filler, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, padding_side="left")
    next_token = _NextToken(requests, longest, sampling, stop_ids, device)

    def end(ids: Tensor, *_: Any) -> Tensor:
        return torch.full((len(ids),), must_end(), device=ids.device)

    # Defaults of the model's folder, such as a repetition penalty, would change the distribution.
    causal_lm.generation_config = GenerationConfig()
    ids = ids.to(device)
    images = [image for request in requests for image in request.images]
    output = causal_lm.generate(
        input_ids=ids,
        attention_mask=mask.to(device),
        **image_inputs(causal_lm, ids, images),
        generation_config=GenerationConfig(
            max_new_tokens=max(request.new_tokens(sampling) for request in requests),
            do_sample=False,
            eos_token_id=sorted(stop_ids),
            pad_token_id=filler,
        ),
        logits_processor=LogitsProcessorList([next_token]),
        stopping_criteria=StoppingCriteriaList([end]),
        synced_gpus=is_synchronised,
    )
    if next_token.is_broken:
        raise NotFiniteError
    return [Sample.from_tokens(tokens, stop_ids) for tokens in output[:, longest:].tolist()]


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
        whole = chances[:, -1:]
        target = torch.minimum(number * whole, torch.nextafter(whole, torch.zeros_like(whole)))
        token = torch.searchsorted(chances, target, right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def dummy_request(
    chosen: Sequence[Request], beside: Sequence[Request], stop_ids: Collection[int]
) -> list[Request]:
    """Return a request whose sample is not used, if a rank needs one to make the forwards of the others.

    `beside` are the requests of all ranks' batches: if some have images, each rank encodes one, in the same
    place among its forwards.
    """
    with_images = [request for request in beside if request.images]
    if with_images and not any(request.images for request in chosen):
        shortest = min(with_images, key=lambda request: len(request.prompt_ids))
        # As much room as the rows: with more, they would pass the end of the model's context.
        return [replace(shortest, room=chosen[0].room) if chosen else shortest]
    return [] if chosen else [Request(np.array([min(stop_ids)], dtype=np.int32), "", 0)]


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
    the batch. If logits are not finite, all ranks raise NotFiniteError.
    """
    world = stops.world
    shares = [batches(requests, sampling, budget, rank, world.size) for rank in range(world.size)]
    share, synchronised = shares[world.rank], engine.is_synchronised
    samples, is_broken = dict[int, Sample](), False
    with engine.ready_to_generate(without_adapter=without_adapter) as causal_lm:
        for number in range(max(map(len, shares))):
            stops.raise_if_stopping()
            if number >= len(share) and not synchronised:
                continue
            indices = share[number] if number < len(share) else []
            chosen, settings = [requests[index] for index in indices], sampling
            if not chosen:  # a rank without work takes part in the forwards of the others
                settings = Sampling(max_new_tokens=1, temperature=0)
            if synchronised:
                beside = [requests[at] for each in shares for batch in each[number:][:1] for at in batch]
                chosen += dummy_request(chosen, beside, stop_ids)
            try:
                generated = generate_batch(
                    causal_lm,
                    chosen,
                    settings,
                    stop_ids,
                    world.device,
                    is_synchronised=synchronised,
                    must_end=lambda: stops.request.is_urgent,
                )
            except NotFiniteError:  # raised after the loop: the other ranks wait in the next batch
                is_broken = True
            else:
                samples |= zip(indices, generated, strict=False)
    stops.raise_if_stopping()  # the last responses may be cut
    gathered = world.gather((samples, is_broken))
    if any(fault for _, fault in gathered):
        raise NotFiniteError
    everything = {index: sample for part, _ in gathered for index, sample in part.items()}
    return [everything[index] for index in range(len(requests))]
