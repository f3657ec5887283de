"""Encoded dataset of a run: the examples of all its sources, memory-mapped by all ranks.

Token ids and masks are in the files of the sources, the other columns in a file of the dataset.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo_dist.batching.content_keys import Keys, response_keys
from dpo_dist.batching.costs import ComputeCosts, ExampleSizes, example_sizes
from dpo_dist.batching.prefixes import Prefixes
from dpo_dist.batching.sampler import Indices, SourceSpan
from dpo_dist.config.losses import KINDS, LossConfig, LossKind, accepts_facts
from dpo_dist.data import (
    NUMBERS,
    SCORERS,
    DataConfig,
    DataCounts,
    Example,
    ImageInput,
    ImageProcessor,
    Mask,
    Origin,
    full_name,
)
from dpo_dist.encoded.dataset_columns import (
    DATASET_COLUMNS,
    NUMBER,
    PREFIX_COLUMNS,
    PROMPT_STARTS,
    PROMPT_TOKENS,
    ScorerPrompts,
    append_records,
    first_rows,
    made_from,
)
from dpo_dist.encoded.store import (
    EncodedSource,
    cache_errors,
    fitting_length,
    has_images,
    read_counts,
    read_source,
)
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.foundation.files import text_digest
from dpo_dist.foundation.process import cores_of_rank
from dpo_dist.foundation.remedies import AtRecords
from dpo_dist.foundation.tables import Array, Columns, TableFacts, stored_columns
from dpo_dist.foundation.types import Tokenizer

_MAX_THREADS = 8


@dataclass(frozen=True)
class PromptImages:
    """The images in the prompts of a dataset, each distinct one once; their files stay on disk."""

    distinct: tuple[ImageInput, ...]  # without inputs
    places: Mapping[bytes, int]  # by digest, the index of each distinct image in `contents`
    contents: pa.ChunkedArray  # the files
    numbers: Array  # int64, the distinct images of all records, record after record
    starts: Array  # int64 [examples], offset of each example's images in `numbers`
    counts: Array  # int64 [examples]
    prompt_tokens: Array  # int64 [examples], placeholders of images in the prompt
    processor: ImageProcessor

    @property
    def fingerprint(self) -> str:
        """A digest of the images of all records in their order."""
        digest = hashlib.blake2b(b"".join(image.digest for image in self.distinct), digest_size=16)
        digest.update(self.numbers.tobytes())
        return digest.hexdigest()

    def in_prompt(self, index: int) -> tuple[ImageInput, ...]:
        """Return the images in the prompt of an example, without inputs."""
        start = int(self.starts[index])
        return tuple(self.distinct[n] for n in self.numbers[start : start + int(self.counts[index])])

    def with_inputs(self, image: ImageInput) -> ImageInput:
        """Return an image with the tensors that the model's tower reads."""
        return replace(image, inputs=self.processor.inputs(self.content(image)))

    def content(self, image: ImageInput) -> bytes:
        """Return the file of an image."""
        content: bytes = self.contents[self.places[image.digest]].as_py()
        return content


