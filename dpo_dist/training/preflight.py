"""What `--check` looks at: a run up to its first GPU second, on one process and without writing anything."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_dist.config.loss_kinds import LossConfig
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Offload, RunConfig, SourceConfig
from dpo_dist.data.build_dataset import check_template_date
from dpo_dist.data.counts import DataCounts, check_counts, check_templated
from dpo_dist.data.encode_chunk import EncodedChunk, encode_chunk
from dpo_dist.data.formats import read_records
from dpo_dist.data.sources import pinned
from dpo_dist.errors import DataError
from dpo_dist.model.flops import count_flops
from dpo_dist.model.folder import description_folder
from dpo_dist.model.load import load_config, load_tokenizer
from dpo_dist.model.supported import check_supported
from dpo_dist.reference.vocabulary import check_same_vocabulary

_FIRST_RECORDS = 64


def rehearse(config: RunConfig) -> str:
    """Load what a run loads before weights, and encode the first records of each source.

    Weights are neither read nor, for a model on the hub, downloaded.

    Returns:
        One block that says what was found.

    Raises:
        ConfigError: the model, its tokenizer or a package cannot be used.
        DataError: a source cannot be read, or its first records cannot be trained on.
    """
    folder = description_folder(config.model.path, config.model.revision, "model.path")
    tokenizer = load_tokenizer(folder, config.model)
    model_config = load_config(folder, config.model)
    check_supported(model_config, config.data.max_length)
    count_flops(model_config, config.model.adapter)  # as a run does: refuses targets that are no layers
    check_template_date(config.data, tokenizer)
    lines = [
        ("run.dir", f"{config.run.dir}{_state(RunFolder.of(config))}"),
        ("model.path", f"{folder}, {model_config.model_type}, {len(tokenizer):,} tokens"),
        ("loss", ", ".join(config.loss.kinds)),
        ("reference", _reference(config, tokenizer)),
    ]
    lines += [(key, _first_records(source, key, config, tokenizer)) for key, source in _sources(config)]
    told = "".join(f"  {label + ':':<15}{text}\n" for label, text in lines)
    return f"check passed: what can be checked without weights and GPUs is in order\n{told}"


def _state(folder: RunFolder) -> str:
    return " (has checkpoints: the run resumes)" if any(folder.checkpoints.glob("step-*")) else " (new)"


def _reference(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    reference = config.reference
    if reference.offload is Offload.nvme:
        from dpo_dist.distributed.nvme import check_async_io  # noqa: PLC0415  (starts DeepSpeed)

        check_async_io()
    told = [reference.mode.value]
    if reference.path is not None:
        folder = description_folder(reference.path, reference.revision, "reference.path")
        check_same_vocabulary(folder, tokenizer, config.model)
        told.append(f"model {folder}")
    if reference.mode.value == "cached":
        spaces = len(list(Path(reference.store).glob("*/space.json")))
        told.append(f"store {reference.store} ({spaces} references)")
    return ", ".join(told)


def _sources(config: RunConfig) -> Iterator[tuple[str, SourceConfig]]:
    for key, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for index, source in enumerate(sources):
            yield f"{key}[{index}]", source


def _first_records(
    source: SourceConfig, key: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Read and encode the first records of a source, and say what became of them."""
    # Nothing is written, so a commit of the hub is not remembered.
    records = list(itertools.islice(read_records(pinned(source, None)), _FIRST_RECORDS))
    part = encode_chunk(records, config.data, tokenizer)
    examples = [f"{bad.origin} {bad.reason}" for _, bad in part.bad]
    details = {bad.reason: bad.detail for _, bad in reversed(part.bad) if bad.detail}
    counts = DataCounts.of(Counter(part.outcomes), examples, details)
    dropped = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.dropped.items()))
    where = f"{key}: {source.path}"
    if len(records) < _FIRST_RECORDS or not counts.kept:
        check_counts(counts, where, config.data)
    elif counts.changed["templated_text"] == counts.kept:
        # A share of the first records says little; all or none of them says enough.
        check_templated(counts, where, config.data)
    _check_loss(part, config.loss, where)
    told = [f"{source.path}, {counts.kept} of the first {counts.read} records kept"]
    told += [f"{dropped} dropped"] if dropped else []
    told += [
        f"{number} {name.replace('_', ' ')}" for name, number in sorted(counts.changed.items()) if number
    ]
    told.append(f"{part.piece_tokens.sum() / len(part.pair_pieces):.0f} tokens a pair")
    return ", ".join(told)


def _check_loss(part: EncodedChunk, loss: LossConfig, where: str) -> None:
    """As `inputs.check_data_fits_loss` does for all pairs."""
    fewest, most = int(part.pair_pieces.min()) - 1, int(part.pair_pieces.max()) - 1
    what: dict[str, Any] = {}
    if fewest < 2 and not loss.is_one_sided:
        what = {"got": "records of one response", "remedy": "set loss=sft, or use data with two responses"}
    if most > 2 and not loss.accepts_rankings:
        remedy = "set loss.kind=plackett_luce, or data.ranked=best_worst or all_pairs"
        what = {"got": f"rankings of up to {most} responses", "remedy": remedy}
    if loss.needs_scores and not what:
        ends = np.cumsum(part.pair_pieces - 1)
        best, worst = ends - (part.pair_pieces - 1), ends - 1
        if not (part.scores[best] > part.scores[worst]).all():
            got = (
                "records without scores, or with a chosen response that is not scored above the rejected one"
            )
            what = {"got": got, "remedy": "leave these records out, or set another loss.kind"}
    if what:
        raise DataError(f"{', '.join(loss.kinds)} does not fit these records", where=where, **what)
