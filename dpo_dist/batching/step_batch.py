"""The batch of a step: micro-batches planned for each rank, and packed when the rank needs them."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dpo_dist.batching.content_keys import Keys
from dpo_dist.batching.costs import ComputeCosts, ExampleSizes, causal_pairs
from dpo_dist.batching.pack import DUMMY_RESPONSES, PackedBatch, dummy_batch, pack
from dpo_dist.batching.plan import SCORING_TOKENS_FACTOR, fits_in_bins, plan_micro_batches, shares_in_bins
from dpo_dist.batching.prefixes import Counts
from dpo_dist.batching.sampler import Indices
from dpo_dist.config.losses import LossConfig
from dpo_dist.data import SCORERS, Example, ImageInput


class ExampleSource(Protocol):
    """The examples that batches are made of, by index; `encoded.dataset.PreferenceDataset` is one.

    A response index counts the responses of all examples in their order.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels of the data's sources; none if there is only one."""

    @property
    def numbers(self) -> Mapping[str, npt.NDArray[Any]]:
        """Float64 [examples] by name, for the `NUMBERS` that have an effect."""

    @property
    def trained_tokens(self) -> npt.NDArray[Any]:
        """Int32 [responses], tokens that the loss counts."""

    def view(self, scorer: str) -> "ExampleSource":
        """Return the same examples as a scorer reads them; `self` if it reads the same prompts."""

    def response_counts(self, indices: Indices) -> Indices:
        """Return the number of responses of each example."""

    def response_indices(self, indices: Indices) -> Indices:
        """Return the response indices of all responses of these examples."""

    def sizes(
        self,
        indices: Indices,
        response_indices: Indices,
        counts: Indices,
        costs: ComputeCosts,
        masked: bool = False,
    ) -> ExampleSizes:
        """Return the sizes of examples with these responses; `masked`: targets are tokens in the loss."""

    def with_images(self, indices: Indices) -> npt.NDArray[np.bool_]:
        """Return whether the prompt of each example has an image."""

    def dummy_image(self) -> ImageInput | None:
        """Return an invented image, for a rank whose micro-batch has none; None if no example has one."""

    def label_numbers(self, indices: Indices | Sequence[int]) -> Indices:
        """Return the index in `labels` of each example's label."""

    def labels_good(self, indices: Indices | Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return whether the response of each of these labelled examples is good."""

    def score_gaps(self, indices: Indices | Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the score of each example's best response minus that of its worst."""

    def keys_of(self, indices: Sequence[int], which: int | None = None) -> Keys:
        """Return the keys of the responses of examples, or only of response `which` of each."""

    def examples_with_keys(
        self, indices: Sequence[int], which: int | None = None
    ) -> tuple[list[Example], Keys]:
        """Return examples, or only response `which` of each, and the verified keys of the responses."""


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of a global batch; every rank has the same number of micro-batches."""

    dataset: ExampleSource
    micro_batches: tuple[tuple[int, ...], ...]  # dataset indices of their examples; empty: a dummy
    positions: tuple[tuple[int, ...], ...]  # of these examples in the global batch
    pairs: int  # examples of the global batch, over all ranks, as in the fields below
    tokens: int  # with nothing but prompts shared, whatever the plan
    computed_tokens: int  # in this plan, in which examples of a micro-batch share prefixes
    unshared_tokens: int  # `tokens` with each prompt once for each of its responses
    targets: int  # completion tokens that the loss counts
    attended: int  # query-key pairs of attention in a layer in which tokens see all earlier ones
    weight: float  # sum of the weights of the pairs in the loss; their number if all are 0
    mean_chosen_tokens: float  # mean number of targets in the chosen responses, with these weights
    is_good: npt.NDArray[np.bool_] | None = None  # [pairs], labels of an unpaired loss
    partners: "RankBatch | None" = None  # the same examples with their partners' responses
    sources: Indices | None = None  # int64 [pairs], index in `dataset.labels`; None without labels
    which: int | None = None  # the only response of each example that is scored; None: all
    forwards: tuple[int, ...] = ()  # for each micro-batch `PackedBatch.forwards`
    image_tokens: int = 0  # placeholders of images in the prompts, of the global batch
    with_images: tuple[bool, ...] = ()  # for each micro-batch, whether it has an image on any rank
    costs: ComputeCosts | None = None  # decide which tokens are shared; None: those of prompts
    live: tuple[str, ...] = ()  # scorers that compute the micro-batches

    def view(self, scorer: str) -> "RankBatch":
        """Return the same micro-batches as a scorer reads them; `self` if it reads the same prompts."""
        view = self.dataset.view(scorer)
        return self if view is self.dataset else replace(self, dataset=view, partners=None)

    def batches(self) -> Iterator[PackedBatch]:
        """Collate this rank's micro-batches in order, on the host.

        They have the keys by which scorers know them, and are there as the `live` scorers read them, too.
        """
        views = {scorer: self.view(scorer) for scorer in SCORERS}
        views = {scorer: view for scorer, view in views.items() if view is not self}
        packed = {scorer: view._own_batches() for scorer, view in views.items() if scorer in self.live}
        for indices, batch in zip(self.micro_batches, self._own_batches(), strict=True):
            keys = dict[str, Keys]()
            read = dict[str, PackedBatch]()
            for scorer, view in views.items():
                if scorer in packed:
                    read[scorer] = next(packed[scorer])
                    keys[scorer] = read[scorer].keys
                elif indices:
                    keys[scorer] = view.dataset.keys_of(indices, self.which)
            yield replace(batch, other_keys=keys, views=read)

    def _own_batches(self) -> Iterator[PackedBatch]:
        dummy_image = self.dataset.dummy_image() if any(self.with_images) else None
        rows = zip(self.micro_batches, self.forwards, self.with_images, strict=True)
        for indices, forwards, with_images in rows:
            batch = collate(
                self.dataset,
                indices,
                self.which,
                is_labelled=self.is_good is not None,
                dummy_image=dummy_image if with_images else None,
                costs=self.costs,
            )
            yield replace(batch, forwards=forwards)


def shard_batch(
    dataset: ExampleSource,
    indices: Indices,
    rank: int,
    world_size: int,
    micro_batch_tokens: int,
    costs: ComputeCosts,
    loss: LossConfig | None = None,
    which: int | None = None,
    live: Collection[str] = (),
) -> RankBatch:
    """Return the share of `rank` in the global batch `indices`, balanced by compute cost.

    O(batch), but for one pass over the places of the dataset's examples, 1 ms for a million.

    `live`: scorers that compute each micro-batch, for which it must not be too large as they read it either.
    With a `loss` the share has the responses that this loss scores, and the partners that it needs; else all
    responses, or response `which` of each example.
    """
    is_good = None
    partners = None
    if loss is not None and not loss.compares_pairs:
        which = 0
        is_good = dataset.labels_good(indices) if loss.is_unpaired else None
        if loss.needs_partners:  # the second response of each example, planned apart
            plan_options = rank, world_size, micro_batch_tokens, costs
            partners = shard_batch(dataset, indices, *plan_options, which=1, live=live)
    counts = dataset.response_counts(indices)
    responses = dataset.response_indices(indices)
    chosen = responses[np.cumsum(counts) - counts]  # the first response of each example
    if which is not None:
        responses = chosen + which
        counts = np.ones_like(counts)
    weights = None
    column = dataset.numbers.get("loss_weight")
    if column is not None and column[indices].any():
        weights = column[indices]
    # Every rank plans the whole batch: that takes milliseconds, and to be sent a plan would be one more wait.
    sizes = dataset.sizes(indices, responses, counts, costs, masked=True)
    views = [view for view in map(dataset.view, live) if view is not dataset]
    scored = [view.sizes(indices, responses, counts, costs) for view in views]
    plan = plan_micro_batches(sizes, world_size, micro_batch_tokens, costs)
    bins = _bins(plan, len(indices))
    # A scorer without a backward may take several times the tokens.
    scored_tokens = SCORING_TOKENS_FACTOR * micro_batch_tokens
    if not all(fits_in_bins(each, costs, bins, scored_tokens) for each in scored):
        planned = sizes
        for each in scored:
            planned = _at_least(planned, each, costs, micro_batch_tokens)
        plan = plan_micro_batches(planned, world_size, micro_batch_tokens, costs)
        bins = _bins(plan, len(indices))
    shared = shares_in_bins(sizes, costs, bins).tokens
    positions = tuple(tuple(ranks[rank]) for ranks in plan)
    with_images = dataset.with_images(indices)
    return RankBatch(
        dataset=dataset,
        micro_batches=tuple(tuple(int(indices[i]) for i in micro_batch) for micro_batch in positions),
        positions=positions,
        pairs=len(indices),
        tokens=int(sizes.prompt_shared_tokens.sum()),
        computed_tokens=int((sizes.tokens - shared).sum()),
        unshared_tokens=int(sizes.unshared_tokens.sum()),
        targets=int(sizes.targets.sum()),
        attended=int((sizes.attended - causal_pairs(shared)).sum()),
        weight=float(len(indices) if weights is None else weights.sum()),
        mean_chosen_tokens=float(np.average(dataset.trained_tokens[chosen], weights=weights)),
        sources=dataset.label_numbers(indices) if dataset.labels else None,
        is_good=is_good,
        partners=partners,
        which=which,
        forwards=tuple(max(DUMMY_RESPONSES, *(int(counts[at].sum()) for at in ranks)) for ranks in plan),
        image_tokens=0 if sizes.image_tokens is None else int(sizes.image_tokens.sum()),
        with_images=tuple(any(with_images[at].any() for at in ranks) for ranks in plan),
        costs=costs,
        live=tuple(live),
    )


def _bins(plan: Sequence[Sequence[Sequence[int]]], examples: int) -> Indices:
    """Return the bin of each example, which is the number of its micro-batch among those of all ranks."""
    bins = np.empty(examples, dtype=np.int64)
    for number, members in enumerate(itertools.chain.from_iterable(plan)):
        bins[members] = number
    return bins


def _at_least(sizes: ExampleSizes, scored: ExampleSizes, costs: ComputeCosts, budget: int) -> ExampleSizes:
    """Return sizes of examples that, `scored` without a backward, may take several times the tokens.

    A micro-batch has what all of them begin with once, as scored: the rest of its `budget` is for the others.
    """
    most = SCORING_TOKENS_FACTOR * budget
    begins = shares_in_bins(scored, costs, np.zeros_like(scored.tokens)).tokens
    common = min(int(np.sort(begins)[1:2].sum()), most - 1)  # the first one shares with none before it

    def larger(own: Counts, other: Counts) -> Counts:
        rest = (other - common) * budget / (most - common)
        return np.maximum(own, np.ceil(rest).astype(np.int64))

    tokens = larger(sizes.tokens, scored.tokens)
    longest = larger(sizes.longest, scored.longest)
    # Examples that share prefixes as the policy reads them need not do so as the scorer does.
    return replace(sizes, tokens=tokens, longest=longest, prefixes=None)


def collate(
    dataset: ExampleSource,
    indices: Sequence[int],
    which: int | None = None,
    *,
    is_labelled: bool = False,
    dummy_image: ImageInput | None = None,
    costs: ComputeCosts | None = None,
) -> PackedBatch:
    """Pack examples, or only response `which` of each, into one micro-batch; a dummy if there are none.

    `dummy_image`, `costs`: see `pack`.
    """
    if not indices:
        numbers: dict[str, Any] = dict.fromkeys(dataset.numbers, torch.ones(1, dtype=torch.float64))
        sources = torch.zeros(1, dtype=torch.int64) if dataset.labels else None
        return replace(dummy_batch(dummy_image), sources=sources, **numbers)
    examples, keys = dataset.examples_with_keys(indices, which)
    numbers = {name: torch.from_numpy(column[[*indices]]) for name, column in dataset.numbers.items()}
    return replace(
        pack(examples, keys, dataset.labels_good(indices) if is_labelled else None, dummy_image, costs),
        score_gaps=torch.from_numpy(dataset.score_gaps(indices)),
        sources=torch.from_numpy(dataset.label_numbers(indices)) if dataset.labels else None,
        **numbers,
    )
