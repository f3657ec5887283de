"""The dry run of `--check`: in one process, load all inputs except weights, and the first records."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dpo_dist.batching.sampler import (
    SourceSpan,
    check_batch,
    make_sampler,
    steps_in_words,
)
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Dtype, ModelConfig, ReferenceMode, RunConfig
from dpo_dist.data import (
    ChatTemplate,
    DataSource,
    Part,
    named_in_one_line,
    source_labels,
)
from dpo_dist.encoded.build import encode_records
from dpo_dist.encoded.dataset import (
    PreferenceDataset,
    check_fits_loss,
    check_ids_in_vocabulary,
    metric_labels,
)
from dpo_dist.encoded.dataset_columns import dataset_columns, key_order
from dpo_dist.encoded.store import fitting_length, read_counts
from dpo_dist.foundation.text import pluralize
from dpo_dist.foundation.types import CheckReport
from dpo_dist.model.architectures import router_loss
from dpo_dist.model.files.folder import description_folder, is_adapter, start_folder
from dpo_dist.model.files.load import Encoder, check_contents_at_hand, check_same_vocabulary, load_encoder
from dpo_dist.model.numerics import has_products
from dpo_dist.objective.losses import check_custom_loss
from dpo_dist.objective.metrics import CustomMetrics, MetricPlan, custom_metrics
from dpo_dist.training.start.inputs import (
    NO_IMAGE,
    Policy,
    check_keep_best,
    checked_model,
    folder_of_own_tokenizer,
    model_notes,
)
from dpo_dist.training.start.named_models import EVALUATION_MODEL_KEY, EvaluatedModel
from dpo_dist.training.start.open_run import rate_warning
from dpo_dist.training.start.preflight import make_all
from dpo_dist.training.start.run_state import RunState, expected_start
from dpo_dist.training.steps.schedule import check_schedule

_FIRST_RECORDS = 1024


class _FirstRecords(NamedTuple):
    """What the first records of a source are."""

    text: str  # counts in words
    notes: list[tuple[str, str]]  # lines about columns that nothing reads
    is_whole: bool  # whether the source has no more
    dataset: PreferenceDataset
    images: int  # records with images


@dataclass
class _DryRun:
    """What the checks have loaded so far, and the lines of the report."""

    config: RunConfig
    models: Sequence[EvaluatedModel]
    is_training: bool
    lines: list[tuple[str, str]] = field(default_factory=list)
    encoder: Encoder = field(init=False)
    policy: Policy = field(init=False)
    custom: CustomMetrics = field(init=False)
    train: list[_FirstRecords] = field(init=False)
    evaluation: list[_FirstRecords] = field(init=False)


def dry_run(
    config: RunConfig,
    models: Sequence[EvaluatedModel] = (),
    *,
    trains: bool = True,
) -> CheckReport:
    """Make `CHECKS` after those of `check_start`, and return what they found.

    They load a run's inputs except weights, which are neither read nor downloaded from the hub, and encode
    the first records of each source. Raises one error with all faults of a stage.

    Args:
        models: models to evaluate; empty for training.
        trains: whether the run starts from the content of its directory.
    """
    look = _DryRun(config, models, trains and not models)
    for checks in CHECKS:
        make_all(partial(check, look) for check in checks)
    doctor = (
        "dpo-dist doctor with the same arguments examines all records, dpo-dist plan says memory and hours"
    )
    return CheckReport(look.lines, hint="" if models else doctor)


def _run_dir(look: _DryRun) -> None:
    run = str(RunFolder(look.config.run.path))
    place = f"{run} ({start_in_words(look.config)})" if look.is_training else run
    look.lines.append(("run.dir", place))


def _policy(look: _DryRun) -> None:
    config = look.config
    folder = description_folder(config.model.path, config.model.revision, "model.path")
    start = start_folder(config.model)
    own_tokenizer = folder_of_own_tokenizer(config) if look.models else None
    look.encoder = load_encoder(folder, own_tokenizer or start, config.model)
    tokenizer = look.encoder.tokenizer
    model_config, causal_lm = checked_model(
        config.model, folder, start, config.data.longest, config.parallelism
    )
    router_loss(config.loss.router, causal_lm)
    look.policy = Policy(folder, start, tokenizer, model_config, causal_lm)
    described = f"{folder}, {model_config.model_type}, vocabulary of {len(tokenizer):,}"
    look.lines.append(("model.path", described))
    routers = None if look.models else config.loss.router
    for note in model_notes(look.policy, config.model, routers, config.data, trains=not look.models):
        look.lines.append((note.about, "warning: " * note.is_warning + note.text))
    if config.model.dtype is Dtype.fp16 and not (torch.cuda.is_available() or has_products(Dtype.fp16)):
        look.lines.append(("model.dtype", "fp16 needs a GPU: this CPU cannot compute in fp16"))


def _template(look: _DryRun) -> None:
    data = look.config.data
    ChatTemplate(look.encoder.tokenizer, data.chat_template).check_arguments(data.template_arguments or ())


def _evaluated(look: _DryRun) -> None:
    for evaluated in look.models:
        _check_evaluated(evaluated, look.config.model, look.encoder)
        look.lines.append(("evaluation", evaluated.path))


def _loss(look: _DryRun) -> None:
    config = look.config
    if not look.models:
        look.lines.append(("loss", check_custom_loss(config.loss) or ", ".join(config.loss.kinds)))
        warning = rate_warning(config.model.adapter, config.optim)
        if warning:
            look.lines.append(("optim.lr", f"warning: {warning}"))


def _metrics(look: _DryRun) -> None:
    look.custom = custom_metrics(look.config.metrics.function, look.config.loss)
    if look.custom.names:
        look.lines.append(("metrics", ", ".join(look.custom.names)))


def _reference(look: _DryRun) -> None:
    reference = look.config.reference
    parts = [reference.mode.value]
    if reference.path is not None:
        parts.append(_checked_model(look, reference.path, "reference.path"))
    if reference.mode is ReferenceMode.cached:
        parts.append(f"store {reference.store}")
    look.lines.append(("reference", ", ".join(parts)))


def _teacher(look: _DryRun) -> None:
    teacher = look.config.teacher
    if teacher.path is not None:
        checked = _checked_model(look, teacher.path, "teacher.path", needs_weights=teacher.digest is None)
        look.lines.append(("teacher", f"{teacher.mode}, {checked}"))


def _checked_model(look: _DryRun, path: str, key: str, *, needs_weights: bool = True) -> str:
    """Return the description of a model that only scores, whose files are checked."""
    folder = description_folder(path, None, key, needs_weights=needs_weights)
    check_same_vocabulary(folder, look.encoder.tokenizer, look.config.model, look.encoder.processor, key)
    check_contents_at_hand(folder, look.config.model, key)
    return f"model {folder}"


def _records(look: _DryRun) -> None:
    """Look at the first records of each source."""
    data = look.config.data
    looks = list[Callable[[], None]]()
    look.train = []
    look.evaluation = []
    for key, sources, found in (
        ("data.train", data.train, look.train),
        ("data.eval", data.eval, look.evaluation),
    ):
        for index, source in enumerate(sources):
            looks.append(partial(_source, look, DataSource(source, key), f"{key}[{index}]", found))
        looks.append(partial(_images, look, found))
    make_all(looks)


def _source(look: _DryRun, source: DataSource, name: str, found: list[_FirstRecords]) -> None:
    first = _first_records(source.pinned(), name, look.config, look.encoder)
    vocabulary = look.policy.model_config.get_text_config().vocab_size
    check_ids_in_vocabulary(first.dataset, look.encoder.tokenizer, vocabulary)
    look.lines += [(name, first.text), *first.notes]
    found.append(first)


def _images(look: _DryRun, found: Sequence[_FirstRecords]) -> None:
    if look.encoder.processor is not None and found and not any(first.images for first in found):
        look.lines.append(("  warning", f"none of these records has an image: {NO_IMAGE}"))


def _steps(look: _DryRun) -> None:
    if look.is_training:
        look.lines += _check_steps(look.config, look.custom, look.train, look.evaluation)


def _check_evaluated(evaluated: EvaluatedModel, model: ModelConfig, encoder: Encoder) -> None:
    """Check tokenizer and files of a model to evaluate; a checkpoint or adapter has those of the policy."""
    if evaluated.is_checkpoint or is_adapter(Path(evaluated.path)):
        return
    revision = model.revision if evaluated.path == model.path else None
    folder = description_folder(evaluated.path, revision, EVALUATION_MODEL_KEY)
    if not is_adapter(folder):
        check_same_vocabulary(folder, encoder.tokenizer, model, encoder.processor, EVALUATION_MODEL_KEY)
        check_contents_at_hand(folder, model, EVALUATION_MODEL_KEY)


def _check_steps(
    config: RunConfig,
    custom: CustomMetrics,
    train: Sequence[_FirstRecords],
    evaluation: Sequence[_FirstRecords],
) -> list[tuple[str, str]]:
    """Check metric, and of data that were read whole batch and schedule, as a start does."""
    data = config.data
    keep_best = config.trainer.keep_best
    if keep_best is not None:
        labels = metric_labels(source_labels(data.eval_sources))
        check_keep_best(keep_best, MetricPlan(config.loss, labels, is_evaluation=True, custom=custom))
    if not all(first.is_whole for first in train):
        return []
    prompts = [first.dataset.prompt_hashes for first in evaluation]
    part = Part.to_train(data, np.concatenate(prompts) if prompts else None)
    spans = []
    for first, source in zip(train, data.train, strict=True):
        pairs = sum(map(part.has, map(int, first.dataset.prompt_hashes)))
        spans.append(SourceSpan(0, pairs, source.weight))
    unit = config.loss.unit
    sampler = make_sampler(spans, config.trainer)
    check_schedule(config.optim, sampler.steps)
    check_batch(sampler, unit)
    return [("training", steps_in_words(sampler, unit))]


def start_in_words(config: RunConfig) -> str:
    """Return in words whether a start is new, resumes or has nothing to do; reads no checkpoint."""
    match expected_start(config.identity, config.run.resume, RunFolder(config.run.path)):
        case RunState():
            return "complete: nothing is left to train"
        case None:
            return "new"
        case _:
            return "has checkpoints: the run resumes"


def _first_records(
    source: DataSource,
    key: str,
    config: RunConfig,
    encoder: Encoder,
) -> _FirstRecords:
    """Read, encode and check the first records of a source."""
    data = config.data
    records = list(itertools.islice(source.records(), _FIRST_RECORDS + 1))
    encoded = encode_records(
        records[:_FIRST_RECORDS],
        data,
        encoder.tokenizer,
        processor=encoder.processor,
        systems=config.systems,
    )
    table = pa.Table.from_batches([encoded])
    counts = read_counts(table)
    has_more = len(records) > _FIRST_RECORDS
    counts.check(
        source.path,
        data,
        key=key,
        of_first=has_more,
        fitting=lambda: fitting_length(table, counts, data),
    )
    columns = dataset_columns(table)
    dataset = PreferenceDataset(
        fingerprint="",
        counts=counts.as_dict(),
        source_pairs=(counts.pairs,),
        source_labels=("",),
        key_order=key_order(columns["keys"]),
        **columns,
    )
    check_fits_loss(dataset, config.loss)
    images = pc.sum(pc.greater(pc.list_value_length(table["images"]), 0)).as_py() or 0
    name = f" ({source.config.name})" if source.config.name else ""
    tokens = float(dataset.piece_tokens.sum()) / len(dataset)
    first = "the first " if has_more else ""
    rest = " (the others were not looked at)" if has_more else ""
    parts = [f"{source.path}{name}, {counts.kept} of {first}{counts.read} records kept{rest}"]
    if counts.dropped:
        parts.append(f"dropped: {_numbers(counts.dropped)}")
    parts.append(counts.forms_in_words)
    if any(counts.changed.values()):
        parts.append(f"changed or unusual: {_numbers(counts.changed)}")
    parts.append(f"{tokens:.0f} tokens per example")
    if images:
        parts.append(f"{pluralize(images, 'record')} with images")
    notes = [("  not read", named_in_one_line(counts.unread))] if counts.unread else []
    return _FirstRecords("; ".join(parts), notes, not has_more, dataset, images)


def _numbers(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in sorted(counts.items()) if number)


CHECKS = (
    (_run_dir, _policy),
    (_template, _evaluated, _loss, _metrics, _reference, _teacher),
    (_records,),
    (_steps,),
)
"""The checks of `--check` in groups: the policy without weights, other models, first records, schedule.

A group needs what those before it have loaded. A start makes these checks with all records, on all processes.
"""