@dataclass(frozen=True)
class PreferenceDataset:
    """Encoded examples of one list of sources, in the order of the sources.

    An example has one response (supervised, or labelled), two (chosen, rejected) or more (a ranking), best
    first; with `partners.with_partners` its own and a response to another prompt. Its pieces are its prompt,
    then its responses. Examples of one ranking share the token ids of their pieces. An index is an example's
    position in the dataset; a response index is a response's position in `keys`.
    """

    fingerprint: str  # digest of everything that decides the token ids
    counts: dict[str, Any]  # of the records (`DataCounts.as_dict`); those of each source under `sources`
    source_paths: tuple[str, ...]  # the files of the records
    source_pairs: tuple[int, ...]  # number of examples of each source
    source_labels: tuple[str, ...]  # sources with the same label are counted together
    largest_id: int  # upper bound of the token ids in `ids`
    ids: Array | pa.ChunkedArray  # int32 [tokens]
    piece_starts: Array  # int64 [pieces], offset of each piece in `ids`
    piece_tokens: Array  # int32 [pieces], length of each piece
    first_pieces: Array  # int64 [examples + 1], index of each example's prompt in the pieces; their number
    keys: Array  # uint64 [responses, 2], `batching.content_keys.response_key` of each response, in order
    key_order: Array  # int64 [responses], response indices in ascending order of `keys`, by both words
    scores: Array  # float64 [responses], nan if a record has no scores; 1 and 0 of good and bad responses
    trained: Array | pa.ChunkedArray  # bool [tokens of responses with a mask], whether the loss counts each
    mask_starts: Array  # int64 [responses], offset in `trained` of the mask of a response that has one
    trained_tokens: Array  # int32 [responses], tokens that the loss counts; fewer than all: it has a mask
    truncated: Array  # bool [responses], whether the end of a response was cut, with its end of turn
    begins: Array  # int32 [responses], leading tokens that an earlier one of the record has; 0: not known
    prompt_hashes: Array  # uint64 [examples], `records.prompt_hash` of each record
    digests: Array  # uint64 [examples], `example_digests`
    origins: Array  # int64 [examples, 2], index in `source_paths`, and line
    encoded: tuple[EncodedSource, ...] = ()  # the sources on disk
    numbers: Mapping[str, Array] = field(default_factory=dict)  # float64 [examples], `NUMBERS` with an effect
    scorer_prompts: Mapping[str, ScorerPrompts] = field(default_factory=dict)  # of scorers that read others
    views: Mapping[str, "PreferenceDataset"] = field(default_factory=dict)  # `views.with_views`
    images: PromptImages | None = None  # None: no prompt has an image
    prefixes: Prefixes | None = None  # how the examples begin; None: not known
    columns_files: tuple[Path, ...] = ()  # of most columns above; empty: they are in memory

    def __len__(self) -> int:
        return len(self.first_pieces) - 1

    def view(self, scorer: str) -> "PreferenceDataset":
        """Return the same examples as a scorer reads them: other prompts, lengths and keys."""
        return self.views.get(scorer, self)

    def spans(self, weights: Sequence[float]) -> list[SourceSpan]:
        """Return the index range of each source with its weight."""
        ends = itertools.accumulate(self.source_pairs)
        sources = zip(ends, self.source_pairs, weights, strict=True)
        return [SourceSpan(stop - pairs, stop, weight) for stop, pairs, weight in sources]

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels of the sources, by which metrics are divided; none if there is only one."""
        return metric_labels(self.source_labels)

    def label_numbers(self, indices: Indices | Sequence[int]) -> Indices:
        """Return the index in `labels` of each example's label, int64; the dataset has several labels."""
        sources = np.searchsorted(np.cumsum(self.source_pairs), indices, side="right")
        return np.array(list(map(self.labels.index, self.source_labels)), dtype=np.int64)[sources]

    def lengths(self, index: int) -> list[int]:
        """Return the tokens of an example's pieces: prompt, response, response, ..."""
        first, stop = self._pieces(index)
        return list(map(int, self.piece_tokens[first:stop]))

    def example(self, index: int, which: Sequence[int] | None = None, masked: bool = False) -> Example:
        """Return the token ids of an example, or of `which` of its responses; `masked`: with their masks.

        Its images have no inputs; `with_inputs` adds them.
        """
        first, stop = self._pieces(index)
        starts = map(int, self.piece_starts[first:stop])
        pieces = zip(starts, self.lengths(index), strict=True)
        prompt, *responses = (np.asarray(self.ids[start : start + tokens]) for start, tokens in pieces)
        masks = self.masks(index) if masked else ()
        if which is None:
            which = range(len(responses))
        images = () if self.images is None else self.images.in_prompt(index)
        return Example(
            prompt,
            responses=tuple(responses[index] for index in which),
            trained=tuple(masks[index] for index in which if masks),
            images=images,
        )

    def texts(self) -> list[Example]:
        """Return the first example, if it has no images."""
        return [self.example(0)] if len(self) and self.images is None else []

    def with_inputs(self, examples: Sequence[Example]) -> list[Example]:
        """Return examples of this dataset with the inputs of their images, decoded and processed."""
        if self.images is None:
            return [*examples]
        distinct = {image.digest: image for example in examples for image in example.images}
        # One thread would keep a GPU waiting.
        with ThreadPoolExecutor(min(_MAX_THREADS, cores_of_rank())) as pool:
            inputs = dict(zip(distinct, pool.map(self.images.with_inputs, distinct.values()), strict=True))
        return [
            replace(example, images=tuple(inputs[image.digest] for image in example.images))
            for example in examples
        ]

    def with_images(self, indices: Indices) -> npt.NDArray[np.bool_]:
        """Return whether the prompt of each example has an image."""
        if self.images is None:
            return np.zeros(len(indices), dtype=np.bool_)
        has_image: npt.NDArray[np.bool_] = self.images.counts[indices] > 0
        return has_image

    def dummy_image(self) -> ImageInput | None:
        """Return an invented image, for a rank whose micro-batch has none; None if no example has one."""
        return None if self.images is None else self.images.processor.invented[0]

    def masks(self, index: int) -> tuple[Mask, ...]:
        """Return for each response of an example which tokens the loss counts; empty: all of them."""
        if not len(self.trained):
            return ()
        within = self.response_range(index)
        counts = self.trained_tokens[within.start : within.stop]
        lengths = self.lengths(index)[1:]
        if sum(lengths) == counts.sum():
            return ()
        starts = map(int, self.mask_starts[within.start : within.stop])
        masks = list[Mask]()
        for start, tokens, trained in zip(starts, lengths, counts, strict=True):
            if trained == tokens:
                masks.append(np.ones(tokens, dtype=np.bool_))
            else:
                masks.append(np.asarray(self.trained[start : start + tokens]))
        return tuple(masks)

    def sizes(
        self,
        indices: Indices,
        response_indices: Indices,
        counts: Indices,
        costs: ComputeCosts,
        masked: bool = False,
    ) -> ExampleSizes:
        """Return the sizes of examples with some of their responses, for a model with these costs.

        `response_indices`: example after example; `counts`: responses of each example, at least one. With
        `masked`, only tokens that the loss counts are targets.
        """
        pieces = response_indices + np.repeat(indices, counts) + 1
        prompt_tokens = self.piece_tokens[self.first_pieces[indices]].astype(np.int64)
        response_tokens = self.piece_tokens[pieces].astype(np.int64)
        targets = self.trained_tokens[response_indices].astype(np.int64) if masked else response_tokens
        image_tokens = None if self.images is None else self.images.prompt_tokens[indices]
        is_whole = np.repeat(counts == self.response_counts(indices), counts)
        begins = np.where(is_whole, self.begins[response_indices], 0)
        sizes = example_sizes(prompt_tokens, response_tokens, targets, counts, begins, costs, image_tokens)
        if self.prefixes is None or not costs.shares_prefixes:
            return sizes
        rows = self.first_rows(indices, response_indices, counts)
        return replace(sizes, prefixes=replace(self.prefixes.select(indices), rows=rows))

    def first_rows(self, indices: Indices, response_indices: Indices, counts: Indices) -> Indices:
        """Return how much of its record's first row each example has with these responses."""
        pieces = response_indices + np.repeat(indices, counts) + 1
        prompts = self.first_pieces[indices]
        return first_rows(self.piece_starts, self.piece_tokens, prompts, pieces, counts)

    def response_range(self, index: int) -> range:
        """Return the response indices of one example."""
        first, stop = self._pieces(index)
        return range(first - index, stop - index - 1)

    def response_counts(self, indices: Indices) -> Indices:
        """Return the number of responses of each example, int64."""
        counts: Indices = self.first_pieces[indices + 1] - self.first_pieces[indices] - 1
        return counts

    def response_indices(self, indices: Indices) -> Indices:
        """Return the response indices of all responses of these examples, int64."""
        counts = self.response_counts(indices)
        starts_in_result = np.cumsum(counts) - counts
        starts = self.first_pieces[indices] - indices
        return np.repeat(starts - starts_in_result, counts) + np.arange(counts.sum())

    def score_gaps(self, indices: Indices | Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the score of each example's best response minus that of its worst; nan without scores."""
        indices = np.asarray(indices, dtype=np.int64)
        best = self.first_pieces[indices] - indices
        worst = best + self.response_counts(indices) - 1
        gaps: npt.NDArray[np.float32] = (self.scores[best] - self.scores[worst]).astype(np.float32)
        return gaps

    def labels_good(self, indices: Indices | Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return whether the response of each of these labelled examples is good."""
        indices = np.asarray(indices, dtype=np.int64)
        good: npt.NDArray[np.bool_] = self.scores[self.first_pieces[indices] - indices] > 0
        return good

    def locate_responses(self, response_indices: Indices) -> tuple[Indices, Indices]:
        """Return the example of each response, and the response's rank in it, int64 each."""
        starts = self.first_pieces[:-1] - np.arange(len(self))
        examples = np.searchsorted(starts, response_indices, side="right") - 1
        return examples, response_indices - starts[examples]

    def origin(self, index: int) -> Origin:
        """Return the file and line of an example's record."""
        source, line = self.origins[index]
        return Origin(self.source_paths[int(source)], int(line))

    def examples_with_keys(
        self, indices: Sequence[int], which: int | None = None
    ) -> tuple[list[Example], Keys]:
        """Return examples with masks and images, and the keys of their responses; or only response `which`.

        Raises DataError: the token ids do not have these keys.
        """
        selected = None
        ranges = list(map(self.response_range, indices))
        if which is not None:
            selected = [which]
            ranges = [responses[which : which + 1] for responses in ranges]
        keys: Keys = self.keys[np.concatenate(ranges)]
        examples = [self.example(index, selected, masked=True) for index in indices]
        if not np.array_equal(response_keys(examples), keys):
            raise self.damaged_ids(indices)
        return self.with_inputs(examples), keys

    def keys_of(self, indices: Sequence[int], which: int | None = None) -> Keys:
        """Return the keys of the responses of examples, or only of response `which` of each."""
        numbers = self.response_indices(np.asarray(indices, dtype=np.int64))
        if which is not None:
            numbers = np.array([self.response_range(index)[which] for index in indices], dtype=np.int64)
        keys: Keys = self.keys[numbers]
        return keys

    def damaged_ids(self, indices: Sequence[int]) -> DataError:
        """Return the error for examples whose token ids do not have the keys that were stored."""
        return DataError(
            "token ids of the encoded data do not match their content key",
            where="; ".join(str(self.origin(index)) for index in indices[:5]),
            got=f"{len(indices)} records in micro-batches with such ids",
            expected="the token ids that were encoded; other ids have other log-probs",
            remedy="delete the folder data.cache and start again: the data are encoded again",
        )

    def _pieces(self, index: int) -> tuple[int, int]:
        return int(self.first_pieces[index]), int(self.first_pieces[index + 1])


def metric_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels of sources, by which metrics are divided; none if there is only one."""
    distinct = tuple(dict.fromkeys(labels))
    return distinct if len(distinct) > 1 else ()


def open_dataset(
    sources: Sequence[EncodedSource], config: DataConfig, processor: ImageProcessor | None = None
) -> PreferenceDataset:
    """Map the encoded sources; check their digests, for which only changed files are read, and counts.

    The columns are computed and written by the first one who opens these sources. The `processor` has to be
    the one with which they were encoded.
    """
    tables = list(map(read_source, sources))
    images = None if processor is None else _prompt_images(sources, tables, processor)
    identity: list[Any] = [(source.fingerprint, source.limit) for source in sources]
    if images is not None:  # the content of their files is not in the fingerprint of a source
        identity.append(images.fingerprint)
    fingerprint = text_digest(json.dumps(identity))

    def build(columns: Columns) -> TableFacts:
        counts = [vars(read_counts(table)) for table in tables]
        _checked_counts(sources, counts, tables, config)  # there are examples
        return append_records(columns, tables) | {"counts": counts}

    file = sources[0].cache / f"{fingerprint}-columns.arrow"
    with cache_errors(file):
        arrays, facts = stored_columns(file, made_from(sources), build)
    counts = _checked_counts(sources, facts["counts"], tables, config)
    every = pa.concat_tables(tables)
    pairs = [source["pairs"] for source in counts["sources"]]
    return PreferenceDataset(
        fingerprint=fingerprint,
        counts=counts | {"duplicates": facts["duplicates"]},
        source_paths=tuple(full_name(sources[source].path, name) for source, name in facts["files"]),
        source_pairs=tuple(pairs),
        source_labels=tuple(source.label for source in sources),
        largest_id=facts["largest_id"],
        ids=pc.list_flatten(every["ids"]),
        trained=pc.list_flatten(every["trained"]),
        encoded=tuple(sources),
        numbers={name: arrays[NUMBER + name] for name in NUMBERS if NUMBER + name in arrays},
        scorer_prompts={
            scorer: ScorerPrompts(
                pc.list_flatten(every[f"{scorer}_prompt"]),
                arrays[PROMPT_STARTS + scorer],
                arrays[PROMPT_TOKENS + scorer],
            )
            for scorer in SCORERS
            if PROMPT_TOKENS + scorer in arrays
        },
        images=images,
        prefixes=Prefixes(*map(arrays.pop, PREFIX_COLUMNS)),
        columns_files=(file,),
        **{name: arrays[name] for name in DATASET_COLUMNS},
    )


def _prompt_images(
    sources: Sequence[EncodedSource], tables: Sequence[pa.Table], processor: ImageProcessor
) -> PromptImages | None:
    """Return the images in the `tables` of these sources, which `read_source` has verified, or None."""
    pairs = zip(sources, tables, strict=True)
    files = [source.images() for source, records in pairs if has_images(records)]
    if not files:
        return None
    stored = pa.concat_tables(files)
    table = pa.concat_tables(tables)
    counts = np.asarray(pc.list_value_length(table["images"]), dtype=np.int64)
    digests = stored["digest"].to_pylist()
    tokens = stored["tokens"].to_pylist()
    places: dict[bytes, int] = {}
    for place, digest in enumerate(digests):  # sources may have the same image
        places.setdefault(digest, place)
    number = {digest: index for index, digest in enumerate(places)}
    distinct = tuple(
        ImageInput(digest, tokens[place], processor.placeholder_id) for digest, place in places.items()
    )
    numbers = np.array([number[digest] for digest in pc.list_flatten(table["images"]).to_pylist()])
    before = np.concatenate(([0], np.cumsum(np.array([image.tokens for image in distinct])[numbers])))
    starts = np.cumsum(counts) - counts
    examples = np.repeat(np.arange(len(table)), np.asarray(pc.list_value_length(table["examples"])))
    return PromptImages(
        distinct,
        places,
        contents=stored["content"],
        numbers=numbers,
        starts=starts[examples],
        counts=counts[examples],
        prompt_tokens=(before[starts + counts] - before[starts])[examples],
        processor=processor,
    )


def _checked_counts(
    sources: Sequence[EncodedSource],
    counts_of_sources: Sequence[Mapping[str, Any]],
    tables: Sequence[pa.Table],
    config: DataConfig,
) -> dict[str, Any]:
    """Return the total counts, and each source's under `sources`. DataError: too few records were kept."""
    counted = [DataCounts.total([counts]) for counts in counts_of_sources]
    by_source = []
    for source, counts in zip(sources, counted, strict=True):
        counts.examples = [
            example._replace(file=full_name(source.path, example.file)) for example in counts.examples
        ]

    def fitting() -> int:
        pairs = zip(tables, counted, strict=True)
        return max(fitting_length(table, counts, config) for table, counts in pairs)

    for source, counts in zip(sources, counted, strict=True):
        counts.check(source.path, config, fitting=fitting)
        by_source.append({"label": source.label, "path": source.path, **counts.numbers()})
    total = DataCounts.total(map(vars, counted))
    total.check_split(config)
    return total.as_dict() | {"sources": by_source}


def count_shared(dataset: PreferenceDataset, other: PreferenceDataset) -> int:
    """Return the number of examples of `dataset` with the same token ids as one of `other`."""
    return _count_among(dataset.digests, other.digests)


def count_shared_prompts(dataset: PreferenceDataset, other: PreferenceDataset) -> int:
    """Return the number of examples of `dataset` whose prompt also occurs in `other`."""
    return _count_among(dataset.prompt_hashes, other.prompt_hashes)


def _count_among(values: Array, others: Array) -> int:
    """Return how many of the `values` are among the others, of which there may be many more."""
    distinct, numbers = np.unique(values, return_counts=True)
    places = np.searchsorted(distinct[:-1], others)
    return int(numbers[np.unique(places[distinct[places] == others])].sum())


def check_ids_in_vocabulary(dataset: PreferenceDataset, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that the model has an embedding of every token id in the data. Raises ConfigError.

    Tokenizers often have tokens without an embedding, such as a padding token, which never occur in text.
    """
    largest = dataset.largest_id
    if largest >= vocab_size:
        raise ConfigError(
            "the data contain a token without an embedding in the model",
            where="model.path",
            got=f"token {tokenizer.convert_ids_to_tokens(largest)!r} with id {largest}",
            expected=f"ids below the model's vocab_size of {vocab_size}",
            remedy="use the tokenizer that belongs to the model, or give the model an embedding of "
            "each of its tokens (docs/models.md, new tokens)",
        )


def check_fits_loss(dataset: PreferenceDataset, loss: LossConfig) -> None:
    """Check that the loss can use every example and its numbers. Raises DataError."""
    every = np.arange(len(dataset), dtype=np.int64)
    counts = np.diff(dataset.first_pieces) - 1
    best = dataset.scores[dataset.first_pieces[:-1] - every]
    is_labelled = (counts == 1) & np.isfinite(best)

    def check(misfits: npt.NDArray[np.bool_], got: str, remedy: str) -> None:
        if misfits.any():
            raise DataError(
                f"{', '.join(loss.kinds)} cannot use {misfits.sum()} of {len(misfits)} examples",
                where=AtRecords(*(str(dataset.origin(int(index))) for index in np.flatnonzero(misfits)[:5])),
                got=got,
                remedy=remedy,
            )

    takes_facts = LossKind.custom not in loss.kinds or accepts_facts(loss.function)
    for name, column in dataset.numbers.items():
        misfits = column != NUMBERS[name]
        if not loss.takes(name) or (name != "loss_weight" and not takes_facts):
            kinds = ", ".join(kind for kind, facts in KINDS.items() if name in facts.numbers)
            columns = f"{name}, votes_chosen, votes_rejected" if name == "soft_label" else name
            remedy = f"set loss.kind to one of {kinds}; or ignore it in the source: ignore: [{columns}]"
            check(misfits, f"a {name} of the record", remedy)
        elif name == "soft_label" and loss.label_smoothing:
            check(misfits, f"a {name} beside loss.label_smoothing", "set loss.label_smoothing=null")
    if loss.accepts_rankings and loss.label_smoothing:
        remedy = "set loss.label_smoothing=null, or data.ranked=best_worst or all_pairs"
        check(counts > 2, "a ranking beside loss.label_smoothing", remedy)
    for scorer, prompts in dataset.scorer_prompts.items():
        ignored = f"ignore it in the source: ignore: [{scorer}_prompt]"
        check((prompts.tokens > 0) & loss.of_scores, f"a {scorer}_prompt, and no {scorer}", ignored)
    if loss.is_unpaired:
        labels = "give each response a label: true or false, 1 or 0"
        check(~is_labelled, "no single response with a label", labels)
        return
    ignored = "; if the label does not judge the response, write fields without it, and ignore: [label]"
    check(is_labelled, "one response with a label, good or bad", "set loss=kto" + ignored)
    if not loss.is_one_sided:
        check(counts < 2, "1 response", "set loss=sft, or use data with two responses")
    if not loss.accepts_rankings:
        ranked = "set loss.kind=plackett_luce, or data.ranked=best_worst or all_pairs"
        check(counts > 2, "a ranking of more than two responses", ranked)
    if loss.needs_scores:
        got = "no scores, or a chosen response that is not scored above the rejected one"
        check(~(dataset.score_gaps(every) > 0), got, "remove these records, or set another loss.kind")
